"""The super-resolution pipeline: Stable Diffusion's x4 upscaler beside diffusers', and ours in pixels."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from diffusers import DDPMScheduler as TheirDDPM
from PIL import Image, ImageOps
from transformers import CLIPTextModel

from pipelines import ConditionalUNet, DDPMScheduler
from pipelines.chain.back_projection import back_project, enlarge, shrink
from pipelines.components.noisy_clip import NoisyCLIP
from pipelines.drawing.request import Request
from pipelines.super_resolution import SuperResolution, SuperResolutionPipeline

PROMPT = "a corgi in a party hat"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(side: tuple[int, int] = (16, 16), seed: int = 0, count: int | None = None) -> Any:
    """A picture, or a list of `count`, of smooth colours and a hard edge."""
    pictures = []
    for i in range(count or 1):
        noise = torch.rand(1, 3, 4, 4, generator=seeded(seed + i))
        pixels = torch.nn.functional.interpolate(noise, side, mode="bilinear")[0]
        pixels[:, side[0] // 2 :, side[1] // 3 :] = pixels[:, :1, :1]
        array = (pixels.permute(1, 2, 0) * 255).round().byte().numpy()
        pictures.append(Image.fromarray(array))
    return pictures[0] if count is None else pictures


# ---- back-projection ----


def test_shrinking_is_the_mean_of_squares_and_enlarging_is_pillows_neighbourhood():
    x = torch.randn(2, 3, 8, 12, generator=seeded())
    blocks = x.numpy().reshape(2, 3, 2, 4, 3, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(shrink(x, 4).numpy(), blocks, rtol=1e-5, atol=1e-6)
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    expected = (torch.arange(32.0) + 0.5) / 4 - 0.5  # a straight line stays one, away from the border
    assert torch.allclose(enlarge(ramp, 4)[0, 0, 16, 8:24], expected[8:24], atol=1e-5)


def test_back_projection_keeps_to_the_small_picture_and_to_the_range():
    """And changes least where there is least to change: a consistent picture stays as it is."""
    y = torch.rand(2, 3, 12, 12, generator=seeded()) * 1.8 - 0.9
    x = torch.randn(2, 3, 48, 48, generator=seeded(1))
    result = back_project(x, y, 4)
    assert result.abs().max() <= 1
    before, after = (shrink(picture.clamp(-1, 1), 4).sub(y).abs().mean() for picture in (x, result))
    assert after < 0.1 * before and after < 0.05, (before, after)
    smooth = torch.nn.functional.interpolate(y[..., :3, :3], (12, 12), mode="bilinear")
    close = back_project(enlarge(smooth, 4), smooth, 4)
    assert shrink(close, 4).sub(smooth).abs().max() < 0.01
    consistent = x.clamp(-1, 1)
    torch.testing.assert_close(back_project(consistent, shrink(consistent, 4), 4), consistent)


# ---- Stable Diffusion's x4 upscaler ----


@pytest.fixture(scope="module")
def upscaler_folder(tmp_path_factory: Any, tokenizer: Any, make_text_encoder: Any, make_unet: Any) -> Path:
    """A tiny x4 upscaler of random weights, built and saved by diffusers: 7 channels in, 4 out, a table of
    noise levels, v-prediction."""
    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.08333,
    ).eval()
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    folder = tmp_path_factory.mktemp("upscaler")
    StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=make_text_encoder(CLIPTextModel),
        tokenizer=copy.deepcopy(tokenizer),
        unet=make_unet(
            UNet2DConditionModel,
            in_channels=7,
            out_channels=4,
            num_class_embeds=1000,
            only_cross_attention=(True, False),
            use_linear_projection=True,
        ),
        low_res_scheduler=TheirDDPM(beta_schedule="scaled_linear"),
        scheduler=DDIMScheduler(
            **betas, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        max_noise_level=350,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def both(upscaler_folder: Path) -> list[Any]:
    """(theirs, ours), from one folder."""
    pipes = [
        cls.from_pretrained(upscaler_folder)
        for cls in (StableDiffusionUpscalePipeline, SuperResolutionPipeline)
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unguided, clean": {"guidance_scale": 1.0, "noise_level": 0},
    "noisiest": {"noise_level": 350, "guidance_scale": 3.0},
    # theirs cannot skip layers of the text encoders of transformers 5
    "negative prompt, eta": {"negative_prompt": "blurry", "eta": 1.0},
    "two of one": {"num_images_per_prompt": 2},
    "a wide picture": {"image": small((8, 20))},
    "a seed for each": {"prompt": [PROMPT, "a red heart"], "image": small(count=2), "generator": "list"},
}


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_x4_upscaler_draws_what_diffusers_draws(both: Any, call: str):
    results = []
    for pipe in both:
        arguments = {"prompt": PROMPT, "image": small(), "num_inference_steps": 3, "generator": seeded()}
        arguments |= CALLS[call]
        if arguments["generator"] == "list":
            arguments["generator"] = [seeded(5), seeded(6)]
        results.append(pipe(**arguments, output_type="np").images)
    theirs, ours = results
    assert theirs.shape == ours.shape and theirs.std() > 0.05
    assert np.abs(theirs - ours).max() < 1e-4


@pytest.mark.parametrize("scheduler", [PNDMScheduler, TheirDDPM])
def test_x4_upscaler_with_other_schedulers(both: Any, scheduler: Any):
    results = []
    for pipe in both:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        images = pipe(PROMPT, small(), 4, generator=seeded(), output_type="np").images
        results.append(images)
    assert np.abs(results[0] - results[1]).max() < 1e-4


def test_settings_of_an_x4_folder_are_read_as_diffusers_reads_them(upscaler_folder: Path, tmp_path: Path):
    """A scheduler that clips, which StableDiffusionPipeline would overrule and the upscaler does not, and a
    vae from before configs had a scaling_factor."""
    import shutil

    folder = Path(shutil.copytree(upscaler_folder, tmp_path / "old"))
    for part, changes in {"scheduler": {"clip_sample": True, "steps_offset": 0}, "vae": {}}.items():
        (path,) = (folder / part).glob("*config.json")
        config = json.loads(path.read_text()) | changes
        config.pop("scaling_factor", None)
        path.write_text(json.dumps(config))
    results = []
    for cls in (StableDiffusionUpscalePipeline, SuperResolutionPipeline):
        pipe = cls.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        results.append(pipe(PROMPT, small(), 3, generator=seeded(), output_type="np").images)
    assert np.abs(results[0] - results[1]).max() < 1e-4


def test_callbacks_of_both_kinds(both: Any):
    """The older one sees what diffusers' sees; the newer one may replace x_t."""
    seen: list[list[Any]] = [[], []]
    for pipe, log in zip(both, seen, strict=True):
        pipe(
            PROMPT, small(), 3, generator=seeded(), output_type="latent",
            callback=lambda i, t, x, log=log: log.append((i, int(t), x.clone())), callback_steps=2,
        )  # fmt: skip
    assert [entry[:2] for entry in seen[0]] == [entry[:2] for entry in seen[1]] and len(seen[1]) == 2
    for theirs, ours in zip(*seen, strict=True):
        torch.testing.assert_close(theirs[2], ours[2], atol=1e-4, rtol=1e-4)

    def replace(pipe: Any, i: int, t: Any, tensors: Any) -> Any:
        return {"latents": torch.full_like(tensors["latents"], float(i))}

    last = both[1](PROMPT, small(), 2, output_type="latent", callback_on_step_end=replace).images
    assert (last == 1).all()


def test_pictures_stay_with_their_prompts(both: Any):
    """Two pictures, two prompts and two of each: as if each were drawn alone."""
    ours, prompts, pictures = both[1], [PROMPT, "a red heart"], small(count=2)
    call = {"num_inference_steps": 2, "output_type": "np", "num_images_per_prompt": 2}
    together = ours(prompts, pictures, generator=[seeded(i) for i in range(4)], **call).images
    for i in range(2):
        pair = [seeded(2 * i), seeded(2 * i + 1)]
        alone = ours(prompts[i], pictures[i], generator=pair, **call).images
        assert np.abs(alone - together[2 * i : 2 * i + 2]).max() < 1e-4


def test_pictures_for_people_bear_the_watermark(make_upsampler: Any):
    """Of "pil" alone, as in diffusers: numbers are as they were drawn."""

    class Watermarker:
        def apply_watermark(self, images: list[Image.Image]) -> list[Image.Image]:
            return [ImageOps.invert(image) for image in images]

    pipe, arguments = make_upsampler(), {"image": small(), "num_inference_steps": 1}
    plain = [pipe(**arguments, generator=seeded(), output_type=kind).images[0] for kind in ("pil", "np")]
    pipe.watermarker = Watermarker()  # no component with weights
    marked = [pipe(**arguments, generator=seeded(), output_type=kind).images[0] for kind in ("pil", "np")]
    assert np.array_equal(np.asarray(marked[0]), 255 - np.asarray(plain[0]))
    assert np.array_equal(marked[1], plain[1])


def test_a_decoder_that_overflows_in_half_precision_runs_in_single_and_is_put_back(both: Any):
    ours, z = both[1], torch.randn(1, 4, 4, 4, generator=seeded())
    ours.vae.to(torch.float16).register_to_config(force_upcast=True)
    task = SuperResolution(ours, Request())
    with torch.no_grad():
        decoded = task.decode(z.half())
        precision = ours.vae.dtype
        exact = ours.vae.float().decode(z.half().float() / 0.08333).sample
    assert precision == torch.float16 and decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, exact, atol=1e-5, rtol=1e-5)


# ---- in pixels ----


def test_pixel_steps_by_hand(make_upsampler: Any):
    """Two steps of DDIM written out in float64's closed form around the same U-Net."""
    pipe, picture = make_upsampler(), small()
    result = pipe(
        image=picture, num_inference_steps=2, noise_level=50, generator=seeded(), output_type="np"
    ).images
    y = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    abar = torch.cos((torch.arange(1001) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    abar = torch.cumprod(1 - betas, 0)
    generator = seeded()
    told = abar[50].sqrt() * y + (1 - abar[50]).sqrt() * torch.randn(y.shape, generator=generator)
    told = enlarge(told, 4)
    x = torch.randn((1, 3, 64, 64), generator=generator)
    with torch.no_grad():
        for t, before in ((999, 499), (499, None)):
            lacks = pipe.unet(torch.cat([x, told], 1), t, None, class_labels=torch.tensor([50])).sample
            x0 = back_project(told + lacks, y, 4)
            eps = (x - abar[t].sqrt() * x0) / (1 - abar[t]).sqrt()
            x = x0 if before is None else abar[before].sqrt() * x0 + (1 - abar[before]).sqrt() * eps
    assert np.abs(result - (x / 2 + 0.5).permute(0, 2, 3, 1).numpy()).max() < 1e-4


@pytest.mark.parametrize("size", [(16, 16), (9, 23)], ids=str)
def test_the_result_shrunk_is_the_picture_that_was_given(make_upsampler: Any, size: tuple[int, int]):
    """For a network of random weights, at any size; without consistency it is far off."""
    pipe, picture = make_upsampler(), small(size)
    given = np.asarray(picture, dtype=np.float64)
    errors = {}
    for consistency in (1.0, 0.0):
        (image,) = pipe(image=picture, generator=seeded(), consistency=consistency).images
        assert image.size == (4 * size[1], 4 * size[0])
        errors[consistency] = np.abs(np.asarray(image.reduce(4), dtype=np.float64) - given).mean()
    assert errors[1.0] < 0.5 and errors[0.0] > 5, errors  # of 255 levels


def test_a_picture_depends_on_its_own_seed_alone(make_upsampler: Any):
    pipe, pictures = make_upsampler(), small(count=3)
    call = {"output_type": "np", "noise_level": 100}
    together = pipe(image=pictures, generator=[seeded(i) for i in range(3)], **call).images
    alone = pipe(image=pictures[2], generator=[seeded(2)], **call).images
    assert np.abs(together[2:] - alone).max() < 1e-5
    other = pipe(image=pictures[2], generator=[seeded(9)], **call).images
    assert np.abs(other - alone).max() > 1e-3


def test_the_prompt_is_not_looked_at_and_transparency_lies_on_white(make_upsampler: Any):
    pipe, picture = make_upsampler(), small()
    expected = pipe(image=picture, generator=seeded(), output_type="np").images
    assert np.array_equal(pipe(PROMPT, picture, generator=seeded(), output_type="np").images, expected)
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    blank = pipe(image=Image.new("RGB", picture.size, "white"), generator=seeded(), output_type="np").images
    assert np.array_equal(pipe(image=clear, generator=seeded(), output_type="np").images, blank)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"image": None}, "`image` must be"),
    "level": ({"noise_level": 201}, "`noise_level` must be a whole number in 0..200, got 201"),
    "fraction": ({"noise_level": 1.5}, "`noise_level`"),
    "steps": ({"num_inference_steps": 0}, "`num_inference_steps`"),
    "share": ({"consistency": 1.5}, "`consistency` must be in 0..1, got 1.5"),
    "latents": ({"latents": torch.zeros(1, 3, 16, 16)}, "`latents` must be a tensor of"),
    "output": ({"output_type": "jpg"}, "`output_type`"),
    "generators": ({"generator": [seeded(), seeded()]}, "2 generators for 1 pictures"),
    "callback": ({"callback_steps": 0}, "`callback_steps`"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_what_cannot_be_is_refused_by_name(make_upsampler: Any, case: str):
    arguments, message = BAD[case]
    pipe = make_upsampler()
    pipe.unet.forward = lambda *_, **__: pytest.fail("work was started")
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe(**({"image": small()} | arguments))


def test_parts_that_do_not_fit_are_refused(make_upsampler: Any, both: Any):
    with pytest.raises(ValueError, match="must predict 'sample'|'sample'"):
        make_upsampler(scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match=r"unet.config.in_channels.*3 and the picture's 3"):
        make_upsampler(unet={"in_channels": 4})(image=small())
    with pytest.raises(ValueError, match="`image` must be one, or one for each of 2 prompts"):
        both[1]([PROMPT, PROMPT], small(count=3))


# ---- folders ----

ELSEWHERE = """
import sys, numpy as np, torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
assert not any("main" in name.split(".")[0] for name in sys.modules if name.startswith("pipelines"))
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
image = Image.open(sys.argv[2])
np.save(sys.argv[3], pipe(image=image, generator=torch.Generator().manual_seed(0), output_type="np").images)
"""


def test_a_saved_folder_loads_here_and_in_plain_diffusers(make_upsampler: Any, tmp_path: Path):
    """There in a process without this repository on its path."""
    pipe, picture = make_upsampler(), small()
    expected = pipe(image=picture, generator=seeded(), output_type="np").images
    folder = tmp_path / "upsampler"
    pipe.save_pretrained(folder)
    here = SuperResolutionPipeline.from_pretrained(folder)
    here.set_progress_bar_config(disable=True)
    assert type(here.unet) is ConditionalUNet and type(here.low_res_scheduler) is DDPMScheduler
    assert here.config.default_num_inference_steps == 3 and here.config.max_noise_level == 200
    assert np.array_equal(here(image=picture, generator=seeded(), output_type="np").images, expected)
    picture.save(tmp_path / "small.png")
    arguments = [str(folder), str(tmp_path / "small.png"), str(tmp_path / "there.npy")]
    environment = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.abs(np.load(tmp_path / "there.npy") - expected).max() < 1e-5
    card = (folder / "README.md").read_text()
    assert "image-to-image" in card and "Enlarges pictures 4 times" in card and "prompt" not in card


# ---- two stages ----


@pytest.fixture
def two_stages(pipeline: Any, make_upsampler: Any) -> Any:
    """A text-to-image pipeline of 16 x 16 pixels with an upsampler beside it."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.upsampler = make_upsampler()
    yield pipeline
    del pipeline.upsampler


def test_large_sizes_are_drawn_small_and_enlarged(two_stages: Any):
    """What the two calls give one after the other, from one generator; other sizes are drawn at once."""
    generator = seeded()
    small = two_stages("a cat", generator=generator, output_type="np").images
    (picture,) = small
    given = torch.from_numpy(picture).permute(2, 0, 1)
    expected = two_stages.upsampler(image=given, generator=generator, output_type="np").images
    large = two_stages("a cat", height=64, width=64, generator=seeded(), output_type="np").images
    assert large.shape == (1, 64, 64, 3) and np.abs(large - expected).max() < 1e-5
    assert two_stages("a cat", height=32, width=64, num_inference_steps=1).images[0].size == (64, 32)
    wide = two_stages("a cat", height=64, width=80, generator=seeded(), num_inference_steps=1).images[0]
    assert wide.size == (80, 64)


def test_each_picture_is_enlarged_by_its_own_seed(two_stages: Any):
    """In a batch as alone; of several candidates the kept one's."""
    call = {"height": 64, "width": 64, "output_type": "np", "num_inference_steps": 2}
    both = two_stages(["a cat", "a dog"], generator=[seeded(1), seeded(2)], **call).images
    alone = two_stages("a dog", generator=[seeded(2)], **call).images
    assert np.abs(both[1:] - alone).max() < 1e-4
    two_stages.rank_candidates = lambda *_, **__: torch.tensor([1])
    try:
        two_stages.register_modules(noisy_clip=NoisyCLIP(16, 3, 8, 16, 1, 2, 24))
        kept = two_stages("a dog", generator=[seeded(1), seeded(2)], num_candidates=2, **call).images
    finally:
        del two_stages.rank_candidates
        two_stages.register_modules(noisy_clip=None)
    assert np.abs(kept - alone).max() < 1e-4


def test_sizes_and_texts_that_two_stages_cannot_take(two_stages: Any, both: Any):
    with pytest.raises(ValueError, match="`width` must be a multiple of 4, .* got 66; the nearest is 64"):
        two_stages("a cat", height=64, width=66)
    with pytest.raises(ValueError, match="`height` must be a positive multiple of 1, got 'large'"):
        two_stages("a cat", height="large", width=64)
    two_stages.upsampler = both[1]
    with pytest.raises(ValueError, match="`prompt` is needed where the upsampler reads text"):
        two_stages(prompt_embeds=torch.zeros(1, 32, 32), height=64, width=64, guidance_scale=1.0)
