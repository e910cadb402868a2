"""Files that are written completely or not at all, and their content: text and JSON."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INDEX, CARD = "model_index.json", "README.md"  # of a model folder
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@contextmanager
def written_aside(target: str | Path, many_writers: bool = False) -> Iterator[Path]:
    """Yields a path beside `target` for a new file or folder, which replaces `target` when the block ends.

    Parent folders are created. After an error the new one is deleted and `target` is unchanged. A killed
    process leaves `target` unchanged and NAME.partial beside it, which the next writer deletes. With
    `many_writers`, several processes may write `target` at once: the path contains the process id.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(
        f"{target.name}.{os.getpid()}.partial" if many_writers else f"{target.name}.partial"
    )
    replaced = target.with_name(f"{target.name}.replaced")
    if replaced.is_dir() and not target.exists():  # a process was killed between the two renames below
        replaced.rename(target)
    _remove(partial)
    try:
        yield partial
        if target.is_dir() and partial.is_dir():  # a rename cannot replace a folder that is not empty
            _remove(replaced)
            target.rename(replaced)
            partial.rename(target)
            _remove(replaced)
        else:
            partial.replace(target)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Writes aside and renames, creating parent folders: a killed process leaves the old file or none."""
    with written_aside(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def read_json(path: str | Path) -> Any:
    """Reads a JSON file. Raises ValueError that names the file if it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def write_json(path: str | Path, content: Any, sort_keys: bool = False) -> None:
    """Writes JSON, indented by 2, ASCII only."""
    write_file(path, json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")


def read_text(path: Path, errors: str = "surrogateescape") -> str | None:
    """A text file's content, or None if there is no file. `errors` says how to read bytes that are not UTF-8;
    surrogates can be written back as the same bytes."""
    return path.read_bytes().decode("utf-8", errors) if path.is_file() else None
