"""Captioned pictures: where they come from, how they are drawn, and the caches of what never changes.

A data set is any of: the emoji folder that `training.emoji` writes, a local folder of pictures with a
`metadata.jsonl` (columns `file_name` and `text`), or a name on the Hugging Face Hub.

Which pictures make up step k is a pure function of (seed, k): no state to save, so a resumed run sees the
same batches, and each process takes its own slice of the same global batch.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm


class NoSuchSplit(ValueError):
    """The data set is there, the split is not."""


def load_pictures(
    source: str, split: str = "train", config_name: str | None = None, cache_dir: str | None = None
) -> Any:
    """A `datasets.Dataset` from a saved data set, a folder of pictures, or a Hub name.

    Raises:
        ValueError: `source` is a folder without pictures, its metadata names files that are not there, or
            the split does not exist (then it is a NoSuchSplit).
    """
    import datasets

    path = Path(source)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(str(path))
    elif path.is_dir():
        check_picture_folder(path)
        loaded = datasets.load_dataset("imagefolder", data_dir=str(path), cache_dir=cache_dir)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"data set {source!r}: there is no such folder")
    else:
        try:
            loaded = datasets.load_dataset(source, config_name, cache_dir=cache_dir)
        except OSError as error:  # neither a folder here nor within reach on the Hub
            raise ValueError(f"data set {source!r}: there is no such folder, and {error}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        loaded = {"train": loaded}  # saved without splits
    if split not in loaded:
        raise NoSuchSplit(f"data set {source!r} has no split {split!r}; it has {', '.join(loaded)}")
    return loaded[split]


def check_picture_folder(folder: Path) -> None:
    """`datasets` drops pictures that the metadata leaves out, and fails on rows without a file only when it
    reaches them: say both before work starts.

    Raises:
        ValueError: no metadata.jsonl, or a line of it is not JSON, lacks `file_name` or `text`, or names a
            file that is not there.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise ValueError(
            f'{folder} has no metadata.jsonl; each line: {{"file_name": "cat.png", "text": "a cat"}}'
        )
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{metadata} line {number} is not JSON: {error}") from error
        for key in ("file_name", "text"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise ValueError(f"{metadata} line {number} has no {key!r}")
        if not (folder / row["file_name"]).is_file():
            raise ValueError(f"{metadata} line {number} names {row['file_name']}, which is not in {folder}")


def to_pixels(image: Image.Image, resolution: int, center_crop: bool = True) -> np.ndarray:
    """(3, resolution, resolution) uint8: EXIF rotation applied, transparency on white, the shorter side
    resized (Lanczos), the middle cropped; without `center_crop` the whole picture is padded with white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's convert clips instead of scaling
        levels = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("RGB")
    if image.size != (resolution, resolution):
        size = (resolution, resolution)
        fit = ImageOps.fit if center_crop else ImageOps.pad
        extra = {} if center_crop else {"color": "white"}
        image = fit(image, size, Image.Resampling.LANCZOS, **extra)  # type: ignore[arg-type]
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def concept_weights(concepts: list[str], power: float = 0.25) -> Tensor:
    """Sampling weight of each picture, (N,), summing to 1: a concept with n pictures gets n^power in all.

    At power 1 every picture counts the same and people in six skin tones drown the rest; at 0 every concept
    does and each of those tones is rarely seen. 0.25 leans to the concepts.
    """
    counts = Counter(concepts)
    weights = torch.tensor([counts[c] ** (power - 1.0) for c in concepts], dtype=torch.float64)
    return weights / weights.sum()


class StepBatchSampler(Sampler[list[int]]):
    """Indices of the pictures of each micro-batch, from `start` on, without end.

    Micro-batch k of the whole run holds batch_size * num_processes pictures, drawn by a generator seeded with
    (seed, k) alone: with `weights`, independently in proportion to them; without, by shuffled epochs. A
    process takes its own contiguous slice.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        weights: Tensor | None = None,
        start: int = 0,
        rank: int = 0,
        num_processes: int = 1,
    ):
        if size < 1:
            raise ValueError("the data set is empty")
        self.size, self.batch_size, self.seed, self.weights = size, batch_size, seed, weights
        self.start, self.rank, self.num_processes = start, rank, num_processes

    def global_batch(self, step: int) -> Tensor:
        total = self.batch_size * self.num_processes
        if self.weights is not None:
            generator = torch.Generator().manual_seed(seed_for(self.seed, "batch", step))
            return torch.multinomial(self.weights, total, replacement=True, generator=generator)
        positions = torch.arange(step * total, (step + 1) * total)
        epochs = {int(e): self.epoch_order(int(e)) for e in (positions // self.size).unique()}
        return torch.stack([epochs[int(p) // self.size][int(p) % self.size] for p in positions])

    def epoch_order(self, epoch: int) -> Tensor:
        return torch.randperm(
            self.size, generator=torch.Generator().manual_seed(seed_for(self.seed, "epoch", epoch))
        )

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            batch = self.global_batch(step)
            yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size].tolist()
            step += 1


def seed_for(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine and in every process."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def content_key(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


@dataclass
class PictureCache:
    """Decoded pictures and their captions, ready to index.

    Attributes:
        pixels: (N, 3, R, R) uint8, memory-mapped.
        captions: every distinct caption, "" first.
        choices: for each picture the indices of its captions, the canonical one first.
        columns: the remaining columns by name.
    """

    pixels: np.ndarray
    captions: list[str]
    choices: list[list[int]]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.choices)

    def images(self, indices: list[int] | Tensor) -> Tensor:
        """(B, 3, R, R) float in [-1, 1]."""
        return torch.from_numpy(self.pixels[np.asarray(indices)]).float() / 127.5 - 1.0

    def choose_captions(self, indices: list[int] | Tensor, draws: Tensor, canonical: float) -> Tensor:
        """One caption index for each picture: the canonical with that probability, else any evenly.

        The chance is in `draws`, (B, 2) uniform in [0, 1), so that the caller says what it depends on.
        """
        chosen = []
        for index, (first, which) in zip(indices, draws.tolist(), strict=True):
            own = self.choices[int(index)]
            chosen.append(own[0] if first < canonical else own[int(which * len(own))])
        return torch.tensor(chosen)


def cache_pictures(
    data: Any,
    resolution: int,
    cache_dir: str | Path,
    image_column: str,
    caption_column: str,
    center_crop: bool = True,
) -> PictureCache:
    """Decode a data set once into a memory-mapped array under `cache_dir`, keyed by its content.

    Raises:
        ValueError: a column is missing, or a picture cannot be read (its row is named).
    """
    for name in (image_column, caption_column):
        if name not in data.column_names:
            raise ValueError(f"the data set has no column {name!r}; it has {', '.join(data.column_names)}")
    if len(data) == 0:
        raise ValueError("the data set is empty")
    key = content_key(str(data._fingerprint), f"{resolution}-{center_crop}-{image_column}")
    path = Path(cache_dir) / f"pixels-{key}.npy"

    def decode(target: np.ndarray) -> None:
        for row in tqdm(range(len(data)), desc="decoding pictures", unit="picture"):
            try:
                target[row] = to_pixels(data[row][image_column], resolution, center_crop)
            except (OSError, ValueError) as error:
                raise ValueError(f"picture {row} of the data set cannot be read: {error}") from error

    pixels = memory_map(path, (len(data), 3, resolution, resolution), np.dtype(np.uint8), decode)
    listed = (
        data["captions"] if "captions" in data.column_names else [[text] for text in data[caption_column]]
    )
    index: dict[str, int] = {"": 0}
    choices = [[index.setdefault(text, len(index)) for text in texts] for texts in listed]
    rest = [c for c in data.column_names if c not in (image_column, "captions")]
    return PictureCache(pixels, list(index), choices, {c: list(data[c]) for c in rest})


def memory_map(path: Path, shape: tuple[int, ...], dtype: np.dtype, fill: Any) -> np.ndarray:
    """The array stored at `path`, filled first if it is not there; written aside and renamed, so that a
    killed run leaves no half array and two that start together both end with a whole one."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        try:
            fill(array)
            array.flush()
            del array
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    array = np.load(path, mmap_mode="r")
    if array.shape != shape:
        raise ValueError(f"the cache {path} holds {array.shape}, not {shape}: delete it")
    return array


@dataclass
class TextCache:
    """Text-encoder outputs of every caption in one memory-mapped fp16 array: the states (L, D) and then the
    pooled vector (P) of each, flat: (N, L * D + P)."""

    rows: np.ndarray
    length: int  # L
    width: int  # D

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, L, D) and pooled (B, P), float32, of the captions with these numbers."""
        rows = torch.from_numpy(self.rows[ids.numpy()]).float()
        states, pooled = rows.tensor_split([self.length * self.width], dim=1)
        return states.unflatten(1, (self.length, self.width)), pooled


def cache_text(captions: list[str], tokenizer: Any, text_encoder: Any, cache_dir: str | Path) -> TextCache:
    """Encode every caption once with the frozen encoder, keyed by the content of captions and weights."""
    from pipelines.conditioning import encode_text

    weights = hashlib.sha256()
    for name, tensor in sorted(text_encoder.state_dict().items()):
        weights.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    key = content_key(
        json.dumps(captions), weights.hexdigest(), json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )

    @torch.no_grad()
    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        states, pooled = encode_text(tokenizer, text_encoder, texts)[:2]
        return states, torch.cat([states.flatten(1), pooled], dim=1)

    def fill(target: np.ndarray) -> None:
        for start in tqdm(range(0, len(captions), 256), desc="encoding captions", unit="batch"):
            target[start : start + 256] = encode(captions[start : start + 256])[1].to(torch.float16).numpy()

    states, row = encode([""])
    shape = (len(captions), row.shape[1])
    path = Path(cache_dir) / f"text-{key}.npy"
    return TextCache(memory_map(path, shape, np.dtype(np.float16), fill), states.shape[1], states.shape[2])


@dataclass
class LatentCache:
    """What PictureCache is for pixels, for latents: the VAE's posterior means times its scaling factor."""

    latents: np.ndarray  # (N, C, h, w) fp16, memory-mapped
    pictures: PictureCache

    def __len__(self) -> int:
        return len(self.pictures)

    def __getattr__(self, name: str) -> Any:  # captions, choices, columns, choose_captions
        return getattr(self.pictures, name)

    def images(self, indices: list[int] | Tensor) -> Tensor:
        return torch.from_numpy(self.latents[np.asarray(indices)]).float()


def cache_latents(pictures: PictureCache, vae: Any, cache_dir: str | Path) -> LatentCache:
    """Encode every picture once with the frozen VAE, keyed by the content of pictures and weights."""
    digest = hashlib.sha256(np.ascontiguousarray(pictures.pixels).tobytes())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    path = (
        Path(cache_dir)
        / f"latents-{content_key(digest.hexdigest(), f'{vae.config.scaling_factor} {shift}')}.npy"
    )

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        return (vae.encode(images).latent_dist.mode() - shift) * vae.config.scaling_factor

    def fill(target: np.ndarray) -> None:
        for start in tqdm(range(0, len(pictures), 64), desc="encoding pictures", unit="batch"):
            indices = list(range(start, min(start + 64, len(pictures))))
            target[start : start + len(indices)] = encode(pictures.images(indices)).to(torch.float16).numpy()

    shape = (len(pictures), *encode(pictures.images([0])).shape[1:])
    return LatentCache(memory_map(path, shape, np.dtype(np.float16), fill), pictures)
