"""Text states and latents, which stay the same throughout training: computed once and kept in memory-mapped
files named by a digest of the models and the data that they come from."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.drawing.text import context_length, encode_text
from training.data.arrays import content_key, memory_map, model_key
from training.data.pictures import PictureCache

logger = logging.getLogger(__name__)


# ------------------------------------------------------------ text


@dataclass
class TextCache:
    """Text-encoder outputs of all captions in one memory-mapped fp16 array (N, L * D + P). Each row is one
    caption's states (L, D), flattened, followed by its pooled vector (P,)."""

    rows: np.ndarray
    length: int  # L
    width: int  # D
    numbers: dict[str, int] = field(default_factory=dict)  # caption -> its row

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """States (B, L, D) and pooled vectors (B, P) of cached captions, float32."""
        return self.lookup(torch.tensor([self.numbers[caption] for caption in captions]))

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States and pooled vectors of the captions with these row numbers, as `__call__` returns them."""
        rows = torch.from_numpy(self.rows[ids.numpy()]).float()
        states, pooled = rows.tensor_split([self.length * self.width], dim=1)
        return states.unflatten(1, (self.length, self.width)), pooled


def cache_text(captions: list[str], tokenizer: Any, text_encoder: Any, cache_dir: str | Path) -> TextCache:
    """Encode every caption once with the frozen encoder, keyed by its weights, config and the tokens."""
    tokens = hashlib.sha256()
    length = context_length(tokenizer, text_encoder)
    too_long = []
    for caption, ids in zip(captions, tokenizer(captions, verbose=False).input_ids, strict=True):
        tokens.update(np.array([*ids, -1]).tobytes())
        if len(ids) > length:
            too_long.append(caption)
    if too_long:
        first = too_long[0] if len(too_long[0]) < 60 else too_long[0][:60] + "..."
        count = f"{len(too_long)} of {len(captions)} captions are"
        logger.warning("%s longer than %d tokens; their ends are not seen: %r", count, length, first)
    key = content_key(model_key(text_encoder), tokens.hexdigest(), f"{length} {tokenizer.pad_token_id}")

    @torch.no_grad()
    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        with without_cut_warnings():
            states, pooled = encode_text(tokenizer, text_encoder, texts)[:2]
        return states, torch.cat([states.flatten(1), pooled], dim=1)

    def fill(target: np.ndarray) -> None:
        for start in tqdm(range(0, len(captions), 256), desc="encoding captions", unit="batch"):
            rows = encode(captions[start : start + 256])[1].to(torch.float16)
            target[start : start + 256] = rows.cpu().numpy()

    states, row = encode([""])
    path = Path(cache_dir) / f"text-{key}.npy"
    rows = memory_map(path, (len(captions), row.shape[1]), np.dtype(np.float16), fill)
    numbers = {caption: number for number, caption in enumerate(captions)}
    return TextCache(rows, states.shape[1], states.shape[2], numbers)


@dataclass
class LiveText:
    """Encodes captions on demand, with the same interface as TextCache. It is used for streams, whose
    captions are not known in advance, and for a text encoder that is being trained: with `learns`, gradients
    flow through it."""

    tokenizer: Any
    text_encoder: Any
    learns: bool = False

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()), without_cut_warnings():
            return encode_text(self.tokenizer, self.text_encoder, captions)[:2]


@contextlib.contextmanager
def without_cut_warnings() -> Iterator[None]:
    """Silence the warning that `encode_text` logs for each truncated prompt: a data set would log too many.
    `cache_text` counts the truncated captions instead."""
    log = logging.getLogger("pipelines.drawing.text")
    was = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = was


# ------------------------------------------------------------ latents


@torch.no_grad()
def encode_latents(vae: Any, images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> (mean - shift_factor) * scaling_factor, (B, C, h, w).

    diffusers' own script samples the posterior at every step. A cache holds one latent for each picture, so
    the posterior's mean is used instead; its standard deviation is small compared with the latents' own
    spread.
    """
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (vae.encode(images.to(vae.device)).latent_dist.mode() - shift) * vae.config.scaling_factor


@dataclass
class LatentCache:
    """Like PictureCache, for latents instead of pixels."""

    latents: np.ndarray  # (N, C, h, w) fp16, memory-mapped; (2 N, C, h, w) with `mirrored`
    pictures: PictureCache
    mirrored: bool = False

    def __len__(self) -> int:
        return len(self.pictures)

    def __getattr__(self, name: str) -> Any:  # captions, choices, columns, choose_captions
        return getattr(self.pictures, name)

    def images(self, indices: list[int] | Tensor, mirror: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w), float; those of the mirrored picture where `mirror`, (B,) bool, is True."""
        rows = np.asarray(indices)
        if mirror is not None:
            rows = rows + len(self) * mirror.numpy()
        return torch.from_numpy(self.latents[rows]).float()


def cache_latents(
    pictures: PictureCache, vae: Any, cache_dir: str | Path, mirrored: bool = False
) -> LatentCache:
    """Encode every picture once with the frozen VAE; the key is the content of pictures, weights and config.

    With `mirrored`, each picture's mirror image is encoded as well: its latents are not the mirrored latents.
    """
    path = Path(cache_dir) / f"latents-{content_key(pictures.key, model_key(vae), str(mirrored))}.npy"
    count = len(pictures)

    def fill(target: np.ndarray) -> None:
        for start in tqdm(range(0, len(target), 64), desc="encoding pictures", unit="batch"):
            rows = torch.arange(start, min(start + 64, len(target)))
            latents = encode_latents(vae, pictures.images(rows % count, rows >= count))
            target[start : start + len(rows)] = latents.to(torch.float16).cpu().numpy()

    shape = (count * (2 if mirrored else 1), *encode_latents(vae, pictures.images([0])).shape[1:])
    return LatentCache(memory_map(path, shape, np.dtype(np.float16), fill), pictures, mirrored)
