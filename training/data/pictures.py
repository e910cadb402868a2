"""Captioned pictures: where they come from, how batches are sampled, and the cache of their pixels.

A data set is any of: the emoji folder that `training.emoji` writes, a local folder of pictures with a
`metadata.jsonl` (columns `file_name` and `text` or `caption`), a folder of webdataset tars, or a name on the
Hugging Face Hub.

Which pictures make up step k is a pure function of (seed, k). There is no state to save: a resumed run sees
the same batches, and each process takes its own slice of the same global batch.
"""

import csv
import hashlib
import io
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from pipelines.folders.files import read_json, write_file
from training.data.arrays import content_key, memory_map

logger = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 2**29  # in one picture, 2 GB when decoded; Pillow's own limit is a third of this


BUILT = {  # data sets that commands of ours build
    "data/emoji": "python -m training.emoji builds it (with npm)",
    "data/emoji-256": "python -m training.emoji --output_dir data/emoji-256 --resolution 256 builds it",
    "data/emoji-wide": "python -m training.widening builds it from data/emoji",
}


class NoSuchSplit(ValueError):
    """The data set exists, but the split does not."""


# ------------------------------------------------------------ where they come from


def load_pictures(
    source: str, split: str = "train", config_name: str | None = None, cache_dir: str | None = None,
    streaming: bool = False, caption_column: str | None = None, strict: bool = False,
) -> Any:  # fmt: skip
    """A `datasets.Dataset` (with `streaming`, an IterableDataset) from a saved data set, a folder of pictures
    or webdataset tars, or a Hub name. A folder's metadata is checked first: see `check_picture_folder`.

    Raises:
        ValueError: `source` is a folder without pictures, or its metadata names files that do not exist.
        NoSuchSplit: the split does not exist.
    """
    import datasets

    path = Path(source)
    options: dict[str, Any] = {"cache_dir": cache_dir, "streaming": streaming}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(str(path))
    elif path.is_dir() and (tars := tar_files(path)):
        loaded = datasets.load_dataset("webdataset", data_files=tars, **options)
    elif path.is_dir():
        check_picture_folder(path, caption_column, strict)
        loaded = datasets.load_dataset("imagefolder", data_dir=str(path), **options)
    elif source in BUILT:
        raise ValueError(f"data set {source!r}: there is no such folder; {BUILT[source]}")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"data set {source!r}: there is no such folder")
    else:
        try:
            loaded = datasets.load_dataset(source, config_name, **options)
        except Exception as error:  # unreachable or interrupted: not every network error is an OSError
            raise ValueError(f"data set {source!r}: there is no such folder, and {error}") from error
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}  # saved without splits
    if split not in loaded:
        raise NoSuchSplit(f"data set {source!r} has no split {split!r}; it has {', '.join(loaded)}")
    data = loaded[split]
    return data.to_iterable_dataset() if streaming and isinstance(data, datasets.Dataset) else data


def load_splits(source: str, splits: str) -> Any:
    """Several splits of a data set, concatenated; `splits` gives their names, joined by +."""
    import datasets

    parts = [load_pictures(source, split) for split in splits.split("+")]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def tar_files(folder: Path) -> dict[str, list[str]]:
    """Webdataset tars by split: `train` in the folder itself, the subfolder's name below it."""
    found: dict[str, list[str]] = {}
    for path in sorted([*folder.glob("*.tar"), *folder.glob("*/*.tar")]):
        found.setdefault("train" if path.parent == folder else path.parent.name, []).append(str(path))
    return found


def check_picture_folder(folder: Path, caption_column: str | None = None, strict: bool = False) -> None:
    """Check a picture folder's metadata before work starts.

    `datasets` silently drops pictures that the metadata does not name, and fails on rows without a file only
    when it reaches them. Here the former cause a warning, the latter an error.

    Raises:
        ValueError: there is no metadata (metadata.jsonl or metadata.csv, in the folder or below it); a line
            of it is not JSON, lacks `file_name` or the caption (`caption_column`, or `text` or `caption`), or
            names a file that does not exist; or, with `strict`, no line names one of the pictures.
    """
    paths = sorted(path for kind in ("jsonl", "csv") for path in folder.rglob(f"metadata.{kind}"))
    if not paths:
        example = '{"file_name": "cat.png", "text": "a cat"}'
        raise ValueError(f"{folder} has no metadata.jsonl; each line: {example}")
    captions = [caption_column] if caption_column else ["text", "caption"]
    named = set()
    for path in paths:
        for number, row in metadata_rows(path):
            where = f"{path} line {number}"
            if not isinstance(row.get("file_name"), str):
                raise ValueError(f"{where} has no 'file_name'")
            if not any(is_caption(row.get(column)) for column in captions):
                raise ValueError(f"{where} has no {' or '.join(map(repr, captions))}")
            if not (path.parent / row["file_name"]).is_file():
                raise ValueError(f"{where} names {row['file_name']}, which is not in {path.parent}")
            named.add((path.parent / row["file_name"]).resolve())
    if not named:
        raise ValueError(f"{folder} has no pictures: its metadata are empty")
    pictures = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    left_out = sorted(str(path.relative_to(folder)) for path in pictures if path.resolve() not in named)
    if left_out:
        message = f"{folder}: no line of the metadata names {listed(left_out)}"
        if strict:
            raise ValueError(message)
        logger.warning("%s; left out", message)


def metadata_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) for each row of a metadata.jsonl or .csv; {} for a row that is not a mapping."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        yield from enumerate(csv.DictReader(io.StringIO(text)), start=2)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from error
            yield number, row if isinstance(row, dict) else {}


def is_caption(value: Any) -> bool:
    """Whether the value is a string, or a non-empty list of strings to choose from."""
    several = isinstance(value, list) and len(value) > 0 and all(isinstance(one, str) for one in value)
    return isinstance(value, str) or several


def listed(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def find_columns(
    columns: list[str], image_column: str = "image", caption_column: str | None = None
) -> tuple[str, str]:
    """(picture column, caption column) of a data set.

    A column named by the caller is used as it is. By default the pictures are in `image` or, in webdataset
    tars, in the column of a file type such as `png`; the captions are in `caption`, `text` or, in tars,
    `txt`.

    Raises:
        ValueError: there is no such column.
    """
    kinds = [kind[1:] for kind in PICTURES] if image_column == "image" else []
    captions = [caption_column] if caption_column else ["caption", "text", "txt"]

    def first(wanted: list[str]) -> str:
        for name in wanted:
            if name in columns:
                return name
        raise ValueError(f"the data set has no column {wanted[0]!r}; it has {', '.join(columns)}")

    return first([image_column, *kinds]), first(captions)


# ------------------------------------------------------------ pixels


def open_picture(value: Any) -> Image.Image:
    """Open the picture in a row's undecoded image column: {"bytes", "path"}, bytes, a path or a PIL image.

    Raises:
        ValueError: the value is none of these, or the picture has more than MAX_PIXELS pixels.
        OSError: the picture cannot be read.
    """
    if isinstance(value, Image.Image):
        return value
    source = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if not isinstance(source, bytes | str) or not source:
        raise ValueError(f"its column holds {type(value).__name__}, not a picture")
    if isinstance(source, str) and "://" in source:  # inside an archive, or a URL
        import datasets

        return datasets.Image().decode_example({"path": source, "bytes": None})
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # type: ignore[assignment]
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS} in all")
    return image


def to_pixels(image: Image.Image, resolution: int, center_crop: bool = True) -> np.ndarray:
    """Pixels (3, resolution, resolution), uint8, of a picture.

    EXIF rotation is applied and transparency is put on white. With `center_crop`, the shorter side is resized
    to `resolution` (Lanczos) and the middle is cropped; without it, the whole picture is resized to fit and
    padded with white.
    """
    if image.width * image.height > 2**26:
        image.draft("RGB", (8 * resolution, 8 * resolution))  # decode a huge JPEG at a reduced size
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's convert clips instead of scaling
        levels = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    size, method = (resolution, resolution), Image.Resampling.LANCZOS
    if image.size != size:
        cropped = center_crop
        image = ImageOps.fit(image, size, method) if cropped else ImageOps.pad(image, size, method, "white")
    return np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)


def draw_row(
    row: dict[str, Any], number: int, image_column: str, resolution: int, center_crop: bool
) -> np.ndarray:
    """`to_pixels` of the picture in a row.

    Raises:
        ValueError: the picture cannot be read; the message names its file, or its number if it has no name.
    """
    value = row[image_column]
    path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    try:
        return to_pixels(open_picture(value), resolution, center_crop)
    except Exception as error:  # decoders raise nearly everything: SyntaxError, struct.error, EOFError
        name = path or row.get("__key__") or f"picture {number} of the data set"
        raise ValueError(f"{name} cannot be read: {error}") from error


# ------------------------------------------------------------ batches


def concept_weights(
    concepts: list[str], power: float = 0.25, styles: list[str] | None = None, style_power: float = 1.0
) -> Tensor:
    """Sampling weight of each picture, (N,), summing to 1.

    A concept with n pictures has a total weight proportional to n^power. At power 1 every picture counts the
    same, and people in six skin tones drown out the rest. At power 0 every concept counts the same, and each
    of those tones is rarely seen. 0.25 is closer to equal concepts.

    Each weight is also multiplied by m^(style_power - 1), where m is the number of pictures in the picture's
    style: 1 leaves the styles as they are, and at 0 rare styles are seen more often.
    """
    counts = Counter(concepts)
    weights = torch.tensor([counts[c] ** (power - 1.0) for c in concepts], dtype=torch.float64)
    if styles is not None:
        sizes = Counter(styles)
        weights *= torch.tensor([sizes[s] ** (style_power - 1.0) for s in styles], dtype=torch.float64)
    return weights / weights.sum()


class StepBatchSampler(Sampler[list[int]]):
    """Picture indices of each micro-batch, from number `start` on, without end.

    Global micro-batch k holds batch_size * num_processes pictures. With `weights`, they are drawn
    independently in proportion to the weights, by a generator seeded with (seed, k) alone; without, they come
    from shuffled epochs. Each process takes its own contiguous slice.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, weights: Tensor | None = None,
        start: int = 0, rank: int = 0, num_processes: int = 1,
    ):  # fmt: skip
        if size < 1:
            raise ValueError("the data set is empty")
        self.size, self.batch_size, self.seed, self.weights = size, batch_size, seed, weights
        self.start, self.rank, self.num_processes = start, rank, num_processes
        self.orders: dict[int, Tensor] = {}  # the order of each epoch that the last batch was drawn from

    def global_batch(self, step: int) -> Tensor:
        total = self.batch_size * self.num_processes
        if self.weights is not None:
            generator = torch.Generator().manual_seed(seed_for(self.seed, "batch", step))
            return torch.multinomial(self.weights, total, replacement=True, generator=generator)
        positions = torch.arange(step * total, (step + 1) * total)
        epochs = (positions // self.size).unique().tolist()
        self.orders = {e: self.orders[e] if e in self.orders else self.epoch_order(e) for e in epochs}
        return torch.stack([self.orders[int(p) // self.size][int(p) % self.size] for p in positions])

    def epoch_order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_for(self.seed, "epoch", epoch))
        return torch.randperm(self.size, generator=generator)

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.start):
            yield self.global_batch(step)[self.rank * self.batch_size :][: self.batch_size].tolist()


def seed_for(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine and in every process."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# ------------------------------------------------------------ the cache


@dataclass
class PictureCache:
    """Decoded pictures and their captions, ready to index.

    Attributes:
        pixels: (M, 3, R, R) uint8, memory-mapped.
        captions: every distinct caption, "" first.
        choices: for each of the N pictures, the indices of its captions, the canonical one first.
        columns: the remaining columns by name.
        rows: for each picture, its row in `pixels` if some rows are left out; None if M = N.
    """

    pixels: np.ndarray
    captions: list[str]
    choices: list[list[int]]
    columns: dict[str, list[Any]]
    rows: np.ndarray | None = None
    name: str = field(default="", repr=False)  # of the file that `pixels` maps: a digest of its content

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def key(self) -> str:
        """A digest of the pictures."""
        digest = hashlib.sha256(self.name.encode())
        for start in range(0, 0 if self.name else len(self.pixels), 256):
            digest.update(np.ascontiguousarray(self.pixels[start : start + 256]).tobytes())
        return digest.hexdigest() + ("" if self.rows is None else str(self.rows.tolist()))

    def images(self, indices: list[int] | Tensor, mirror: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, R, R), float in [-1, 1], mirrored where `mirror`, (B,) bool, is True."""
        found = np.asarray(indices)
        pixels = self.pixels[found if self.rows is None else self.rows[found]]
        images = torch.from_numpy(pixels).float() / 127.5 - 1.0
        if mirror is not None:
            images[mirror] = images[mirror].flip(-1)
        return images

    def choose_captions(self, indices: list[int] | Tensor, draws: Tensor, canonical: float) -> Tensor:
        """One caption index for each picture: the canonical caption with probability `canonical`, otherwise
        any of the picture's captions with equal probability.

        The randomness comes from `draws`, (B, 2) uniform in [0, 1), so that the caller decides what it
        depends on.
        """
        chosen = []
        for index, (first, which) in zip(indices, draws.tolist(), strict=True):
            own = self.choices[int(index)]
            chosen.append(own[0] if first < canonical else own[int(which * len(own))])
        return torch.tensor(chosen)


def index_captions(texts: Iterable[str | list[str]]) -> tuple[list[str], list[list[int]]]:
    """(every distinct caption, "" first; for each picture, the indices of its own captions)."""
    index: dict[str, int] = {"": 0}
    several = ([own] if isinstance(own, str) else own for own in texts)
    choices = [[index.setdefault(text, len(index)) for text in own] for own in several]
    return list(index), choices


def cache_pictures(
    data: Any, resolution: int, cache_dir: str | Path, image_column: str = "image",
    caption_column: str | None = None, center_crop: bool = True, strict: bool = False,
) -> PictureCache:  # fmt: skip
    """Decode a data set once into a memory-mapped array under `cache_dir`, keyed by its content.

    Pictures that cannot be read and rows without a caption are named in a warning and left out.

    Raises:
        ValueError: a column is missing or is of the wrong type, no picture is usable, or, with `strict`, a
            picture cannot be read or has no caption (the message names its file or row).
        OSError: `cache_dir` cannot be written or has too little space.
    """
    import datasets

    image_column, caption_column = find_columns(data.column_names, image_column, caption_column)
    if len(data) == 0:
        raise ValueError("the data set is empty")
    key = content_key(str(data._fingerprint), f"{resolution}-{center_crop}-{image_column}")
    path = Path(cache_dir) / f"pixels-{key}.npy"
    unread = path.with_suffix(".json")  # the pictures that could not be read: {row: reason}
    undecoded = data
    if isinstance(data.features[image_column], datasets.Image):
        undecoded = data.cast_column(image_column, datasets.Image(decode=False))

    def decode(target: np.ndarray) -> None:
        problems = {}
        unread.unlink(missing_ok=True)
        for number, row in enumerate(tqdm(undecoded, desc="decoding pictures", unit="picture")):
            try:
                target[number] = draw_row(row, number, image_column, resolution, center_crop)
            except ValueError as error:
                if strict:
                    raise
                problems[number] = str(error)
        if len(problems) == len(target):
            raise ValueError(f"no picture of the data set can be read: {problems[0]}")
        if problems:
            write_file(unread, json.dumps(problems))

    pixels = memory_map(path, (len(data), 3, resolution, resolution), np.dtype(np.uint8), decode)
    problems = read_json(unread) if unread.is_file() else {}
    captions = list(data["captions" if "captions" in data.column_names else caption_column])
    if not any(map(is_caption, captions)):
        kind = type(captions[0]).__name__
        raise ValueError(f"caption_column {caption_column!r} holds {kind}, not text")
    for number, caption in enumerate(captions):
        if not is_caption(caption):
            problems.setdefault(str(number), f"picture {number} of the data set has no caption")
    if problems:
        message = f"{len(problems)} of {len(data)} pictures cannot be used: {listed(list(problems.values()))}"
        if strict:
            raise ValueError(message)
        logger.warning("%s; left out", message)
    rows = np.array([number for number in range(len(data)) if str(number) not in problems])
    columns = {}
    for name in data.column_names:
        if name not in (image_column, "captions") and not isinstance(data.features[name], datasets.Image):
            values = list(data[name])
            columns[name] = [values[row] for row in rows]
    texts, choices = index_captions(captions[row] for row in rows)
    return PictureCache(pixels, texts, choices, columns, rows if problems else None, path.name)
