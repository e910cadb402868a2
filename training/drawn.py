"""Pictures that a model draws of captions it was trained on, half of them guided to their style: what the
classifier that guides it meets, and no training picture shows.

    accelerate launch -m training.drawn --output_dir runs/drawn

A classifier learns what its teachers make of them (`training.classifier --drawn`). The names that
`training.evaluate styles` draws are left out.
"""

from dataclasses import dataclass, field

import torch

from training.config import parse_config, require, run
from training.data import load_pictures
from training.loop import make_accelerator
from training.samples import draw, with_guides
from training.styles import DRAWN, choose_rows


@dataclass
class DrawnConfig:
    """Settings of `training.drawn`."""

    output_dir: str = field(metadata={"help": "Folder of the pictures; what is there is not drawn again."})
    model: str = field(default="models/emoji", metadata={"help": "The pipeline that draws."})
    dataset: str = field(default="data/emoji", metadata={"help": "Data set that training.emoji built."})
    noisy_classifier: str = field(default="", metadata={"help": "What guides; default the model's own."})
    classifier_guidance_scale: float = field(
        default=300.0, metadata={"help": "Of the second half, to each picture's style; 0 is off."}
    )
    num_pictures: int = field(default=3000, metadata={"help": "Of captions at random, one each."})
    num_inference_steps: int = field(default=16, metadata={"help": "Of each picture."})
    batch_size: int = field(default=25, metadata={"help": "Pictures drawn at a time."})
    skip_names: int = field(default=150, metadata={"help": "First so many of evaluate styles' are left out."})
    seed: int = field(default=1_000_000, metadata={"help": "Of the choice and of the first picture."})

    def check(self) -> None:
        """Raise a ValueError that names the argument, for everything that can be told before work starts."""
        for name in ("num_pictures", "num_inference_steps", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("classifier_guidance_scale", "skip_names"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


def choose_captions(config: DrawnConfig) -> tuple[list[str], list[str]]:
    """(captions, styles) of training pictures in random order, without the names that are left out."""
    train = load_pictures(config.dataset, "train")
    names, styles = list(train["name"]), list(train["style"])
    left_out = {names[row] for row in choose_rows(names, styles, list(DRAWN), config.skip_names, 0)}
    pool = [i for i, style in enumerate(styles) if style in DRAWN and names[i] not in left_out]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(config.seed)).tolist()
    rows = [pool[i] for i in order[: config.num_pictures]]
    return [f"{names[row]}, {styles[row]} style" for row in rows], [styles[row] for row in rows]


def main() -> None:
    config = parse_config(DrawnConfig)
    config.check()
    captions, styles = choose_captions(config)
    pipe, state = with_guides(config.model, noisy_classifier=config.noisy_classifier), make_accelerator()
    scale, size = config.classifier_guidance_scale, config.batch_size
    has = scale == 0 or pipe.noisy_classifier is not None
    require(has, "noisy_classifier", config.noisy_classifier, "given: this model has none")
    half = len(captions) // 2
    for guidance, start, end in ((0.0, 0, half), (scale, half, len(captions))):
        first = start + (end - start) * state.process_index // state.num_processes
        last = start + (end - start) * (state.process_index + 1) // state.num_processes
        draw(
            pipe,
            captions[first:last],
            seed=config.seed + first,
            num_inference_steps=config.num_inference_steps,
            batch_size=size,
            folder=config.output_dir,
            label="drawing, guided to the style" if guidance else "drawing",
            class_labels=styles[first:last] if guidance else None,
            classifier_guidance_scale=guidance,
        )


if __name__ == "__main__":
    run(main, "training.drawn")
