"""Train a small AutoencoderKL, whose latents are the space of latent diffusion (Rombach 2022).

    accelerate launch -m training.autoencoder --config training/configs/autoencoder.yaml

The class is diffusers' own. The shift and scaling factor that give the latents zero mean and unit variance
are measured on training pictures and saved in the config.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch import Tensor

from pipelines.folders.files import written_aside
from training.data.pictures import PictureCache, cache_pictures, load_pictures, seed_for
from training.run.loop import Training
from training.run.settings import (
    ColumnSettings,
    PictureSettings,
    RunSettings,
    TimeSettings,
    parse_config,
    run_command,
    setting,
)
from training.run.start import Run


class AutoencoderConfig(RunSettings, PictureSettings, ColumnSettings, TimeSettings):
    """Settings of `training.autoencoder`."""

    block_out_channels: list[int] = setting("Width of each level.", [32, 64, 128, 128])
    latent_channels: int = setting("Channels of the latent.", 8, "at least 1")
    kl_weight: float = setting("Weight of KL(q(z|x), N(0, I)), per value of x.", 1e-5, "0 or more")
    train_batch_size: int = 16
    max_train_steps: int = 4000


class Autoencoder(AutoencoderKL):
    """AutoencoderKL with one forward pass for all of training, so that processes can average gradients."""

    def forward(  # type: ignore[override]
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (pictures decoded from z ~ q(z|x), KL(q(z|x), N(0, I)) per value of x)."""
        posterior = self.encode(images).latent_dist
        decoded = self.decode(posterior.sample(generator)).sample
        return decoded, posterior.kl().mean() / images[0].numel()


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of the pictures, plus the mean absolute errors of the differences between
    horizontal and between vertical neighbours: sharp edges are essential to flat art, and the plain error
    blurs them."""
    across, down = (F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (-1, -2))
    return F.l1_loss(decoded, images) + (across + down)


class AutoencoderLoss:
    """The loss of one micro-batch: reconstruction_loss + kl_weight KL. The latent noise depends only on the
    seed, the step and the process."""

    def __init__(self, config: AutoencoderConfig, vae: torch.nn.Module, pictures: PictureCache, run: Run):
        self.config, self.vae, self.pictures, self.run = config, vae, pictures, run

    def __call__(self, indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        images = self.pictures.images(indices).to(self.run.device, memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(seed_for(self.config.seed, "latent", step, self.run.rank))
        decoded, kl = self.vae(images, generator)
        reconstruction = reconstruction_loss(decoded.float(), images)
        loss = reconstruction + self.config.kl_weight * kl
        return loss, {"reconstruction": float(reconstruction.detach())}


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    levels = len(config.block_out_channels)
    return Autoencoder(
        sample_size=config.resolution, latent_channels=config.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.block_out_channels), layers_per_block=1,
        norm_num_groups=16, mid_block_add_attention=False,
    )  # fmt: skip


def main() -> None:
    config = parse_config(AutoencoderConfig)
    config.check()
    run = Run(config)
    data = load_pictures(config.dataset)
    pictures = cache_pictures(data, config.resolution, config.cache_dir, "image", config.caption_column)
    vae = build_autoencoder(config).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    total = config.max_train_steps
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=total)
    training = Training(run, [vae], optimizer, schedule, "vae", total)
    loss = AutoencoderLoss(config, training.models[0], pictures, run)
    batches = run.batches(pictures, training.start)
    for _ in training.steps(batches, loss, max_train_minutes=config.max_train_minutes):
        pass
    if run.is_main:
        finish(run.accelerator.unwrap_model(training.models[0]).eval(), pictures, run.output)
    run.accelerator.end_training()


@torch.no_grad()
def finish(vae: AutoencoderKL, cache: Any, output: Path) -> None:
    """Measure the latents' mean and scale and the reconstruction error on 512 pictures, then save."""
    images = cache.images(torch.randperm(len(cache), generator=torch.Generator().manual_seed(0))[:512])
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(64)])
    mse = ((decoded.clamp(-1, 1) - images) / 2).pow(2).mean()
    plain = AutoencoderKL.from_config(vae.config)  # so that the saved config names diffusers' class
    plain.load_state_dict(vae.state_dict())
    plain.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    with written_aside(output / "vae") as partial:
        plain.save_pretrained(str(partial))
    print(f"autoencoder saved in {output / 'vae'}: PSNR {-10 * mse.log10():.2f} dB, std {latents.std():.2f}")


if __name__ == "__main__":
    run_command(main, "training.autoencoder")
