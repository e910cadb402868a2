"""How many words that occur in no caption a text tower understands.

    python -m training.evaluate words --clip runs/clip/clip --teacher

`training.data.words` selects the words.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pipelines.drawing.text import encode_text
from training.data.words import UnseenWord, read_wordnet, word_lists
from training.evaluation.judge import embed_concepts
from training.evaluation.noised_accuracy import PipelineTexts
from training.evaluation.settings import EvaluationConfig
from training.objectives.distillation import Teacher
from training.run.building import load_text_tower


def word_ranks(embedder: Any, concepts: Any, words: list[UnseenWord]) -> Tensor:
    """(N,) rank of each word's best concept among all concepts, from 0."""
    embeds = embedder.embed_texts([word.text for word in words])
    pairs = [(row, concept) for row, word in enumerate(words) for concept in sorted(word.concepts)]
    rows = torch.tensor([row for row, _ in pairs])
    ranks = concepts.rank(embeds[rows], [concept for _, concept in pairs])
    best = torch.full((len(words),), len(concepts.ids))
    return best.scatter_reduce(0, rows, ranks, "amin")


class StatesEmbedder:
    """Embeds texts by the states that a U-Net's cross-attention reads: their mean over the context, minus its
    average over all names, l2-normalised."""

    def __init__(self, tokenizer: Any, encoder: Any, names: list[str]):
        self.tokenizer, self.encoder = tokenizer, encoder
        self.center: Tensor | float = 0.0
        self.center = self._mean_states(names).mean(0)

    @torch.no_grad()
    def _mean_states(self, texts: list[str]) -> Tensor:
        parts = (texts[start : start + 256] for start in range(0, len(texts), 256))
        return torch.cat([encode_text(self.tokenizer, self.encoder, part)[0].mean(1) for part in parts])

    def embed_texts(self, texts: list[str]) -> Tensor:
        return torch.nn.functional.normalize(self._mean_states(texts) - self.center, dim=-1)

    embed_names = embed_texts


def words(config: EvaluationConfig) -> dict[str, Any]:
    """How often the concept that a word stands for is the nearest of all concepts, or among the five nearest.

    The figures "tower" are measured in the text tower's own space, "states" in the states that the U-Net
    reads, and "teacher" in the sentence encoder's space. No caption or tag contains any of the words:
    distillation may teach those called "taught", and may not teach those called "kept out". A word is
    embedded by itself, a concept by its names in every template.
    """
    wordnet = read_wordnet(config.wordnet_dir)
    tokenizer, encoder = load_text_tower(config.clip or config.model, "clip")
    encoder.eval()
    tower: Any = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder)  # the parts that are read
    embedders: dict[str, Any] = {"tower": PipelineTexts(tower)}
    if config.teacher:
        embedders["teacher"] = Teacher(cache_dir=config.cache_dir)
    taught, kept_out, names = word_lists(config.dataset, config.npm_dir, wordnet)
    embedders["states"] = StatesEmbedder(tokenizer, encoder, sorted(set().union(*names.values())))
    lists = {
        "taught synonyms": taught,
        "kept out": kept_out,
        "kept out, synonyms": [word for word in kept_out if not word.kind],
        "kept out, kinds": [word for word in kept_out if word.kind],
    }
    figures: dict[str, Any] = {"concepts": len(names), "words": {n: len(part) for n, part in lists.items()}}
    for name, embedder in embedders.items():
        concepts = embed_concepts(embedder, config.dataset)
        ranks = {part: word_ranks(embedder, concepts, own) for part, own in lists.items() if own}
        figures[name] = {
            part: {f"top {n}": float((r < n).float().mean()) for n in (1, 5)} for part, r in ranks.items()
        }
    if config.teacher:
        figures["share of the teacher's top 5"] = {
            part: figures["tower"][part]["top 5"] / max(figures["teacher"][part]["top 5"], 1e-9)
            for part in figures["tower"]
        }
    return figures
