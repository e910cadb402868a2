"""Files that are written whole or not at all."""

import io
from pathlib import Path
from typing import Any


def write_file(path: str | Path, content: str | bytes) -> None:
    """Written beside its place and renamed, folders made: a killed process leaves the old file, or none."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    partial.replace(target)


def png_bytes(image: Any) -> bytes:
    """A PIL picture as the bytes of a PNG."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def save_png(image: Any, path: str | Path) -> None:
    """Whatever the file is called."""
    write_file(path, png_bytes(image))
