"""The judge: a CLIP that took no part in conditioning or guidance, and what it says about pictures."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from training.data.arrays import content_key, memory_map, model_key
from training.data.pictures import PictureCache, load_pictures
from training.data.words import SPLITS, TEMPLATES
from training.evaluation.metrics import recall_at


class EmbedsNames(Protocol):
    def embed_names(self, names: list[str]) -> Tensor:
        """(N, D), l2-normalised."""
        ...


class Judge:
    """A CLIP that judges which of all concepts a picture shows."""

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
            part = texts[start : start + 512]
            ids = self.tokenizer(part, truncation=True, padding="longest", return_tensors="pt").input_ids
            rows.append(pooled(self.model.get_text_features(input_ids=ids)))
        return F.normalize(torch.cat(rows), dim=-1)

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(N, 3, H, H) in [-1, 1] -> (N, D), l2-normalised. Larger pictures are reduced to the judge's size
        by averaging over areas, smaller ones are enlarged by bicubic interpolation."""
        side = self.image_size
        if images.shape[-1] > side:
            images = F.interpolate(images, (side, side), mode="area")
        elif images.shape[-1] < side:
            images = F.interpolate(images, (side, side), mode="bicubic").clamp(-1, 1)
        rows = [pooled(self.model.get_image_features(pixel_values=part)) for part in images.split(128)]
        return F.normalize(torch.cat(rows), dim=-1)

    def embed_names(self, names: list[str]) -> Tensor:
        """(N, D): each name's mean over all templates, a prompt ensemble (Radford 2021, section 3.1.4)."""
        embeds = self.embed_texts([t.format(name) for name in names for t in TEMPLATES])
        return F.normalize(embeds.unflatten(0, (len(names), len(TEMPLATES))).mean(1), dim=-1)


def pooled(output: Any) -> Tensor:
    """The pooled tensor: transformers 5 returns an output object where transformers 4 returned the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


@dataclass
class Concepts:
    """Every concept of the data set, with the embeddings of all its names."""

    ids: list[str]
    owner: Tensor  # (names,) index of the concept of each name
    embeds: Tensor  # (names, D)

    def rank(self, image_embeds: Tensor, truth: list[str]) -> Tensor:
        """(N,) rank of the true concept among all, from 0; a concept's score is that of its best name."""
        scores = image_embeds @ self.embeds.T  # (N, names)
        best = torch.full((len(scores), len(self.ids)), -2.0)
        best = best.scatter_reduce(1, self.owner.expand(len(scores), -1), scores, "amax")
        index = {concept: i for i, concept in enumerate(self.ids)}
        own = best.gather(1, torch.tensor([[index[c]] for c in truth]))
        return (~(best < own)).sum(1) - 1  # a tie, or NaN, counts against it


def embed_concepts(judge: EmbedsNames, dataset: str) -> Concepts:
    """The concepts of all splits, with their names' embeddings."""
    names: dict[str, set[str]] = defaultdict(set)
    for split in SPLITS:
        data = load_pictures(dataset, split)
        for concept, name in zip(data["concept"], data["name"], strict=True):
            names[concept].add(name)
    ids = sorted(names)
    owned = [(i, name) for i, concept in enumerate(ids) for name in sorted(names[concept])]
    owner, every = zip(*owned, strict=True)
    return Concepts(ids, torch.tensor(owner), judge.embed_names(list(every)))


def recall(ranks: Tensor) -> dict[str, float]:
    """The share of pictures whose concept ranks first (R@1), or among the first five (R@5)."""
    return {f"R@{k}": recall_at(ranks, k) for k in (1, 5)}


def embed_pictures(judge: Judge, pictures: PictureCache, cache_dir: str) -> Tensor:
    """(N, D): the judge's embeddings of a whole split, computed once for each judge and split."""
    path = Path(cache_dir) / f"judge-{content_key(pictures.key, model_key(judge.model))}.npy"

    def fill(target: np.ndarray) -> None:
        for start in tqdm(range(0, len(target), 128), desc="embedding real pictures", unit="batch"):
            rows = torch.arange(start, min(start + 128, len(target)))
            target[start : start + 128] = judge.embed_images(pictures.images(rows)).numpy()

    width = judge.model.config.projection_dim
    rows = memory_map(path, (len(pictures), width), np.dtype(np.float32), fill)
    return torch.from_numpy(np.array(rows))
