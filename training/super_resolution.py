"""Train an upsampler: a diffusion model of large pictures conditioned on small ones (Saharia 2021, "SR3").

    python -m training.emoji --output_dir data/emoji-256 --resolution 256
    accelerate launch -m training.super_resolution --config training/configs/super_resolution.yaml

The pairs are the vector art rendered at both sizes: `training.emoji` builds a data set of each, with the same
pictures in the same order. The U-Net is convolutional and trained on crops, so it runs at any size. It is
conditioned on the small picture y, blurred and noised to a random level s, and on s itself (Ho 2021,
"Cascaded diffusion models", section 4.2). The noised y is enlarged by E of `pipelines.chain.back_projection`,
and the U-Net predicts the difference between it and the large picture x:

    y_s = sqrt(abar_s) blur(y) + sqrt(1 - abar_s) eps',  x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps
    loss = mean |E(y_s) + U-Net([x_t, E(y_s)], t, s) - x|                 SR3, equation 6 with p = 1, for x0

(SR3 writes x for the small picture and y for the large one.) Colours thus come from the enlarged input from
the first step on, and the network draws the edges.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from pipelines import ConditionalUNet, DDPMScheduler
from pipelines.chain.back_projection import enlarge
from pipelines.folders.files import written_aside
from pipelines.super_resolution import SuperResolutionPipeline
from training.data.pairs import Pairs, blur, load_pairs
from training.data.pictures import seed_for
from training.run.averages import averaged, make_ema
from training.run.building import as_mapping, compile_blocks
from training.run.loop import Training
from training.run.optimizers import add_decay, make_optimizer
from training.run.settings import (
    AverageSettings,
    MuonSettings,
    PairSettings,
    RunSettings,
    TimeSettings,
    UNetSettings,
    parse_config,
    require,
    run_command,
    setting,
)
from training.run.start import Run


class SuperResolutionConfig(
    RunSettings, PairSettings, UNetSettings, MuonSettings, AverageSettings, TimeSettings
):
    """Settings of `training.super_resolution`."""

    crop: int = setting("Side of the training crops, in large pixels.", 128)
    low_res_scheduler: Any = setting("Config of the chain that noises the small picture.", None)
    max_noise_level: int = setting("Noisiest timestep of that chain that is used.", 200, "0 or more")
    max_blur: float = setting("Widest blur, standard deviation in small pixels.", 1.0, "0 or more")
    num_inference_steps: int = setting("Default number of steps of the saved pipeline.", 4)
    noise_level: int = setting("Default noise level of the saved pipeline.", 0)
    learning_rate: float = 4e-4
    train_batch_size: int = 16
    max_train_steps: int = 10000
    ema_decay: float = 0.999
    checkpointing_steps: int = 200

    @property
    def scale(self) -> int:
        return self.resolution // self.low_resolution

    def chains(self) -> list[DDPMScheduler]:
        """The chains of the large and of the small pictures."""
        names = ("noise_scheduler", "low_res_scheduler")
        return [DDPMScheduler(**as_mapping(getattr(self, name), name)) for name in names]

    def check(self) -> None:
        super().check()
        side, low, patch = (
            self.resolution,
            self.low_resolution,
            as_mapping(self.unet, "unet").get("patch_size", 1),
        )
        require(low < side and side % low == 0, "low_resolution", low, f"a divisor of resolution, {side}")
        unit, rule = max(patch, self.scale), f"a factor or multiple of {self.scale}"
        require(unit % min(patch, self.scale) == 0, "unet.patch_size", patch, rule)
        fits = 0 < self.crop <= side and self.crop % unit == 0
        require(fits, "crop", self.crop, f"a multiple of {unit}, {side} at most")


class SuperResolutionLoss:
    """The loss of one micro-batch, from picture indices to a scalar; see the top of this file.

    Every draw is a function of the seed, the step and the process alone.
    """

    def __init__(self, config: SuperResolutionConfig, unet: Any, pairs: Pairs, rank: int = 0) -> None:
        self.config, self.unet, self.pairs, self.rank = config, unet, pairs, rank
        self.chain, self.low_chain = config.chains()

    def __call__(self, indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed_for(self.config.seed, "noise", step, self.rank))
        count, chain = len(indices), self.chain
        x, y = self.pairs.crops(indices, self.config.crop, generator)
        # squared: half of the levels are in the lowest quarter, where generated pictures need them
        level = (torch.rand(count, generator=generator).square() * (self.config.max_noise_level + 1)).long()
        t = torch.randint(0, len(chain), (count,), generator=generator)
        return self.of(x, blur(y, self.config.max_blur, generator), t, level, generator), {}

    def of(self, x: Tensor, y: Tensor, t: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of large x and small y at timesteps t and noise levels `level`, both (B,)."""
        y = self.low_chain.add_noise(y, torch.randn(y.shape, generator=generator), level)
        x_t = self.chain.add_noise(x, torch.randn(x.shape, generator=generator), t)
        told = enlarge(y, self.config.scale)  # (B, 3, side, side)
        joined = torch.cat([x_t, told], dim=1).contiguous(memory_format=torch.channels_last)
        lacks = self.unet(joined, t, None, class_labels=level).sample
        return (told + lacks.float() - x).abs().mean()


@torch.no_grad()
def validation_loss(loss: SuperResolutionLoss, pairs: Pairs) -> dict[str, float]:
    """The loss on fixed crops of 64 pictures with fixed noise, at three timesteps and noise level 0, and that
    of E alone."""
    indices = torch.linspace(0, len(pairs) - 1, min(64, len(pairs))).long().tolist()
    generator = torch.Generator().manual_seed(0)
    x, y = pairs.crops(indices, loss.config.crop, generator)
    level = torch.zeros(len(indices), dtype=torch.long)
    figures = {"enlarged alone": float((enlarge(y, loss.config.scale) - x).abs().mean())}
    for t in (len(loss.chain) - 1, len(loss.chain) // 2, len(loss.chain) // 10):
        figures[f"t {t}"] = float(loss.of(x, y, torch.full_like(level, t), level, generator))
    return figures


def save_result(config: SuperResolutionConfig, unet: ConditionalUNet) -> Path:
    """Save the pipeline as output_dir/pipeline, with a DDIM scheduler, which draws better in a few steps than
    the ancestral sampler."""
    chain, low_chain = config.chains()
    pipe = SuperResolutionPipeline(
        unet=unet, low_res_scheduler=low_chain, scheduler=DDIMScheduler.from_config(chain.config),
        max_noise_level=config.max_noise_level, upscale_factor=config.scale, default_guidance_scale=1.0,
        default_num_inference_steps=config.num_inference_steps, default_noise_level=config.noise_level,
    )  # fmt: skip
    folder = Path(config.output_dir) / "pipeline"
    with written_aside(folder) as partial:
        pipe.save_pretrained(str(partial))
    return folder


def main() -> None:
    # 1. Settings, data, model.
    config = parse_config(SuperResolutionConfig)
    config.check()
    run = Run(config)
    sides = (config.resolution, config.low_resolution)
    with run.accelerator.local_main_process_first():  # decodes the pictures; the other processes read them
        train, held_out = (
            load_pairs(config.dataset, config.low_dataset, split, *sides, config.cache_dir)
            for split in ("train", "validation")
        )
    unet = ConditionalUNet(**as_mapping(config.unet, "unet")).to(memory_format=torch.channels_last)
    if config.compile:
        compile_blocks(unet)

    # 2. Optimizer, schedule, average.
    optimizer = make_optimizer(
        config.optimizer, [unet], config.learning_rate, config.muon_learning_rate,
        betas=(0.9, 0.99), weight_decay=1e-2,
    )  # fmt: skip
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=config.lr_warmup_steps)
    add_decay(schedule, config.max_train_steps, config.lr_decay_steps)
    averages = [make_ema(config.ema_decay, unet)] if run.is_main else []
    training = Training(run, [unet], optimizer, schedule, "unet", config.max_train_steps, averages, limit=2)

    # 3. Train; validation runs between steps, whenever a checkpoint is due.
    loss = SuperResolutionLoss(config, training.models[0], train, run.rank)
    batches = run.batches(train.large, training.start)
    for progress in training.steps(batches, loss, max_train_minutes=config.max_train_minutes):
        if progress.saved and run.is_main:
            with averaged([unet], averages[0]):
                figures = validation_loss(SuperResolutionLoss(config, unet, held_out), held_out)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            tqdm.write(f"step {progress.step}, {progress.minutes:.0f} min of CPU, held-out loss: {shown}")

    # 4. Save the pipeline with the averaged weights.
    if run.is_main:
        with averaged([unet], averages[0]):
            print(f"pipeline saved in {save_result(config, unet)}")
    run.accelerator.end_training()


if __name__ == "__main__":
    run_command(main, "training.super_resolution")
