"""`training.drawn`: of which captions it draws what, however many processes share it."""

import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import TextToImagePipeline
from pipelines.components.noisy_classifier import NoisyClassifier
from training import drawn
from training.drawn import DrawnConfig, choose_captions
from training.styles import DRAWN, choose_rows

pytest_plugins = ["evaluation_folders"]


def pictures(folder):
    return {path.name: np.array(Image.open(path)).astype(int) for path in folder.glob("*.png")}


def test_what_is_drawn_is_what_the_pipeline_draws(model_folder, dataset_folder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    guide = NoisyClassifier(["3d", "emojione", "flat", "fxemoji", "noto", "twemoji"], 16, 3, 2, (8, 16), 4, 2)
    for parameter in guide.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    guide.save_pretrained(tmp_path / "guide")
    settings = {
        "model": str(model_folder), "dataset": str(dataset_folder),
        "noisy_classifier": str(tmp_path / "guide"),
        "num_pictures": 6, "num_inference_steps": 2, "batch_size": 2, "skip_names": 1, "seed": 30,
        "classifier_guidance_scale": 200.0,
    }  # fmt: skip

    def run(name, rank=0, world=1):
        monkeypatch.setattr(
            drawn, "make_accelerator", lambda: SimpleNamespace(process_index=rank, num_processes=world)
        )
        given = settings | {"output_dir": str(tmp_path / name)}
        monkeypatch.setattr(sys, "argv", ["drawn", *(f"--{key}={value}" for key, value in given.items())])
        drawn.main()
        return pictures(tmp_path / name)

    alone = run("alone")
    pipe = TextToImagePipeline.from_pretrained(model_folder)
    pipe.register_modules(noisy_classifier=guide.eval())
    captions, styles = choose_captions(DrawnConfig(output_dir="", **settings))
    expected = []
    for i, (caption, style) in enumerate(zip(captions, styles, strict=True)):
        more = {"class_labels": style, "classifier_guidance_scale": 200.0} if i >= 3 else {}
        generator = torch.Generator().manual_seed(30 + i)
        image = pipe(caption, num_inference_steps=2, generator=generator, **more).images[0]
        expected.append(np.array(image).astype(int))
    far = np.array([[np.abs(one - other).max() for other in alone.values()] for one in expected])
    # a batch of other size rounds a pixel of some to the next of 256 levels; no two captions come so near
    assert far.shape == (6, 6) and ((far <= 1).sum(0) == 1).all() and ((far <= 1).sum(1) == 1).all()
    first, both = run("shared", 0, 2), run("shared", 1, 2)
    assert 0 < len(first) < len(both) == 6
    assert all(np.abs(both[name] - alone[name]).max() <= 1 for name in alone)

    train = datasets.load_from_disk(str(dataset_folder))["train"]
    left_out = train["name"][choose_rows(train["name"], train["style"], list(DRAWN), 1, 0)[0]]
    possible = {
        f"{name}, {style} style"
        for name, style in zip(train["name"], train["style"], strict=True)
        if style in DRAWN and name != left_out
    }
    assert len(set(captions)) == 6 and set(captions) <= possible
    everything, _ = choose_captions(DrawnConfig(output_dir="", **(settings | {"num_pictures": 10**6})))
    assert set(everything) == possible


@pytest.mark.parametrize(("name", "value"), [("num_pictures", 0), ("skip_names", -1)])
def test_settings_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* or more|{name} must be at least 1"):
        DrawnConfig(output_dir="", **{name: value}).check()
