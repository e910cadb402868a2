"""Train the text-to-image U-Net, from scratch or from a saved model, in full or with low-rank adapters.

    accelerate launch -m training.text_to_image --config training/configs/emoji.yaml
    accelerate launch -m training.text_to_image --pretrained_model_name_or_path models/emoji \\
        --train_data_dir my_folder --output_dir runs/mine --rank 8

One step takes cached pictures (or latents) x0 and their captions' states, draws t and eps from (seed, step),
computes x_t = q_sample(x0, t, eps), compares the U-Net's prediction with its target, and updates the EMA. The
arguments are named as in diffusers' train_text_to_image.py and train_text_to_image_lora.py.
"""

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from diffusers.optimization import SchedulerType, get_scheduler
from huggingface_hub import upload_file
from PIL import Image
from tqdm import tqdm

from pipelines import ConditionalUNet, InpaintPipeline, TextToImagePipeline
from pipelines.drawing.images import image_grid
from pipelines.folders.files import written_aside
from training.data.caches import LiveText, cache_latents, cache_text
from training.data.pictures import NoSuchSplit, cache_pictures, load_pictures
from training.data.streaming import PictureStream
from training.objectives.denoising import DenoisingLoss, DenoisingSettings, diffusion_loss, validation_loss
from training.objectives.losses import LossAwareTimesteps
from training.run.averages import averaged, make_ema
from training.run.building import PipelineSettings, build_pipeline, compile_blocks
from training.run.loop import Training
from training.run.lora import FILE, TEXT_LAYERS, UNET_LAYERS, Behind, LoraFile, add_lora
from training.run.optimizers import add_decay, make_optimizer
from training.run.settings import (
    AdamWSettings,
    AverageSettings,
    ColumnSettings,
    MuonSettings,
    RunSettings,
    TimeSettings,
    parse_config,
    require,
    run_command,
    setting,
)
from training.run.start import Run

SCHEDULES = [kind.value for kind in SchedulerType]


class TextToImageConfig(
    RunSettings, TimeSettings, AdamWSettings, MuonSettings, AverageSettings, ColumnSettings,
    PipelineSettings, DenoisingSettings,
):  # fmt: skip
    """Settings of `training.text_to_image`."""

    # What is trained
    rank: int | None = setting(
        "Train adapters of this rank (LoRA) instead of the weights.", None, "at least 1"
    )
    lora_alpha: float | None = setting(
        "The adapters' output is scaled by alpha / rank; default the rank.", None
    )
    lora_layers: list[str] | None = setting(
        "The U-Net's layers that get adapters; default the attention's.", None
    )
    train_text_encoder: bool = setting("Train adapters on the text encoder too.", False)
    # The data
    dataset_name: str | None = setting("Saved data set or Hub name.", None)
    dataset_config_name: str | None = setting("Configuration of a Hub data set.", None)
    train_data_dir: str | None = setting(
        "Folder of pictures with a metadata.jsonl, or of webdataset tars.", None
    )
    image_column: str = setting("Column of the pictures.", "image")
    max_train_samples: int | None = setting(
        "Use only this many pictures, the first ones.", None, "at least 1"
    )
    streaming: bool = setting(
        "Read the pictures in order, without caches (see training.data.streaming).", False
    )
    shuffle_buffer: int = setting("Streaming: rows in the shuffle buffer.", 1000, "at least 1")
    strict: bool = setting("End the run at a picture that cannot be read, instead of leaving it out.", False)
    resolution: int | None = setting(
        "Side of the pictures, in pixels; default the model's.", None, "at least 1"
    )
    center_crop: bool = setting("Crop to a square; otherwise pad with white.", True)
    concept_power: float = setting("0 samples concepts evenly, 1 pictures.", 0.25, "in [0, 1]")
    style_power: float = setting(
        "1 samples styles as they come; lower values favour rare styles.", 1.0, "in [0, 1]"
    )
    # The optimizer
    gradient_accumulation_steps: int = setting("Micro-batches of one optimizer step.", 1, "at least 1")
    num_train_epochs: int | None = setting(
        "Passes over the data, if max_train_steps is not given; without either, 100,000 steps.",
        None,
        "at least 1",
    )
    optimizer: str = "adamw"
    learning_rate: float = 4e-4
    scale_lr: bool = setting(
        "Multiply the learning rates by the number of pictures in an optimizer step.", False
    )
    lr_scheduler: str = setting("A schedule of diffusers.optimization.", "constant_with_warmup", SCHEDULES)
    lr_warmup_steps: int = 300
    adam_beta1: float = setting("AdamW's first beta.", 0.9)
    adam_beta2: float = setting("AdamW's second beta.", 0.99)
    adam_epsilon: float = setting("AdamW's epsilon.", 1e-8)
    gradient_checkpointing: bool = setting("Less memory, more time.", False)
    num_processes: int | None = setting(
        "Refuse to run with any other number of processes.", None, "at least 1"
    )
    # EMA, checkpoints, logs
    use_ema: bool = setting("Keep an exponential moving average of the weights; not of adapters.", True)
    ema_decay: float = 0.9995
    more_ema_decays: list[float] = setting("Further averages, for training.export to choose from.", [])
    checkpoints_total_limit: int | None = setting("How many checkpoints to keep.", 2, "at least 1")
    validation_prompts: list[str] = setting("Prompts drawn at each validation.", [])
    validation_prompt: str | None = setting("One more prompt, drawn num_validation_images times.", None)
    num_validation_images: int = setting("Number of pictures of validation_prompt.", 4, "at least 1")
    validation_steps: int = setting("Steps between validations.", 1000, "at least 1")
    report_to: str = setting("Tracker of accelerate, or none.", "tensorboard")
    tracker_project_name: str = setting("Name of the run in the tracker.", "text_to_image")
    push_to_hub: bool = setting("Upload the result to the Hub at the end.", False)
    hub_model_id: str | None = setting("Name of the Hub repository; default that of output_dir.", None)
    hub_token: str | None = setting("Token for the upload; default that of `hf auth login`.", None)

    @property
    def tracker(self) -> str | None:
        return None if self.report_to == "none" else self.report_to

    def check(self) -> None:
        super().check()
        saved, data = self.pretrained_model_name_or_path, self.dataset_name
        one = (data is None) != (self.train_data_dir is None)
        require(one, "dataset_name", data, "given, or train_data_dir")
        more, rule = self.more_ema_decays, "different numbers in [0, 1], other than ema_decay"
        distinct = len({self.ema_decay, *more}) == 1 + len(more)
        require(distinct and all(0 <= decay <= 1 for decay in more), "more_ema_decays", more, rule)
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


# ------------------------------------------------------------ data


def resolution_of(config: TextToImageConfig, pipe: TextToImagePipeline) -> int:
    """The side of the pictures in pixels: `resolution`, by default the model's own. Raises ValueError if the
    model does not support it."""
    unit = pipe.vae_scale_factor * pipe.unet.config.get("patch_size", 1)
    size = config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    require(size % unit == 0, "resolution", size, f"a multiple of {unit} for this model")
    return size


def load_data(config: TextToImageConfig, pipe: TextToImagePipeline, split: str, run: Run) -> Any:
    """Captioned pictures, or their latents if the pipeline has a VAE; with `streaming`, a PictureStream."""
    folder, column = config.train_data_dir, config.caption_column
    require(folder is None or Path(folder).is_dir(), "train_data_dir", folder, "a folder that is there")
    source, named = folder or config.dataset_name or "", config.dataset_config_name
    size, crop = resolution_of(config, pipe), config.center_crop
    strict, streaming = config.strict, config.streaming
    data = load_pictures(source, split, named, streaming=streaming, caption_column=column, strict=strict)
    if config.max_train_samples:
        count = config.max_train_samples
        data = data.take(count) if streaming else data.select(range(min(count, len(data))))
    if streaming:
        return PictureStream(
            data, config.train_batch_size, config.seed, run.rank, run.world,
            resolution=size, image_column=config.image_column, caption_column=column, center_crop=crop,
            strict=strict, buffer_size=config.shuffle_buffer,
        )  # fmt: skip
    pictures = cache_pictures(data, size, config.cache_dir, config.image_column, column, crop, strict)
    mirrored = config.random_flip and split == "train"
    return pictures if pipe.vae is None else cache_latents(pictures, pipe.vae, config.cache_dir, mirrored)


def load_all(config: TextToImageConfig, pipe: TextToImagePipeline, run: Run) -> tuple[Any, Any, Any]:
    """(training data, held-out data or None, the source of text states)."""
    train = load_data(config, pipe, "train", run)
    try:
        held_out = load_data(config, pipe, "validation", run)
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


# ------------------------------------------------------------ what is validated and saved


def validate(
    config: TextToImageConfig, pipe: TextToImagePipeline, loss: DenoisingLoss,
    parts: dict[str, Any], step: int,
) -> dict[str, float]:  # fmt: skip
    """Print the losses by timestep for each part of the data, on fixed noise, and draw the prompts; return
    the values for the tracker to log."""
    log: dict[str, float] = {}
    for name, part in parts.items():
        buckets = validation_loss(loss, part, config.seed)
        log |= {f"{name}_loss/t{i * 100:03d}": value for i, value in enumerate(buckets)}
        log[f"{name}_loss/mean"] = sum(buckets) / len(buckets)
        tqdm.write(f"step {step} {name} loss by t: " + " ".join(f"{bucket:.4f}" for bucket in buckets))
    one_more = [config.validation_prompt] * config.num_validation_images if config.validation_prompt else []
    if prompts := config.validation_prompts + one_more:
        save_sheet(pipe, prompts, Path(config.output_dir) / "samples" / f"{step:07d}.png", config.seed)
    return log


def save_sheet(pipe: TextToImagePipeline, prompts: list[str], path: Path, seed: int) -> None:
    """Draw the prompts with 25 steps and the seeds seed, seed + 1, ...; save them in rows of eight."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {}
    if isinstance(pipe, InpaintPipeline):  # paint the whole picture
        white = Image.new("L", pipe.sample_size, "white")
        given = {"image": white, "mask_image": white}
    drawn: Any = pipe(prompts, num_inference_steps=25, generator=generators, **given)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(drawn.images, columns=8).save(path)


def save_result(
    config: TextToImageConfig, pipe: TextToImagePipeline, models: list[Any], repo: str | None
) -> Path:
    """Save the trained pipeline as output_dir/pipeline, or the adapters' file in output_dir, and return its
    path. The result is also uploaded if `repo` names a Hub repository."""
    output, token = Path(config.output_dir), config.hub_token
    result = output / ("pipeline" if config.rank is None else FILE)
    with tempfile.TemporaryDirectory(dir=output) as aside:
        if config.rank is None:
            named = Path(aside) / output.resolve().name  # the folder's name becomes the model card's title
            pipe.save_pretrained(str(named))
            with written_aside(result) as partial:
                named.rename(partial)
        else:
            LoraFile().save(models, Path(aside))
            (Path(aside) / FILE).replace(result)
    if repo and config.rank is None:
        pipe.push_to_hub(repo, token=token)
    elif repo:
        upload_file(path_or_fileobj=result, path_in_repo=FILE, repo_id=repo, token=token)
    return result


# ------------------------------------------------------------ the run


def check_machine(config: TextToImageConfig, run: Run) -> None:
    """Raise a ValueError for settings that this machine or these processes cannot support."""
    sharded = run.accelerator.distributed_type == DistributedType.FSDP
    require(not (sharded and config.use_ema), "use_ema", True, "false with FSDP, which shards the weights")
    kind = config.optimizer
    require(not sharded or kind == "adamw", "optimizer", kind, "adamw with FSDP: Muon needs whole matrices")
    on_cpu, compiler = run.device.type == "cpu", os.environ.get("CXX", "g++")
    compiles = not on_cpu or shutil.which(compiler) is not None or shutil.which("clang++") is not None
    require(not config.compile or compiles, "compile", True, "false without a C++ compiler, g++ or clang++")


def prepare_learning(config: TextToImageConfig, pipe: TextToImagePipeline) -> list[Any]:
    """The models to train: the U-Net and, with train_text_encoder, the text encoder. With `rank`, they get
    adapters here, and only these are trained."""
    models = [pipe.unet, pipe.text_encoder] if config.train_text_encoder else [pipe.unet]
    if config.rank is not None:
        for model, layers in zip(models, (config.lora_layers or UNET_LAYERS, TEXT_LAYERS), strict=False):
            add_lora(model, layers, config.rank, config.lora_alpha)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(pipe.unet)
    return models


def start_training(
    config: TextToImageConfig, run: Run, models: list[Any], train: Any, timesteps: LossAwareTimesteps | None
) -> Training:
    """Set up the models' optimizer, schedule and averages, and resume from a checkpoint if asked to."""
    pictures_a_step = config.train_batch_size * config.gradient_accumulation_steps * run.world
    total = config.max_train_steps or 100_000
    if config.num_train_epochs and not config.max_train_steps:
        total = config.num_train_epochs * math.ceil(len(train) / pictures_a_step)
    scale = pictures_a_step if config.scale_lr else 1
    optimizer = make_optimizer(
        config.optimizer, models, config.learning_rate * scale, config.muon_learning_rate * scale,
        betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )  # fmt: skip
    length = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": total}
    schedule = get_scheduler(config.lr_scheduler, optimizer, **length)
    add_decay(schedule, total, config.lr_decay_steps)
    keeps = config.use_ema and config.rank is None and run.is_main
    decays = [config.ema_decay, *config.more_ema_decays] if keeps else []
    try:
        return Training(
            run, models, optimizer, schedule, "unet", total,
            averages=[make_ema(decay, models[0]) for decay in decays],
            limit=config.checkpoints_total_limit, files=None if config.rank is None else LoraFile(),
            settings={"seed": config.seed, "pictures_a_step": pictures_a_step, "streaming": config.streaming},
            also_saved=[] if timesteps is None else [timesteps],
        )  # fmt: skip
    except RuntimeError as error:  # from accelerate, if only one of the two runs draws t by its losses
        alike, rule = "custom checkpoints" not in str(error), f"of a run with loss {config.loss}, too"
        require(alike, "resume_from_checkpoint", config.resume_from_checkpoint, rule)
        raise


def batches_of(config: TextToImageConfig, run: Run, train: Any, training: Training) -> Any:
    """The run's micro-batches from its first step on."""
    if not config.streaming:
        first = training.start * config.gradient_accumulation_steps
        return run.batches(train, first, config.concept_power, config.style_power)
    state = training.checkpoints.state
    require(not training.start or bool(state), "streaming", True, "off, as it was before this checkpoint")
    train.load_state_dict(state or train.state_dict())
    return iter(train)


def gather_weights(run: Run, training: Training, pipe: TextToImagePipeline) -> None:
    """With FSDP: assemble the whole U-Net from the shards of all processes."""
    whole = run.accelerator.get_state_dict(training.models[0])
    if run.is_main:
        pipe.unet = ConditionalUNet.from_config(pipe.unet.config)
        pipe.unet.load_state_dict(whole)


def main() -> None:
    # 1. Settings, and all checks that need no data or model.
    config = parse_config(TextToImageConfig)
    config.check()
    run = Run(config, config.tracker, config.num_processes)
    check_machine(config, run)
    sharded = run.accelerator.distributed_type == DistributedType.FSDP
    repo = run.create_repository(config.hub_model_id, config.hub_token) if config.push_to_hub else None

    # 2. Model, data, and the caches of the frozen parts' outputs.
    pipe = build_pipeline(config).to(run.device)
    latents_too = "without a VAE: of latents only whole pictures' are cached"
    require(pipe.vae is None or not config.inpainting, "inpainting", True, latents_too)
    chain = diffusion_loss(config.loss, pipe).chain  # raises if loss, variance and out_channels do not fit
    with run.accelerator.local_main_process_first():  # computes the caches; the other processes read them
        train, held_out, text = load_all(config, pipe, run)
    models = prepare_learning(config, pipe)

    # 3. Optimizer, schedule, averages, checkpoints; the losses and the data for validation.
    timesteps = LossAwareTimesteps(len(chain)) if config.loss == "vlb" else None
    training = start_training(config, run, models, train, timesteps)
    ema = training.averages[0] if training.averages else None
    # On the unwrapped models, since only one process validates
    fixed_loss = DenoisingLoss(config, pipe, pipe.unet, None, text)
    fixed_parts = {"validation": held_out} if held_out else {}
    if held_out and not config.streaming:
        fixed_parts = {"train": train} | fixed_parts
    if config.train_text_encoder:
        text = LiveText(pipe.tokenizer, Behind(training.models[1], pipe.text_encoder), learns=True)
    data = None if config.streaming else train
    loss = DenoisingLoss(config, pipe, training.models[0], data, text, run.rank, run.world, timesteps)

    # 4. Train; validation runs between steps.
    batches, step = batches_of(config, run, train, training), training.start
    if config.tracker:
        run.init_tracker(config.tracker_project_name)
    for progress in training.steps(
        batches, loss, config.max_grad_norm, config.gradient_accumulation_steps, config.max_train_minutes,
        train.state_dict if config.streaming else None,
    ):  # fmt: skip
        step = progress.step
        if (progress.done or step % config.validation_steps == 0) and run.is_main and not sharded:
            with averaged(models, ema):
                run.accelerator.log(validate(config, pipe, fixed_loss, fixed_parts, step), step)

    # 5. Save the pipeline with the averaged weights, or the adapters.
    if sharded:
        gather_weights(run, training, pipe)
    if run.is_main:
        with averaged(models, ema):
            path = save_result(config, pipe, models, repo)
        print(f"step {step}; {'pipeline' if config.rank is None else 'adapters'} saved in {path}")
    run.accelerator.end_training()


if __name__ == "__main__":
    run_command(main, "training.text_to_image")
