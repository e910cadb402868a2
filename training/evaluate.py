"""Measure what was trained. Each command prints its figures and, with --json FILE, writes them.

    python -m training.evaluate zero-shot --clip models/judge
    python -m training.evaluate retrieval --model models/emoji --judge models/judge
    python -m training.evaluate sheet --model models/emoji
    python -m training.evaluate bits-per-dim --model models/emoji
    python -m training.evaluate text-information --model models/emoji
    python -m training.evaluate sampling-steps --models runs/a/pipeline runs/b/pipeline:fixed_large
    python -m training.evaluate words --clip runs/clip/clip --teacher

The judge is a CLIP that took no part in conditioning or guidance, of another seed and size than the one
whose text tower the model reads, and trained on every split.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from pipelines import TextToImagePipeline
from pipelines.images import image_grid
from training.bits_per_dim import BitsPerDimConfig, bits_per_dim, text_information
from training.config import parse_config, require
from training.data import PictureCache, cache_pictures, load_pictures
from training.emoji import STYLES
from training.sampling_steps import SamplingStepsConfig, sampling_steps

TEMPLATES = ("{}", "a {}", *(f"{{}}, {style} style" for style in list(STYLES.values())[:6]))


@dataclass
class EvaluationConfig:
    """Settings of `training.evaluate`."""

    clip: str = field(default="models/judge", metadata={"help": "zero-shot: the CLIP to measure."})
    judge: str = field(default="models/judge", metadata={"help": "The CLIP that scores pictures."})
    model: str = field(default="models/emoji", metadata={"help": "The pipeline to measure."})
    dataset: str = field(default="data/emoji", metadata={"help": "Data set that training.emoji built."})
    split: str = field(default="", metadata={"help": "Split to take; by default what the command is for."})
    cache_dir: str = field(default="data/cache", metadata={"help": "Decoded pictures."})
    num_pictures: int = field(default=200, metadata={"help": "retrieval: captions drawn at random."})
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Classifier-free guidance; the model's own by default."}
    )
    batch_size: int = field(default=25, metadata={"help": "Pictures drawn at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the captions and of the first picture."})
    output: str = field(default="", metadata={"help": "sheet, retrieval: PNG to write."})
    json: str = field(default="", metadata={"help": "File for the figures."})
    teacher: bool = field(default=False, metadata={"help": "words: the teacher's figures too."})
    wordnet_dir: str = field(default="/usr/share/wordnet", metadata={"help": "words: WordNet's files."})
    npm_dir: str = field(default="data/npm", metadata={"help": "words: where training.emoji's packages are."})

    def check(self) -> None:
        """Raise a ValueError that names the argument, for everything that can be told before work starts."""
        for name in ("num_pictures", "num_inference_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


class Judge:
    """A CLIP that tells which of all concepts a picture shows."""

    def __init__(self, folder: str):
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"there is no CLIP in {folder!r}; train one with training.clip")
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """(N, D), l2-normalised."""
        rows = []
        for start in range(0, len(texts), 512):
            ids = self.tokenizer(
                texts[start : start + 512], truncation=True, padding="longest", return_tensors="pt"
            ).input_ids
            rows.append(pooled(self.model.get_text_features(input_ids=ids)))
        return F.normalize(torch.cat(rows), dim=-1)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(N, 3, R, R) in [-1, 1] -> (N, D), l2-normalised."""
        rows = [pooled(self.model.get_image_features(pixel_values=part)) for part in images.split(128)]
        return F.normalize(torch.cat(rows), dim=-1)

    def embed_names(self, names: list[str]) -> Tensor:
        """(N, D): each name in every template, averaged: CLIP's prompt ensembles (Radford 2021, 3.1.4)."""
        embeds = self.embed_texts([t.format(name) for name in names for t in TEMPLATES])
        return F.normalize(embeds.unflatten(0, (len(names), len(TEMPLATES))).mean(1), dim=-1)


def pooled(output: Any) -> Tensor:
    """transformers 5 returns an output object where 4 returned the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


@dataclass
class Concepts:
    """Every concept of the data set with all its names, embedded by a judge."""

    ids: list[str]
    owner: Tensor  # (names,) index of the concept of each name
    embeds: Tensor  # (names, D)

    def rank(self, image_embeds: Tensor, truth: list[str]) -> Tensor:
        """(N,) place of the true concept among all, 0 the first; a concept scores as its best name does."""
        scores = image_embeds @ self.embeds.T  # (N, names)
        best = torch.full((len(scores), len(self.ids)), -2.0)
        best = best.scatter_reduce(1, self.owner.expand(len(scores), -1), scores, "amax")
        index = {concept: i for i, concept in enumerate(self.ids)}
        own = best.gather(1, torch.tensor([[index[c]] for c in truth]))
        return (~(best < own)).sum(1) - 1  # a tie, or NaN, counts against it


def embed_concepts(judge: Judge, dataset: str) -> Concepts:
    names: dict[str, set[str]] = defaultdict(set)
    for split in ("train", "validation", "heldout_compositions"):
        data = load_pictures(dataset, split)
        for concept, name in zip(data["concept"], data["name"], strict=True):
            names[concept].add(name)
    ids = sorted(names)
    owner = [i for i, concept in enumerate(ids) for _ in names[concept]]
    return Concepts(
        ids, torch.tensor(owner), judge.embed_names([n for concept in ids for n in sorted(names[concept])])
    )


def recall(ranks: Tensor) -> dict[str, float]:
    """Share of pictures whose concept is the first, or among the first five."""
    return {"R@1": float((ranks < 1).float().mean()), "R@5": float((ranks < 5).float().mean())}


def pictures_of(config: EvaluationConfig, split: str, resolution: int) -> PictureCache:
    return cache_pictures(
        load_pictures(config.dataset, split), resolution, config.cache_dir, "image", "caption"
    )


def zero_shot(config: EvaluationConfig) -> dict[str, Any]:
    """Classify pictures among all concepts by prompt templates alone (Radford 2021, section 3.1)."""
    judge = Judge(config.clip)
    concepts = embed_concepts(judge, config.dataset)
    figures: dict[str, Any] = {"concepts": len(concepts.ids)}
    splits = [config.split] if config.split else ["train", "validation", "heldout_compositions"]
    for split in splits:
        pictures = pictures_of(config, split, judge.model.config.vision_config.image_size)
        chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(config.seed))[:1000]
        ranks = concepts.rank(
            judge.embed_images(pictures.images(chosen)), [pictures.columns["concept"][i] for i in chosen]
        )
        figures[split] = {"pictures": len(chosen), **recall(ranks)}
    return figures


def draw(pipe: TextToImagePipeline, captions: list[str], config: EvaluationConfig) -> Tensor:
    """(N, 3, H, W) in [-1, 1]; picture i has the seed config.seed + i whatever the batch."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in tqdm(range(0, len(captions), config.batch_size), desc="drawing", unit="batch"):
        part = captions[start : start + config.batch_size]
        generators = [torch.Generator().manual_seed(config.seed + start + i) for i in range(len(part))]
        drawn: Any = pipe(
            part,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=generators,
            output_type="pt",
        )
        parts.append(drawn.images * 2 - 1)
    return torch.cat(parts)


def retrieval(config: EvaluationConfig) -> dict[str, Any]:
    """Draw random captions of a split and let the judge find the concept of each picture among all; real
    pictures of the same captions beside them, and a shuffled control that knows nothing of the text."""
    judge = Judge(config.judge)
    concepts = embed_concepts(judge, config.dataset)
    side = judge.model.config.vision_config.image_size
    pictures = pictures_of(config, config.split or "train", side)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(pictures), generator=generator)[: config.num_pictures].tolist()
    captions, truth = ([pictures.columns[c][i] for i in chosen] for c in ("caption", "concept"))
    pipe = TextToImagePipeline.from_pretrained(config.model)
    drawn = draw(pipe, captions, config)
    embeds = judge.embed_images(
        F.interpolate(drawn, (side, side), mode="area") if drawn.shape[-1] != side else drawn
    )
    figures: dict[str, Any] = {
        "split": config.split or "train",
        "pictures": len(chosen),
        "concepts": len(concepts.ids),
        "steps": config.num_inference_steps,
        "generated": recall(concepts.rank(embeds, truth)),
        "real": recall(concepts.rank(judge.embed_images(pictures.images(chosen)), truth)),
        "shuffled": recall(concepts.rank(embeds.roll(1, dims=0), truth)),
    }
    if config.output:
        save_png(image_grid(to_images(drawn[:100]), columns=10), config.output)
    return figures


SHEET_PROMPTS = (
    "red heart", "dog face", "pizza", "rocket", "grinning face",
    "sunflower", "house", "red apple", "cat face", "crown",
)  # fmt: skip


def sheet(config: EvaluationConfig) -> dict[str, Any]:
    """Ten prompts down, ten across: the six styles and four without one. No picking: seeds in a row."""
    styles = [*list(STYLES.values())[:6], "", "", "", ""]
    captions = [
        f"{name}, {style} style" if style else f"a {name}" for name in SHEET_PROMPTS for style in styles
    ]
    images = draw(TextToImagePipeline.from_pretrained(config.model), captions, config)
    path = config.output or "sheet.png"
    save_png(image_grid(to_images(images), columns=10), path)
    return {"sheet": path, "pictures": len(captions)}


def to_images(images: Tensor) -> list[Any]:
    from PIL import Image

    scaled = (images.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(i)) for i in scaled]


def save_png(image: Any, path: str) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    image.save(partial, format="PNG")
    partial.replace(target)


def words(config: EvaluationConfig) -> dict[str, Any]:
    """How many words that no caption holds the text tower of --clip understands."""
    from training.words import measure

    return measure(config)


COMMANDS: dict[str, Any] = {
    "zero-shot": zero_shot,
    "retrieval": retrieval,
    "sheet": sheet,
    "words": words,
    "bits-per-dim": bits_per_dim,
    "text-information": text_information,
    "sampling-steps": sampling_steps,
}
CONFIGS: dict[str, Any] = {  # of the commands that do not share EvaluationConfig
    "bits-per-dim": BitsPerDimConfig,
    "text-information": BitsPerDimConfig,
    "sampling-steps": SamplingStepsConfig,
}


def show(figures: dict[str, Any], indent: str = "") -> None:
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            show(value, indent + "  ")
        elif isinstance(value, list) and len(value) > 20:
            print(f"{indent}{name}: {len(value)} numbers, see --json")
        elif isinstance(value, float):
            print(f"{indent}{name}: {value:.3f}" if abs(value) >= 0.1 else f"{indent}{name}: {value:.3g}")
        else:
            print(f"{indent}{name}: {value}")


def main() -> None:
    argv = sys.argv[1:]
    if not argv or argv[0] not in COMMANDS:
        raise SystemExit(f"usage: python -m training.evaluate {{{','.join(COMMANDS)}}} [--help | settings]")
    config: Any = parse_config(CONFIGS.get(argv[0], EvaluationConfig), argv[1:])
    try:
        config.check()
        figures = COMMANDS[argv[0]](config)
    except ValueError as error:
        raise SystemExit(f"training.evaluate {argv[0]}: {error}") from error
    show(figures)
    if config.json:
        target = Path(config.json)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
