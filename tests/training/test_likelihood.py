"""The three losses of Improved DDPM through the real recipe: trained, saved, loaded, drawn from, resumed."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers import DDPMScheduler as DiffusersDDPM
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from pipelines import DDPMScheduler, TextToImagePipeline
from training import text_to_image
from training.data.caches import cache_text
from training.data.pictures import PictureCache
from training.objectives.denoising import DenoisingLoss, diffusion_loss, draw_noise
from training.objectives.losses import LossAwareTimesteps
from training.run.building import build_pipeline
from training.text_to_image import TextToImageConfig

T = 100
VARIANCE = {"simple": "fixed_small", "hybrid": "learned_range", "vlb": "learned_range"}


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module", autouse=True)
def one_machine(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
        reset_accelerate()


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tokenizer, make_text_encoder) -> Path:
    """A tiny CLIP and eight random pictures of 16 x 16."""
    folder = tmp_path_factory.mktemp("sources")
    make_text_encoder().save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    (folder / "pictures").mkdir()
    lines = []
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"cat {number}"}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def settings(folder: Path, sources: Path, loss: str, timesteps: int = T, **changes: Any) -> dict[str, Any]:
    unet = {"sample_size": 16, "in_channels": 3, "patch_size": 2, "layers_per_block": 1}
    unet |= {"block_out_channels": [16, 32], "attention_head_dim": 4, "norm_num_groups": 8}
    unet |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "cross_attention_dim": 32}
    unet |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
    unet["out_channels"] = 3 if loss == "simple" else 6
    scheduler = {"num_train_timesteps": timesteps, "beta_schedule": "squaredcos_cap_v2"}
    config = {
        "output_dir": str(folder / "run"), "cache_dir": str(folder / "cache"), "report_to": "none",
        "text_encoder": str(sources / "clip"), "train_data_dir": str(sources / "pictures"),
        "unet": unet, "noise_scheduler": scheduler | {"variance_type": VARIANCE[loss]},
        "prediction_type": "epsilon", "loss": loss, "snr_gamma": None, "train_batch_size": 4,
        "learning_rate": 1e-3, "lr_warmup_steps": 0, "checkpointing_steps": 12,
    }  # fmt: skip
    return config | changes


def train(config: dict[str, Any], *arguments: object) -> None:
    """`python -m training.text_to_image --config FILE`, in this process."""
    reset_accelerate()
    file = Path(config["output_dir"]).parent / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["text_to_image", "--config", str(file), *map(str, arguments)])
        text_to_image.main()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


# ------------------------------------------------------------ values


def bound_by_hand(output: torch.Tensor, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """T L_t in bits per dimension, for eps and a learned range, in float64: from diffusers' chain, by
    torch.distributions, its last term by the difference of two cumulative probabilities."""
    theirs = DiffusersDDPM(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2")
    abar = torch.cat([torch.ones(1), theirs.alphas_cumprod]).double()[torch.stack([t, t + 1])]  # prev, t
    abar_prev, abar_t = abar.reshape(2, -1, 1, 1, 1)
    beta, alpha = 1 - abar_t / abar_prev, abar_t / abar_prev

    def mean(x0: torch.Tensor) -> torch.Tensor:
        own = abar_prev.sqrt() * beta * x0 + alpha.sqrt() * (1 - abar_prev) * x_t.double()
        return own / (1 - abar_t)

    first = theirs.alphas_cumprod.double()[:2]
    smallest = (1 - first[0]) / (1 - first[1]) * (1 - first[1] / first[0])
    small = ((1 - abar_prev) / (1 - abar_t) * beta).clamp(min=smallest)
    eps, v = output.double().chunk(2, dim=1)
    predicted = (x_t.double() - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    std = torch.exp(((v + 1) / 2 * beta.log() + (1 - v) / 2 * small.log()) / 2)
    p = Normal(mean(predicted), std)
    kl = kl_divergence(Normal(mean(x0.double()), small.sqrt()), p)
    half = 1 / 255
    upper = torch.where(x0 > 1 - half, 1.0, p.cdf(x0.double() + half))
    lower = torch.where(x0 < -1 + half, 0.0, p.cdf(x0.double() - half))
    nll = -(upper - lower).clamp(min=1e-300).log()
    nats = torch.where((t == 0).reshape(-1, 1, 1, 1), nll, kl)
    return T * nats.mean((1, 2, 3)) / np.log(2)


@pytest.mark.parametrize("kind", ["hybrid", "vlb"])
def test_the_loss_by_hand(kind, make_pipeline, make_unet, tmp_path):
    """simple + 0.001 T L_t, or T L_t, at t = 0 too; within 1e-3, in float32 over float64."""
    scheduler = DDPMScheduler(
        num_train_timesteps=T, beta_schedule="squaredcos_cap_v2", variance_type="learned_range"
    )
    pipe = make_pipeline(unet=make_unet(out_channels=6), scheduler=scheduler)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    pictures = PictureCache(pixels, ["", "cat"], [[1]] * 4, {})
    text = cache_text(pictures.captions, pipe.tokenizer, pipe.text_encoder, tmp_path)
    config = TextToImageConfig(output_dir=str(tmp_path), loss=kind, snr_gamma=None)
    loss = DenoisingLoss(config, pipe, pipe.unet, pictures, text)
    x0 = pictures.images(list(range(4)))
    eps, t = draw_noise(0, 0, (4, 3, 16, 16), T, 0, 1)[0], torch.tensor([0, 5, 50, 99])
    mean, details = loss.loss(x0, ["cat"] * 4, eps, t)
    x_t = scheduler.add_noise(x0, eps, t)
    with torch.no_grad():
        output = pipe.unet(x_t, t, text(["cat"] * 4)[0]).sample
    expected = bound_by_hand(output, x0, x_t, t)
    assert expected.min() > 0.01  # each term is one to be seen
    if kind == "hybrid":
        simple = ((output[:, :3] - eps) ** 2).mean((1, 2, 3)).double()
        assert (0.001 * expected > 0.01 * simple).any()
        expected = simple + 0.001 * expected
    torch.testing.assert_close(details["per_sample"].double(), expected, rtol=1e-3, atol=1e-4)
    assert float(mean.detach()) == pytest.approx(float(details["per_sample"].mean()), rel=1e-6)


def test_loss_aware_timesteps_leave_the_mean_as_it_is(make_pipeline, make_unet, tmp_path, monkeypatch):
    """Each draw counts 1/(T p_t) times: after the history is full, the mean over draws is that over all t.

    T = 2 of which one is drawn 9 times in 10, and a loss of t + 1: 1.5 within four standard errors, where the
    loss without weights would be 1.9. The sampler is told the losses themselves.
    """
    scheduler = DDPMScheduler(num_train_timesteps=2, beta_schedule="squaredcos_cap_v2")
    pipe = make_pipeline(unet=make_unet(), scheduler=scheduler)
    pictures = PictureCache(np.zeros((50, 3, 16, 16), np.uint8), ["", "cat"], [[1]] * 50, {})
    text = cache_text(pictures.captions, pipe.tokenizer, pipe.text_encoder, tmp_path)
    config = TextToImageConfig(output_dir=str(tmp_path), loss="vlb")
    sampler = LossAwareTimesteps(2)
    sampler.update(torch.tensor([0, 1] * 10), torch.tensor([1.0, 9.0] * 10))
    loss = DenoisingLoss(config, pipe, pipe.unet, pictures, text, timesteps=sampler)
    told = []
    monkeypatch.setattr(sampler, "update", lambda t, losses: told.append((t, losses)))
    monkeypatch.setattr(loss, "criterion", Fake())
    with torch.no_grad():
        means = torch.stack([loss(list(range(50)), step)[0] for step in range(30)])
    drawn, losses = (torch.cat(parts) for parts in zip(*told, strict=True))
    share = (drawn == 1).double().mean()
    assert share == pytest.approx(0.9, abs=4 * (0.09 / 1500) ** 0.5)
    assert torch.equal(losses, drawn + 1.0)
    # p = (0.1, 0.9): a weighted draw is 1/(2 * 0.1) = 5 or 2/(2 * 0.9) = 1.11, of deviation 1.17
    assert float(means.mean()) == pytest.approx(1.5, abs=4 * 1.17 / 1500**0.5)


class Fake:
    """A loss of t + 1, in the place of the U-Net's."""

    kind = "vlb"

    def __call__(self, output: Any, target: Any, x0: Any, x_t: Any, t: torch.Tensor, weight: Any) -> Any:
        assert weight is None
        return t + 1.0


# ------------------------------------------------------------ whole runs


@pytest.mark.parametrize("loss", ["simple", "hybrid", "vlb"])
def test_trained_saved_loaded_and_drawn_from(loss, sources, tmp_path):
    """Every channel of the output learns, and from the saved folder diffusers' scheduler draws the same.

    `leading` timesteps, whose last step is t = 0; within 2e-3 of [0, 1], as rounding adds up over 100 steps.
    """
    config = settings(tmp_path, sources, loss, max_train_steps=6, use_ema=False)
    train(config)
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.variance_type == VARIANCE[loss]
    assert pipe.unet.config.out_channels == (3 if loss == "simple" else 6)
    set_seed(0)
    start = build_pipeline(TextToImageConfig(**config)).unet.state_dict()
    moved = (pipe.unet.conv_out.weight - start["conv_out.weight"]).abs().amax((1, 2, 3))
    assert len(moved) == 4 * pipe.unet.config.out_channels and (moved > 1e-4).all()
    theirs = DiffusersDDPM.from_config(pipe.scheduler.config)
    for steps in (10, 25, 50, 100):
        drawn = []
        for scheduler in (pipe.scheduler, theirs):
            other = TextToImagePipeline(**(pipe.components | {"scheduler": scheduler}))
            other.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            call = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "pt"}
            drawn.append(other("cat 3", generator=generator, **call).images)
        assert drawn[0].std() > 0.05
        torch.testing.assert_close(*drawn, rtol=0, atol=2e-3)


def test_vlb_resumes_bit_for_bit_with_what_it_knows_of_the_timesteps(sources, tmp_path):
    """T = 4: after 12 steps of 4 pictures every t has its ten losses. 24 steps at a stretch, or 12 and 12."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    train(settings(whole, sources, "vlb", 4, max_train_steps=24))
    config = settings(parts, sources, "vlb", 4, max_train_steps=18, checkpointing_steps=18)
    train(config)
    saved = torch.load(parts / "run" / "checkpoint-18" / "custom_checkpoint_0.pkl", weights_only=True)
    sampler = LossAwareTimesteps(4)
    sampler.load_state_dict(saved)
    p = sampler.probabilities()
    assert (saved["counts"] == 10).all() and p.max() > 1.5 * p.min()  # so what is drawn depends on it
    train(config, "--max_train_steps", 24, "--resume_from_checkpoint", "latest")
    for part in ("pipeline/unet", "checkpoint-24/unet"):
        torch.testing.assert_close(
            weights(parts / "run" / part), weights(whole / "run" / part), rtol=0, atol=0
        )
    kept = [
        torch.load(f / "run" / "checkpoint-24" / "custom_checkpoint_0.pkl", weights_only=True)
        for f in (whole, parts)
    ]
    torch.testing.assert_close(*kept, rtol=0, atol=0)


def test_a_run_with_another_loss_is_not_resumed(sources, tmp_path):
    """vlb of a fixed variance has the U-Net of simple, but not what simple's checkpoint lacks."""
    train(settings(tmp_path, sources, "simple", max_train_steps=1))
    arguments = ["--loss", "vlb", "--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="resume_from_checkpoint must be of a run with loss vlb"):
        train(settings(tmp_path, sources, "simple"), *arguments)


@pytest.mark.parametrize(
    "loss, changes, message",
    [
        ("hybrid", {"out_channels": 3}, "out_channels must be 6 with variance_type='learned_range', got 3"),
        ("vlb", {"out_channels": 3}, "out_channels must be 6"),
        ("simple", {"out_channels": 6}, "out_channels must be 3 with variance_type='fixed_small', got 6"),
        ("simple", {"variance_type": "learned_range"}, "loss must be hybrid or vlb"),
        ("hybrid", {"variance_type": "fixed_small"}, "variance_type must be one of .*'fixed_small'"),
        ("other", {}, "loss must be one of simple, hybrid, vlb, got 'other'"),
    ],
)
def test_misfits_are_told_before_the_data_is_read(loss, changes, message, sources, tmp_path):
    config = settings(tmp_path, sources, loss if loss in VARIANCE else "simple", max_train_steps=1)
    config |= {"loss": loss, "train_data_dir": str(tmp_path / "nowhere")}
    for name, value in changes.items():
        config["unet" if name == "out_channels" else "noise_scheduler"][name] = value
    with pytest.raises(ValueError, match=message):
        train(config)


def test_the_bound_is_of_pixels(make_pipeline, make_unet):
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4)
    scheduler = DDPMScheduler(variance_type="learned_range")
    pipe = make_pipeline(unet=make_unet(out_channels=6), scheduler=scheduler, vae=vae)
    with pytest.raises(ValueError, match="loss must be simple with a VAE.*'hybrid'"):
        diffusion_loss("hybrid", pipe)
