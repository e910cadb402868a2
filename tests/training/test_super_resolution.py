"""How the upsampler is trained, and how it is measured."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from evaluation_folders import clip_folder  # noqa: F401
from PIL import Image

from pipelines.chain.back_projection import enlarge
from pipelines.super_resolution import SuperResolutionPipeline
from training import super_resolution
from training.evaluation.judge import Judge
from training.evaluation.metrics import frechet_distance
from training.evaluation.upscaling import UpscalingConfig, cut_squares, perceptual_distance, psnr, upscaling
from training.super_resolution import SuperResolutionConfig, SuperResolutionLoss, blur, load_pairs

UNET = {
    "sample_size": 64, "in_channels": 6, "out_channels": 3, "patch_size": 4, "block_out_channels": [16, 16],
    "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    "mid_block_type": "UNetMidBlock2D", "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 1,
    "cross_attention_dim": 1, "class_embed_type": "timestep", "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> tuple[str, str]:
    """(large, small): 12 pictures of 64 x 64 and of 16 x 16, the second the first shrunk: coloured boxes with
    corners anywhere."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(12):
        pixels = np.full((64, 64, 3), 255, dtype=np.uint8)
        top, left, height, width = random.integers(4, 28, 4)
        pixels[top : top + height, left : left + width] = random.integers(0, 255, 3)
        pictures.append(Image.fromarray(pixels))
    home = tmp_path_factory.mktemp("pairs")
    for name, own in (("large", pictures), ("small", [picture.reduce(4) for picture in pictures])):
        columns = {
            "image": own,
            "caption": [[f"box {i}"] for i in range(12)],
            "hexcode": [str(i) for i in range(12)],
            "style": ["flat"] * 12,
        }
        kinds = datasets.Features(
            {
                "image": datasets.Image(),
                "caption": datasets.Sequence(datasets.Value("string")),
                "hexcode": datasets.Value("string"),
                "style": datasets.Value("string"),
            }
        )
        data = datasets.Dataset.from_dict(columns, features=kinds)
        parts = {"train": data.select(range(8)), "validation": data.select(range(8, 12))}
        datasets.DatasetDict(parts).save_to_disk(str(home / name))
    return str(home / "large"), str(home / "small")


@pytest.fixture
def pairs(folders: Any, tmp_path: Path) -> Any:
    return load_pairs(*folders, "train", 64, 16, str(tmp_path))


def make_config(folders: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "output_dir": str(folder / "run"), "dataset": folders[0], "low_dataset": folders[1],
        "cache_dir": str(folder / "cache"), "resolution": 64, "low_resolution": 16, "crop": 32, "unet": UNET,
        "noise_scheduler": {**COSINE, "prediction_type": "sample", "timestep_spacing": "trailing"},
        "low_res_scheduler": COSINE, "max_noise_level": 50, "train_batch_size": 4, "lr_warmup_steps": 1,
    }  # fmt: skip
    return settings | changes


def test_crops_are_of_the_same_place(pairs: Any):
    """A large crop, shrunk, is the small one; mirrored ones too; all places come up."""
    generator, seen = torch.Generator().manual_seed(0), set()
    whole = pairs.large.images(list(range(8)))
    for _ in range(200):
        x, y = pairs.crops(list(range(8)), 32, generator)
        assert x.shape == (8, 3, 32, 32) and y.shape == (8, 3, 8, 8)
        shrunk = torch.nn.functional.avg_pool2d(x, 4)
        assert (shrunk - y).abs().max() <= 1.01 / 127.5  # both are rounded to 8 bits
        for picture, crop in zip(whole, x, strict=True):
            for mirrored in (False, True):
                own = crop.flip(-1) if mirrored else crop
                for top in range(0, 33, 4):
                    for left in range(0, 33, 4):
                        if torch.equal(picture[:, top : top + 32, left : left + 32], own):
                            seen.add((top, left, mirrored))
    assert len(seen) == 2 * 9 * 9


def test_half_of_the_pictures_are_blurred():
    """Each by a Gaussian's own second moment, between 0 and max_blur squared."""
    y = torch.zeros(400, 3, 15, 15)
    y[:, :, 7, 7] = 1
    blurred = blur(y, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(blurred.sum((2, 3)), torch.ones(400, 3))
    offset = torch.arange(15) - 7.0
    variance = (blurred[:, 0].sum(1) * offset**2).sum(1)
    assert abs((variance == 0).float().mean() - 0.55) < 0.1  # half, and the widths below 0.1
    assert 0.8 < variance.max() <= 1.0


def test_the_loss_by_hand(folders: Any, pairs: Any, tmp_path: Path):
    """Noising by diffusers' schedulers, the sum and the mean absolute error written out."""
    config = SuperResolutionConfig(**make_config(folders, tmp_path))
    config.check()
    torch.manual_seed(0)
    unet = super_resolution.ConditionalUNet(**UNET)
    loss = SuperResolutionLoss(config, unet, pairs)
    x, y = pairs.crops([0, 3], 32, torch.Generator().manual_seed(1))
    t, level = torch.tensor([900, 10]), torch.tensor([0, 40])
    with torch.no_grad():
        found = loss.of(x, y, t, level, torch.Generator().manual_seed(2))
        generator, chain = torch.Generator().manual_seed(2), diffusers.DDPMScheduler(**COSINE)
        low = chain.add_noise(y, torch.randn(y.shape, generator=generator), level)
        x_t = chain.add_noise(x, torch.randn(x.shape, generator=generator), t)
        told = torch.nn.functional.interpolate(low, (32, 32), mode="bicubic", antialias=True)
        x0 = told + unet(torch.cat([x_t, told], dim=1), t, None, class_labels=level).sample
    torch.testing.assert_close(found, (x0 - x).abs().mean(), rtol=1e-5, atol=1e-6)
    draws = [loss([1, 2], step)[0].item() for step in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]


@pytest.fixture(scope="module")
def trained(folders: Any, tmp_path_factory: Any) -> Path:
    """60 steps, of which the last 20 are resumed."""
    folder = tmp_path_factory.mktemp("upsampler")
    for steps in (40, 60):
        config = make_config(
            folders, folder, max_train_steps=steps, checkpointing_steps=20, muon_learning_rate=5e-3,
            resume_from_checkpoint="latest" if steps > 40 else None, ema_decay=0.9,
        )  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["super_resolution", "--config", str(folder / "config.yaml")])
            super_resolution.main()
    return folder / "run"


def test_a_run_ends_in_a_pipeline_that_sharpens(trained: Path, folders: Any, tmp_path: Path):
    """On pictures that it never saw, boxes too: nearer to them than what it starts from."""
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-40", "checkpoint-60"]
    pipe = SuperResolutionPipeline.from_pretrained(trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.default_num_inference_steps == 4 and pipe.config.max_noise_level == 50
    held_out = load_pairs(*folders, "validation", 64, 16, str(tmp_path))
    x, y = held_out.large.images([0, 1, 2, 3]), held_out.small.images([0, 1, 2, 3])
    result = pipe(image=y / 2 + 0.5, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert (result * 2 - 1 - x).abs().mean() < 0.9 * (enlarge(y, 4) - x).abs().mean()


def test_settings_that_cannot_be(folders: Any, tmp_path: Path):
    for changes, message in (
        ({"low_resolution": 24}, "low_resolution must be a divisor of resolution, 64"),
        ({"crop": 30}, "crop must be a multiple of 4"),
        ({"crop": 128}, "crop must be a multiple of 4, 64 at most"),
        ({"max_blur": -1.0}, "max_blur must be 0 or more"),
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"train_batch_size": 0}, "train_batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SuperResolutionConfig(**make_config(folders, tmp_path, **changes)).check()
    with pytest.raises(ValueError, match="low_dataset must hold the pictures of"):
        other = datasets.load_from_disk(folders[1])
        other["train"] = other["train"].select(range(7, -1, -1))
        other.save_to_disk(str(tmp_path / "other"))
        load_pairs(folders[0], str(tmp_path / "other"), "train", 64, 16, str(tmp_path))


# ---- the measure ----


def test_squares_and_distances_by_hand():
    pictures = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).reshape(2, 3, 8, 12)
    squares = cut_squares(pictures, 4)
    assert len(squares) == 2 * 2 * 3
    assert torch.equal(squares[7], pictures[1, :, 0:4, 4:8]) and torch.equal(
        squares[-1], pictures[1, :, 4:, 8:]
    )
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[0] += 0.2
    b[1] += 0.02
    assert psnr(a, b) == pytest.approx((20 + 40) / 2, abs=1e-4)
    x = [torch.eye(4)[None, :2], torch.eye(4)[None, :2]]
    y = [torch.eye(4)[None, :2], -torch.eye(4)[None, :2]]
    assert perceptual_distance(x, y) == pytest.approx((0 + 4) / 2)


def test_the_command_measures_each_filter_and_the_model(
    trained: Path,
    folders: Any,
    clip_folder: Path,  # noqa: F811
    tmp_path: Path,
):
    config = UpscalingConfig(
        model=str(trained / "pipeline"), judge=str(clip_folder), dataset=folders[0], low_dataset=folders[1],
        cache_dir=str(tmp_path / "cache"), resolution=64, low_resolution=16, num_pictures=4,
        output=str(tmp_path / "sheet.png"),
    )  # fmt: skip
    config.check()
    figures = json.loads(json.dumps(upscaling(config)))
    ours = figures[str(trained / "pipeline")]
    assert figures["pictures"] == 4 and 0 < figures["squares"] < 4 * 16
    # boxes shrink to what was given, whichever filter only repeats pixels; a wide one does not
    assert figures["box"]["shrunk, from the small picture"] == pytest.approx(0, abs=1e-4)
    assert (
        ours["shrunk, from the small picture"] < 0.5 < figures["bilinear"]["shrunk, from the small picture"]
    )
    large = load_pairs(*folders, "validation", 64, 16, str(tmp_path)).large
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
    real = large.images(order)
    nearest = torch.nn.functional.interpolate(
        torch.nn.functional.avg_pool2d(real, 4).mul(127.5).round().div(127.5), scale_factor=4.0
    )
    assert figures["nearest"]["PSNR"] == pytest.approx(psnr(nearest, real), abs=0.2)
    assert ours["PSNR"] > figures["bicubic"]["PSNR"]
    # the Frechet distance, of squares cut one by one where the real picture has an edge
    small = load_pairs(*folders, "validation", 64, 16, str(tmp_path)).small.images(order)
    repeated = small.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    judge, kept = Judge(str(clip_folder)), {"real": [], "nearest": []}
    for picture, other in zip(real, repeated, strict=True):
        for top in range(0, 64, 16):
            for left in range(0, 64, 16):
                place = np.s_[:, top : top + 16, left : left + 16]
                if picture[place].std() > 0.05:
                    kept["real"].append(picture[place])
                    kept["nearest"].append(other[place])
    embeds = {name: judge.embed_images(torch.stack(squares)) for name, squares in kept.items()}
    assert figures["squares"] == len(kept["real"])
    expected = frechet_distance(embeds["nearest"], embeds["real"])
    assert figures["nearest"]["Frechet distance"] == pytest.approx(expected, rel=1e-3) and expected > 1e-3
    assert len({figures[way]["Frechet distance"] for way in ("nearest", "bicubic", config.model)}) == 3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 64 and sheet.height > 4 * 64
    with pytest.raises(ValueError, match="model '.*nosuch'"):
        upscaling(UpscalingConfig(**(vars(config) | {"model": str(tmp_path / "nosuch")})))
    with pytest.raises(ValueError, match="resolution must be 4 times low_resolution"):
        upscaling(UpscalingConfig(**(vars(config) | {"low_resolution": 32})))
