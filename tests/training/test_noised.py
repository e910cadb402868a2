"""The recipes of the noised CLIP and the noisy classifier, how they are measured, and the frontier."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from pipelines import DDPMScheduler, TextToImagePipeline
from pipelines.components.noisy_classifier import NoisyClassifier
from pipelines.components.noisy_clip import NoisyCLIP
from training import classifier, clip
from training.data.augmentation import augment
from training.data.pictures import seed_for
from training.data.words import TEMPLATES
from training.evaluation import frontier
from training.evaluation.frontier import FrontierConfig, diversity
from training.evaluation.noised_accuracy import NoisedAccuracyConfig, noised_accuracy
from training.objectives import noised
from training.objectives.denoising import draw_noise
from training.run import loop
from training.run.checkpoints import Checkpoints

COLOURS = {"red": (220, 30, 30), "green": (20, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}
GROUPS = {"red": "warm", "green": "cold", "blue": "cold", "white": "cold"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """Squares of four colours, a little grainy, in three splits."""
    rng = np.random.default_rng(0)
    kinds = {"image": datasets.Image()} | {
        k: datasets.Value("string") for k in ("caption", "name", "concept", "group")
    }
    parts = {}
    for split in ("train", "validation", "heldout_compositions"):
        rows = [
            {
                "image": np.clip(np.array(rgb) + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8),
                "caption": f"a {name}",
                "name": name,
                "concept": name,
                "group": GROUPS[name],
            }
            for _ in range(12)
            for name, rgb in COLOURS.items()
        ]
        parts[split] = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    path = tmp_path_factory.mktemp("colours")
    datasets.DatasetDict(parts).save_to_disk(str(path))
    return path


@pytest.fixture
def model(make_pipeline, tmp_path) -> Path:
    make_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def judge(tokenizer, tmp_path) -> Path:
    torch.manual_seed(8)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 32,
    }
    config = CLIPConfig(
        text_config=shared | ends,
        vision_config=shared | {"image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    made = CLIPModel(config)
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    made.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


@pytest.fixture
def run(folder, model, tmp_path, monkeypatch) -> Any:
    """run(recipe, name, **settings) -> output_dir."""

    def train(recipe: Any, name: str, **settings: Any) -> Path:
        shared = {
            "output_dir": tmp_path / name, "pretrained_model_name_or_path": model, "dataset": folder,
            "cache_dir": tmp_path / "cache", "train_batch_size": 16, "max_train_steps": 60,
            "lr_warmup_steps": 5, "learning_rate": 3e-3, "checkpointing_steps": 20, "shift": 2,
        }  # fmt: skip
        own: dict[str, Any] = {"patch_size": 2}
        if recipe is clip:
            own = {"noised": True, "patch_size": 8, "vision_width": 32, "vision_layers": 1, "head_dim": 16}
        listed = {key: settings.pop(key) for key in ("timestep_limits",) if key in settings}
        argv = [f"--{key}={value}" for key, value in (shared | own | settings).items()]
        argv += [word for key, values in listed.items() for word in (f"--{key}", *map(str, values))]
        argv += [] if recipe is clip else ["--block_out_channels", "16", "16"]
        monkeypatch.setattr(sys, "argv", ["recipe", *argv])
        recipe.main()
        return tmp_path / name

    return train


def test_both_learn_to_read_noised_pictures_and_no_noise(run, folder, model, judge, tmp_path):
    config = NoisedAccuracyConfig(
        model=str(model), judge=str(judge), dataset=str(folder), cache_dir=str(tmp_path / "cache"),
        noisy_clip=str(run(clip, "a") / "noisy_clip"), num_pictures=40, batch_size=16,
        noisy_classifier=str(run(classifier, "b") / "noisy_classifier"), output=str(tmp_path / "t.png"),
        label_column="group",
    )  # fmt: skip
    config.check()
    figures = noised_accuracy(config)
    print(json.dumps(figures, indent=1))
    found, right = figures["noised CLIP"]["R@1"], figures["classifier"]["accuracy"]
    assert found[0] >= 0.75 and found[3] >= 0.75 and found[-1] < 0.6  # four colours: chance is 0.25
    assert right[0] > 0.95 and right[-1] < 0.95  # most are cold: chance is 0.75
    assert figures["noised CLIP"]["R@5"] == [1.0] * 10 and (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"

    # the clean CLIP's, counted again by hand
    pipe = TextToImagePipeline.from_pretrained(model)
    reader, tokenizer = CLIPModel.from_pretrained(judge).eval(), pipe.tokenizer
    pictures = noised.NoisedPictures(pipe, str(folder), "validation", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(48, generator=generator)[:40].tolist()
    x0 = pictures.data.images(chosen)
    eps = torch.randn(x0.shape, generator=generator)
    names = sorted(COLOURS)

    def features(output: Any) -> torch.Tensor:
        return F.normalize(output if isinstance(output, torch.Tensor) else output.pooler_output, dim=-1)

    with torch.no_grad():
        texts = []
        for name in names:
            ids = tokenizer([t.format(name) for t in TEMPLATES], padding=True, return_tensors="pt").input_ids
            texts.append(F.normalize(features(reader.get_text_features(input_ids=ids)).mean(0), dim=0))
        for level, t in enumerate(figures["t"]):
            abar = pictures.chain.alphas_cumprod[t]
            images = features(
                reader.get_image_features(pixel_values=abar.sqrt() * x0 + (1 - abar).sqrt() * eps)
            )
            best = (images @ torch.stack(texts).T).argmax(1).tolist()
            share = np.mean(
                [names[b] == pictures.columns["concept"][i] for b, i in zip(best, chosen, strict=True)]
            )
            assert figures["clean CLIP"]["R@1"][level] == pytest.approx(share)


def test_the_noised_readers_are_told_t(folder, model, judge, tmp_path):
    """Both networks, of random weights that hear t well, counted again at each level with its own t."""
    torch.manual_seed(3)
    reader = NoisyCLIP(16, 3, 8, 16, 1, 2, 24).eval()
    labels = ["cold", "warm"]
    sorter = NoisyClassifier(labels, 16, 3, 2, (8, 16), 4, 2).eval()
    for network in (reader, sorter):
        for name, parameter in network.named_parameters():
            parameter.data += (2.0 if "time" in name else 0.3) * torch.randn_like(parameter)
    reader.save_pretrained(tmp_path / "clip")
    sorter.save_pretrained(tmp_path / "classifier")
    config = NoisedAccuracyConfig(
        model=str(model), judge=str(judge), dataset=str(folder), cache_dir=str(tmp_path / "cache"),
        noisy_clip=str(tmp_path / "clip"), noisy_classifier=str(tmp_path / "classifier"), num_pictures=40,
    )  # fmt: skip
    figures = noised_accuracy(config)
    pipe = TextToImagePipeline.from_pretrained(model)
    pictures = noised.NoisedPictures(pipe, str(folder), "validation", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(48, generator=generator)[:40].tolist()
    x0 = pictures.data.images(chosen)
    eps = torch.randn(x0.shape, generator=generator)
    names = sorted(COLOURS)
    with torch.no_grad():
        texts = []
        for name in names:
            padded = pipe.tokenizer([t.format(name) for t in TEMPLATES], padding=True, return_tensors="pt")
            pooled = pipe.text_encoder(padded.input_ids).text_embeds
            texts.append(F.normalize(F.normalize(pooled, dim=-1).mean(0), dim=0))

        def shares(x_t: torch.Tensor, t: int) -> tuple[float, float]:
            """Of the concept found first, and of the right class."""
            best = (reader(x_t, t) @ torch.stack(texts).T).argmax(1).tolist()
            classes = sorter(x_t, t).argmax(1).tolist()
            concept = [names[b] == pictures.columns["concept"][i] for b, i in zip(best, chosen, strict=True)]
            group = [labels[c] == pictures.columns["group"][i] for c, i in zip(classes, chosen, strict=True)]
            return float(np.mean(concept)), float(np.mean(group))

        others = []
        for level, t in enumerate(figures["t"]):
            abar = pictures.chain.alphas_cumprod[t]
            x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
            found = figures["noised CLIP"]["R@1"][level], figures["classifier"]["accuracy"][level]
            assert found == pytest.approx(shares(x_t, t))
            others.append(shares(x_t, 0))
    for column, mine in enumerate((figures["noised CLIP"]["R@1"], figures["classifier"]["accuracy"])):
        assert mine != pytest.approx([pair[column] for pair in others])  # told t = 0 they say something else


def test_two_processes_share_a_batch_of_noised_pictures(folder, model, tmp_path):
    """eps and t of the global batch in slices, flips and shifts of each process's own seed."""
    pipe = TextToImagePipeline.from_pretrained(model)
    pictures = noised.NoisedPictures(pipe, str(folder), "train", str(tmp_path / "cache"))
    seed, step, half, indices = 3, 5, 8, list(range(8, 24))
    whole = pictures.data.images(indices)
    total = len(pictures.chain)
    eps, t = draw_noise(seed, step, tuple(whole.shape), total, 0, 1)
    flips = []
    for rank in range(2):
        mine = indices[rank * half :][:half]
        x0, zeros = pictures.batch(mine, seed, step, rank, 2, flip=True, noised=False)
        generator = torch.Generator().manual_seed(seed_for(seed, "flip", step, rank))
        flips.append((torch.rand(half, generator=generator) < 0.5).tolist())
        own = whole[rank * half :][:half]
        expected = [x.flip(-1) if flip else x for x, flip in zip(own, flips[-1], strict=True)]
        assert torch.equal(x0, torch.stack(expected)) and not zeros.any()

        generator = torch.Generator().manual_seed(seed_for(seed, "shift", step, rank))
        moved = augment(own, 2, 0.0, generator)
        x_t, times = pictures.batch(mine, seed, step, rank, 2, shift=2)
        slice_ = slice(rank * half, (rank + 1) * half)
        abar = pictures.chain.alphas_cumprod[t[slice_]].view(-1, 1, 1, 1)
        assert torch.equal(times, t[slice_])
        torch.testing.assert_close(x_t, abar.sqrt() * moved + (1 - abar).sqrt() * eps[slice_])
    assert flips[0] != flips[1] and len({*flips[0], *flips[1]}) == 2


def test_they_are_components_of_the_pipeline_they_were_trained_for(run, model):
    pipe = TextToImagePipeline.from_pretrained(
        model,
        noisy_clip=NoisyCLIP.from_pretrained(run(clip, "a", max_train_steps=2) / "noisy_clip"),
        noisy_classifier=NoisyClassifier.from_pretrained(
            run(classifier, "b", max_train_steps=2) / "noisy_classifier"
        ),
    )
    call = {
        "clip_guidance_scale": 2.0,
        "classifier_guidance_scale": 2.0,
        "num_inference_steps": 2,
        "output_type": "pt",
    }
    assert list(pipe.noisy_classifier.config.labels) == ["cold", "warm"]
    one, other = (
        pipe("a red", class_labels=label, generator=torch.Generator().manual_seed(0), **call).images
        for label in ("warm", "cold")
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("recipe", "part", "settings"),
    [
        (clip, "noisy_clip", {}),
        (classifier, "noisy_classifier", {}),
        (classifier, "noisy_classifier", {"ema_decay": 0.9, "flip": True, "noised": False}),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(run, monkeypatch, recipe, part, settings):
    file = f"{part}/diffusion_pytorch_model.safetensors"
    settings = {"max_train_steps": 8, "checkpointing_steps": 3} | settings
    whole = load_file(run(recipe, "whole", **settings) / file)

    class Stop(Exception): ...

    class Stopping(Checkpoints):
        def save(self, step: int, *others: Any, **settings: Any) -> Any:
            super().save(step, *others, **settings)
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Checkpoints", Stopping)
        with pytest.raises(Stop):
            run(recipe, "parts", **settings)
    parts = load_file(run(recipe, "parts", **settings, resume_from_checkpoint="latest") / file)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_what_is_saved_is_the_moving_average(run, monkeypatch):
    """By hand, of three steps: decay 0 at the first, 1 - 2^(-3/4) = 0.405 at the second, then at most 0.5."""
    seen = []

    def fit(accelerator, models, *others, **settings):
        for result in unwatched(accelerator, models, *others, **settings):
            seen.append({key: value.clone() for key, value in models[0].state_dict().items()})
            yield result

    unwatched = loop.fit
    monkeypatch.setattr(loop, "fit", fit)
    folder = run(classifier, "averaged", max_train_steps=3, ema_decay=0.5)
    saved = load_file(folder / "noisy_classifier/diffusion_pytorch_model.safetensors")
    first, second, third = seen
    decay = 1 - 2**-0.75
    for key, value in saved.items():
        expected = 0.5 * (decay * first[key] + (1 - decay) * second[key]) + 0.5 * third[key]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(saved["head.weight"], third["head.weight"], atol=1e-4)


def test_two_columns_are_two_sets_and_the_loss_is_the_sum_of_theirs(run, folder, monkeypatch):
    """Cross-entropies with torch's own class weights, the second of the pictures below its limit alone."""
    kept: dict[str, Any] = {}

    def train_guide(config, run, model, pictures, make_loss, name, ema_decay):
        kept.update(config=config, run=run, model=model, pictures=pictures, make_loss=make_loss)

    monkeypatch.setattr(classifier, "train_guide", train_guide)
    run(classifier, "two", label_column="group+name", timestep_limits=[1000, 300], timestep_shift=0.4)
    model, pictures, config = kept["model"], kept["pictures"], kept["config"]
    names = ["cold", "warm", "blue", "green", "red", "white"]
    assert list(model.config.labels) == names and list(model.config.label_sets) == [2, 4]
    indices, sides = [0, 5, 2, 3, 1, 7, 30, 44], set()
    plain = NoisyClassifier(**{k: v for k, v in model.config.items() if k[0] != "_" and "_sets" not in k
                               and "limits" not in k})  # fmt: skip
    plain.load_state_dict(model.state_dict())
    for step in range(3):
        x_t, t = pictures.batch(indices, config.seed, step, 0, 1, config.shift, timestep_shift=0.4)
        loss, details = kept["make_loss"](kept["run"], model)(indices, step)
        logits, expected = plain(x_t, t), 0.0
        for column, labels, limit in (("group", names[:2], 1000), ("name", names[2:], 300)):
            counts = torch.bincount(
                torch.tensor([labels.index(value) for value in pictures.columns[column]])
            ).double()
            weights = (counts.sum() / (len(labels) * counts)).sqrt().float()
            own = logits[:, [names.index(label) for label in labels]]
            truth = torch.tensor([labels.index(pictures.columns[column][i]) for i in indices])
            low = t < limit
            sides |= set(low.tolist())
            expected = expected + F.cross_entropy(own[low], truth[low], weights)
            right = (own.argmax(1) == truth)[low].float().mean()
            assert details[column] == pytest.approx(float(right))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert sides == {False, True}


def test_how_often_a_set_of_two_is_right(run, folder, model, judge, tmp_path):
    trained = run(classifier, "sets", label_column="group+name", max_train_steps=150) / "noisy_classifier"
    settings = {
        "model": str(model), "judge": str(judge), "dataset": str(folder), "noisy_classifier": str(trained),
        "cache_dir": str(tmp_path / "cache"), "num_pictures": 40, "batch_size": 16,
    }  # fmt: skip
    reader = NoisyClassifier.from_pretrained(trained).eval()
    pipe = TextToImagePipeline.from_pretrained(model)
    pictures = noised.NoisedPictures(pipe, str(folder), "validation", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(48, generator=generator)[:40].tolist()
    eps = torch.randn((40, 3, 16, 16), generator=generator)
    x_t = pictures.chain.add_noise(pictures.data.images(chosen), eps, torch.tensor(50))
    for column, labels in (("group", ["cold", "warm"]), ("name", ["blue", "green", "red", "white"])):
        figures = noised_accuracy(NoisedAccuracyConfig(**settings, label_column=column))
        with torch.no_grad():
            scores = reader(x_t, 50)[:, [reader.config.labels.index(label) for label in labels]]
        found = [labels[i] for i in scores.argmax(1)]
        right = np.mean([a == pictures.columns[column][i] for a, i in zip(found, chosen, strict=True)])
        assert figures["classifier"]["accuracy"][0] == pytest.approx(right) and right > 0.7
    for column in ("caption", "kind"):  # of other values, and none
        with pytest.raises(ValueError, match="label_column must be a column of the classifier's classes"):
            noised_accuracy(NoisedAccuracyConfig(**settings, label_column=column))


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        (clip, {"patch_size": 5}, "patch_size must be a divisor of 16, the side"),
        (clip, {"distill": "words"}, "distill must be none with noised"),
        (classifier, {"label_column": "colour"}, "label_column must be a column .*group.*got 'colour'"),
        (classifier, {"train_batch_size": 0}, "train_batch_size must be at least 1"),
        (
            classifier,
            {"label_column": "name+concept"},
            "label_column must be columns without a value",
        ),
        (classifier, {"timestep_limits": [0]}, "timestep_limits must be in 1 .. 1000, one for"),
        (
            classifier,
            {"timestep_limits": [9, 9]},
            "timestep_limits must be in 1 .. 1000, one for",
        ),
        (classifier, {"ema_decay": 1.5}, r"ema_decay must be in \[0, 1\], or none, got 1.5"),
    ],
)
def test_settings_that_cannot_be(run, recipe, setting, message):
    with pytest.raises(ValueError, match=message):
        run(recipe, "refused", **setting)


# ---- the frontier


def test_diversity_is_the_mean_over_pairs():
    embeds = F.normalize(torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [1 - float(e[i] @ e[j]) for e in embeds for i in range(3) for j in range(3) if i != j]
    assert diversity(embeds) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert diversity(embeds[:, :1].expand(-1, 4, -1)) == pytest.approx(0.0, abs=1e-6)


def test_the_frontier_measures_what_each_form_draws(folder, model, judge, tmp_path, monkeypatch):
    torch.manual_seed(1)
    NoisyCLIP(16, 3, 8, 16, 1, 2, 24).save_pretrained(tmp_path / "noisy_clip")
    labels = ["cold", "warm"]
    NoisyClassifier(labels, 16, 3, 2, (8, 16), 4, 2).save_pretrained(tmp_path / "noisy_classifier")
    config = FrontierConfig(
        model=str(model), judge=str(judge), dataset=str(folder), cache_dir=str(tmp_path / "cache"),
        noisy_clip=str(tmp_path / "noisy_clip"), noisy_classifier=str(tmp_path / "noisy_classifier"),
        classifier_free=[1.0, 4.0], thresholded=[4.0], noised_clip=[0.0, 30.0], classifier=[0.0, 30.0],
        num_captions=4, per_caption=2, num_inference_steps=3, batch_size=3, output=str(tmp_path / "f.png"),
    )  # fmt: skip
    config.check()
    figures = frontier.frontier(config)
    assert "clean_clip" not in figures and set(figures) >= {
        "classifier_free",
        "thresholded",
        "noised_clip",
        "classifier",
    }
    unguided = [figures[form]["CLIP score"][0] for form in ("classifier_free", "noised_clip", "classifier")]
    assert (
        unguided[0] == pytest.approx(unguided[1]) == pytest.approx(unguided[2])
    )  # three ways to leave it out
    for form in ("classifier_free", "noised_clip", "classifier"):
        assert figures[form]["Frechet distance"][0] != figures[form]["Frechet distance"][1]

    # one point again, by hand
    pipe = TextToImagePipeline.from_pretrained(model)
    pictures = frontier.read_pictures(config, config.split, 16)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
    captions = [pictures.columns["caption"][i] for i in order[:4] for _ in range(2)]
    drawn = [
        pipe(
            c,
            guidance_scale=4.0,
            num_inference_steps=3,
            generator=[torch.Generator().manual_seed(i)],
            output_type="pt",
        )
        for i, c in enumerate(captions)
    ]
    images = torch.cat([one.images for one in drawn]) * 2 - 1
    reader = frontier.Judge(str(judge))
    score = (100 * (reader.embed_images(images) * reader.embed_texts(captions)).sum(-1).clamp(min=0)).mean()
    assert figures["classifier_free"]["CLIP score"][1] == pytest.approx(float(score), abs=1e-3)
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"

    # and with x0 scaled down to its 99.5th percentile where that is above 1
    pipe.scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", thresholding=True,
        dynamic_thresholding_ratio=0.995, sample_max_value=100.0, clip_sample=False,
    )  # fmt: skip
    settings = {"guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "pt"}
    images = torch.cat(
        [
            pipe(c, generator=torch.Generator().manual_seed(i), **settings).images
            for i, c in enumerate(captions)
        ]
    )
    cosines = (reader.embed_images(images * 2 - 1) * reader.embed_texts(captions)).sum(-1)
    thresholded = figures["thresholded"]["CLIP score"][0]
    assert thresholded == pytest.approx(float(100 * cosines.clamp(min=0).mean()), abs=1e-3)
    assert abs(thresholded - figures["classifier_free"]["CLIP score"][1]) > 1e-2

    # nothing is drawn twice
    monkeypatch.setattr(TextToImagePipeline, "__call__", None)
    assert frontier.frontier(config) == figures


def test_a_judge_that_guides_is_refused(folder, model, judge, tmp_path):
    shared = {"model": str(model), "judge": str(judge), "dataset": str(folder), "cache_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="judge must be another CLIP than the one that guides"):
        frontier.frontier(FrontierConfig(**shared, clip_guidance_model=str(judge)))
    with pytest.raises(ValueError, match="forms must be .* noisy_clip"):
        frontier.frontier(FrontierConfig(**shared, forms=["noised_clip"]))
    with pytest.raises(ValueError, match="forms must be some of"):
        FrontierConfig(forms=["best"]).check()


def test_augmented_pictures_by_hand():
    """Each moved by its own offset over white, under noise of its own deviation."""
    x, shift, noise = torch.rand(5, 3, 6, 7, generator=torch.Generator().manual_seed(1)), 2, 0.3
    found = augment(x, shift, noise, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(0, 2 * shift + 1, (5, 2), generator=generator)
    deviations = noise * torch.rand(5, generator=generator)
    eps = torch.randn(x.shape, generator=generator)
    for i, (down, right) in enumerate((offsets - shift).tolist()):
        expected = torch.ones(3, 6, 7)
        for row in range(max(0, -down), min(6, 6 - down)):
            for column in range(max(0, -right), min(7, 7 - right)):
                expected[:, row, column] = x[i, :, row + down, column + right]
        torch.testing.assert_close(found[i], expected + deviations[i] * eps[i])
    assert len(set(deviations.tolist())) == 5
