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
from training.config import parse_config, require, run
from training.noised import NoisedPictures, train_tower
from training.samples import load_pipeline


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
    label_column: str = field(default="group", metadata={"help": "Column of the classes' names."})
    cache_dir: str = field(default="data/cache", metadata={"help": "Decoded pictures, computed once."})
    patch_size: int = field(default=4, metadata={"help": "Side of the squares folded into channels."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [48, 80, 96], metadata={"help": "Width of each level."}
    )
    noised: bool = field(
        default=True, metadata={"help": "Without it one that sees clean pictures alone, at t = 0."}
    )
    shift: int = field(default=5, metadata={"help": "Augmentation: shift by up to this many pixels."})
    train_batch_size: int = field(default=128, metadata={"help": "Pictures for each process and step."})
    max_train_steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak of the cosine schedule."})
    lr_warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    adam_weight_decay: float = field(default=0.05, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
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


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """What each class counts in the loss, (classes,): (N / (classes n_k))^(1/2), so that a class that few
    pictures have is not given up for one that most have. All pictures together count N or less."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return (len(labels) / (classes * counts)).sqrt()


def main() -> None:
    config = parse_config(ClassifierConfig)
    config.check()
    pipe = load_pipeline(config.pretrained_model_name_or_path)
    pictures = NoisedPictures(pipe, config.dataset, config.splits, config.cache_dir)
    values = pictures.columns.get(config.label_column)
    if values is None:
        has = ", ".join(pictures.columns)
        raise ValueError(
            f"label_column must be a column of the data set ({has}), got {config.label_column!r}"
        )
    names = sorted(set(map(str, values)))
    require(len(names) > 1, "label_column", config.label_column, "a column of two values or more")
    labels = torch.tensor([names.index(str(value)) for value in values])
    weight = class_weights(labels, len(names))
    set_seed(config.seed)
    model = NoisyClassifier(
        names, pictures.side, pictures.channels, config.patch_size, tuple(config.block_out_channels)
    )

    def make_loss(accelerator: Any, trained: Any) -> Any:
        rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device

        def compute_loss(indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
            x_t, t = pictures.batch(indices, config.seed, step, rank, world, config.shift, config.noised)
            truth = labels[indices].to(device)
            logits = trained(x_t.to(device), t.to(device))
            right = (logits.argmax(-1) == truth).float().mean()
            return F.cross_entropy(logits, truth, weight.to(device)), {"accuracy": float(right)}

        return compute_loss

    train_tower(config, model, pictures, make_loss, "noisy_classifier")


if __name__ == "__main__":
    run(main, "training.classifier")
