"""Train a classifier of noised pictures, for classifier guidance (Dhariwal and Nichol 2021, section 4).

    accelerate launch -m training.classifier --config training/configs/noisy_classifier.yaml
    accelerate launch -m training.classifier --config training/configs/style_classifier.yaml

The classes are the values of a column of the data set; what it sees is x_t of the model that it will guide.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor

from pipelines.components.noisy_classifier import NoisyClassifier
from training.evaluation.samples import load_pipeline
from training.objectives.noised import NoisedPictures, train_tower
from training.run.settings import parse_config, require, run


@dataclass
class ClassifierConfig:
    """Settings of `training.classifier`."""

    output_dir: str = field(metadata={"help": "Where the trained classifier and its checkpoints go."})
    pretrained_model_name_or_path: str = field(
        default="models/emoji", metadata={"help": "The pipeline whose schedule and space are taken."}
    )
    dataset: str = field(
        default="data/emoji", metadata={"help": "Saved data set, picture folder or Hub name."}
    )
    splits: str = field(default="train", metadata={"help": "Splits to train on, joined by +."})
    label_column: str = field(
        default="group",
        metadata={"help": "Column of the classes' names, or several joined by +: a set each."},
    )
    cache_dir: str = field(default="data/cache", metadata={"help": "Decoded pictures, computed once."})
    patch_size: int = field(default=4, metadata={"help": "Side of the squares folded into channels."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [48, 80, 96], metadata={"help": "Width of each level."}
    )
    noised: bool = field(
        default=True, metadata={"help": "Without it one that sees clean pictures alone, at t = 0."}
    )
    timestep_limits: list[int] | None = field(
        default=None, metadata={"help": "For each column, below which t it is learned and guides; at all t."}
    )
    timestep_shift: float = field(default=1.0, metadata={"help": "Below 1 clearer x_t come up more often."})
    guidance_limit: float | None = field(
        default=None, metadata={"help": "By how much, RMS, it may move the predicted noise; default any."}
    )
    shift: int = field(default=5, metadata={"help": "Augmentation: shift by up to this many pixels."})
    flip: bool = field(default=False, metadata={"help": "Augmentation: mirror half of the pictures."})
    train_batch_size: int = field(default=128, metadata={"help": "Pictures for each process and step."})
    max_train_steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak of the cosine schedule."})
    lr_warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    adam_weight_decay: float = field(default=0.05, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    ema_decay: float | None = field(
        default=None, metadata={"help": "Keep and save a moving average: 1 - (1 + step)^(-3/4) until that."}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16, bf16, or auto: bf16 if fast here; default accelerate's."}
    )
    checkpointing_steps: int = field(default=200, metadata={"help": "Save every so many steps."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "'latest' or a folder."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, batches, t and eps."})

    def check(self) -> None:
        """Raise a ValueError that names the argument, for everything that can be told before work starts."""
        for name in ("patch_size", "train_batch_size", "max_train_steps", "checkpointing_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        most = self.guidance_limit
        require(most is None or most > 0, "guidance_limit", most, "above 0, or none")
        inside = self.ema_decay is None or 0 <= self.ema_decay <= 1
        require(inside, "ema_decay", self.ema_decay, "in [0, 1], or none")


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """What each class counts in the loss, (classes,): (N / (classes n_k))^(1/2), so that a class that few
    pictures have is not given up for one that most have. All pictures together count N or less."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return (len(labels) / (classes * counts)).sqrt()


def label_set(pictures: NoisedPictures, column: str) -> tuple[list[str], Tensor]:
    """The values of a column, sorted, and each picture's place among them.

    Raises ValueError when there is no such column, or it has one value alone."""
    values = pictures.columns.get(column)
    has = ", ".join(pictures.columns)
    require(values is not None, "label_column", column, f"a column of the data set ({has})")
    names = sorted(set(map(str, values or [])))
    require(len(names) > 1, "label_column", column, "a column of two values or more")
    return names, torch.tensor([names.index(str(value)) for value in values or []])


def main() -> None:
    config = parse_config(ClassifierConfig)
    config.check()
    pipe = load_pipeline(config.pretrained_model_name_or_path)
    pictures = NoisedPictures(pipe, config.dataset, config.splits, config.cache_dir)
    columns = config.label_column.split("+")
    sets = [label_set(pictures, column) for column in columns]
    names = [name for own, _ in sets for name in own]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, "label_column", config.label_column, f"columns without a value in common ({twice})")
    total, limits = len(pictures.chain), config.timestep_limits
    known = limits is None or (len(limits) == len(sets) and all(1 <= limit <= total for limit in limits))
    require(known, "timestep_limits", limits, f"in 1 .. {total}, one for each column of label_column")
    weights = [class_weights(labels, len(own)) for own, labels in sets]
    set_seed(config.seed)
    # By name: diffusers takes what is passed by place for a default, which it may drop
    model = NoisyClassifier(
        labels=names,
        sample_size=pictures.side,
        in_channels=pictures.channels,
        patch_size=config.patch_size,
        block_out_channels=tuple(config.block_out_channels),
        label_sets=[len(own) for own, _ in sets] if len(sets) > 1 else None,
        timestep_limits=limits,
        guidance_limit=config.guidance_limit,
    )

    def make_loss(accelerator: Any, trained: Any) -> Any:
        rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device

        def compute_loss(indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
            x_t, t = pictures.batch(
                indices, config.seed, step, rank, world, shift=config.shift, noised=config.noised,
                flip=config.flip, timestep_shift=config.timestep_shift,
            )  # fmt: skip
            parts = trained(x_t.to(device), t.to(device)).split([len(own) for own, _ in sets], dim=1)
            loss, details = torch.zeros((), device=device), {}
            for i, (logits, (_, labels)) in enumerate(zip(parts, sets, strict=True)):
                truth = labels[indices].to(device)
                counts = (t < (limits[i] if limits else total)).to(device)  # the others' loss is a constant
                weight = weights[i].to(device)[truth] * counts
                each = F.cross_entropy(logits, truth, reduction="none")
                loss = loss + (weight * each).sum() / weight.sum().clamp(min=1e-6)
                right = (logits.argmax(-1) == truth)[counts]
                if len(right):
                    details["accuracy" if len(sets) == 1 else columns[i]] = float(right.float().mean())
            return loss, details

        return compute_loss

    train_tower(config, model, pictures, make_loss, "noisy_classifier", config.ema_decay)


if __name__ == "__main__":
    run(main, "training.classifier")
