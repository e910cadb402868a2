"""Folders and data sets of a few tiny pictures."""

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

FP16 = {"rtol": 2**-10, "atol": 1e-6}  # half precision rounds to 11 bits; the rest is float32's
R, G, B, W, K = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
GOOD = '{"file_name": "a.png", "text": "a cat"}'


def channels(*rows: list[tuple[int, ...]]) -> np.ndarray:
    """Rows of (r, g, b) -> (3, H, W)."""
    return np.array(rows, dtype=np.uint8).transpose(2, 0, 1)


def write_folder(folder: Path, *lines: str, pictures: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    folder.mkdir()
    for number, name in enumerate(pictures):
        Image.new("RGB", (4, 4), (10 * number, 0, 0)).save(folder / name)
    if lines:
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def tiny_dataset(value: int, count: int = 3, **columns) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = []
    for number in range(count):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (value, number, 0)).save(file, format="PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "caption": f"picture {number}"})
    made = datasets.Dataset.from_list(rows, features=features)
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made
