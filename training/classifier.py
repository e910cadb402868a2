"""Train a classifier of noised pictures, for classifier guidance (Dhariwal and Nichol 2021, section 4).

    accelerate launch -m training.classifier --config training/configs/noisy_classifier.yaml
    accelerate launch -m training.classifier --config training/configs/style_classifier.yaml

The classes are the values of a column of the data set. The classifier sees the x_t of the model that it will
guide.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor

from pipelines.components.noisy_classifier import NoisyClassifier
from training.evaluation.samples import load_pipeline
from training.objectives.noised import NoisedPictures
from training.run.guides import TowerSettings, train_guide
from training.run.settings import (
    AverageSettings,
    TimestepSettings,
    parse_config,
    require,
    run_command,
    setting,
)
from training.run.start import Run


class ClassifierConfig(TowerSettings, AverageSettings, TimestepSettings):
    """Settings of `training.classifier`."""

    label_column: str = setting(
        "Column of class names, or several joined by +, each a set of classes.", "group"
    )
    block_out_channels: list[int] = setting("Width of each level.", [48, 80, 96])
    timestep_limits: list[int] | None = setting(
        "For each column, the t below which it is learned and guides; default all t.", None
    )
    guidance_limit: float | None = setting(
        "Largest RMS change to the predicted noise; default no limit.", None, "above 0"
    )
    flip: bool = setting("Augmentation: mirror half of the pictures.", False)
    train_batch_size: int = 128
    adam_weight_decay: float = 0.05


@dataclass
class LabelSet:
    """A column of classes: their names, each picture's class, and the t below which they are learned."""

    column: str
    names: list[str]
    labels: Tensor  # (N,)
    limit: int

    @functools.cached_property
    def weights(self) -> Tensor:
        """The weight of each class in the loss, (K,): (N / (K n_k))^(1/2) for K classes, n_k of the N
        pictures being in class k. A rare class is thus not sacrificed to a common one. The weights of all
        pictures sum to at most N."""
        counts = torch.bincount(self.labels, minlength=len(self.names)).clamp(min=1)
        return (len(self.labels) / (len(self.names) * counts)).sqrt()


def label_set(pictures: NoisedPictures, column: str) -> tuple[list[str], Tensor]:
    """(the column's distinct values in sorted order, each picture's index among them, (N,)).

    Raises ValueError if the column does not exist or has fewer than two distinct values."""
    values = pictures.columns.get(column)
    has = ", ".join(pictures.columns)
    require(values is not None, "label_column", column, f"a column of the data set ({has})")
    names = sorted(set(map(str, values or [])))
    require(len(names) > 1, "label_column", column, "a column of two values or more")
    return names, torch.tensor([names.index(str(value)) for value in values or []])


def label_sets(config: ClassifierConfig, pictures: NoisedPictures) -> list[LabelSet]:
    """A label set for each column named by label_column. Raises ValueError if two sets share a class, or
    timestep_limits does not fit."""
    columns, total, limits = config.label_column.split("+"), len(pictures.chain), config.timestep_limits
    found = [label_set(pictures, column) for column in columns]
    names = [name for own, _ in found for name in own]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, "label_column", config.label_column, f"columns without a value in common ({twice})")
    known = limits is None or (len(limits) == len(found) and all(1 <= limit <= total for limit in limits))
    require(known, "timestep_limits", limits, f"in 1 .. {total}, one for each column of label_column")
    each = limits or [total] * len(found)
    return [LabelSet(c, *own, limit) for c, own, limit in zip(columns, found, each, strict=True)]


@dataclass
class ClassifierLoss:
    """The weighted cross-entropy of the noised pictures whose t is below a label set's limit, summed over the
    sets."""

    config: ClassifierConfig
    pictures: NoisedPictures
    sets: list[LabelSet]
    run: Run
    model: torch.nn.Module

    def __call__(self, indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        config, device = self.config, self.run.device
        x_t, t = self.pictures.batch(
            indices, config.seed, step, self.run.rank, self.run.world, shift=config.shift,
            noised=config.noised, flip=config.flip, timestep_shift=config.timestep_shift,
        )  # fmt: skip
        parts = self.model(x_t.to(device), t.to(device)).split([len(own.names) for own in self.sets], dim=1)
        loss, details = torch.zeros((), device=device), {}
        for own, logits in zip(self.sets, parts, strict=True):
            truth = own.labels[indices].to(device)
            counts = (t < own.limit).to(device)  # other pictures get no weight
            weight = own.weights.to(device)[truth] * counts
            each = F.cross_entropy(logits, truth, reduction="none")
            loss = loss + (weight * each).sum() / weight.sum().clamp(min=1e-6)
            right = (logits.argmax(-1) == truth)[counts]
            if len(right):
                details["accuracy" if len(self.sets) == 1 else own.column] = float(right.float().mean())
        return loss, details


def main() -> None:
    config = parse_config(ClassifierConfig)
    config.check()
    run = Run(config)
    pipe = load_pipeline(config.pretrained_model_name_or_path)
    pictures = NoisedPictures(pipe, config.dataset, config.splits, config.cache_dir)
    sets = label_sets(config, pictures)
    set_seed(config.seed)  # so that the weights depend on nothing else
    # By keyword: diffusers takes positional arguments for defaults, which it may drop
    model = NoisyClassifier(
        labels=[name for own in sets for name in own.names],
        label_sets=[len(own.names) for own in sets] if len(sets) > 1 else None,
        sample_size=pictures.side, in_channels=pictures.channels, patch_size=config.patch_size,
        block_out_channels=tuple(config.block_out_channels),
        timestep_limits=config.timestep_limits, guidance_limit=config.guidance_limit,
    )  # fmt: skip
    make_loss = functools.partial(ClassifierLoss, config, pictures, sets)
    train_guide(config, run, model, pictures, make_loss, "noisy_classifier", config.ema_decay)


if __name__ == "__main__":
    run_command(main, "training.classifier")
