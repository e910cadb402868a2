"""Train the text-to-image U-Net, from scratch or from a saved model, whole or by low-rank adapters.

    accelerate launch -m training.text_to_image --config training/configs/emoji.yaml
    accelerate launch -m training.text_to_image --pretrained_model_name_or_path models/emoji \\
        --train_data_dir my_folder --output_dir runs/mine --rank 8

One step: pictures (or latents) x0 and their captions' states, cached; t and eps drawn by (seed, step);
x_t = q_sample(x0, t, eps); the U-Net's prediction against its target; EMA. Argument names are those of
diffusers' train_text_to_image.py and train_text_to_image_lora.py.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, set_seed
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo, upload_file
from PIL import Image
from tqdm import tqdm

from pipelines import ConditionalUNet, InpaintPipeline, TextToImagePipeline
from pipelines.drawing.images import image_grid
from training.data.caches import LiveText, cache_latents, cache_text
from training.data.pictures import (
    NoSuchSplit,
    StepBatchSampler,
    cache_pictures,
    concept_weights,
    load_pictures,
)
from training.data.streaming import PictureStream
from training.objectives.denoising import (
    DenoisingLoss,
    diffusion_loss,
    draw_noise,
    target_of,
    validation_loss,
)
from training.objectives.losses import LOSSES, LossAwareTimesteps
from training.run.building import build_pipeline, compile_blocks
from training.run.loop import Checkpoints, ModelFolder, fit, make_accelerator
from training.run.lora import FILE, TEXT_LAYERS, UNET_LAYERS, Behind, LoraFile, add_lora
from training.run.optimizers import OPTIMIZERS, add_decay, make_optimizer
from training.run.precision import PRECISIONS
from training.run.settings import parse_config, require, run

__all__ = [
    "DenoisingLoss",
    "TextToImageConfig",
    "build_pipeline",
    "draw_noise",
    "target_of",
    "validation_loss",
]


def setting(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TextToImageConfig:
    """Settings of `training.text_to_image`."""

    output_dir: str = field(metadata={"help": "Checkpoints, logs and the trained pipeline go here."})
    # What is trained
    pretrained_model_name_or_path: str | None = setting("Start from this pipeline: a folder or a Hub name.")
    unet: Any = setting("ConditionalUNet's config (in YAML, or as JSON); from scratch.")
    noise_scheduler: Any = setting("DDPMScheduler's config (in YAML, or as JSON).")
    text_encoder: str | None = setting("A CLIP's folder with its tokenizer, or a pipeline's; frozen.")
    vae: str | None = setting("Folder of an AutoencoderKL, frozen; none means pixels.")
    prediction_type: str | None = setting("epsilon, sample (x0) or v_prediction.")
    self_conditioning: bool = setting("The U-Net sees its last guess of x0; a saved one is widened.", False)
    inpainting: bool = setting("It sees a mask and the masked picture too; a saved one is widened.", False)
    rank: int | None = setting("Train adapters of this rank (LoRA) instead of the weights.")
    lora_alpha: float | None = setting("Adapters count alpha / rank times; default the rank.")
    lora_layers: list[str] | None = setting("The U-Net's layers that get adapters; default the attention's.")
    train_text_encoder: bool = setting("Adapters on the text encoder too.", False)
    # The data
    dataset_name: str | None = setting("Saved data set or Hub name.")
    dataset_config_name: str | None = setting("Configuration of a Hub data set.")
    train_data_dir: str | None = setting("Folder of pictures with a metadata.jsonl, or of webdataset tars.")
    image_column: str = setting("Column of the pictures.", "image")
    caption_column: str | None = setting("Column of the captions; caption or text.")
    max_train_samples: int | None = setting("Use only the first so many pictures.")
    streaming: bool = setting(
        "Read the pictures in order, without caches (see training.data.streaming).", False
    )
    shuffle_buffer: int = setting("Streaming: rows among which the next is drawn.", 1000)
    strict: bool = setting("End the run at a picture that cannot be read, instead of leaving it out.", False)
    cache_dir: str = setting("Decoded pictures, latents and text states.", "data/cache")
    resolution: int | None = setting("Side of the pictures, in pixels; default the model's.")
    center_crop: bool = setting("Crop to a square; otherwise pad with white.", True)
    random_flip: bool = setting("Mirror half of the pictures.", False)
    canonical_caption: float = setting("How often the first of a picture's captions is used.", 0.5)
    caption_dropout: float = setting("How often the caption is replaced by the null prompt.", 0.1)
    concept_power: float = setting("0 samples concepts evenly, 1 pictures.", 0.25)
    style_power: float = setting("1 samples styles as they come; below, rare ones more.", 1.0)
    # The loss and the optimizer
    loss: str = setting("simple, or of a learned variance: hybrid or vlb (Improved DDPM).", "simple")
    train_batch_size: int = setting("Pictures for each process and micro-batch.", 32)
    gradient_accumulation_steps: int = setting("Micro-batches of one optimizer step.", 1)
    max_train_steps: int | None = setting("Optimizer steps; default num_train_epochs, or else 100,000.")
    num_train_epochs: int | None = setting("Passes over the data, where max_train_steps is not given.")
    max_train_minutes: float | None = setting("Stop after so much CPU time of the main process.")
    optimizer: str = setting("adamw, or muon: Muon for the hidden matrices, AdamW for the rest.", "adamw")
    learning_rate: float = setting("Peak learning rate.", 4e-4)
    muon_learning_rate: float = setting("The same of Muon, where it is used.", 1e-3)
    scale_lr: bool = setting("Multiply it by the pictures of one optimizer step.", False)
    lr_scheduler: str = setting("A schedule of diffusers.optimization.", "constant_with_warmup")
    lr_warmup_steps: int = setting("Steps of linear warm-up.", 300)
    lr_decay_steps: int = setting("The last so many steps fall to 0 linearly, whatever lr_scheduler.", 0)
    adam_beta1: float = setting("AdamW.", 0.9)
    adam_beta2: float = setting("AdamW.", 0.99)
    adam_weight_decay: float = setting("AdamW.", 0.01)
    adam_epsilon: float = setting("AdamW.", 1e-8)
    max_grad_norm: float = setting("Gradients are scaled down to this norm.", 1.0)
    snr_gamma: float | None = setting("Min-SNR weighting of all but vlb; none is the plain loss.", 5.0)
    snr_floor: float = setting("With snr_gamma: what the ratio counts as at least.", 0.0)
    detail_weight: float = setting("With snr_gamma: of |error of x0| where SNR is at least it.", 0.0)
    timestep_shift: float = setting("Above 1 draws noisier t more often (Esser 2024, eq. 23).", 1.0)
    noise_offset: float = setting("Share of noise that is constant over each channel.", 0.0)
    gradient_checkpointing: bool = setting("Less memory, more time.", False)
    compile: bool = setting("torch.compile the U-Net: a minute or two at the start, then faster.", False)
    mixed_precision: str | None = setting("no, fp16, bf16, or auto: bf16 if fast here; default accelerate's.")
    num_processes: int | None = setting("Refuse to run in any other number of processes.")
    # EMA, checkpoints, logs
    use_ema: bool = setting("Keep an exponential moving average of the weights; not of adapters.", True)
    ema_decay: float = setting("Its decay once warm: 1 - (1 + step)^(-3/4) until then.", 0.9995)
    more_ema_decays: list[float] = field(
        default_factory=list,
        metadata={"help": "Further averages, for training.export to choose from."},
    )
    checkpointing_steps: int = setting("Save every so many steps.", 500)
    checkpoints_total_limit: int | None = setting("Keep so many checkpoints.", 2)
    resume_from_checkpoint: str | None = setting("'latest' or a checkpoint folder.")
    validation_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Drawn at each validation."}
    )
    validation_prompt: str | None = setting("One more, drawn num_validation_images times.")
    num_validation_images: int = setting("Pictures of validation_prompt.", 4)
    validation_steps: int = setting("Validate every so many steps.", 1000)
    report_to: str = setting("Tracker of accelerate, or none.", "tensorboard")
    tracker_project_name: str = setting("Name of the run in the tracker.", "text_to_image")
    push_to_hub: bool = setting("Upload the result to the Hub at the end.", False)
    hub_model_id: str | None = setting("Its name there; default that of output_dir.")
    hub_token: str | None = setting("Token to upload with; default that of `hf auth login`.")
    seed: int = setting("Seed of weights, batches, captions, t and eps.", 0)

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
        for name in ("text_encoder", "vae", "noise_scheduler"):
            value = getattr(self, name)
            require(saved is None or value is None, name, value, "left to pretrained_model_name_or_path")
        for name in ("caption_dropout", "canonical_caption", "concept_power", "style_power", "ema_decay"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        more, rule = self.more_ema_decays, "different numbers in [0, 1], other than ema_decay"
        distinct = len({self.ema_decay, *more}) == 1 + len(more)
        require(distinct and all(0 <= decay <= 1 for decay in more), "more_ema_decays", more, rule)
        require(self.timestep_shift > 0, "timestep_shift", self.timestep_shift, "above 0")
        require(self.loss in LOSSES, "loss", self.loss, f"one of {LOSSES}")
        gamma, floor = self.snr_gamma, self.snr_floor
        require(gamma is None or gamma > 0, "snr_gamma", gamma, "above 0, or null for the plain loss")
        require(floor == 0 or 0 < floor <= (gamma or 0), "snr_floor", floor, "in [0, snr_gamma]")
        detail = self.detail_weight
        allowed = detail == 0 or (detail > 0 and gamma is not None and self.loss != "vlb")
        require(allowed, "detail_weight", detail, "0, or above 0 with snr_gamma and a loss other than vlb")
        for name in ("learning_rate", "muon_learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("lr_warmup_steps", "lr_decay_steps", "noise_offset", "adam_weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        counts = ["train_batch_size", "gradient_accumulation_steps", "checkpointing_steps"]
        counts += ["validation_steps", "shuffle_buffer", "num_validation_images"]
        optional = ["max_train_steps", "num_train_epochs", "rank", "resolution", "max_train_samples"]
        optional += ["checkpoints_total_limit", "num_processes"]
        for name in counts + [name for name in optional if getattr(self, name) is not None]:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        kinds = (None, "epsilon", "sample", "v_prediction")
        require(self.prediction_type in kinds, "prediction_type", self.prediction_type, f"one of {kinds}")
        require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {OPTIMIZERS}")
        schedules = [kind.value for kind in SchedulerType]
        precision = self.mixed_precision
        require(precision in PRECISIONS, "mixed_precision", precision, f"one of {PRECISIONS}")
        require(self.lr_scheduler in schedules, "lr_scheduler", self.lr_scheduler, f"one of {schedules}")
        lora, tower_too = self.rank is not None, self.train_text_encoder
        new_inputs = "left out with rank: adapters train no new inputs"
        require(not (lora and self.inpainting), "inpainting", True, new_inputs)
        require(saved is not None or not lora, "rank", self.rank, "left out when training from scratch")
        for name in ("lora_alpha", "lora_layers"):
            require(lora or getattr(self, name) is None, name, getattr(self, name), "left out without rank")
        require(lora or not tower_too, "train_text_encoder", tower_too, "left out without rank")
        epochs = self.num_train_epochs
        counted = epochs is None or self.max_train_steps is not None
        require(counted or not self.streaming, "num_train_epochs", epochs, "max_train_steps when streaming")


def resolution_of(config: TextToImageConfig, pipe: TextToImagePipeline) -> int:
    """The side of the pictures: as asked for, if the model can take it, else the one it was made for."""
    unit = pipe.vae_scale_factor * pipe.unet.config.get("patch_size", 1)
    size = config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    require(size % unit == 0, "resolution", size, f"a multiple of {unit} for this model")
    return size


def load_data(
    config: TextToImageConfig, pipe: TextToImagePipeline, split: str, accelerator: Accelerator
) -> Any:
    """Pictures in [-1, 1], or latents where the pipeline has a VAE, with captions; or a stream of them."""
    folder, column = config.train_data_dir, config.caption_column
    require(folder is None or Path(folder).is_dir(), "train_data_dir", folder, "a folder that is there")
    source = folder or config.dataset_name or ""
    size, crop = resolution_of(config, pipe), config.center_crop
    strict, streaming = config.strict, config.streaming
    data = load_pictures(source, split, config.dataset_config_name, None, streaming, column, strict)
    if config.max_train_samples:
        count = config.max_train_samples
        data = data.take(count) if streaming else data.select(range(min(count, len(data))))
    if streaming:
        return PictureStream(
            data, config.train_batch_size, config.seed, accelerator.process_index, accelerator.num_processes,
            resolution=size, image_column=config.image_column, caption_column=column, center_crop=crop,
            strict=strict, buffer_size=config.shuffle_buffer,
        )  # fmt: skip
    pictures = cache_pictures(data, size, config.cache_dir, config.image_column, column, crop, strict)
    if pipe.vae is None:
        return pictures
    mirrored = config.random_flip and split == "train"
    return cache_latents(pictures, pipe.vae, config.cache_dir, mirrored)


def load_all(
    config: TextToImageConfig, pipe: TextToImagePipeline, accelerator: Accelerator
) -> tuple[Any, Any, Any]:
    """(training data, held-out data or None, the source of text states)."""
    train = load_data(config, pipe, "train", accelerator)
    try:
        held_out = load_data(config, pipe, "validation", accelerator)
    except NoSuchSplit:
        held_out = None
    if config.streaming and held_out is not None:
        held_out = held_out.head(256)
        if pipe.vae is not None:
            held_out = cache_latents(held_out, pipe.vae, config.cache_dir)
    if config.streaming or config.train_text_encoder:
        return train, held_out, LiveText(pipe.tokenizer, pipe.text_encoder)
    captions = dict.fromkeys(train.captions + (held_out.captions if held_out else []))
    return train, held_out, cache_text(list(captions), pipe.tokenizer, pipe.text_encoder, config.cache_dir)


def make_ema(decay: float, unet: Any) -> EMAModel:
    return EMAModel(
        unet.parameters(),
        decay=decay,
        use_ema_warmup=True,
        power=0.75,
        model_cls=type(unet),
        model_config=unet.config,
        foreach=True,
    )


@contextlib.contextmanager
def averaged(models: list[Any], ema: EMAModel | None) -> Iterator[None]:
    """For as long as this lasts, the trained models evaluate, the U-Net with its averaged weights."""
    for model in models:
        model.eval()
    torch.compiler.set_stance("force_eager")  # other sizes of batch are not worth compiling for
    if ema is not None:
        ema.store(models[0].parameters())
        ema.copy_to(models[0].parameters())
    try:
        yield
    finally:
        if ema is not None:
            ema.restore(models[0].parameters())
        torch.compiler.set_stance("default")
        for model in models:
            model.train()


def validate(
    config: TextToImageConfig,
    pipe: TextToImagePipeline,
    loss: DenoisingLoss,
    parts: dict[str, Any],
    step: int,
) -> dict[str, float]:
    """Print the losses by timestep on the fixed noise of each part of the data, draw the prompts; returns
    what the tracker is to log."""
    log: dict[str, float] = {}
    for name, part in parts.items():
        buckets = validation_loss(loss, part, config.seed)
        log |= {f"{name}_loss/t{i * 100:03d}": value for i, value in enumerate(buckets)}
        log[f"{name}_loss/mean"] = sum(buckets) / len(buckets)
        shown = " ".join(f"{bucket:.4f}" for bucket in buckets)
        tqdm.write(f"step {step} {name} loss by t: {shown}")
    prompts = config.validation_prompts
    if config.validation_prompt:
        prompts = prompts + [config.validation_prompt] * config.num_validation_images
    if prompts:
        save_sheet(pipe, prompts, Path(config.output_dir) / "samples" / f"{step:07d}.png", config.seed)
    return log


def save_sheet(pipe: TextToImagePipeline, prompts: list[str], path: Path, seed: int) -> None:
    """Draw the prompts with 25 steps and the seeds seed, seed + 1, ..., eight in a row."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {}
    if isinstance(pipe, InpaintPipeline):  # all of it is to be painted
        width, height = pipe.sample_size
        given = {name: Image.new("L", (width, height), "white") for name in ("image", "mask_image")}
    drawn: Any = pipe(prompts, num_inference_steps=25, generator=generators, **given)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(drawn.images, columns=8).save(path)


def save_result(
    config: TextToImageConfig, pipe: TextToImagePipeline, models: list[Any], repo: str | None
) -> Path:
    """The trained pipeline in output_dir/pipeline, or the adapters' file in output_dir; written aside first,
    and uploaded where `repo` names a Hub repository."""
    output = Path(config.output_dir)
    partial = output / "result.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if config.rank is not None:
        LoraFile().save(models, partial)
        (partial / FILE).replace(output / FILE)
        partial.rmdir()
        if repo:
            upload_file(
                path_or_fileobj=output / FILE, path_in_repo=FILE, repo_id=repo, token=config.hub_token
            )
        return output / FILE
    named = partial / output.resolve().name  # the model card is headed by the folder's name
    pipe.save_pretrained(str(named))
    shutil.rmtree(output / "pipeline", ignore_errors=True)
    named.rename(output / "pipeline")
    partial.rmdir()
    if repo:
        pipe.push_to_hub(repo, token=config.hub_token)
    return output / "pipeline"


def main() -> None:
    # 1. Settings, and everything that can be refused at once.
    config = parse_config(TextToImageConfig)
    config.check()
    output = Path(config.output_dir)
    tracker = None if config.report_to == "none" else config.report_to
    accelerator = make_accelerator(output, config.mixed_precision, tracker, config.num_processes)
    set_seed(config.seed)
    rank, world, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    sharded = accelerator.distributed_type == DistributedType.FSDP
    require(not (sharded and config.use_ema), "use_ema", True, "false with FSDP, which shards the weights")
    on_cpu, compiler = accelerator.device.type == "cpu", os.environ.get("CXX", "g++")
    compiles = not on_cpu or shutil.which(compiler) is not None or shutil.which("clang++") is not None
    require(not config.compile or compiles, "compile", True, "false without a C++ compiler, g++ or clang++")
    kind = config.optimizer
    require(not sharded or kind == "adamw", "optimizer", kind, "adamw with FSDP: Muon needs whole matrices")
    repo = None
    if config.push_to_hub and is_main:
        name = config.hub_model_id or output.name
        repo = create_repo(name, token=config.hub_token, exist_ok=True).repo_id

    # 2. Model, data and the caches of what stays frozen.
    pipe = build_pipeline(config).to(accelerator.device)
    latents_too = "without a VAE: of latents only whole pictures' are cached"
    require(pipe.vae is None or not config.inpainting, "inpainting", True, latents_too)
    chain = diffusion_loss(config, pipe).chain  # raises if loss, variance and out_channels do not fit
    models = [pipe.unet, pipe.text_encoder] if config.train_text_encoder else [pipe.unet]
    with accelerator.local_main_process_first():  # it computes the caches, the others read them
        train, held_out, text = load_all(config, pipe, accelerator)
    if config.rank is not None:
        for model, layers in zip(models, (config.lora_layers or UNET_LAYERS, TEXT_LAYERS), strict=False):
            add_lora(model, layers, config.rank, config.lora_alpha)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(pipe.unet)

    # 3. Optimizer, schedule, EMA, checkpoints.
    pictures_a_step = config.train_batch_size * config.gradient_accumulation_steps * world
    total = config.max_train_steps or 100_000
    if config.num_train_epochs and not config.max_train_steps:
        total = config.num_train_epochs * math.ceil(len(train) / pictures_a_step)
    scale = pictures_a_step if config.scale_lr else 1
    optimizer = make_optimizer(
        config.optimizer, models, config.learning_rate * scale, config.muon_learning_rate * scale,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )  # fmt: skip
    warm_up = config.lr_warmup_steps
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=warm_up, num_training_steps=total
    )
    add_decay(schedule, total, config.lr_decay_steps)
    keeps = config.use_ema and config.rank is None and is_main
    decays = [config.ema_decay, *config.more_ema_decays] if keeps else []
    averages = [make_ema(decay, pipe.unet) for decay in decays]
    ema, more = (averages[0], averages[1:]) if averages else (None, [])
    *wrapped, optimizer, schedule = accelerator.prepare(*models, optimizer, schedule)
    fixed_loss = DenoisingLoss(
        config, pipe, pipe.unet, None, text
    )  # of the bare models: one process validates
    fixed_parts = {"validation": held_out} if held_out else {}
    if held_out and not config.streaming:
        fixed_parts = {"train": train} | fixed_parts
    if config.train_text_encoder:
        text = LiveText(pipe.tokenizer, Behind(wrapped[1], pipe.text_encoder), learns=True)
    checkpoints = Checkpoints(
        accelerator, output, "unet", ema, config.checkpoints_total_limit,
        files=ModelFolder("unet", ema, more) if config.rank is None else LoraFile(),
        settings={"seed": config.seed, "pictures_a_step": pictures_a_step, "streaming": config.streaming},
    )  # fmt: skip
    timesteps = LossAwareTimesteps(len(chain)) if config.loss == "vlb" else None
    if timesteps is not None:
        accelerator.register_for_checkpointing(timesteps)
    resumed = config.resume_from_checkpoint
    try:
        start = checkpoints.resume(resumed)
    except RuntimeError as error:  # accelerate's, where only one of the two runs draws t by its losses
        same = "custom checkpoints" not in str(error)
        require(same, "resume_from_checkpoint", resumed, f"of a run with loss {config.loss}, too")
        raise

    # 4. Train; the generator yields after each step, and what follows happens between steps.
    if config.streaming:
        placed = not start or bool(checkpoints.state)
        require(placed, "streaming", True, "off, as it was before this checkpoint")
        train.load_state_dict(checkpoints.state or train.state_dict())
        batches = iter(train)
    else:
        concepts, styles = train.columns.get("concept"), train.columns.get("style")
        powers = config.concept_power, config.style_power
        weights = concept_weights(concepts, powers[0], styles, powers[1]) if concepts else None
        first, size = start * config.gradient_accumulation_steps, config.train_batch_size
        batches = iter(StepBatchSampler(len(train), size, config.seed, weights, first, rank, world))
    data = None if config.streaming else train
    loss = DenoisingLoss(config, pipe, wrapped[0], data, text, rank, world, timesteps)
    if tracker:
        plain = {k: v for k, v in vars(config).items() if isinstance(v, int | float | str)}
        accelerator.init_trackers(config.tracker_project_name, plain | {"hub_token": ""})
    steps = fit(
        accelerator, wrapped, optimizer, schedule, batches, loss,
        max_train_steps=total, start_step=start, seed=config.seed, ema=averages,
        gradient_accumulation_steps=config.gradient_accumulation_steps, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    bar = tqdm(total=total, initial=start, disable=not is_main, unit="step", mininterval=10)
    began, mean, done, saved = time.process_time(), None, False, start
    for result in steps:
        mean = result.loss if mean is None else 0.99 * mean + 0.01 * result.loss
        bar.update()
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        done = result.step == total
        if config.max_train_minutes is not None:  # the main process's time counts for all
            spent = torch.tensor(time.process_time() - began, device=accelerator.device)
            done = done or float(broadcast(spent)) / 60 > config.max_train_minutes
        if result.step % 20 == 0:
            accelerator.log(
                {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.learning_rate}, result.step
            )
        # before drawing: a crash there costs nothing
        if done or result.step % config.checkpointing_steps == 0:
            place = train.state_dict() if config.streaming else None
            checkpoints.save(result.step, required=done, state=place)
        if (done or result.step % config.validation_steps == 0) and is_main and not sharded:
            with averaged(models, ema):
                accelerator.log(validate(config, pipe, fixed_loss, fixed_parts, result.step), result.step)
        saved = result.step
        if done:
            break
    accelerator.wait_for_everyone()

    # 5. Save the pipeline with the averaged weights, or the adapters.
    if sharded:
        whole = accelerator.get_state_dict(wrapped[0])  # all processes together gather it
        if is_main:
            pipe.unet = ConditionalUNet.from_config(pipe.unet.config)
            pipe.unet.load_state_dict(whole)
    if is_main:
        with averaged(models, ema):
            path = save_result(config, pipe, models, repo)
        what = "pipeline" if config.rank is None else "adapters"
        print(f"step {saved}; {what} saved in {path}")
    accelerator.end_training()


if __name__ == "__main__":
    run(main, "training.text_to_image")
