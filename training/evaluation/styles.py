"""A hundred names in four styles each, nothing picked: are the styles told apart, is it the right thing, and
which training picture is nearest?

    python -m training.evaluate styles --model models/emoji --output styles

The classifier is one of clean pictures (`training/configs/style_classifier.yaml`) that guides nothing.
"""

import html
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.components.noisy_classifier import NoisyClassifier
from pipelines.drawing.images import image_grid, to_pil
from pipelines.folders.files import save_png, write_file
from training.data.pictures import PictureCache, cache_pictures, load_pictures
from training.evaluation.judge import Judge, embed_concepts
from training.evaluation.metrics import nearest_neighbours, recall_at
from training.evaluation.redrawn import cache_redrawn
from training.evaluation.report import embed_pictures
from training.evaluation.report_page import STYLE, note, pair_tags, table_tag
from training.evaluation.samples import draw, with_guides
from training.evaluation.settings import OWN
from training.run.settings import require

DRAWN = ("3d", "flat", "noto", "twemoji")


@dataclass
class StylesConfig:
    """Settings of `training.evaluate styles`."""

    model: str = field(default="models/emoji", metadata={"help": "The pipeline to measure."})
    classifier: str = field(
        default="models/style-classifier", metadata={"help": "A NoisyClassifier of styles, for t = 0."}
    )
    judge: str = field(default="models/judge", metadata={"help": "The CLIP that scores pictures."})
    dataset: str = field(default="data/emoji", metadata={"help": "Data set that training.emoji built."})
    cache_dir: str = field(default="data/cache", metadata={"help": "Decoded pictures, their embeddings."})
    styles: list[str] = field(default_factory=lambda: list(DRAWN), metadata={"help": "Each name in each."})
    num_names: int = field(default=100, metadata={"help": "Names drawn at random of those in all styles."})
    num_inference_steps: int | None = field(default=None, metadata={"help": "The model's own by default."})
    guidance_scale: float | None = field(default=None, metadata={"help": "The model's own by default."})
    clip_guidance_scale: float | None = field(
        default=None,
        metadata={"help": "By the noised CLIP, 0 is off; the model's own unless guidance_scale is given."},
    )
    noisy_classifier: str = field(
        default="", metadata={"help": "Folder of a NoisyClassifier that guides; " + OWN}
    )
    classifier_guidance_scale: float = field(
        default=0.0, metadata={"help": "Of guidance to each picture's style by it, 0 is off."}
    )
    num_candidates: int = field(
        default=1, metadata={"help": "So many drawn for each picture; the best by what guides is kept."}
    )
    batch_size: int = field(default=25, metadata={"help": "Pictures drawn at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice and of the first picture."})
    output: str = field(default="styles", metadata={"help": "Folder of the page, and of what was drawn."})
    json: str = field(default="", metadata={"help": "File for the figures."})

    def check(self) -> None:
        """Raise a ValueError that names the argument, for everything that can be told before work starts."""
        for name in ("num_names", "batch_size", "num_candidates"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(len(self.styles) > 0, "styles", self.styles, "one or more")
        there = (Path(self.classifier) / "config.json").is_file()
        require(there, "classifier", self.classifier, "the folder of a NoisyClassifier")
        require(not Path(self.output).is_file(), "output", self.output, "a folder, there is a file")
        scale, guide = self.classifier_guidance_scale, self.noisy_classifier
        require(scale >= 0, "classifier_guidance_scale", scale, "0 or more")
        there = not guide or (Path(guide) / "config.json").is_file()
        require(there, "noisy_classifier", guide, "the folder of a trained one")


def choose_rows(names: list[str], styles: list[str], wanted: list[str], count: int, seed: int) -> list[int]:
    """Rows of `count` names at random of those that have a picture in each wanted style, a row for each."""
    places: dict[str, dict[str, int]] = defaultdict(dict)
    for row, (name, style) in enumerate(zip(names, styles, strict=True)):
        places[name].setdefault(style, row)
    whole = sorted(name for name, own in places.items() if own.keys() >= set(wanted))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [places[whole[i]][style] for i in order for style in wanted]


@torch.no_grad()
def classify(classifier: Any, pictures: Tensor, among: list[str]) -> list[str]:
    """The most probable of the styles `among` for each picture, (N, 3, H, W) in [-1, 1]."""
    places = [list(classifier.config.labels).index(style) for style in among]
    found = torch.cat([classifier(part, 0)[:, places].argmax(-1) for part in pictures.split(128)])
    return [among[i] for i in found.tolist()]


def accuracies(found: list[str], truth: list[str]) -> dict[str, float]:
    """Share of right ones, of all and of each style."""
    right: dict[str, list[bool]] = defaultdict(list)
    for a, b in zip(found, truth, strict=True):
        right["all"].append(a == b)
        right[b].append(a == b)
    return {style: sum(own) / len(own) for style, own in right.items()}


def styles(config: StylesConfig) -> dict[str, Any]:
    """Accuracy of the styles, of drawn and of real held-out pictures; retrieval of the concept; writes the
    page, each drawn picture beside its nearest training picture, and sheet.png."""
    # First: a data set that is not there is told before anything is loaded
    splits = {name: load_pictures(config.dataset, name) for name in ("train", "validation")}
    pipe, judge = with_guides(config.model, noisy_classifier=config.noisy_classifier), Judge(config.judge)
    classifier: Any = NoisyClassifier.from_pretrained(config.classifier).eval()
    known = list(classifier.config.labels)
    require(set(config.styles) <= set(known), "styles", config.styles, f"some of the classifier's, {known}")
    guided = config.classifier_guidance_scale > 0
    has = not guided or pipe.noisy_classifier is not None
    require(has, "noisy_classifier", config.noisy_classifier, "given: this model has none")
    guide = list(pipe.noisy_classifier.config.labels) if guided else config.styles
    require(set(config.styles) <= set(guide), "styles", config.styles, f"some of noisy_classifier's, {guide}")
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor

    def read(split: str) -> PictureCache:
        return cache_pictures(splits[split], side, config.cache_dir, "image", "caption")

    train, held_out = read("train"), read("validation")
    names, own = train.columns["name"], train.columns["style"]
    rows = choose_rows(names, own, config.styles, config.num_names, config.seed)
    require(len(rows) > 0, "styles", config.styles, "styles that some name has all of")
    captions = [f"{names[row]}, {own[row]} style" for row in rows]
    drawn = draw(
        pipe,
        captions,
        seed=config.seed,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        clip_guidance_scale=config.clip_guidance_scale,
        batch_size=config.batch_size,
        folder=Path(config.output) / "samples",
        class_labels=[own[row] for row in rows] if guided else None,
        classifier_guidance_scale=config.classifier_guidance_scale,
        num_candidates=config.num_candidates,
    )
    found = classify(classifier, drawn, config.styles)
    others = [i for i, style in enumerate(held_out.columns["style"]) if style in config.styles]
    kinds = [held_out.columns["style"][i] for i in others]
    real = [("real held-out", held_out.images(others))]
    if pipe.vae is None:  # what the model's smudges alone take from the classifier
        again = torch.from_numpy(cache_redrawn(held_out, pipe, config.cache_dir)[others])
        real.append(("real held-out, redrawn", again.float() / 127.5 - 1))
    embeds, all_embeds = judge.embed_images(drawn), embed_pictures(judge, train, config.cache_dir)
    concepts, truth = embed_concepts(judge, config.dataset), [train.columns["concept"][row] for row in rows]
    ranks = {"generated": concepts.rank(embeds, truth), "real": concepts.rank(all_embeds[rows], truth)}
    distances, nearest = nearest_neighbours(embeds, all_embeds)
    figures: dict[str, Any] = {
        "model": config.model,
        "pictures": len(rows),
        "names": len(rows) // len(config.styles),
        "classifier_guidance_scale": config.classifier_guidance_scale,
        "num_candidates": config.num_candidates,
        "style found, generated": accuracies(found, [own[row] for row in rows]),
        **{
            f"style found, {name}": accuracies(classify(classifier, x, config.styles), kinds)
            for name, x in real
        },
        **{f"R@5, {column}": recall_at(places, 5) for column, places in ranks.items()},
    }
    copies = train.images(nearest)
    notes = [
        f"{caption}\nfound: {style}; nearest: {names[int(j)]}, {own[int(j)]}\ndistance {float(distance):.3f}"
        for caption, style, j, distance in zip(captions, found, nearest, distances, strict=True)
    ]
    folder = Path(config.output)
    write_file(
        folder / "index.html", page(config, figures, pair_tags(drawn, copies, ("drawn", "nearest"), notes))
    )
    columns = len(config.styles) * max(1, 20 // len(config.styles))
    save_png(image_grid(to_pil(drawn), columns=columns), folder / "sheet.png")
    write_file(folder / "styles.json", json.dumps(figures, indent=1) + "\n")
    return figures


def page(config: StylesConfig, figures: dict[str, Any], pairs: str) -> str:
    rows = [
        [
            name,
            *(
                f"{figures[f'style found, {name}'].get(style, float('nan')):.3f}"
                for style in ("all", *config.styles)
            ),
        ]
        for name in ("generated", "real held-out", "real held-out, redrawn")
        if f"style found, {name}" in figures
    ]
    scale = config.classifier_guidance_scale
    guided = f" Each guided to its style by a noised classifier, at scale {scale:g}." if scale > 0 else ""
    count = config.num_candidates
    several = f"{count} seeds each, of which the guides keep one and nobody else picks"
    drawn = several if count > 1 else "one seed each, nothing picked"
    title = html.escape(f"{config.model}: {figures['names']} names in {len(config.styles)} styles")
    body = [
        f"<h1>{title}</h1>",
        table_tag(["style found", "all", *config.styles], rows),
        note(
            f"R@5 of the concept {figures['R@5, generated']:.3f}, real pictures of the same captions "
            f"{figures['R@5, real']:.3f}. Names drawn at random, {drawn}: drawn on the left, its nearest "
            f"training picture in the judge's space on the right.{guided} Redrawn: a real picture noised to "
            f"t of 60 to 240 and drawn on from there by the model, told nothing of it."
        ),
        pairs,
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )
