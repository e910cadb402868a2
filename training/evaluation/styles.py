"""A hundred names in four styles each, without cherry-picking: does each picture have the right style and
concept, and which training picture is nearest to it?

    python -m training.evaluate styles --model models/emoji --output styles

The style classifier sees clean pictures (`training/configs/style_classifier.yaml`) and is not used for
guidance.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.components.noisy_classifier import NoisyClassifier
from pipelines.drawing.images import image_grid, save_png, to_pil
from pipelines.folders.files import write_file
from training.data.pictures import load_pictures
from training.evaluation.html_tags import document, heading, note, pair_tags, table_tag
from training.evaluation.judge import Judge, embed_concepts, embed_pictures
from training.evaluation.metrics import nearest_neighbours, recall_at
from training.evaluation.redrawn import cache_redrawn
from training.evaluation.samples import draw, random_rows, read_pictures, with_guides
from training.evaluation.settings import (
    ClassifierSettings,
    FigureSettings,
    GuidanceSettings,
    JudgedSettings,
)
from training.run.settings import Rule, require, setting

DRAWN = ["3d", "flat", "noto", "twemoji"]


class StylesConfig(JudgedSettings, ClassifierSettings, GuidanceSettings, FigureSettings):
    """Settings of `training.evaluate styles`."""

    classifier: str = setting(
        "A NoisyClassifier of styles, for t = 0.",
        "models/style-classifier",
        Rule(lambda folder: (Path(folder) / "config.json").is_file(), "the folder of a NoisyClassifier"),
    )
    styles: list[str] = setting("Styles in which each name is drawn.", DRAWN, Rule(bool, "one or more"))
    num_names: int = setting("Number of names, chosen at random from those in all styles.", 100, "at least 1")
    classifier_guidance_scale: float = setting(
        "Guidance to each picture's style by noisy_classifier, 0 for none.", 0.0, "0 or more"
    )
    num_candidates: int = setting(
        "Candidates drawn for each picture; the guides' best one is kept.", 1, "at least 1"
    )
    output: str = setting(
        "Folder of the page and the drawn pictures.",
        "styles",
        Rule(lambda folder: not Path(folder).is_file(), "a folder, there is a file"),
    )


def choose_rows(names: list[str], styles: list[str], wanted: list[str], count: int, seed: int) -> list[int]:
    """One row for each wanted style of `count` names, drawn at random from those with a picture in every such
    style."""
    places: dict[str, dict[str, int]] = defaultdict(dict)
    for row, (name, style) in enumerate(zip(names, styles, strict=True)):
        places[name].setdefault(style, row)
    whole = sorted(name for name, own in places.items() if own.keys() >= set(wanted))
    chosen = random_rows(len(whole), count, seed)
    return [places[whole[i]][style] for i in chosen for style in wanted]


@torch.no_grad()
def classify(classifier: Any, pictures: Tensor, among: list[str]) -> list[str]:
    """The most probable of the styles `among` for each picture, (N, 3, H, W) in [-1, 1]."""
    places = [list(classifier.config.labels).index(style) for style in among]
    found = torch.cat([classifier(part, 0)[:, places].argmax(-1) for part in pictures.split(128)])
    return [among[i] for i in found.tolist()]


def accuracies(found: list[str], truth: list[str]) -> dict[str, float]:
    """The share of correct styles, overall ("all") and for each style."""
    right: dict[str, list[bool]] = defaultdict(list)
    for a, b in zip(found, truth, strict=True):
        right["all"].append(a == b)
        right[b].append(a == b)
    return {style: sum(own) / len(own) for style, own in right.items()}


def load_models(config: StylesConfig) -> tuple[Any, Any]:
    """(pipeline, classifier). Raises ValueError for a style that either network does not know."""
    pipe = with_guides(config.model, noisy_classifier=config.noisy_classifier)
    classifier: Any = NoisyClassifier.from_pretrained(config.classifier).eval()
    known = list(classifier.config.labels)
    require(set(config.styles) <= set(known), "styles", config.styles, f"some of the classifier's, {known}")
    if config.classifier_guidance_scale > 0:
        guide, name = pipe.noisy_classifier, config.noisy_classifier
        require(guide is not None, "noisy_classifier", name, "given: this model has none")
        known = list(guide.config.labels)
        require(
            set(config.styles) <= set(known), "styles", config.styles, f"some of noisy_classifier's, {known}"
        )
    return pipe, classifier


def styles(config: StylesConfig) -> dict[str, Any]:
    """Style accuracy for generated and for real held-out pictures, and retrieval of the concept. Also write a
    page that shows each generated picture next to its nearest training picture, and sheet.png."""
    for split in ("train", "validation"):  # a missing data set is reported before any model is loaded
        load_pictures(config.dataset, split)
    (pipe, classifier), judge = load_models(config), Judge(config.judge)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    train, held_out = (read_pictures(config, split, side) for split in ("train", "validation"))
    names, own = train.columns["name"], train.columns["style"]
    rows = choose_rows(names, own, config.styles, config.num_names, config.seed)
    require(len(rows) > 0, "styles", config.styles, "styles that some name has all of")
    captions, truth = [f"{names[row]}, {own[row]} style" for row in rows], [own[row] for row in rows]
    scale, folder = config.classifier_guidance_scale, Path(config.output)
    guided: Any = {"class_labels": truth if scale > 0 else None, "classifier_guidance_scale": scale}
    guided |= {"num_candidates": config.num_candidates, "folder": folder / "samples"}
    drawn = draw(pipe, captions, config.seed, **config.drawing(), **guided)
    found = classify(classifier, drawn, config.styles)
    others = [i for i, style in enumerate(held_out.columns["style"]) if style in config.styles]
    kinds = [held_out.columns["style"][i] for i in others]
    real = {"real held-out": held_out.images(others)}
    if pipe.vae is None:  # how much the model's smudges alone cost the classifier
        again = torch.from_numpy(cache_redrawn(held_out, pipe, config.cache_dir)[others])
        real["real held-out, redrawn"] = again.float() / 127.5 - 1
    accuracy = {"generated": accuracies(found, truth)}
    accuracy |= {name: accuracies(classify(classifier, x, config.styles), kinds) for name, x in real.items()}
    embeds, all_embeds = judge.embed_images(drawn), embed_pictures(judge, train, config.cache_dir)
    concepts, shown = embed_concepts(judge, config.dataset), [train.columns["concept"][row] for row in rows]
    figures: dict[str, Any] = {
        "model": config.model,
        "pictures": len(rows),
        "names": len(rows) // len(config.styles),
        "classifier_guidance_scale": scale,
        "num_candidates": config.num_candidates,
        **{f"style found, {name}": shares for name, shares in accuracy.items()},
        "R@5, generated": recall_at(concepts.rank(embeds, shown), 5),
        "R@5, real": recall_at(concepts.rank(all_embeds[rows], shown), 5),
    }
    distances, nearest = nearest_neighbours(embeds, all_embeds)
    notes = [
        f"{caption}\nfound: {style}; nearest: {names[int(j)]}, {own[int(j)]}\ndistance {float(distance):.3f}"
        for caption, style, j, distance in zip(captions, found, nearest, distances, strict=True)
    ]
    pairs = pair_tags(drawn, train.images(nearest), ("drawn", "nearest"), notes)
    write_file(folder / "index.html", page(config, figures, accuracy, pairs))
    columns = len(config.styles) * max(1, 20 // len(config.styles))
    save_png(image_grid(to_pil(drawn), columns=columns), folder / "sheet.png")
    write_file(folder / "styles.json", json.dumps(figures, indent=1) + "\n")
    return figures


def page(
    config: StylesConfig, figures: dict[str, Any], accuracy: dict[str, dict[str, float]], pairs: str
) -> str:
    rows = [
        [name, *(f"{shares.get(style, float('nan')):.3f}" for style in ("all", *config.styles))]
        for name, shares in accuracy.items()
    ]
    scale = config.classifier_guidance_scale
    guided = f" Each guided to its style by a noised classifier, at scale {scale:g}." if scale > 0 else ""
    count = config.num_candidates
    several = f"{count} seeds each, of which the guides keep one, without cherry-picking"
    drawn = several if count > 1 else "one seed each, nothing picked"
    title = f"{config.model}: {figures['names']} names in {len(config.styles)} styles"
    explained = (
        f"R@5 of the concept {figures['R@5, generated']:.3f}, real pictures of the same captions "
        f"{figures['R@5, real']:.3f}. Names drawn at random, {drawn}: drawn on the left, its nearest "
        f"training picture in the judge's space on the right.{guided} Redrawn: a real picture noised to "
        f"t of 60 to 240 and denoised from there by the model, without a prompt."
    )
    table = table_tag(["style found", "all", *config.styles], rows)
    return document(title, [heading(1, title), table, note(explained), pairs])
