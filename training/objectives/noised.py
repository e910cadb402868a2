"""What is trained on noised pictures beside the U-Net, for guidance: a CLIP image tower and a classifier.

    accelerate launch -m training.clip --noised --config training/configs/noisy_clip.yaml
    accelerate launch -m training.classifier --config training/configs/noisy_classifier.yaml

Both see x_t of the model that they will guide: its own schedule, and its own space, pixels or a VAE's
latents. Here is what their recipes share, and how well each reads a picture at each noise level.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from pipelines import DDPMScheduler, TextToImagePipeline
from pipelines.drawing.images import decode_latents
from pipelines.drawing.text import context_length, encode_text
from training.data.caches import cache_latents
from training.data.pictures import StepBatchSampler, cache_pictures, concept_weights, load_pictures, seed_for
from training.evaluation.bits_per_dim import new_figure, save_figure
from training.evaluation.judge import Judge, embed_concepts
from training.evaluation.metrics import recall_at
from training.evaluation.samples import with_guides
from training.objectives.denoising import BUCKETS, draw_noise, training_scheduler
from training.run.loop import Checkpoints, fit, make_accelerator
from training.run.settings import require

LossFunction = Callable[[list[int], int], tuple[Tensor, dict[str, Any]]]


class NoisedPictures:
    """A split's x_0 in the space of a pipeline, and its x_t by the pipeline's own schedule.

    `data` is a PictureCache or a LatentCache; `side` and `channels` are those of x_t.
    """

    def __init__(self, pipe: TextToImagePipeline, dataset: str, splits: str, cache_dir: str) -> None:
        import datasets

        parts = [load_pictures(dataset, split) for split in splits.split("+")]
        joined = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        pictures = cache_pictures(joined, size, cache_dir, "image", None)
        self.columns = pictures.columns
        self.data: Any = pictures if pipe.vae is None else cache_latents(pictures, pipe.vae, cache_dir)
        self.chain: DDPMScheduler = training_scheduler(pipe.scheduler)
        self.side, self.channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels

    def __len__(self) -> int:
        return len(self.data)

    def batch(
        self,
        indices: list[int],
        seed: int,
        step: int,
        rank: int,
        world: int,
        shift: int = 0,
        noised: bool = True,
        flip: bool = False,
        timestep_shift: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(x_t, t) of a micro-batch, of the seed, the step and the place in the global batch alone; in pixels
        each picture is moved by up to `shift` first, and with `flip` mirrored half the time; t as
        `draw_noise` draws it. Without `noised` (x_0, 0)."""
        from training.clip import augment

        x0 = self.data.images(indices)
        eps, t = draw_noise(
            seed, step, tuple(x0.shape), len(self.chain), rank, world, timestep_shift=timestep_shift
        )
        if shift and self.channels == 3:
            generator = torch.Generator().manual_seed(seed_for(seed, "shift", step, rank))
            x0 = augment(x0, shift, 0.0, generator)
        if flip:
            generator = torch.Generator().manual_seed(seed_for(seed, "flip", step, rank))
            mirrored = torch.rand(len(x0), generator=generator) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        return (self.chain.add_noise(x0, eps, t), t) if noised else (x0, torch.zeros_like(t))


@torch.no_grad()
def embed_prompts(pipe: TextToImagePipeline, texts: list[str]) -> Tensor:
    """(N, P), l2-normalised: pooled text of the U-Net's own tower, padded no further than needed."""
    limit, rows = context_length(pipe.tokenizer, pipe.text_encoder), []
    for start in range(0, len(texts), 256):
        part = texts[start : start + 256]
        longest = max(len(ids) for ids in pipe.tokenizer(part, verbose=False).input_ids)
        length = min(longest, limit)
        rows.append(encode_text(pipe.tokenizer, pipe.text_encoder, part, max_length=length)[1])
    return F.normalize(torch.cat(rows).float(), dim=-1)


def text_width(pipe: TextToImagePipeline) -> int:
    """P, of the pooled text."""
    config = pipe.text_encoder.config
    return config.projection_dim if hasattr(pipe.text_encoder, "text_projection") else config.hidden_size


def train_tower(
    config: Any,
    model: Any,
    pictures: NoisedPictures,
    make_loss: Callable[[Accelerator, Any], LossFunction],
    name: str,
    ema_decay: float | None = None,
) -> Path | None:
    """Train `model`, a component of a pipeline, and save it, or with `ema_decay` the moving average of its
    weights, as output_dir/name; returns the folder, None in all but the main process.

    config: output_dir, mixed_precision, seed, train_batch_size, max_train_steps, learning_rate,
    lr_warmup_steps, adam_weight_decay, max_grad_norm, checkpointing_steps and resume_from_checkpoint.
    """
    accelerator = make_accelerator(config.output_dir, config.mixed_precision)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.adam_weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    steps, warm_up = config.max_train_steps, config.lr_warmup_steps
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warm_up, num_training_steps=steps)
    ema = EMAModel(
        model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75,
        model_cls=type(model), model_config=model.config,
    ) if ema_decay is not None and accelerator.is_main_process else None  # fmt: skip
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    checkpoints = Checkpoints(accelerator, config.output_dir, name, ema, limit=1)
    start = checkpoints.resume(config.resume_from_checkpoint)
    concepts = pictures.columns.get("concept")
    weights = concept_weights(concepts) if concepts else None
    rank, world = accelerator.process_index, accelerator.num_processes
    size = config.train_batch_size
    sampler = StepBatchSampler(len(pictures), size, config.seed, weights, start, rank, world)
    is_main = accelerator.is_main_process
    bar = tqdm(total=steps, initial=start, disable=not is_main, unit="step", mininterval=10)
    means: dict[str, float] = {}
    for result in fit(
        accelerator, model, optimizer, schedule, iter(sampler), make_loss(accelerator, model),
        max_train_steps=steps, start_step=start, max_grad_norm=config.max_grad_norm, seed=config.seed,
        ema=ema,
    ):  # fmt: skip
        for key, value in {"loss": result.loss, **result.details}.items():
            means[key] = 0.98 * means.get(key, value) + 0.02 * value
        bar.update()
        bar.set_postfix({key: f"{mean:.3f}" for key, mean in means.items()}, refresh=False)
        if result.step % config.checkpointing_steps == 0 or result.step == steps:
            checkpoints.save(result.step)
    bar.close()
    folder = None
    if is_main:
        folder = Path(config.output_dir) / name
        partial = folder.with_name(f"{name}.partial")
        trained = accelerator.unwrap_model(model)
        if ema is not None:
            ema.copy_to(trained.parameters())
        trained.save_pretrained(str(partial))
        for file in partial.iterdir():
            folder.mkdir(exist_ok=True)
            file.replace(folder / file.name)
        partial.rmdir()
        size_mb = 2 * sum(p.numel() for p in trained.parameters()) / 1e6
        shown = ", ".join(f"{key} {mean:.3f}" for key, mean in means.items())
        print(f"saved in {folder}: {size_mb:.2f} MB in fp16; {shown}")
    accelerator.end_training()
    return folder


# ------------------------------------------------------------ how well they read noised pictures


OWN = "if empty the model's own, or that of the folder beside it with -guidance added."


@dataclass
class NoisedAccuracyConfig:
    """Settings of `training.evaluate noised-accuracy`."""

    model: str = field(default="models/emoji", metadata={"help": "The pipeline whose x_t are read."})
    noisy_clip: str = field(default="", metadata={"help": "Folder of a NoisyCLIP; " + OWN})
    noisy_classifier: str = field(default="", metadata={"help": "Folder of a NoisyClassifier; " + OWN})
    judge: str = field(default="models/judge", metadata={"help": "The clean CLIP beside them."})
    dataset: str = field(default="data/emoji", metadata={"help": "Data set that training.emoji built."})
    split: str = field(default="validation", metadata={"help": "Split to take pictures from."})
    label_column: str = field(
        default="group", metadata={"help": "Column of the classifier's classes, of one set."}
    )
    cache_dir: str = field(default="data/cache", metadata={"help": "Decoded pictures."})
    num_pictures: int = field(default=400, metadata={"help": "Pictures drawn at random."})
    batch_size: int = field(default=100, metadata={"help": "Pictures at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice and of the noise."})
    output: str = field(default="", metadata={"help": "PNG of the accuracies against t."})
    json: str = field(default="", metadata={"help": "File for the figures."})

    def check(self) -> None:
        """Raise a ValueError that names the argument, for everything that can be told before work starts."""
        for name in ("num_pictures", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("noisy_clip", "noisy_classifier"):
            folder = getattr(self, name)
            there = not folder or (Path(folder) / "config.json").is_file()
            require(there, name, folder, "the folder of a trained one")


class PipelineTexts:
    """The text side of a NoisyCLIP, as `embed_concepts` asks a judge for it."""

    def __init__(self, pipe: TextToImagePipeline) -> None:
        self.pipe = pipe

    def embed_texts(self, texts: list[str]) -> Tensor:
        return embed_prompts(self.pipe, texts)

    embed_names = Judge.embed_names


@torch.no_grad()
def noised_accuracy(config: NoisedAccuracyConfig) -> dict[str, Any]:
    """Ten noise levels, at the middle of each tenth of the chain: how often the concept of a noised picture
    is found among all, first or in five, by the noised CLIP and by the clean one on the very same pictures;
    and the classifier's share of right classes."""
    pipe = with_guides(config.model, config.noisy_clip, config.noisy_classifier)
    noisy, classifier = pipe.noisy_clip, pipe.noisy_classifier
    require(noisy is not None or classifier is not None, "noisy_clip", config.noisy_clip, "given")
    pictures = NoisedPictures(pipe, config.dataset, config.split, config.cache_dir)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(pictures), generator=generator)[: config.num_pictures].tolist()
    truth = [pictures.columns["concept"][i] for i in chosen]
    judge = Judge(config.judge)
    readers: dict[str, tuple[Any, Any]] = {
        "clean CLIP": (
            embed_concepts(judge, config.dataset),
            lambda x, t: judge.embed_images(decode_latents(pipe.vae, x)),
        )
    }
    if noisy is not None:
        readers["noised CLIP"] = embed_concepts(PipelineTexts(pipe), config.dataset), noisy  # type: ignore[arg-type]
    total = len(pictures.chain)
    levels = [(2 * bucket + 1) * total // (2 * BUCKETS) for bucket in range(BUCKETS)]
    figures: dict[str, Any] = {"split": config.split, "pictures": len(chosen), "t": levels}
    figures |= {reader: {"R@1": [], "R@5": []} for reader in readers}
    if classifier is not None:
        labels, values = list(classifier.config.labels), pictures.columns.get(config.label_column, [])
        own, rule = set(values), f"a column of the classifier's classes, {labels}"
        require(len(own) > 0 and own <= set(labels), "label_column", config.label_column, rule)
        places = [i for i, label in enumerate(labels) if label in own]
        classes = torch.tensor([labels.index(values[i]) for i in chosen])
        figures["classifier"] = {"accuracy": []}
    x0 = pictures.data.images(chosen)
    eps = torch.randn(x0.shape, generator=generator)
    for t in tqdm(levels, desc="noise levels", unit="level"):
        x_t = pictures.chain.add_noise(x0, eps, torch.tensor(t)).split(config.batch_size)
        for reader, (concepts, embed) in readers.items():
            ranks = concepts.rank(torch.cat([embed(part, t) for part in x_t]), truth)
            for k in (1, 5):
                figures[reader][f"R@{k}"].append(recall_at(ranks, k))
        if classifier is not None:
            best = torch.cat([classifier(part, t)[:, places].argmax(-1) for part in x_t])
            found = torch.tensor(places)[best]
            figures["classifier"]["accuracy"].append(float((found == classes).double().mean()))
    if config.output:
        draw_accuracy(figures, config.output)
    return figures


def draw_accuracy(figures: dict[str, Any], path: str) -> None:
    """A curve for each reader against t."""
    figure, ax = new_figure(6, 3.5)
    for reader, own in figures.items():
        if isinstance(own, dict):
            for name, values in own.items():
                ax.plot(figures["t"], values, marker="o", label=f"{reader}, {name}")
    ax.set(xlabel="t", ylabel="share of noised pictures", ylim=(0, 1))
    ax.grid(alpha=0.3)
    ax.legend()
    save_figure(figure, path)
