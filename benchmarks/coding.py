"""The size of pictures as files: our codec compared with the KL bound, and with PNG and similar formats.

    python -m benchmarks.coding --model runs/likelihood-hybrid/pipeline --output_dir outputs/coding

Held-out pictures of data/emoji, at the size that the model draws, are coded as
    - one lossless archive of all, and one of the first picture alone, each compared with the sum of the KL
      terms;
    - the same archive under the null prompt, which shows what the captions save;
    - progressive files of the first few, truncated at several places and decoded: rate against distortion.
PNG, WebP, JPEG and AVIF code one sheet of the same pictures, so that their headers count once. Our header
names the model and all captions: the curve counts only the coded bytes, the table the whole file.
"""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from tqdm import tqdm

from pipelines.coding.coding_model import best_end
from pipelines.coding.progressive_coding import decode, encode, to_picture
from pipelines.drawing.images import image_grid, save_png
from pipelines.drawing.text import NULL_PROMPT
from pipelines.folders.files import write_file
from training.evaluation.bits_per_dim import BitsPerDimConfig, held_out_pictures, load_pixel_pipeline
from training.evaluation.figures import chart, finish

LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "PNG", "optimize": True},
    "WebP lossless": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
}
LOSSY: dict[str, dict[str, Any]] = {  # colour at full resolution if the format has it: flat art needs it
    "JPEG": {"format": "JPEG", "optimize": True, "subsampling": "4:4:4"},
    "WebP": {"format": "WEBP", "method": 6},
    "AVIF": {"format": "AVIF", "speed": 0, "subsampling": "4:4:4"},
}
QUALITIES = (5, 10, 20, 35, 50, 65, 80, 90, 95)
CUTS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the coded bytes


def available(codecs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The codecs that this Pillow can write."""
    built_in = ("PNG", "JPEG")
    return {k: v for k, v in codecs.items() if v["format"] in built_in or features.check(v["format"].lower())}


def compress(image: Image.Image, options: dict[str, Any]) -> tuple[int, Image.Image]:
    """(size of the file in bytes, the picture that it decodes to)."""
    file = io.BytesIO()
    image.save(file, **options)
    return file.getbuffer().nbytes, Image.open(file).convert("RGB")


def squared_error(a: Image.Image, b: Image.Image) -> float:
    """The mean squared error over pixels and channels, in levels of 0 .. 255."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float(np.square(difference).mean())


def sheet_of(pictures: list[Image.Image]) -> Image.Image:
    """All pictures in one, without gaps, ten in a row; empty cells at the end repeat the last picture."""
    columns = min(10, len(pictures))
    cells = [np.asarray(one) for one in pictures + pictures[-1:] * (-len(pictures) % columns)]  # (H, W, 3)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return Image.fromarray(np.concatenate(rows))


def archive(
    pipe: Any, pictures: list[Image.Image], captions: list[str], steps: int, end: int
) -> dict[str, Any]:
    """The size of one lossless file, and of the sum of the KL terms."""
    began = time.perf_counter()
    data, cost = encode(pipe, pictures, captions, kind="lossless", steps=steps, end=end)
    taken = time.perf_counter() - began
    back = decode(pipe, data).pictures
    for picture, held in zip(pictures, back, strict=True):
        if picture.tobytes() != held.tobytes():
            raise RuntimeError("the archive does not hold the pictures that it was made of")
    return {
        "pictures": len(pictures),
        "bytes": cost.total,
        "of them header": cost.header,
        "of them initial bits": cost.initial // 8,
        "KL sum, bytes": round(cost.kl / 8),
        "coded above the KL sum, %": 100 * (8 * (cost.total - cost.header) / cost.kl - 1),
        "file above the KL sum, %": 100 * (8 * cost.total / cost.kl - 1),
        "seconds to encode": taken,
    }


def progressive(
    pipe: Any, pictures: list[Image.Image], captions: list[str], steps: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """(total sizes, the curve: mean coded bytes and mean squared error at each of CUTS)."""
    totals = {"coded, bytes": 0.0, "KL sum, bytes": 0.0, "the coder's bound, bytes": 0.0}
    points = np.zeros((len(CUTS), 2))
    pairs = list(zip(pictures, captions, strict=True))
    for picture, caption in tqdm(pairs, desc="progressive", unit="picture"):
        data, cost = encode(pipe, [picture], [caption], steps=steps)
        coded = cost.total - cost.header
        totals["coded, bytes"] += coded
        totals["KL sum, bytes"] += cost.kl / 8
        totals["the coder's bound, bytes"] += cost.bound / 8
        for i, share in enumerate(CUTS):
            size = round(share * coded)
            seen = decode(pipe, data[: cost.header + size], prefix=share < 1).pictures[0]
            points[i] += (size, squared_error(picture, seen))
    points /= len(pictures)
    figures = {"pictures": len(pictures)} | {name: round(value) for name, value in totals.items()}
    return figures, {"bytes": points[:, 0].tolist(), "squared error": points[:, 1].tolist()}


def others(pictures: list[Image.Image]) -> dict[str, dict[str, list[float]]]:
    """The rate-distortion curve of each lossy codec, over QUALITIES, on one sheet of the pictures."""
    sheet, curves = sheet_of(pictures), {}
    for name, options in available(LOSSY).items():
        results = [compress(sheet, options | {"quality": quality}) for quality in QUALITIES]
        curves[name] = {
            "bytes": [size / len(pictures) for size, _ in results],
            "squared error": [squared_error(sheet, image) for _, image in results],
        }
    return curves


def draw_curves(
    curves: dict[str, dict[str, list[float]]], lossless: dict[str, float], dims: int, path: Path
) -> None:
    """Plot peak signal-to-noise ratio against bits per dimension; lossless formats are vertical lines."""
    with chart(path, 7, 4.2) as ax:
        for name, curve in curves.items():
            rate = [8 * size / dims for size in curve["bytes"]]
            psnr = [10 * np.log10(255**2 / error) if error else np.nan for error in curve["squared error"]]
            ax.plot(rate, psnr, marker=".", lw=2 if name == "ours" else 1, label=name)
        for i, (name, size) in enumerate(lossless.items(), start=len(curves)):
            ax.axvline(8 * size / dims, ls="--", lw=0.8, color=f"C{i}", label=f"{name}, exact")
        finish(ax, 8, xlabel="bits/dim", ylabel="PSNR, dB", xscale="log")
        ax.grid(which="minor", alpha=0.3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.coding", description=__doc__.splitlines()[0])
    for name, default, text in (
        ("model", "models/emoji", "pipeline without a VAE"),
        ("dataset", "data/emoji", "source of the validation pictures"),
        ("cache_dir", "data/cache", "where decoded pictures are kept"),
        ("num_pictures", 100, "pictures in the archive"),
        ("num_progressive", 10, "how many of them are coded as progressive files as well"),
        ("steps", 100, "timesteps of the chain"),
        ("output_dir", Path("outputs/coding"), "where the figures go"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    settings = parser.parse_args(argv)
    shared = {name: getattr(settings, name) for name in ("model", "dataset", "cache_dir", "num_pictures")}
    config, few = BitsPerDimConfig(**shared, num_inference_steps=settings.steps), settings.num_progressive
    try:
        config.check()
        if not 1 <= few <= settings.num_pictures:
            raise ValueError(f"num_progressive must be in 1 .. num_pictures, got {few}")
        pipe = load_pixel_pipeline(settings.model)
        held_out = held_out_pictures(config, pipe)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    x0s = list(held_out.pictures.images(held_out.numbers).split(1))
    pictures = [to_picture(x0) for x0 in x0s]
    captions, dims = held_out.captions, 3 * pictures[0].width ** 2
    # one end for all, so that what the captions save does not depend on where the chain ends
    end = best_end(pipe, x0s, captions, settings.steps, None, 0)
    chain = (settings.steps, end)
    figures: dict[str, Any] = {"the chain's last timestep": end}
    figures["archive"] = archive(pipe, pictures, captions, *chain)
    figures["first picture alone"] = archive(pipe, pictures[:1], captions[:1], *chain)
    unknown = archive(pipe, pictures, [NULL_PROMPT] * len(pictures), *chain)
    saved = 8 * (unknown["KL sum, bytes"] - figures["archive"]["KL sum, bytes"]) / len(pictures)
    figures["the captions save, bits a picture"] = saved
    for name, images in (("as one sheet, bytes", [sheet_of(pictures)]), ("as single files, bytes", pictures)):
        for codec, options in available(LOSSLESS).items():
            figures.setdefault(name, {})[codec] = sum(compress(image, options)[0] for image in images)
    figures["progressive"], curve = progressive(pipe, pictures[:few], captions[:few], settings.steps)
    curves = {"ours": curve} | others(pictures)
    exact = {name: size / len(pictures) for name, size in figures["as one sheet, bytes"].items()}
    exact["our archive"] = figures["archive"]["bytes"] / len(pictures)
    draw_curves(curves, exact, dims, settings.output_dir / "rate-distortion.png")
    save_png(image_grid(pictures[:few], columns=min(few, 10)), settings.output_dir / "pictures.png")
    write_file(settings.output_dir / "coding.json", json.dumps(figures | {"curves": curves}, indent=1))
    print(json.dumps(figures, indent=1))
    print(settings.output_dir / "rate-distortion.png")


if __name__ == "__main__":
    main()
