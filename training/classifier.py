"""Train a classifier of noised pictures, for classifier guidance (Dhariwal and Nichol 2021, section 4).

    accelerate launch -m training.classifier --config training/configs/noisy_classifier.yaml
    accelerate launch -m training.classifier --config training/configs/style_classifier.yaml

The classes are the values of a column of the data set; what it sees is x_t of the model that it will guide.
What that model draws is not quite what it learned from, and nobody has said what class it is of: with
`--drawn` the mean of several classifiers says it (a noisy student, Xie 2019, https://arxiv.org/abs/1911.04252).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor

from pipelines.components.noisy_classifier import NoisyClassifier
from pipelines.images import to_tensor
from training.config import parse_config, require, run
from training.data import seed_for
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
    drawn: str = field(
        default="",
        metadata={"help": "Folder of pictures (training.drawn) to learn too, as teachers see them."},
    )
    teachers: list[str] = field(
        default_factory=list, metadata={"help": "Folders of classifiers with all classes of one column."}
    )
    drawn_share: float = field(default=0.4, metadata={"help": "Share of them in each batch."})
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
        require(0 < self.drawn_share < 1, "drawn_share", self.drawn_share, "in (0, 1)")
        there = not self.drawn or any(Path(self.drawn).glob("*.png"))
        require(there, "drawn", self.drawn, "a folder with PNG pictures")
        both = bool(self.drawn) == bool(self.teachers)
        require(both, "teachers", self.teachers, "given with drawn, and left out without")
        for folder in self.teachers:
            there = (Path(folder) / "config.json").is_file()
            require(there, "teachers", folder, "the folder of a NoisyClassifier")


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


@torch.no_grad()
def soft_labels(teachers: list[Any], pictures: Tensor, classes: list[str]) -> Tensor:
    """(N, classes): the mean, over teachers and over each picture and its mirror image, of p(y | x_0).

    pictures: (N, C, H, W) uint8. Raises ValueError for a teacher that does not know all of the classes."""
    total = torch.zeros(len(pictures), len(classes))
    for teacher in teachers:
        known = list(teacher.config.labels)
        require(set(classes) <= set(known), "teachers", known, f"classifiers that know {classes}")
        places = [known.index(name) for name in classes]
        for start in range(0, len(pictures), 128):
            part = pictures[start : start + 128].float() / 127.5 - 1
            for view in (part, part.flip(-1)):
                total[start : start + 128] += teacher(view, 0)[:, places].softmax(-1)
    return total / (2 * len(teachers))


class Drawn(NamedTuple):
    """Pictures a model drew, (N, C, H, W) uint8; the set of classes they are taught in; p, (N, classes)."""

    pictures: Tensor
    place: int
    soft: Tensor

    def choose(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(x_0, p) of `count` of them at random."""
        chosen = torch.randint(0, len(self.pictures), (count,), generator=generator)
        return self.pictures[chosen].float() / 127.5 - 1, self.soft[chosen]


def read_drawn(config: ClassifierConfig, sets: list[list[str]], shape: tuple[int, ...]) -> Drawn:
    """The pictures of `config.drawn` as `config.teachers` see them.

    Raises ValueError where these do not know all classes of one set, and for pictures of another shape."""
    teachers: list[Any] = [NoisyClassifier.from_pretrained(folder).eval() for folder in config.teachers]
    known = [{*teacher.config.labels} for teacher in teachers]
    place = next((i for i, own in enumerate(sets) if all(labels >= {*own} for labels in known)), -1)
    require(place >= 0, "teachers", config.teachers, f"classifiers that know all classes of one of {sets}")
    images = [Image.open(path) for path in sorted(Path(config.drawn).glob("*.png"))]
    sizes = {image.size for image in images}
    require(sizes == {shape[:0:-1]}, "drawn", sizes, f"pictures of {shape[2]} x {shape[1]}")
    pictures = torch.cat([((to_tensor(image) + 1) * 127.5).round().byte() for image in images])
    return Drawn(pictures, place, soft_labels(teachers, pictures, sets[place]))


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
    require(not config.drawn or pipe.vae is None, "drawn", config.drawn, "left out for a model of latents")
    shape = (pictures.channels, pictures.side, pictures.side)
    drawn = read_drawn(config, [own for own, _ in sets], shape) if config.drawn else None
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
            count = int(config.drawn_share * len(indices)) if drawn else 0
            others, soft, indices = None, torch.zeros(0), indices[count:]
            if drawn and count:  # they take the first places of the batch
                generator = torch.Generator().manual_seed(seed_for(config.seed, "drawn", step, rank))
                others, soft = drawn.choose(count, generator)
            x_t, t = pictures.batch(
                indices, config.seed, step, rank, world, shift=config.shift, noised=config.noised,
                flip=config.flip, timestep_shift=config.timestep_shift, others=others,
            )  # fmt: skip
            parts = trained(x_t.to(device), t.to(device)).split([len(own) for own, _ in sets], dim=1)
            loss, details = torch.zeros((), device=device), {}
            for i, (logits, (own, labels)) in enumerate(zip(parts, sets, strict=True)):
                target = F.one_hot(labels[indices], len(own)).float()
                weight = weights[i][labels[indices]]
                if drawn and count:
                    taught = i == drawn.place
                    target = torch.cat([soft if taught else torch.zeros(count, len(own)), target])
                    weight = torch.cat([torch.full((count,), float(taught)), weight])
                weight = (weight * (t < (limits[i] if limits else total))).to(device)
                target = target.to(device)  # where the weight is 0 the loss is a constant
                each = F.cross_entropy(logits, target, reduction="none")
                loss = loss + (weight * each).sum() / weight.sum().clamp(min=1e-6)
                right = (logits.argmax(-1) == target.argmax(-1))[weight > 0]
                if len(right):
                    details["accuracy" if len(sets) == 1 else columns[i]] = float(right.float().mean())
            return loss, details

        return compute_loss

    train_tower(config, model, pictures, make_loss, "noisy_classifier", config.ema_decay)


if __name__ == "__main__":
    run(main, "training.classifier")
