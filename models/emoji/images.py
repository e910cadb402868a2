"""Pictures in and out: PIL and numpy on one side, float tensors (B, C, H, W) in [-1, 1] on the other."""

import inspect
import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_tensor(images: Image.Image | list[Image.Image], background: str = "white") -> torch.Tensor:
    """PIL pictures of one size -> float32 (B, 3, H, W), x / 127.5 - 1, so black is -1 and white 1.

    Transparency is laid over `background` (a PIL colour name) first: a plain convert would show whatever
    colour hides under the transparent parts, most often black.

    Raises ValueError for an empty list or for pictures of different sizes.
    """
    images = images if isinstance(images, list) else [images]
    if not images or len({image.size for image in images}) > 1:
        raise ValueError(
            f"to_tensor needs pictures of one size, got sizes {[image.size for image in images]}"
        )
    flat = [_without_transparency(image, background) for image in images]
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in flat])  # (B, H, W, 3), 0..255
    return torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def to_unit(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1], same shape; values beyond the range are clipped."""
    return (x * 0.5 + 0.5).clamp(0, 1)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> float32 array (B, H, W, C) in [0, 1], diffusers' `output_type="np"`."""
    return to_unit(x).detach().cpu().permute(0, 2, 3, 1).float().numpy()


def to_pil(x: torch.Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1] -> B pictures: grey for C = 1, RGB for 3, RGBA for 4; rounded.

    `to_pil(to_tensor(image))` gives back the very same pixels. Raises ValueError for another C.
    """
    if x.ndim != 4 or x.shape[1] not in _MODES:
        raise ValueError(f"to_pil needs (B, C, H, W) with C one of {list(_MODES)}, got {tuple(x.shape)}")
    pixels = (to_numpy(x) * 255).round().astype(np.uint8)  # (B, H, W, C)
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in pixels]


def decode_latents(
    vae: Any | None, latents: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """Latents as the U-Net sees them -> pictures (B, C, H, W) in about [-1, 1]. No `vae`: they are pictures.

    vae.decode(latents / scaling_factor + shift_factor). Only a decoder that draws noise is given `generator`.
    """
    if vae is None:
        return latents
    latents = latents / getattr(vae.config, "scaling_factor", 1.0)
    if getattr(vae.config, "shift_factor", None):
        latents = latents + vae.config.shift_factor
    draws = "generator" in inspect.signature(vae.decode).parameters
    return vae.decode(latents, return_dict=False, **({"generator": generator} if draws else {}))[0]


def image_grid(
    images: list[Image.Image],
    columns: int | None = None,
    gap: int = 2,
    background: str = "white",
    labels: list[str] | None = None,
) -> Image.Image:
    """A sheet of pictures, row by row, all in cells of the largest one's size, `gap` pixels apart.

    `columns` defaults to the most square sheet. `labels`, one for each picture, are written under it and cut
    to the cell's width. Raises ValueError for no pictures, fewer than one column, or a wrong number of
    labels.
    """
    if not images:
        raise ValueError("image_grid needs at least one picture")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"image_grid needs at least one column, got {columns}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"image_grid got {len(images)} pictures but {len(labels)} labels")
    columns, rows = min(columns, len(images)), math.ceil(len(images) / columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    text_height = 14 if labels else 0
    step_x, step_y = width + gap, height + text_height + gap
    sheet = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), background)
    for i, image in enumerate(images):
        x, y = gap + (i % columns) * step_x, gap + (i // columns) * step_y
        sheet.paste(_without_transparency(image, background), (x, y))
        if labels:
            cell = Image.new("RGB", (width, text_height), background)  # a cell of its own cuts a long label
            dark = sum(ImageColor.getrgb(background)[:3]) < 384
            ImageDraw.Draw(cell).text((0, 1), labels[i], fill="white" if dark else "black")
            sheet.paste(cell, (x, y + height))
    return sheet


def _without_transparency(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
