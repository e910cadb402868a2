"""Pictures as PIL images, arrays and PNG files, to and from float tensors (B, C, H, W) in [-1, 1]."""

import contextlib
import inspect
import io
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

from ..folders.files import write_file
from .request import ARGUMENTS

MAX_PIXELS = 2**26  # in a picture to edit: 67 million, 0.8 GB as float32
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """A picture of any mode as a viewer shows it, in 8-bit RGB: rotated as EXIF says, 16-bit grey scaled and
    not clipped, CMYK and palettes converted, transparency laid over `background`.

    A plain convert would show whatever colour is stored under the transparent parts, most often black.
    """
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        levels = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def to_grey(image: Image.Image) -> Image.Image:
    """As `to_rgb`, but in 8-bit grey (mode L) and over black: for masks."""
    return to_rgb(image, "black").convert("L")


def to_tensor(images: Image.Image | list[Image.Image], background: str = "white") -> torch.Tensor:
    """PIL pictures of one size -> float32 (B, 3, H, W), x / 127.5 - 1, so black is -1 and white 1.

    They go through `to_rgb` with `background`, a PIL colour name. Raises ValueError for an empty list or for
    pictures of different sizes.
    """
    flat = [to_rgb(image, background) for image in (images if isinstance(images, list) else [images])]
    if not flat or len({image.size for image in flat}) > 1:
        raise ValueError(f"to_tensor needs pictures of one size, got sizes {[image.size for image in flat]}")
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

    `to_pil(to_tensor(image))` gives back the same pixels. Raises ValueError for another C.
    """
    if x.ndim != 4 or x.shape[1] not in _MODES:
        raise ValueError(f"to_pil needs (B, C, H, W) with C one of {list(_MODES)}, got {tuple(x.shape)}")
    pixels = (to_numpy(x) * 255).round().astype(np.uint8)  # (B, H, W, C)
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in pixels]


# ---- what callers pass as pictures and masks ----


def read_pictures(images: Any, size: tuple[int, int] | None = None, name: str = "image") -> torch.Tensor:
    """PIL pictures of any mode, arrays or tensors -> float32 (B, 3, H, W) in [-1, 1].

    Args:
        images: one picture or a list of them: PIL (see `to_rgb`), array (H, W, C) or (B, H, W, C), tensor
            (C, H, W) or (B, C, H, W). Values are in [0, 1], or uint8; C is 1 or 3.
        size: (height, width) to resize to: PIL pictures by Lanczos, arrays and tensors by nearest neighbour,
            as in diffusers. None keeps their size, which must be the same for all.
        name: what to call them in errors.

    Raises ValueError for anything else, and for more than `MAX_PIXELS` pixels.
    """
    x = _read(images, size, name, to_rgb)
    if x.shape[1] not in (1, 3):
        raise ValueError(f"`{name}` must have 1 or 3 channels, got {x.shape[1]} (shape {tuple(x.shape)}).")
    return x.expand(-1, 3, -1, -1) * 2 - 1


def read_masks(
    masks: Any, size: tuple[int, int] | None = None, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> torch.Tensor:
    """Masks, passed like pictures or without the channel dimension -> float32 (B, 1, H, W) in [0, 1].

    White, 1, is repainted; black or transparent, 0, is kept. `resample` is the filter that resizes PIL masks
    to `size`. See `read_pictures` for the rest.
    """
    if isinstance(masks, (np.ndarray, torch.Tensor)) and masks.ndim == 3:
        one = masks.shape[-1 if isinstance(masks, np.ndarray) else 0] == 1
        masks = masks if one else list(masks)  # (B, H, W)
    x = _read(masks, size, "mask_image", to_grey, resample)
    if x.shape[1] != 1:
        raise ValueError(f"`mask_image` must have 1 channel, got {x.shape[1]} (shape {tuple(x.shape)}).")
    return x


def _read(
    images: Any, size: tuple[int, int] | None, name: str, convert: Callable[[Image.Image], Image.Image],
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> torch.Tensor:  # fmt: skip
    """float32 (B, C, H, W) in [0, 1]; `convert` makes PIL pictures RGB or grey."""
    stacked = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    parts = list(images) if stacked or isinstance(images, (list, tuple)) else [images]
    read = [_read_one(part, size, name, convert, resample) for part in parts]
    if not read or len({part.shape for part in read}) > 1:
        sizes = [f"{part.shape[-1]} x {part.shape[-2]}" for part in read]
        raise ValueError(f"`{name}` must be pictures of one size, got {', '.join(sizes) or 'none'}.")
    return torch.stack(read)


def _read_one(
    image: Any, size: tuple[int, int] | None, name: str, convert: Any, resample: Image.Resampling
) -> torch.Tensor:
    if isinstance(image, Image.Image):
        check_pixels(image.width, image.height, name)
        image = convert(image)
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], resample)
        pixels = np.array(image)  # (H, W) or (H, W, 3)
        return torch.from_numpy(pixels).float().div(255).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
    if not isinstance(image, (np.ndarray, torch.Tensor)) or image.ndim not in (2, 3):
        shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
        raise ValueError(
            f"`{name}` must be a PIL picture, an array, a tensor or a list of these, got "
            f"{type(image).__name__}{shape}."
        )
    x = torch.as_tensor(image.copy() if isinstance(image, np.ndarray) else image).detach().cpu()
    x = x.float().div(255) if x.dtype == torch.uint8 else x.float()
    if x.ndim == 2:
        x = x[None]
    elif isinstance(image, np.ndarray):
        x = x.permute(2, 0, 1)
    check_pixels(x.shape[2], x.shape[1], name)
    if x.numel() == 0 or not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"`{name}` must hold numbers in [0, 1] (or uint8), got {_extent(x)}.")
    if size is not None and x.shape[1:] != size:
        x = F.interpolate(x[None], size)[0]
    return x


def _extent(x: torch.Tensor) -> str:
    return f"{x.min().item():.3g} .. {x.max().item():.3g}" if x.numel() else "none"


def check_pixels(width: int, height: int, name: str = "image") -> None:
    """Raises ValueError for a picture of more than `MAX_PIXELS` pixels, before any of it is decoded."""
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"`{name}` has {width} x {height} pixels, {width * height / 1e6:.0f} million; at most "
            f"{MAX_PIXELS / 1e6:.0f} million are taken: make it smaller first."
        )


def nearest_size(height: int, width: int, unit: int) -> tuple[int, int]:
    """The nearest (height, width) such that both are positive multiples of `unit`."""
    nearest_height, nearest_width = (max(unit, round(side / unit) * unit) for side in (height, width))
    return nearest_height, nearest_width


def encode_pictures(
    vae: Any | None, pictures: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> latents as the U-Net sees them; the inverse of `decode_latents`.

    (z - shift_factor) scaling_factor, where z is drawn from the encoder's posterior, with one generator for
    all pictures or one for each. Without a `vae`, pictures are their own latents and nothing is drawn.
    """
    if vae is None:
        return pictures

    def encode(part: torch.Tensor, source: torch.Generator | None) -> torch.Tensor:
        encoded = vae.encode(part)
        return encoded.latent_dist.sample(source) if hasattr(encoded, "latent_dist") else encoded.latents

    if isinstance(generator, list):
        latents = torch.cat([encode(x, g) for x, g in zip(pictures.split(1), generator, strict=True)])
    else:
        latents = encode(pictures, generator)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * getattr(vae.config, "scaling_factor", 1.0)


def decode_latents(
    vae: Any | None, latents: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """Latents as the U-Net sees them -> pictures (B, C, H, W) in about [-1, 1].

    vae.decode(latents / scaling_factor + shift_factor); without a `vae` they are pictures already. Only a
    decoder that draws noise is given `generator`.
    """
    if vae is None:
        return latents
    latents = latents / getattr(vae.config, "scaling_factor", 1.0)
    if getattr(vae.config, "shift_factor", None):
        latents = latents + vae.config.shift_factor
    draws = "generator" in inspect.signature(vae.decode).parameters
    return vae.decode(latents, return_dict=False, **({"generator": generator} if draws else {}))[0]


def image_grid(
    images: list[Image.Image], columns: int | None = None, gap: int = 2, background: str = "white",
    labels: list[str] | None = None,
) -> Image.Image:  # fmt: skip
    """A sheet of pictures, row by row, in cells of the largest picture's size, `gap` pixels apart.

    By default `columns` makes the sheet as square as possible. `labels`, one for each picture, are written
    below the pictures and cut to the cell's width. Raises ValueError for no pictures, fewer than one column,
    or a wrong number of labels.
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
        sheet.paste(to_rgb(image, background), (x, y))
        if labels:
            cell = Image.new("RGB", (width, text_height), background)  # a separate cell cuts off a long label
            dark = sum(ImageColor.getrgb(background)[:3]) < 384
            ImageDraw.Draw(cell).text((0, 1), labels[i], fill="white" if dark else "black")
            sheet.paste(cell, (x, y + height))
    return sheet


# ---- PNG files that carry their settings as text, under the names of the Python arguments

# Written even at their defaults
ALWAYS = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "strength")
RENAMED = {  # keys of 0.1
    "steps": "num_inference_steps",
    "clip_form": "clip_guidance",
    "clip_model": "clip_guidance_model",
    "classifier_guidance": "classifier_guidance_scale",
    "class_label": "class_labels",
    "best_of": "num_candidates",
    "resampling": "jump_n_sample",
}


def png_bytes(image: Image.Image, **options: Any) -> bytes:
    """The content of a PNG file; `options` are Pillow's, such as `pnginfo`."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", **options)
    return stream.getvalue()


def save_png(image: Image.Image, path: str | Path, **options: Any) -> None:
    """Save as PNG, whatever the file's suffix; `options` are Pillow's, such as `pnginfo`."""
    write_file(path, png_bytes(image, **options))


def open_picture(path: str | Path, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """Open a picture file of any mode, in RGB or as `convert` returns it. Raises ValueError if it is not a
    picture or has more than `MAX_PIXELS` pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the lower limit
            with Image.open(path) as image:
                check_pixels(image.width, image.height)
                return convert(image)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("This file cannot be read as a picture.") from None


def settings_of(call: dict[str, Any]) -> dict[str, str]:
    """A call's arguments as text: those in `ALWAYS`, and any others that differ from their default. Dicts and
    pairs become JSON."""
    text = {}
    for name, value in call.items():
        default = ARGUMENTS[name].default if name in ARGUMENTS else None
        off = name == "clip_guidance_scale" and value == 0
        if name in ALWAYS or not (off or value in (None, "", default)):
            listed = isinstance(value, dict | list | tuple)
            text[name] = json.dumps(value, ensure_ascii=False) if listed else str(value)
    return text


def slug(prompt: str) -> str:
    """The prompt's words as a file name: letters and digits of any script, at most 80 bytes."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return words.encode()[:80].decode(errors="ignore").strip("-") or "picture"


def write_picture(image: Image.Image, folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """Writes folder/name.png, or name-1.png and so on if that exists, with `settings` as PNG text.

    An existing file is never overwritten, even by two runs at once, and a run that fails leaves no file.
    """
    text = PngInfo()
    for key, value in settings.items():
        text.add_text(key, str(value))
    content = png_bytes(image, pnginfo=text)
    for number in range(10**6):
        path = folder / (f"{name}-{number}.png" if number else f"{name}.png")
        with contextlib.suppress(FileExistsError):
            with open(path, "xb") as file:
                try:
                    file.write(content)
                except BaseException:
                    path.unlink()
                    raise
            return path
    raise FileExistsError(f"every name like {name}.png is taken")


def read_settings(path: str | Path, quiet: bool = False) -> dict[str, str]:
    """The settings in a PNG from `write_picture`, with the picture's own width and height.

    Keys of version 0.1 get their new names, with one FutureWarning unless `quiet`.
    Raises ValueError if the file is not a picture or carries no settings.
    """
    try:
        with Image.open(path) as image:
            settings = {str(key): text for key, text in image.info.items() if isinstance(text, str)}
            size = {"width": str(image.width), "height": str(image.height)}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError("This file cannot be read as a picture.") from None
    if settings.get("Software") != "Corgi":
        raise ValueError("This picture carries no settings: only a PNG that was saved from here does.")
    renamed = rename(settings)
    if renamed.keys() != settings.keys() and not quiet:
        old, new = sorted(settings.keys() - renamed.keys()), sorted(renamed.keys() - settings.keys())
        warnings.warn(f"{path}: settings {old} are now {new}.", FutureWarning, stacklevel=2)
    return renamed | size


def rename(settings: dict[str, str]) -> dict[str, str]:
    """Settings with keys of 0.1 changed to their current names."""
    old, new = dict(settings), {}
    if old.get("clip_guidance") not in (None, "noised", "clean"):  # in 0.1 it was the scale
        new["clip_guidance_scale"] = old.pop("clip_guidance")
    words, weight = old.pop("combined_prompt", None), old.pop("combined_weight", "0.7")
    if words is not None:
        new["combined_prompts"] = f"{{{json.dumps(words, ensure_ascii=False)}: {weight}}}"
    low, high = old.pop("guidance_from", None), old.pop("guidance_to", None)
    if low is not None or high is not None:
        new["guidance_interval"] = f"[{low or 0}, {high or 'Infinity'}]"
    return {RENAMED.get(key, key): text for key, text in old.items()} | new
