"""A refiner trained alone: what it gains is measured anew, and nothing else changes."""

import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from pipelines import ConditionalUNet, DDPMScheduler, TextToImagePipeline
from pipelines.conditioning import encode_text
from training import refiner
from training.refiner import RefinerConfig

CHAIN = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "prediction_type": "sample"}


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disc of one colour on white, in 40 sizes and places."""
    chance, rows = np.random.default_rng(0), []
    y, x = np.mgrid[:16, :16]
    for _ in range(40):
        centre, radius = chance.uniform(5, 11, 2), chance.uniform(3, 5)
        pixels = np.full((16, 16, 3), 255, np.uint8)
        pixels[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = (200, 40, 90)
        rows.append({"image": pixels, "caption": "a disc"})
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    folder = tmp_path_factory.mktemp("discs")
    parts = {"train": datasets.Dataset.from_list(rows, features=kinds)}
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


def train(monkeypatch, folder: Path, model: Path, output: Path, **settings) -> ConditionalUNet:
    shared = {
        "output_dir": output, "pretrained_model_name_or_path": model, "dataset": folder, "seed": 3,
        "cache_dir": output / "cache", "num_samples": 200, "max_train_steps": 700, "train_batch_size": 16,
        "lr_warmup_steps": 5, "refiner_channels": 16, "learning_rate": 1e-2,
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["refiner", *(f"--{k}={v}" for k, v in (shared | settings).items())])
    refiner.main()
    return ConditionalUNet.from_pretrained(output / "unet").eval()


def test_it_learns_what_the_network_lacks_and_leaves_the_network(
    discs, make_pipeline, make_unet, tmp_path, monkeypatch
):
    """The network knows nothing yet: nearly clean x_t tell more, and noise on one colour is smoothed away, so
    that the error is below half of what the noise alone leaves."""
    unet = make_unet(patch_size=2, self_conditioning=True)
    make_pipeline(unet=unet, scheduler=DDPMScheduler(**CHAIN)).save_pretrained(tmp_path / "m")
    refined = train(monkeypatch, discs, tmp_path / "m", tmp_path / "out", max_timestep=200)
    for name, weight in unet.state_dict().items():
        assert torch.equal(refined.state_dict()[name], weight), name

    pipe = TextToImagePipeline.from_pretrained(tmp_path / "m")
    data = datasets.load_from_disk(str(discs))["train"]
    x0 = torch.tensor(np.stack([np.asarray(row["image"]) for row in data])).permute(0, 3, 1, 2) / 127.5 - 1
    states, _, _ = encode_text(pipe.tokenizer, pipe.text_encoder, ["a disc"] * len(x0))
    t = torch.full((len(x0),), 150)
    x_t = pipe.scheduler.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(9)), t)
    signal = pipe.scheduler.alphas_cumprod[150].sqrt()
    with torch.no_grad():
        outputs = {"network": unet(x_t, t, states).sample, "refined": refined(x_t, t, states).sample}
    errors = {name: float((x - x0).square().mean().sqrt()) for name, x in outputs.items()}
    noise = float((x_t / signal - x0).square().mean().sqrt())
    assert errors["network"] > 0.5 and errors["refined"] < 0.5 * noise, (errors, noise)


def test_the_loss_by_hand():
    """Errors 1, -1, 3 and 5 have the mean square 9 and the mean size 2.5."""
    config = RefinerConfig(output_dir="out", squared_weight=2.0, detail_weight=4.0)
    output = torch.tensor([[1.0, -1.0, 3.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    assert refiner.refiner_loss(output, torch.zeros(2, 4), config).tolist() == [2 * 9 + 4 * 2.5, 0.0]


def test_what_it_cannot_train_is_refused(discs, make_pipeline, make_unet, tmp_path, monkeypatch):
    make_pipeline(unet=make_unet()).save_pretrained(tmp_path / "eps")
    with pytest.raises(
        ValueError, match="pretrained_model_name_or_path must be a pipeline of pixels that pre"
    ):
        train(monkeypatch, discs, tmp_path / "eps", tmp_path / "out")
    for name, value in {
        "num_samples": 0,
        "max_timestep": 0,
        "learning_rate": 0.0,
        "detail_weight": -1.0,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            RefinerConfig(output_dir="out", **{name: value}).check()
