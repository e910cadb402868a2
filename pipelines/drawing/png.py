"""Pictures as PNG files that carry their settings: as text, under the names of the Python arguments."""

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..folders.files import png_bytes, write_file
from .images import check_pixels, to_rgb
from .request import ARGUMENTS

ALWAYS = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "strength")  # also if default
RENAMED = {  # keys of 0.1
    "steps": "num_inference_steps",
    "clip_form": "clip_guidance",
    "clip_model": "clip_guidance_model",
    "classifier_guidance": "classifier_guidance_scale",
    "class_label": "class_labels",
    "best_of": "num_candidates",
    "resampling": "jump_n_sample",
}


def open_picture(path: str | Path, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """A file's picture of any mode, in RGB or as `convert` returns it. Raises ValueError if it is not a
    picture, or has more than `images.MAX_PIXELS`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the lower limit
            with Image.open(path) as image:
                check_pixels(image.width, image.height)
                return convert(image)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("This file cannot be read as a picture.") from None


def settings_of(call: dict[str, Any]) -> dict[str, str]:
    """The text of a call's arguments: of those of `ALWAYS`, and of others where they differ from their
    default. Dicts and pairs are JSON."""
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

    The name is taken before it is written to, and a name that is taken is never written: two runs at once do
    not overwrite each other, and one that fails leaves no file.
    """
    text = PngInfo()
    for key, value in settings.items():
        text.add_text(key, str(value))
    content = png_bytes(image, pnginfo=text)
    for number in range(10**6):
        path = folder / (f"{name}-{number}.png" if number else f"{name}.png")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        try:
            write_file(path, content)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path
    raise FileExistsError(f"every name like {name}.png is taken")


def read_settings(path: str | Path, quiet: bool = False) -> dict[str, str]:
    """The settings in a PNG of `write_picture`, with the picture's own width and height.

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
    """Settings with the keys of 0.1 under their present names."""
    old, new = dict(settings), {}
    if old.get("clip_guidance") not in (None, "noised", "clean"):  # it was the scale
        new["clip_guidance_scale"] = old.pop("clip_guidance")
    words, weight = old.pop("combined_prompt", None), old.pop("combined_weight", "0.7")
    if words is not None:
        new["combined_prompts"] = f"{{{json.dumps(words, ensure_ascii=False)}: {weight}}}"
    low, high = old.pop("guidance_from", None), old.pop("guidance_to", None)
    if low is not None or high is not None:
        new["guidance_interval"] = f"[{low or 0}, {high or 'Infinity'}]"
    return {RENAMED.get(key, key): text for key, text in old.items()} | new
