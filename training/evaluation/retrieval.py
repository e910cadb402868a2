"""Does the judge recognise, among all concepts, what generated and real pictures are meant to show?

python -m training.evaluate zero-shot --clip models/judge
python -m training.evaluate retrieval --model models/emoji --judge models/judge
python -m training.evaluate sheet --model models/emoji
"""

import itertools
from typing import Any

from torch import Tensor

from pipelines.coding.likelihood import chain_of
from pipelines.drawing.images import image_grid, save_png, to_pil
from training.data.emoji import STYLES
from training.data.words import SPLITS
from training.evaluation.judge import Judge, embed_concepts, recall
from training.evaluation.samples import draw, random_rows, read_pictures, with_guides
from training.evaluation.settings import EvaluationConfig

SHEET_PROMPTS = (
    "red heart", "dog face", "pizza", "rocket", "grinning face",
    "sunflower", "house", "red apple", "cat face", "crown",
)  # fmt: skip
ZERO_SHOT_PICTURES = 1000  # of each split, at most


def zero_shot(config: EvaluationConfig) -> dict[str, Any]:
    """Zero-shot classification of real pictures among all concepts, by prompt templates (Radford 2021,
    section 3.1)."""
    judge = Judge(config.clip or config.judge)
    concepts = embed_concepts(judge, config.dataset)
    figures: dict[str, Any] = {"concepts": len(concepts.ids)}
    for split in [config.split] if config.split else SPLITS:
        pictures = read_pictures(config, split, judge.image_size)
        chosen = random_rows(len(pictures), ZERO_SHOT_PICTURES, config.seed)
        truth = [pictures.columns["concept"][i] for i in chosen]
        ranks = concepts.rank(judge.embed_images(pictures.images(chosen)), truth)
        figures[split] = {"pictures": len(chosen), **recall(ranks)}
    return figures


def draw_captions(config: EvaluationConfig, captions: list[str]) -> Tensor:
    """(N, 3, H, W) in [-1, 1]: the pictures that the model draws for the captions."""
    pipe = with_guides(config.model)
    if config.eta is not None:
        pipe.scheduler = chain_of(pipe.scheduler, eta=config.eta)
    return draw(pipe, captions, config.seed, **config.drawing())


def retrieval(config: EvaluationConfig) -> dict[str, Any]:
    """Draw random captions of a split and let the judge find each picture's concept among all concepts. For
    comparison, the same for the real pictures of these captions, and for a control whose pictures are
    shuffled and thus independent of the text."""
    judge, split = Judge(config.judge), config.split or "train"
    concepts = embed_concepts(judge, config.dataset)
    pictures = read_pictures(config, split, judge.image_size)
    chosen = random_rows(len(pictures), config.num_pictures, config.seed)
    captions, truth = ([pictures.columns[c][i] for i in chosen] for c in ("caption", "concept"))
    drawn = draw_captions(config, captions)
    embeds = judge.embed_images(drawn)
    figures = {
        "split": split,
        "pictures": len(chosen),
        "concepts": len(concepts.ids),
        "steps": config.num_inference_steps,
        "generated": recall(concepts.rank(embeds, truth)),
        "real": recall(concepts.rank(judge.embed_images(pictures.images(chosen)), truth)),
        "shuffled": recall(concepts.rank(embeds.roll(1, dims=0), truth)),
    }
    if config.output:
        save_png(image_grid(to_pil(drawn[:100]), columns=10), config.output)
    return figures


def sheet(config: EvaluationConfig) -> dict[str, Any]:
    """A sheet with ten prompts as rows and ten columns: the six styles, and four pictures without a style.
    The seeds are consecutive, so nothing is cherry-picked."""
    styles = [*list(STYLES.values())[:6], "", "", "", ""]
    pairs = itertools.product(SHEET_PROMPTS, styles)
    captions = [f"{name}, {style} style" if style else f"a {name}" for name, style in pairs]
    images = draw_captions(config, captions)
    path = config.output or "sheet.png"
    save_png(image_grid(to_pil(images), columns=10), path)
    return {"sheet": path, "pictures": len(captions)}
