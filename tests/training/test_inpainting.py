"""What a U-Net is trained with to inpaint, and how editing is measured."""

import json
import sys

import datasets
import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from evaluation_folders import clip_folder, dataset_folder  # noqa: F401
from PIL import Image

from pipelines import DDPMScheduler, InpaintPipeline
from pipelines.drawing.loop import pad_channels
from pipelines.drawing.text import encode_text
from training import text_to_image
from training.data.caches import cache_text
from training.data.pictures import PictureCache
from training.evaluation.editing import (
    REGIONS,
    EditingConfig,
    border_energy,
    editing,
    parse_change,
    region_mask,
)
from training.evaluation.judge import Judge
from training.objectives.denoising import DenoisingLoss, draw_noise
from training.objectives.inpainting import KINDS, SHARES, draw_mask, random_masks, see_mask
from training.run.building import widen_input
from training.text_to_image import TextToImageConfig


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_masks_depend_on_seed_step_and_place_alone():
    whole = random_masks(3, 7, 8, 32, 24)
    assert whole.shape == (8, 1, 32, 24) and whole.unique().tolist() == [0, 1]
    for rank in range(4):
        assert torch.equal(random_masks(3, 7, 2, 32, 24, rank, 4), whole[2 * rank : 2 * rank + 2])
    assert not torch.equal(random_masks(3, 8, 8, 32, 24), whole)
    assert not torch.equal(random_masks(4, 7, 8, 32, 24), whole)


def test_masks_are_of_the_kinds_and_shares_that_are_said():
    masks = [draw_mask(np.random.default_rng(i), 32, 32) for i in range(2000)]
    areas = np.array([mask.mean() for mask in masks])
    assert areas.min() > 0

    def straight(mask):  # constant along one axis
        return not mask.all() and (mask == mask[:1]).all() or (mask == mask[:, :1]).all() and not mask.all()

    shares = dict(zip(KINDS, SHARES, strict=True))
    error = 5 * (0.25 / 2000) ** 0.5
    assert abs(np.mean([mask.all() for mask in masks]) - shares["all"]) < error
    assert abs(np.mean([straight(mask) for mask in masks]) - shares["half"]) < error
    sides = {(bool(m[0, 0]), bool(m[-1, -1]), bool(m[0, -1])) for m in masks if straight(m)}
    assert len(sides) == 4  # each of the four sides
    assert 0.3 < areas.mean() < 0.7


@pytest.mark.parametrize(
    "config, change",
    [
        ({}, {"in_channels": 7}),
        ({"patch_size": 2, "text_concat_channels": 5, "pooled_text_dim": 24}, {"in_channels": 7}),
        ({"patch_size": 2, "self_conditioning": True}, {"in_channels": 7}),
        ({"patch_size": 2, "text_concat_channels": 5, "pooled_text_dim": 24}, {"self_conditioning": True}),
        ({}, {"in_channels": 7, "self_conditioning": True}),
    ],
)
def test_a_widened_network_predicts_what_it_did(make_unet, config, change):
    """Whatever the new channels hold, until their weights are trained."""
    narrow = make_unet(**config)
    wide = widen_input(narrow, **change).eval()
    random = torch.Generator().manual_seed(0)
    sample, extra = torch.randn(2, 7, 16, 16, generator=random).split([3, 4], dim=1)
    x0, text = torch.randn(2, 3, 16, 16, generator=random), torch.randn(2, 5, 32, generator=random)
    added = {"pooled_text": torch.randn(2, 24, generator=random)}
    own = added | ({"x0_self": x0} if narrow.config.self_conditioning else {})
    given = torch.cat([sample, extra], dim=1) if wide.config.in_channels == 7 else sample
    seen = added | (
        {"x0_self": pad_channels(x0, wide.config.in_channels)} if wide.config.self_conditioning else {}
    )
    with torch.no_grad():
        expected = narrow(sample, 5, text, added_cond_kwargs=own).sample
        found = wide(given, 5, text, added_cond_kwargs=seen).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_widening_takes_nothing_away(make_unet):
    with pytest.raises(ValueError, match="must not take inputs away"):
        widen_input(make_unet(), in_channels=2)


def test_training_shows_the_network_what_the_pipeline_shows_it(make_pipeline, make_unet):
    """`see_mask` of the picture's own x_t is what InpaintPipeline's U-Net is given at its first step."""
    pipe = InpaintPipeline.from_pipe(make_pipeline(unet=widen_input(make_unet(), in_channels=7)))
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.unet.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask, z = random_masks(0, 0, 1, 16, 16), torch.randn(1, 3, 16, 16)
    pipe("a cat", image=picture, mask_image=mask, latents=z, guidance_scale=1.0, num_inference_steps=1)
    torch.testing.assert_close(seen[0], see_mask(z, picture * 2 - 1, mask))


def test_the_loss_sees_the_mask_and_what_is_around_it(make_pipeline, make_unet, tmp_path):
    """[x_t, mask, x0 (1 - mask)] put together by hand, diffusers' noising; the error counts everywhere."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
    pictures = PictureCache(pixels, [f"cat {i}" for i in range(6)], [[i] for i in range(6)], {})
    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
    unet = make_unet(in_channels=7, out_channels=3)
    pipe = InpaintPipeline.from_pipe(make_pipeline(unet=unet, scheduler=DDPMScheduler(**settings)))
    text = cache_text(pictures.captions, pipe.tokenizer, pipe.text_encoder, tmp_path)
    config = TextToImageConfig(
        output_dir="", inpainting=True, snr_gamma=None, caption_dropout=0.0, canonical_caption=1.0, seed=5
    )
    details = DenoisingLoss(config, pipe, pipe.unet, pictures, text)([4, 1, 1], 8)[1]
    x0, (eps, t) = pictures.images([4, 1, 1]), draw_noise(5, 8, (3, 3, 16, 16), 1000, 0, 1)
    mask = random_masks(5, 8, 3, 16, 16)
    x_t = diffusers.DDPMScheduler(**settings).add_noise(x0, eps, t)
    states, _, _ = encode_text(pipe.tokenizer, pipe.text_encoder, ["cat 4", "cat 1", "cat 1"])
    with torch.no_grad():
        output = unet(torch.cat([x_t, mask, torch.where(mask > 0, 0.0, x0)], dim=1), t, states).sample
    expected = (output - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(details["per_sample"], expected, rtol=2e-3, atol=1e-5)  # fp16 text states


def test_a_saved_model_is_trained_to_inpaint(pipeline, dataset_folder, tmp_path, monkeypatch):  # noqa: F811
    """One step of rate 1e-8 from a text-to-image model: the result is one that inpaints, and predicts what
    the model did, since its new inputs start at 0."""
    pipeline.save_pretrained(tmp_path / "model")
    arguments = [
        "--inpainting", "--pretrained_model_name_or_path", tmp_path / "model",
        "--dataset_name", dataset_folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run",
        "--train_batch_size", "2", "--report_to", "none", "--learning_rate", "1e-8", "--max_train_steps", "1",
        "--validation_prompts", "cat",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["text_to_image", *map(str, arguments)])
    reset_accelerate()
    text_to_image.main()
    pipe = InpaintPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.sees_mask and pipe.unet.config.in_channels == 7
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
    sample, text = torch.randn(1, 3, 16, 16), torch.randn(1, 5, 32)
    with torch.no_grad():
        before = pipeline.unet(sample, 7, text).sample
        after = pipe.unet(torch.cat([sample, torch.randn(1, 4, 16, 16)], dim=1), 7, text).sample
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_what_cannot_be_trained_to_inpaint(stable_diffusion_folder, dataset_folder, tmp_path, monkeypatch):  # noqa: F811
    saved = {"pretrained_model_name_or_path": "model", "train_data_dir": "pictures"}
    with pytest.raises(ValueError, match="inpainting must be left out with rank"):
        TextToImageConfig(output_dir="", inpainting=True, rank=4, **saved).check()
    arguments = ["--inpainting", "--pretrained_model_name_or_path", stable_diffusion_folder]
    arguments += ["--dataset_name", dataset_folder, "--output_dir", tmp_path / "run", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", ["text_to_image", *map(str, arguments)])
    reset_accelerate()
    with pytest.raises(ValueError, match="inpainting must be without a VAE"):
        text_to_image.main()


# ---------------------------------------------------------------- the measure


def test_border_energy_is_the_mean_over_crossing_pairs():
    mask = torch.zeros(8, 6)
    mask[2:5, 1:4] = 1
    pictures = torch.rand(3, 3, 8, 6)
    expected = []
    for x in pictures:
        pairs = [
            (x[:, i, j] - x[:, k, m]).square().mean()
            for i in range(8)
            for j in range(6)
            for k, m in ((i + 1, j), (i, j + 1))
            if k < 8 and m < 6 and mask[i, j] != mask[k, m]
        ]
        assert len(pairs) == 12
        expected.append(torch.stack(pairs).mean())
    torch.testing.assert_close(border_energy(pictures, mask), torch.stack(expected))


def test_changes_are_read_and_wrong_ones_refused():
    assert parse_change("cat face > cat with a hat @ top") == ("cat face", "cat with a hat", "top")
    for wrong in ("cat face", "cat > dog", "> dog @ top", "cat > dog @ left"):
        with pytest.raises(ValueError, match="changes must be 'name > words @ region'"):
            EditingConfig(changes=[wrong]).check()
    with pytest.raises(ValueError, match="models must be FOLDER or FOLDER:N"):
        EditingConfig(models=["a:0"]).check()
    assert {region_mask(region, 20).getbbox() for region in REGIONS} == {
        (5, 5, 15, 15), (2, 0, 18, 9), (10, 0, 20, 20)
    }  # fmt: skip


def test_what_is_drawn_and_scored_is_by_hand(pipeline, clip_folder, dataset_folder, tmp_path):  # noqa: F811
    """The new words in the hole of the old picture, drawn one by one; the judge sees the hole and a pixel
    around it. Swapped words, a mask that is ignored or another region all change the figures."""
    pipeline.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    config = EditingConfig(
        models=[model], judge=str(clip_folder), dataset=str(dataset_folder), seed=7,
        cache_dir=str(tmp_path / "cache"), num_inference_steps=3, guidance_scale=4.0,
        changes=["dog face > cat face @ middle"],
    )  # fmt: skip
    figures = editing(config)
    rows = datasets.load_from_disk(str(dataset_folder))["train"]

    def pictures(name: str) -> dict[str, torch.Tensor]:
        own = [row for row in rows if row["name"] == name]
        sized = {row["style"]: row["image"].resize((16, 16), Image.Resampling.LANCZOS) for row in own}
        return {
            k: torch.from_numpy(np.array(v)).permute(2, 0, 1) / 127.5 - 1 for k, v in reversed(sized.items())
        }

    dogs, cats = pictures("dog face"), pictures("cat face")
    styles = [style for style in dogs if style in cats]
    assert figures["pictures"] == len(styles) > 1
    box = np.zeros((16, 16), dtype=np.uint8)
    box[4:12, 4:12] = 255
    order = [row["style"] for row in rows if row["name"] == "dog face"]  # seeds go by the data set's order
    styles.sort(key=order.index)
    pipe, judge = InpaintPipeline.from_pretrained(model), Judge(str(clip_folder))
    pipe.set_progress_bar_config(disable=True)
    ways: dict[str, list[torch.Tensor]] = {"as it was": [], "cut and pasted": [], model: []}
    for i, style in enumerate(styles):
        drawn = pipe(
            f"cat face, {style} style", image=dogs[style][None] / 2 + 0.5, mask_image=Image.fromarray(box),
            num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(7 + i),
            output_type="pt",
        )  # fmt: skip
        pasted = dogs[style].clone()
        pasted[:, 4:12, 4:12] = cats[style][:, 4:12, 4:12]
        for way, picture in zip(ways, (dogs[style], pasted, drawn.images[0] * 2 - 1), strict=True):
            ways[way].append(picture)
    texts = {
        words: judge.embed_texts([f"{words}, {style} style" for style in styles])
        for words in ("cat face", "dog face")
    }
    real = border_energy(torch.stack(ways["as it was"]), torch.from_numpy(box) > 0).mean()
    for way, edited in ways.items():
        embeds = judge.embed_images(torch.stack(edited)[:, :, 3:13, 3:13])
        new, old = ((embeds * texts[words]).sum(1) for words in ("cat face", "dog face"))
        seam = border_energy(torch.stack(edited), torch.from_numpy(box) > 0).mean() / real
        assert figures[way] == {
            "score of the new words": pytest.approx(new.mean().item(), abs=1e-5),
            "score of the old words": pytest.approx(old.mean().item(), abs=1e-5),
            "new words win": pytest.approx((new > old).float().mean().item()),
            "seam, times real": pytest.approx(seam.item(), rel=1e-4),
        }, way
        assert abs(new.mean() - old.mean()) > 1e-4  # else swapped words would not show


def test_the_command_measures_each_way(pipeline, clip_folder, dataset_folder, tmp_path):  # noqa: F811
    pipeline.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    config = EditingConfig(
        models=[model, f"{model}:2"], judge=str(clip_folder), dataset=str(dataset_folder),
        cache_dir=str(tmp_path / "cache"), num_inference_steps=12,
        changes=["dog face > cat face @ middle", "red heart > red heart with a crown @ top"],
        output=str(tmp_path / "sheet.png"),
    )  # fmt: skip
    config.check()
    figures = json.loads(json.dumps(editing(config)))
    assert list(figures) == ["pictures", "as it was", "cut and pasted", model, f"{model}:2"]
    assert figures["as it was"]["seam, times real"] == pytest.approx(1, abs=1e-5)
    # random weights draw noise, which shows; the picture of its own words, cut in, does not
    assert figures[model]["seam, times real"] > 2 * figures["cut and pasted"]["seam, times real"]
    assert figures[model] != figures[f"{model}:2"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 5 * 128 and sheet.height > 2 * 128
    with pytest.raises(ValueError, match="a name that the train split has"):
        editing(EditingConfig(**(vars(config) | {"changes": ["unicorn > dog face @ top"]})))
    with pytest.raises(ValueError, match="models '.*nosuch'"):
        editing(EditingConfig(**(vars(config) | {"models": [str(tmp_path / "nosuch")]})))
