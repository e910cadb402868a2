"""Train an upsampler: a diffusion model of large pictures that is told the small one (Saharia 2021, "SR3").

    python -m training.emoji --output_dir data/emoji-256 --resolution 256
    accelerate launch -m training.super_resolution --config training/configs/super_resolution.yaml

Pairs are drawn from the vector art at both sizes: `training.emoji` builds a data set of each, with the same
pictures in the same order. The U-Net is convolutional and is trained on crops, so it runs on any size. What
it is told is the small picture y, blurred and noised by a random level that it is told too (Ho 2021,
"Cascaded diffusion models", section 4.2), enlarged by E of `pipelines.chain.back_projection`; it predicts what that
lacks:

    y_s = sqrt(abar_s) blur(y) + sqrt(1 - abar_s) eps',  x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps
    loss = mean |E(y_s) + U-Net([x_t, E(y_s)], t, s) - x|                 SR3, equation 6 with p = 1, for x0

A colour is the enlarged input's own in this way, from the first step on, and the network draws edges.
"""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from pipelines import ConditionalUNet, DDPMScheduler
from pipelines.chain.back_projection import enlarge
from pipelines.super_resolution import SuperResolutionPipeline
from training.data.pictures import (
    PictureCache,
    StepBatchSampler,
    cache_pictures,
    concept_weights,
    load_pictures,
    seed_for,
)
from training.run.building import as_mapping, compile_blocks
from training.run.loop import Checkpoints, fit, make_accelerator
from training.run.optimizers import OPTIMIZERS, add_decay, make_optimizer
from training.run.settings import parse_config, require, run

BLUR_KERNEL = 7  # pixels of the small picture: three standard deviations of the widest blur to each side


@dataclass
class SuperResolutionConfig:
    """Settings of `training.super_resolution`."""

    output_dir: str = field(metadata={"help": "Checkpoints, samples and the trained pipeline go here."})
    dataset: str = field(default="data/emoji-256", metadata={"help": "Data set of the large pictures."})
    low_dataset: str = field(default="data/emoji", metadata={"help": "The same pictures, small."})
    cache_dir: str = field(default="data/cache", metadata={"help": "Decoded pictures, computed once."})
    resolution: int = field(default=256, metadata={"help": "Side of the large pictures, in pixels."})
    low_resolution: int = field(default=64, metadata={"help": "Side of the small ones; divides the former."})
    crop: int = field(default=128, metadata={"help": "Side of the crops that are trained on, large pixels."})
    unet: Any = field(
        default=None, metadata={"help": "Config of the ConditionalUNet: mapping, JSON or file."}
    )
    noise_scheduler: Any = field(default=None, metadata={"help": "Config of the chain of the picture."})
    low_res_scheduler: Any = field(
        default=None, metadata={"help": "Config of the chain that noises its input."}
    )
    max_noise_level: int = field(
        default=200, metadata={"help": "Noisiest timestep of that chain that is used."}
    )
    max_blur: float = field(
        default=1.0, metadata={"help": "Widest blur, standard deviation in small pixels."}
    )
    optimizer: str = field(default="muon", metadata={"help": f"One of {', '.join(OPTIMIZERS)}."})
    learning_rate: float = field(default=4e-4, metadata={"help": "AdamW's."})
    muon_learning_rate: float = field(default=1e-3, metadata={"help": "Muon's."})
    lr_warmup_steps: int = field(default=100, metadata={"help": "Steps in which the rate rises from 0."})
    lr_decay_steps: int = field(default=0, metadata={"help": "Last steps, in which it falls to 0."})
    train_batch_size: int = field(default=16, metadata={"help": "Crops for each process and step."})
    max_train_steps: int = field(default=10000, metadata={"help": "Optimizer steps."})
    max_train_minutes: float | None = field(
        default=None, metadata={"help": "Stop after so much CPU time of this process."}
    )
    ema_decay: float = field(default=0.999, metadata={"help": "1 - (1 + step)^(-3/4) until that is reached."})
    num_inference_steps: int = field(default=4, metadata={"help": "Of the saved pipeline's calls."})
    noise_level: int = field(default=0, metadata={"help": "Likewise."})
    compile: bool = field(default=False, metadata={"help": "torch.compile the U-Net."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16, bf16, or auto: bf16 if fast here; default accelerate's."}
    )
    checkpointing_steps: int = field(
        default=200, metadata={"help": "Save, and measure, every so many steps."}
    )
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "'latest' or a folder."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, batches, crops and noise."})

    @property
    def scale(self) -> int:
        return self.resolution // self.low_resolution

    def check(self) -> None:
        """Raise a ValueError that names the argument, for everything that can be told before work starts."""
        sides, patch = (
            (self.resolution, self.low_resolution),
            as_mapping(self.unet, "unet").get("patch_size", 1),
        )
        require(
            0 < self.low_resolution < self.resolution and self.resolution % self.low_resolution == 0,
            "low_resolution", self.low_resolution, f"a divisor of resolution, {self.resolution}",
        )  # fmt: skip
        unit = max(patch, self.scale)
        require(
            unit % min(patch, self.scale) == 0,
            "unet.patch_size",
            patch,
            f"a factor or multiple of {self.scale}",
        )
        fits = 0 < self.crop <= min(sides[0], self.resolution) and self.crop % unit == 0
        require(fits, "crop", self.crop, f"a multiple of {unit}, {self.resolution} at most")
        require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {OPTIMIZERS}")
        require(self.max_blur >= 0, "max_blur", self.max_blur, "0 or more")
        for name in ("train_batch_size", "max_train_steps", "checkpointing_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


# ------------------------------------------------------------ data


@dataclass
class Pairs:
    """Pictures at two sizes, row by row the same."""

    large: PictureCache
    small: PictureCache

    def __len__(self) -> int:
        return len(self.large)

    def crops(self, indices: list[int], side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random squares of the pictures, half of them mirrored: (B, 3, side, side), and (B, 3, h, h) of the
        same place in the small ones. Both in [-1, 1]."""
        large, small = self.large.images(indices), self.small.images(indices)
        scale = large.shape[-1] // small.shape[-1]
        h, room = side // scale, small.shape[-1] - side // scale + 1
        corners = torch.randint(0, room, (len(indices), 2), generator=generator).tolist()
        mirror = torch.rand(len(indices), generator=generator) < 0.5
        x = torch.stack(
            [
                p[:, scale * i : scale * i + side, scale * j : scale * j + side]
                for p, (i, j) in zip(large, corners, strict=True)
            ]
        )
        y = torch.stack([p[:, i : i + h, j : j + h] for p, (i, j) in zip(small, corners, strict=True)])
        x[mirror], y[mirror] = x[mirror].flip(-1), y[mirror].flip(-1)
        return x, y


def load_pairs(
    dataset: str, low_dataset: str, split: str, resolution: int, low_resolution: int, cache_dir: str
) -> Pairs:
    """The split at both sizes.

    Raises:
        ValueError: the data sets differ in other things than size.
    """
    sizes = ((dataset, resolution), (low_dataset, low_resolution))
    large, small = (
        cache_pictures(load_pictures(name, split), side, cache_dir, "image", "caption")
        for name, side in sizes
    )
    for column in ("hexcode", "style", "caption"):
        if large.columns.get(column) != small.columns.get(column) or len(large) != len(small):
            raise ValueError(
                f"low_dataset must hold the pictures of {dataset!r} in their order, and {low_dataset!r} does "
                f"not ({column} differs): build both with training.emoji, alike but for --resolution"
            )
    return Pairs(large, small)


def blur(y: Tensor, max_blur: float, generator: torch.Generator) -> Tensor:
    """Half of the pictures blurred by a Gaussian of a random width, up to `max_blur` pixels."""
    widths = (torch.rand(len(y), generator=generator) * 2 - 1) * max_blur  # below 0: none
    return torch.stack(
        [
            gaussian_blur(p, [BLUR_KERNEL] * 2, [w] * 2) if w > 0.1 else p
            for p, w in zip(y, widths.tolist(), strict=True)
        ]
    )


# ------------------------------------------------------------ the loss


class SuperResolutionLoss:
    """The loss of one micro-batch, from picture indices to a scalar; see the head of this file.

    Every draw is a function of (seed, step) and the place in the global batch alone.
    """

    def __init__(
        self, config: SuperResolutionConfig, unet: Any, pairs: Pairs, rank: int = 0, world: int = 1
    ) -> None:
        self.config, self.unet, self.pairs, self.rank, self.world = config, unet, pairs, rank, world
        self.chain = DDPMScheduler(**as_mapping(config.noise_scheduler, "noise_scheduler"))
        self.low_chain = DDPMScheduler(**as_mapping(config.low_res_scheduler, "low_res_scheduler"))

    def __call__(self, indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed_for(self.config.seed, "noise", step, self.rank))
        count, chain = len(indices), self.chain
        x, y = self.pairs.crops(indices, self.config.crop, generator)
        # squared: half of the levels are in the lowest quarter, where drawn pictures need them
        level = (torch.rand(count, generator=generator).square() * (self.config.max_noise_level + 1)).long()
        t = torch.randint(0, len(chain), (count,), generator=generator)
        return self.of(x, blur(y, self.config.max_blur, generator), t, level, generator), {}

    def of(self, x: Tensor, y: Tensor, t: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
        """The loss at timesteps t and noise levels `level`, (B,) both, of large x and small y."""
        y = self.low_chain.add_noise(y, torch.randn(y.shape, generator=generator), level)
        x_t = self.chain.add_noise(x, torch.randn(x.shape, generator=generator), t)
        told = enlarge(y, self.config.scale)  # (B, 3, side, side)
        joined = torch.cat([x_t, told], dim=1).contiguous(memory_format=torch.channels_last)
        lacks = self.unet(joined, t, None, class_labels=level).sample
        return (told + lacks.float() - x).abs().mean()


@torch.no_grad()
def validation_loss(loss: SuperResolutionLoss, pairs: Pairs) -> dict[str, float]:
    """The loss on fixed crops and noise of 64 pictures by timestep, at noise level 0, and E's alone."""
    indices = torch.linspace(0, len(pairs) - 1, min(64, len(pairs))).long().tolist()
    generator = torch.Generator().manual_seed(0)
    x, y = pairs.crops(indices, loss.config.crop, generator)
    level = torch.zeros(len(indices), dtype=torch.long)
    figures = {"enlarged alone": float((enlarge(y, loss.config.scale) - x).abs().mean())}
    for t in (len(loss.chain) - 1, len(loss.chain) // 2, len(loss.chain) // 10):
        figures[f"t {t}"] = float(loss.of(x, y, torch.full_like(level, t), level, generator))
    return figures


# ------------------------------------------------------------ the run


def main() -> None:
    # 1. Settings, and everything that can be refused at once.
    config = parse_config(SuperResolutionConfig)
    config.check()
    accelerator = make_accelerator(config.output_dir, config.mixed_precision)
    set_seed(config.seed)
    rank, world, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process

    # 2. Data and model.
    sides = (config.resolution, config.low_resolution)
    with accelerator.local_main_process_first():  # it decodes the pictures, the others read them
        train, held_out = (
            load_pairs(config.dataset, config.low_dataset, split, *sides, config.cache_dir)
            for split in ("train", "validation")
        )
    unet = ConditionalUNet(**as_mapping(config.unet, "unet")).to(memory_format=torch.channels_last)
    if config.compile:
        compile_blocks(unet)

    # 3. Optimizer, schedule, average, checkpoints.
    optimizer = make_optimizer(
        config.optimizer,
        [unet],
        config.learning_rate,
        config.muon_learning_rate,
        betas=(0.9, 0.99),
        weight_decay=1e-2,
    )
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=config.lr_warmup_steps)
    add_decay(schedule, config.max_train_steps, config.lr_decay_steps)
    ema = EMAModel(
        unet.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75,
        model_cls=ConditionalUNet, model_config=unet.config, foreach=True,
    ) if is_main else None  # fmt: skip
    model, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)
    checkpoints = Checkpoints(accelerator, config.output_dir, "unet", ema, limit=2)
    start = checkpoints.resume(config.resume_from_checkpoint)
    weights = concept_weights(train.large.columns["concept"]) if "concept" in train.large.columns else None
    batches = iter(
        StepBatchSampler(len(train), config.train_batch_size, config.seed, weights, start, rank, world)
    )

    # 4. Train; the generator yields after each step, and what follows happens between steps.
    loss = SuperResolutionLoss(config, model, train, rank, world)
    steps = fit(
        accelerator, model, optimizer, schedule, batches, loss,
        max_train_steps=config.max_train_steps, start_step=start, seed=config.seed, ema=ema,
    )  # fmt: skip
    bar = tqdm(total=config.max_train_steps, initial=start, disable=not is_main, unit="step", mininterval=10)
    began, mean = time.process_time(), None
    for result in steps:
        mean = result.loss if mean is None else 0.99 * mean + 0.01 * result.loss
        bar.update()
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        minutes = (time.process_time() - began) / 60
        done = result.step == config.max_train_steps
        done = done or (config.max_train_minutes is not None and minutes > config.max_train_minutes)
        if done or result.step % config.checkpointing_steps == 0:
            checkpoints.save(result.step, required=done)
            if ema is not None:
                average = averaged(unet, ema)
                figures = validation_loss(SuperResolutionLoss(config, average, held_out), held_out)
                shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
                tqdm.write(f"step {result.step}, {minutes:.0f} min of CPU, held-out loss: {shown}")
        if done:
            break
    accelerator.wait_for_everyone()

    # 5. Save the pipeline with the averaged weights.
    if ema is not None:
        print(f"pipeline saved in {save_result(config, averaged(unet, ema))}")
    accelerator.end_training()


def save_result(config: SuperResolutionConfig, unet: ConditionalUNet) -> Path:
    """The pipeline in output_dir/pipeline, written aside first; steps are DDIM's, which at few of them draws
    better than the ancestral sampler."""
    chain = DDPMScheduler(**as_mapping(config.noise_scheduler, "noise_scheduler"))
    pipe = SuperResolutionPipeline(
        unet=unet,
        low_res_scheduler=DDPMScheduler(**as_mapping(config.low_res_scheduler, "low_res_scheduler")),
        scheduler=DDIMScheduler.from_config(chain.config),
        max_noise_level=config.max_noise_level,
        upscale_factor=config.scale,
        default_guidance_scale=1.0,
        default_num_inference_steps=config.num_inference_steps,
        default_noise_level=config.noise_level,
    )
    output = Path(config.output_dir)
    partial = output / "pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(str(partial))
    shutil.rmtree(output / "pipeline", ignore_errors=True)
    return partial.rename(output / "pipeline")


def averaged(unet: Any, ema: EMAModel) -> ConditionalUNet:
    """A U-Net of its own with the averaged weights."""
    copy = ConditionalUNet.from_config(unet.config).eval()
    copy.load_state_dict(unet.state_dict())
    ema.copy_to(copy.parameters())
    return copy.to(memory_format=torch.channels_last)


if __name__ == "__main__":
    run(main, "training.super_resolution")
