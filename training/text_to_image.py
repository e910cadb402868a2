"""Train the text-to-image U-Net, from scratch or from a saved model.

    accelerate launch -m training.text_to_image --config training/configs/emoji.yaml

One step: pictures (or latents) x0 and their captions' states, cached; t and eps drawn by (seed, step);
x_t = q_sample(x0, t, eps); the U-Net's prediction against its target; EMA. Argument names are those of
diffusers' train_text_to_image.py.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from pipelines import ConditionalUNet, DDPMScheduler, TextToImagePipeline
from pipelines.components.ddpm_scheduler import signal_to_noise_ratio
from pipelines.images import image_grid
from training.config import parse_config, require
from training.data import (
    NoSuchSplit,
    PictureCache,
    StepBatchSampler,
    TextCache,
    cache_latents,
    cache_pictures,
    cache_text,
    concept_weights,
    load_pictures,
    seed_for,
)
from training.loop import Checkpoints, fit
from training.losses import min_snr_weight, simple_loss


@dataclass
class TextToImageConfig:
    """Settings of `training.text_to_image`."""

    output_dir: str = field(metadata={"help": "Checkpoints, logs and the trained pipeline go here."})
    # What is trained
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Start from this pipeline."}
    )
    unet: Any = field(
        default=None, metadata={"help": "ConditionalUNet's config (in YAML, or as JSON); from scratch."}
    )
    noise_scheduler: Any = field(
        default=None, metadata={"help": "DDPMScheduler's config (in YAML, or as JSON)."}
    )
    text_encoder: str | None = field(
        default=None, metadata={"help": "Folder of a CLIP with its tokenizer; frozen."}
    )
    vae: str | None = field(
        default=None, metadata={"help": "Folder of an AutoencoderKL, frozen; none means pixels."}
    )
    prediction_type: str | None = field(
        default=None, metadata={"help": "epsilon, sample (x0) or v_prediction."}
    )
    # The data
    dataset_name: str | None = field(default=None, metadata={"help": "Saved data set or Hub name."})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set."}
    )
    train_data_dir: str | None = field(
        default=None, metadata={"help": "Folder of pictures with a metadata.jsonl."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the pictures."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the captions; caption or text."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many pictures."}
    )
    cache_dir: str = field(
        default="data/cache", metadata={"help": "Decoded pictures, latents and text states."}
    )
    resolution: int = field(default=64, metadata={"help": "Side of the pictures, in pixels."})
    center_crop: bool = field(default=True, metadata={"help": "Crop to a square; otherwise pad with white."})
    random_flip: bool = field(
        default=False, metadata={"help": "Mirror half of the pictures (pixel models only)."}
    )
    canonical_caption: float = field(
        default=0.5, metadata={"help": "How often the first of a picture's captions is used."}
    )
    caption_dropout: float = field(
        default=0.1, metadata={"help": "How often the caption is replaced by the null prompt."}
    )
    concept_power: float = field(default=0.25, metadata={"help": "0 samples concepts evenly, 1 pictures."})
    # The loss and the optimizer
    train_batch_size: int = field(default=32, metadata={"help": "Pictures for each process and micro-batch."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Micro-batches of one optimizer step."}
    )
    max_train_steps: int = field(default=100_000, metadata={"help": "Optimizer steps."})
    max_train_minutes: float | None = field(
        default=None, metadata={"help": "Stop after so much CPU time of this process."}
    )
    learning_rate: float = field(default=4e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler: str = field(
        default="constant_with_warmup", metadata={"help": "A schedule of diffusers.optimization."}
    )
    lr_warmup_steps: int = field(default=300, metadata={"help": "Steps of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW."})
    adam_beta2: float = field(default=0.99, metadata={"help": "AdamW."})
    adam_weight_decay: float = field(default=0.01, metadata={"help": "AdamW."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    snr_gamma: float | None = field(
        default=5.0, metadata={"help": "Min-SNR weighting; none is the plain simple loss."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory, more time."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16 or bf16; default accelerate's."}
    )
    # EMA, checkpoints, logs
    use_ema: bool = field(
        default=True, metadata={"help": "Keep an exponential moving average of the weights."}
    )
    ema_decay: float = field(
        default=0.9995, metadata={"help": "Its decay once warm: 1 - (1 + step)^(-3/4) until then."}
    )
    checkpointing_steps: int = field(default=500, metadata={"help": "Save every so many steps."})
    checkpoints_total_limit: int | None = field(default=2, metadata={"help": "Keep so many checkpoints."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'latest' or a checkpoint folder."}
    )
    validation_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Drawn at each validation."}
    )
    validation_steps: int = field(default=1000, metadata={"help": "Validate every so many steps."})
    report_to: str = field(default="tensorboard", metadata={"help": "Tracker of accelerate, or none."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, batches, captions, t and eps."})

    def check(self) -> None:
        """Raise a ValueError that names the argument, for everything that can be told before work starts."""
        new, saved, data = self.unet, self.pretrained_model_name_or_path, self.dataset_name
        either = "given, or pretrained_model_name_or_path instead of it"
        require((new is None) != (saved is None), "unet", new, either)
        require(
            (data is None) != (self.train_data_dir is None), "dataset_name", data, "given, or train_data_dir"
        )
        tower = self.text_encoder
        require(
            saved is not None or tower is not None, "text_encoder", tower, "given when training from scratch"
        )
        for name in ("caption_dropout", "canonical_caption", "concept_power"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        counts = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps")
        for name in (*counts, "validation_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        kinds = (None, "epsilon", "sample", "v_prediction")
        require(self.prediction_type in kinds, "prediction_type", self.prediction_type, f"one of {kinds}")
        require(not (self.random_flip and self.vae), "random_flip", True, "off with cached latents")


def as_mapping(value: Any, name: str) -> dict[str, Any]:
    """A config given as a mapping (YAML), a JSON string or a JSON file."""
    if value is None or isinstance(value, dict):
        return dict(value or {})
    is_json = value.lstrip().startswith("{")  # and so no path, for which it may be too long
    text = value if is_json or not Path(value).is_file() else Path(value).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be JSON or a JSON file, got {value!r}: {error}") from error


def build_pipeline(config: TextToImageConfig) -> TextToImagePipeline:
    """The pipeline to train: a saved one, or new weights around a frozen text encoder (and VAE)."""
    if config.pretrained_model_name_or_path:
        pipe = TextToImagePipeline.from_pretrained(config.pretrained_model_name_or_path)
        if config.prediction_type:
            pipe.scheduler.register_to_config(prediction_type=config.prediction_type)
        return pipe
    settings = as_mapping(config.noise_scheduler, "noise_scheduler")
    if config.prediction_type:
        settings["prediction_type"] = config.prediction_type
    return TextToImagePipeline(
        tokenizer=CLIPTokenizer.from_pretrained(config.text_encoder),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(config.text_encoder),
        unet=ConditionalUNet(**as_mapping(config.unet, "unet")),
        scheduler=DDPMScheduler(**settings),
        vae=AutoencoderKL.from_pretrained(config.vae) if config.vae else None,
    )


def draw_noise(
    seed: int, step: int, shape: tuple[int, ...], timesteps: int, rank: int, world: int
) -> tuple[Tensor, Tensor]:
    """(eps, t) of this process's slice of micro-batch `step`: a function of (seed, step) and the place in the
    global batch alone, however many processes share it."""
    generator = torch.Generator().manual_seed(seed_for(seed, "noise", step))
    t = torch.randint(0, timesteps, (shape[0] * world,), generator=generator)
    eps = torch.randn((shape[0] * world, *shape[1:]), generator=generator)
    mine = slice(rank * shape[0], (rank + 1) * shape[0])
    return eps[mine], t[mine]


def target_of(scheduler: Any, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the U-Net is to predict at x_t, by the scheduler's prediction_type."""
    kind = scheduler.config.prediction_type
    return {
        "epsilon": lambda: eps,
        "sample": lambda: x0,
        "v_prediction": lambda: scheduler.get_velocity(x0, eps, t),
    }[kind]()


class DenoisingLoss:
    """The training loss of one micro-batch, from picture indices to a scalar (Ho 2020, Algorithm 1)."""

    def __init__(
        self,
        config: TextToImageConfig,
        pipe: TextToImagePipeline,
        unet: Any,
        data: Any,
        text: TextCache,
        rank: int,
        world: int,
    ):
        self.config, self.scheduler, self.unet, self.rank, self.world = (
            config,
            pipe.scheduler,
            unet,
            rank,
            world,
        )
        self.data, self.text = data, text  # data: PictureCache or LatentCache
        self.pooled = pipe.requires_pooled_text
        self.snr = signal_to_noise_ratio(pipe.scheduler.alphas_cumprod)

    def __call__(self, indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        config = self.config
        # Drawn for the global batch, of which this process takes its slice, as eps and t are
        generator = torch.Generator().manual_seed(seed_for(config.seed, "captions", step))
        count = len(indices)
        draws = torch.rand(count * self.world, 4, generator=generator)[self.rank * count :][:count]
        x0 = self.data.images(indices)
        if config.random_flip:
            mirrored = draws[:, 3] < 0.5
            x0[mirrored] = x0[mirrored].flip(-1)
        captions = self.data.choose_captions(indices, draws[:, :2], config.canonical_caption)
        captions[draws[:, 2] < config.caption_dropout] = 0  # "" is number 0
        eps, t = draw_noise(
            config.seed,
            step,
            tuple(x0.shape),
            self.scheduler.config.num_train_timesteps,
            self.rank,
            self.world,
        )
        return self.loss(x0, captions, eps, t)

    def loss(self, x0: Tensor, captions: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Any]]:
        device = self.unet.device if hasattr(self.unet, "device") else next(self.unet.parameters()).device
        states, pooled = (x.to(device) for x in self.text.lookup(captions))
        x0, eps, t = x0.to(device), eps.to(device), t.to(device)
        added = {"pooled_text": pooled} if self.pooled else None
        output = self.unet(self.scheduler.add_noise(x0, eps, t), t, states, added_cond_kwargs=added).sample
        weight = None
        if self.config.snr_gamma is not None:
            weight = min_snr_weight(
                self.snr.to(device)[t], self.scheduler.config.prediction_type, self.config.snr_gamma
            )
        per_sample = simple_loss(output, target_of(self.scheduler, x0, eps, t), weight)
        return per_sample.mean(), {"t": t.cpu(), "per_sample": per_sample.detach().cpu()}


BUCKETS = 10


@torch.no_grad()
def validation_loss(loss: DenoisingLoss, pictures: Any, seed: int, limit: int = 256) -> list[float]:
    """Mean loss in each of ten timestep buckets, on fixed pictures, captions, eps and t: so steps compare."""
    count = min(limit, len(pictures))
    generator = torch.Generator().manual_seed(seed_for(seed, "validation"))
    order = torch.randperm(len(pictures), generator=generator)[:count]
    total = loss.scheduler.config.num_train_timesteps
    sums, counts = torch.zeros(BUCKETS), torch.zeros(BUCKETS)
    was, loss.data, weighted, loss.config.snr_gamma = loss.data, pictures, loss.config.snr_gamma, None
    try:
        for start in range(0, count, 32):
            indices = order[start : start + 32]
            x0 = pictures.images(indices)
            captions = torch.tensor([pictures.choices[int(i)][0] for i in indices])
            eps = torch.randn(x0.shape, generator=generator)
            t = (torch.arange(start, start + len(indices)) * 617 + 31) % total  # spread evenly over 0..T-1
            details = loss.loss(x0, captions, eps, t)[1]
            bucket = details["t"] * BUCKETS // total
            sums.index_add_(0, bucket, details["per_sample"])
            counts.index_add_(0, bucket, torch.ones(len(bucket)))
    finally:
        loss.data, loss.config.snr_gamma = was, weighted
    return (sums / counts.clamp(min=1)).tolist()


def load_data(config: TextToImageConfig, pipe: TextToImagePipeline, split: str) -> Any:
    """Pictures in [-1, 1], or latents where the pipeline has a VAE, with their captions."""
    source = config.train_data_dir or config.dataset_name or ""
    data = load_pictures(source, split, config.dataset_config_name)
    caption = config.caption_column or ("caption" if "caption" in data.column_names else "text")
    if config.max_train_samples:
        data = data.select(range(min(config.max_train_samples, len(data))))
    pictures = cache_pictures(
        data, config.resolution, config.cache_dir, config.image_column, caption, config.center_crop
    )
    return cache_latents(pictures, pipe.vae, config.cache_dir) if pipe.vae is not None else pictures


def save_sheet(pipe: TextToImagePipeline, prompts: list[str], path: Path, seed: int) -> None:
    """Draw the prompts with 25 steps and the seeds seed, seed + 1, ..., eight in a row."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    pipe.set_progress_bar_config(disable=True)
    drawn: Any = pipe(prompts, num_inference_steps=25, generator=generators)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(drawn.images, columns=8).save(path)


def main() -> None:
    # 1. Settings, and everything that can be refused at once.
    config = parse_config(TextToImageConfig)
    config.check()
    output = Path(config.output_dir)
    tracker = None if config.report_to == "none" else config.report_to
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=tracker,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
    )
    set_seed(config.seed)
    rank, world = accelerator.process_index, accelerator.num_processes

    # 2. Model, data and the caches of what stays frozen.
    pipe = build_pipeline(config)
    unet = pipe.unet.train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    train = load_data(config, pipe, "train")
    try:
        held_out: PictureCache | None = load_data(config, pipe, "validation")
    except NoSuchSplit:
        held_out = None
    known = dict.fromkeys(
        train.captions + (held_out.captions if held_out else []) + config.validation_prompts
    )
    text = cache_text(list(known), pipe.tokenizer, pipe.text_encoder, config.cache_dir)
    if held_out:
        number = {caption: i for i, caption in enumerate(known)}
        held_out.choices = [[number[held_out.captions[c]] for c in own] for own in held_out.choices]

    # 3. Optimizer, schedule, EMA, checkpoints.
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps
        * world,  # accelerate steps the schedule once for each process
        num_training_steps=config.max_train_steps * world,
    )
    ema = None
    if config.use_ema:
        ema = EMAModel(
            unet.parameters(),
            decay=config.ema_decay,
            use_ema_warmup=True,
            power=0.75,
            model_cls=ConditionalUNet,
            model_config=unet.config,
            foreach=True,
        )
        ema.to(accelerator.device)
    model, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)
    checkpoints = Checkpoints(accelerator, output, "unet", ema, config.checkpoints_total_limit)
    start = checkpoints.resume(config.resume_from_checkpoint)

    # 4. Train; the generator yields after each step, and what follows happens between steps.
    weights = (
        concept_weights(train.columns["concept"], config.concept_power)
        if "concept" in train.columns
        else None
    )
    first = start * config.gradient_accumulation_steps
    sampler = StepBatchSampler(len(train), config.train_batch_size, config.seed, weights, first, rank, world)
    loss = DenoisingLoss(config, pipe, model, train, text, rank, world)
    if tracker:
        accelerator.init_trackers(
            "text_to_image", {k: v for k, v in vars(config).items() if isinstance(v, int | float | str)}
        )
    steps = fit(
        accelerator, model, optimizer, schedule, iter(sampler), loss,
        max_train_steps=config.max_train_steps, start_step=start, seed=config.seed, ema=ema,
        gradient_accumulation_steps=config.gradient_accumulation_steps, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    bar = tqdm(
        total=config.max_train_steps,
        initial=start,
        disable=not accelerator.is_main_process,
        unit="step",
        mininterval=10,
    )
    began, saved, mean = time.process_time(), start, None

    def use_ema_weights() -> None:
        if ema is not None:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())

    def restore_weights() -> None:
        if ema is not None:
            ema.restore(unet.parameters())

    for result in steps:
        mean = result.loss if mean is None else 0.99 * mean + 0.01 * result.loss
        bar.update()
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        out_of_time = (
            config.max_train_minutes is not None
            and (time.process_time() - began) / 60 > config.max_train_minutes
        )
        done = out_of_time or result.step == config.max_train_steps
        if result.step % 20 == 0:
            accelerator.log(
                {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.learning_rate}, result.step
            )
        if done or result.step % config.checkpointing_steps == 0:
            checkpoints.save(result.step)  # before drawing: a crash there must cost nothing
            saved = result.step
        if (done or result.step % config.validation_steps == 0) and accelerator.is_main_process:
            unet.eval()
            use_ema_weights()
            if held_out:
                for name, part in (("train", train), ("validation", held_out)):
                    buckets = validation_loss(loss, part, config.seed)
                    log = {f"{name}_loss/t{i * 100:03d}": value for i, value in enumerate(buckets)}
                    accelerator.log(log | {f"{name}_loss/mean": sum(buckets) / BUCKETS}, result.step)
                    tqdm.write(
                        f"step {result.step} {name} loss by t: " + " ".join(f"{b:.4f}" for b in buckets)
                    )
            if config.validation_prompts:
                save_sheet(
                    pipe,
                    config.validation_prompts,
                    output / "samples" / f"{result.step:07d}.png",
                    config.seed,
                )
            restore_weights()
            unet.train()
        if done:
            break
    accelerator.wait_for_everyone()

    # 5. Save the pipeline with the averaged weights.
    if accelerator.is_main_process:
        use_ema_weights()
        pipe.save_pretrained(str(output / "pipeline"))
        print(f"step {saved}; pipeline saved in {output / 'pipeline'}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
