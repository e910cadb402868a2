"""Train a small AutoencoderKL: the space that latent diffusion works in (Rombach 2022).

    accelerate launch -m training.autoencoder --config training/configs/autoencoder.yaml

The class is diffusers' own; here are the loss and the recipe. The scaling factor that brings the latents to
unit variance is measured on the training pictures and saved in the config.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from training.data.pictures import StepBatchSampler, cache_pictures, concept_weights, load_pictures, seed_for
from training.run.loop import Checkpoints, fit, make_accelerator
from training.run.settings import parse_config, run


@dataclass
class AutoencoderConfig:
    """Settings of `training.autoencoder`."""

    output_dir: str = field(metadata={"help": "Checkpoints and the trained autoencoder go here."})
    dataset: str = field(
        default="data/emoji", metadata={"help": "Saved data set, picture folder or Hub name."}
    )
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the captions (unused, but cached); caption or text."}
    )
    cache_dir: str = field(default="data/cache", metadata={"help": "Decoded pictures, computed once."})
    resolution: int = field(default=64, metadata={"help": "Side of the pictures, in pixels."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [32, 64, 128, 128], metadata={"help": "Width of each level."}
    )
    latent_channels: int = field(default=8, metadata={"help": "Channels of the latent."})
    kl_weight: float = field(
        default=1e-5, metadata={"help": "Weight of KL(q(z given x), N(0, I)), per pixel."}
    )
    train_batch_size: int = field(default=16, metadata={"help": "Pictures for each process and step."})
    max_train_steps: int = field(default=4000, metadata={"help": "Optimizer steps."})
    max_train_minutes: float | None = field(
        default=None, metadata={"help": "Stop after so much CPU time of this process."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak of the cosine schedule."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16, bf16, or auto: bf16 if fast here; default accelerate's."}
    )
    checkpointing_steps: int = field(default=500, metadata={"help": "Save every so many steps."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "'latest' or a folder."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, batches and latent noise."})


class Autoencoder(AutoencoderKL):
    """AutoencoderKL with all that training needs in one forward pass, so that processes share gradients."""

    def forward(  # type: ignore[override]
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (pictures decoded from a draw of q(z given x), KL(q, N(0, I)) per value of x)."""
        posterior = self.encode(images).latent_dist
        decoded = self.decode(posterior.sample(generator)).sample
        return decoded, posterior.kl().mean() / images[0].numel()


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of the picture and, as much again, of its differences between neighbours: flat art
    lives by its edges, and the plain error blurs them."""
    edges = F.l1_loss(decoded.diff(dim=-1), images.diff(dim=-1)) + F.l1_loss(
        decoded.diff(dim=-2), images.diff(dim=-2)
    )
    return F.l1_loss(decoded, images) + edges


def main() -> None:
    config = parse_config(AutoencoderConfig)
    accelerator = make_accelerator(config.output_dir, config.mixed_precision)
    set_seed(config.seed)
    data = load_pictures(config.dataset)
    cache = cache_pictures(data, config.resolution, config.cache_dir, "image", config.caption_column)
    levels = len(config.block_out_channels)
    vae = Autoencoder(
        sample_size=config.resolution,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=16,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=100, num_training_steps=config.max_train_steps
    )
    model, optimizer, schedule = accelerator.prepare(
        vae.to(memory_format=torch.channels_last), optimizer, schedule
    )
    checkpoints = Checkpoints(accelerator, config.output_dir, "vae", limit=1)
    start = checkpoints.resume(config.resume_from_checkpoint)
    weights = concept_weights(cache.columns["concept"]) if "concept" in cache.columns else None
    rank, world = accelerator.process_index, accelerator.num_processes
    sampler = StepBatchSampler(len(cache), config.train_batch_size, config.seed, weights, start, rank, world)

    def compute_loss(indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        images = cache.images(indices).to(accelerator.device, memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(seed_for(config.seed, "latent", step, rank))
        decoded, kl = model(images, generator)
        reconstruction = reconstruction_loss(decoded.float(), images)
        return reconstruction + config.kl_weight * kl, {"reconstruction": float(reconstruction.detach())}

    bar = tqdm(
        total=config.max_train_steps,
        initial=start,
        disable=not accelerator.is_main_process,
        unit="step",
        mininterval=10,
    )
    began = time.process_time()
    for result in fit(
        accelerator, model, optimizer, schedule, iter(sampler), compute_loss,
        max_train_steps=config.max_train_steps, start_step=start, seed=config.seed,
    ):  # fmt: skip
        bar.update()
        bar.set_postfix(loss=f"{result.details['reconstruction']:.4f}", refresh=False)
        out_of_time = (
            config.max_train_minutes is not None
            and (time.process_time() - began) / 60 > config.max_train_minutes
        )
        if (
            out_of_time
            or result.step % config.checkpointing_steps == 0
            or result.step == config.max_train_steps
        ):
            checkpoints.save(result.step)
        if out_of_time:
            break
    if accelerator.is_main_process:
        finish(accelerator.unwrap_model(model).eval(), cache, Path(config.output_dir))


@torch.no_grad()
def finish(vae: AutoencoderKL, cache: Any, output: Path) -> None:
    """Measure the latents' scale and the reconstruction on 512 pictures, then save."""
    images = cache.images(torch.randperm(len(cache), generator=torch.Generator().manual_seed(0))[:512])
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(64)])
    mse = ((decoded.clamp(-1, 1) - images) / 2).pow(2).mean()
    plain = AutoencoderKL.from_config(vae.config)  # so that the saved config names diffusers' class
    plain.load_state_dict(vae.state_dict())
    plain.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    plain.save_pretrained(str(output / "vae"))
    print(f"autoencoder saved in {output / 'vae'}: PSNR {-10 * mse.log10():.2f} dB, std {latents.std():.2f}")


if __name__ == "__main__":
    run(main, "training.autoencoder")
