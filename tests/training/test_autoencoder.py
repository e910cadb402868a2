"""The recipe of the autoencoder: what it minimises, and that it learns to give pictures back."""

import sys
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from places import ROOT
from torch.optim.optimizer import register_optimizer_step_pre_hook

from training import autoencoder
from training.autoencoder import Autoencoder, reconstruction_loss
from training.data.pictures import cache_pictures, load_pictures

EMOJI = ROOT / "tests" / "data" / "emoji64"
SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}


def test_one_forward_pass_gives_the_decoded_draw_and_the_kl():
    """Beside diffusers' own parts, and torch.distributions' KL summed over the latent."""
    torch.manual_seed(0)
    model = Autoencoder(**SMALL)
    theirs = AutoencoderKL(**SMALL)
    theirs.load_state_dict(model.state_dict())
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    decoded, kl = model(images, torch.Generator().manual_seed(1))
    posterior = theirs.encode(images).latent_dist
    eps = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    expected = theirs.decode(posterior.mean + posterior.std * eps).sample
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-6)
    normal = torch.distributions.Normal
    each = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    assert kl.item() == pytest.approx(each.sum(dim=(1, 2, 3)).mean().item() / (3 * 16 * 16), rel=1e-5)


def test_the_reconstruction_loss_by_hand():
    """A step of 1 between two halves, drawn flat: half the pixels are off by 1, one edge in each row is."""
    images = torch.zeros(1, 1, 4, 4)
    images[..., 2:] = 1.0
    flat = torch.zeros(1, 1, 4, 4)
    assert reconstruction_loss(flat, images).item() == pytest.approx(0.5 + 1 / 3)
    assert reconstruction_loss(images, images).item() == 0.0


def test_the_recipe_learns_and_measures_the_scale(monkeypatch, tmp_path, capsys):
    """150 steps on the committed pictures: nearer to them than their mean picture is, latents of unit
    variance by the saved scale, and a folder of diffusers' class."""
    arguments = {
        "output_dir": tmp_path / "run",
        "dataset": EMOJI,
        "cache_dir": tmp_path / "cache",
        "resolution": 16,
        "train_batch_size": 8,
        "max_train_steps": 150,
        "learning_rate": 3e-3,
        "seed": 3,
    }
    argv = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", ["autoencoder", *argv, "--block_out_channels", "16", "32"])
    autoencoder.main()
    assert "autoencoder saved in" in capsys.readouterr().out
    vae = AutoencoderKL.from_pretrained(tmp_path / "run" / "vae")
    data = load_pictures(str(EMOJI))
    cache = cache_pictures(data, 16, str(tmp_path / "cache"), "image", None)
    images = cache.images(list(range(len(cache))))
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        decoded = vae.decode(latents).sample
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert scaled.std().item() == pytest.approx(1.0, abs=0.01)
    assert scaled.mean().item() == pytest.approx(0.0, abs=0.01)
    error, blank = ((x - images).square().mean().item() for x in (decoded, images.mean(0)))
    assert error < 0.65 * blank, (error, blank)


def test_the_first_gradient_is_of_the_error_and_the_weighted_kl(monkeypatch, tmp_path):
    """Of one run's first step, beside autograd through diffusers' own class and torch.distributions' KL; with
    a KL weight of 0 the direction is another."""
    seen: dict[str, Any] = {}
    forward = Autoencoder.forward

    def watched(self, images, generator=None):
        if not seen:
            weights = {name: value.detach().clone() for name, value in self.state_dict().items()}
            seen.update(config=self.config, weights=weights, images=images, noise=generator.get_state())
        return forward(self, images, generator)

    def keep_gradients(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.setdefault("gradient", torch.cat([gradient.flatten() for gradient in gradients]))

    monkeypatch.setattr(Autoencoder, "forward", watched)
    arguments = {
        "output_dir": tmp_path / "run", "dataset": EMOJI, "cache_dir": tmp_path / "cache", "resolution": 16,
        "train_batch_size": 4, "max_train_steps": 1, "kl_weight": 0.3, "mixed_precision": "no",
    }  # fmt: skip
    argv = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", ["autoencoder", *argv, "--block_out_channels", "16", "16"])
    hook = register_optimizer_step_pre_hook(keep_gradients)
    try:
        autoencoder.main()
    finally:
        hook.remove()

    model, images = AutoencoderKL.from_config(seen["config"]), seen["images"]
    model.load_state_dict(seen["weights"])
    generator = torch.Generator()
    generator.set_state(seen["noise"])
    posterior = model.encode(images).latent_dist
    decoded = model.decode(
        posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    )
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    error = reconstruction_loss(decoded.sample, images)  # by hand above

    def direction(weight: float) -> torch.Tensor:  # gradients are clipped to a norm
        model.zero_grad()
        (error + weight * kl.sum() / images.numel()).backward(retain_graph=True)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        return gradient / gradient.norm()

    found = seen["gradient"] / seen["gradient"].norm()
    torch.testing.assert_close(found, direction(0.3), rtol=1e-3, atol=1e-4)
    assert (found - direction(0.0)).norm() > 0.01
