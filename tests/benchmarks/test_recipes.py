"""The trials of recipes: each is one that training takes, of about the baseline's size."""

from argparse import Namespace

import diffusers
import pytest
import torch
import yaml

from benchmarks.recipes import TRIALS, Measure, settings_of, table
from pipelines import ConditionalUNet, DDPMScheduler, TextToImagePipeline
from training.run.settings import parse_config
from training.text_to_image import TextToImageConfig

pytest_plugins = ["evaluation_folders"]


def parameters(unet: dict) -> int:
    return sum(p.numel() for p in ConditionalUNet.from_config(unet).parameters())


@pytest.mark.parametrize("name", TRIALS)
def test_each_changes_what_it_says_and_keeps_the_size(name, tmp_path):
    settings, baseline = settings_of(name), settings_of("baseline")
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(settings))
    config = parse_config(TextToImageConfig, ["--config", str(tmp_path / "trial.yaml")])
    config.dataset_name = str(tmp_path)  # the emoji set may not be built
    config.check()
    for key, value in TRIALS[name].items():
        expected = baseline["unet"] | value if key == "unet" else value
        assert getattr(config, key) == expected, key
    changed = {key for key in settings if settings[key] != baseline.get(key)}
    assert changed == set(TRIALS[name])
    assert parameters(settings["unet"]) == pytest.approx(parameters(baseline["unet"]), rel=0.1)


def test_pictures_are_scored_as_the_judge_scores_them(clip_folder, dataset_folder, tmp_path, monkeypatch):
    """By the judge's own similarities, and against themselves a Frechet distance of 0."""
    monkeypatch.chdir(tmp_path)
    measure = Measure(Namespace(judge=str(clip_folder), dataset=str(dataset_folder), num_pictures=10))
    images = measure.pictures.images(measure.chosen)
    embeds, texts = measure.judge.embed_images(images), measure.judge.embed_texts(measure.captions)
    nearest = (embeds @ measure.concepts.embeds.T).argmax(1)
    first = [measure.concepts.ids[measure.concepts.owner[i]] for i in nearest]
    figures = measure.of(images)
    assert figures["R@1"] == pytest.approx(
        sum(a == b for a, b in zip(first, measure.truth, strict=True)) / 10
    )
    assert figures["CLIP score"] == pytest.approx(float(100 * (embeds * texts).sum(1).clamp(min=0).mean()))
    measure.reference = embeds
    assert measure.of(images)["Frechet distance"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_error_of_x0_is_that_of_diffusers_x0(
    prediction_type, model_folder, clip_folder, dataset_folder, tmp_path, monkeypatch
):
    """Picture by picture, from what diffusers' scheduler makes of the U-Net's output at the same x_t."""
    monkeypatch.chdir(tmp_path)
    measure = Measure(Namespace(judge=str(clip_folder), dataset=str(dataset_folder), num_pictures=10))
    pipe = TextToImagePipeline.from_pretrained(model_folder)
    theirs = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    pipe.scheduler = DDPMScheduler.from_config(theirs.config)
    x0, errors = measure.pictures.images(measure.chosen), []
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    states = pipe.encode_prompt(measure.captions, "cpu", 1, False)[0]
    for i in range(len(x0)):
        t = torch.tensor(i * 617 % 1000)
        x_t = theirs.add_noise(x0[i : i + 1], eps[i : i + 1], t[None])
        with torch.no_grad():
            output = pipe.unet(x_t, t, states[i : i + 1]).sample
        found = theirs.step(output, int(t), x_t).pred_original_sample
        errors.append(float((found - x0[i : i + 1]).square().mean()))
    assert measure.x0_error(pipe) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_the_table_has_a_row_for_each():
    baseline = {"updates": 200, "R@1": 0.1, "R@5": 0.25, "CLIP score": 21.5}
    assert table({"baseline": baseline, "real": {"R@5": 0.9}}).splitlines()[2:] == [
        "| baseline | 200 |  | 0.1 | 0.25 | 21.5 |  |",
        "| real |  |  |  | 0.9 |  |  |",
    ]
