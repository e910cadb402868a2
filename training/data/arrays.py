"""Arrays computed once and memory-mapped, in files named by a digest of what they are computed from."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from pipelines.folders.files import written_aside


def content_key(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def model_key(model: Any) -> str:
    """A digest of a model's weights and config, excluding the name of its folder and library versions."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    incidental = ("architectures", "dtype", "transformers_version")  # these do not affect what it computes
    kept = {key: value for key, value in config.items() if key[0] != "_" and key not in incidental}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def memory_map(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, fill: Callable[[np.ndarray], None]
) -> np.ndarray:
    """The array stored at `path`; if there is none, `fill` computes it first.

    It is written to a temporary file and renamed, so a killed run leaves no partial array. Processes that
    start together wait for the first one, which holds a lock. Raises OSError before any work if the disk has
    no room for it: writing to a mapped file that does not fit on the disk would kill the process without a
    message.
    """
    if not path.is_file():
        lock = path.with_name(path.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                if not path.is_file():
                    _fill_file(path, shape, dtype, fill)
        except OSError as error:
            raise OSError(f"cache_dir {path.parent}: {path.name} could not be written: {error}") from error
        lock.unlink(missing_ok=True)  # processes still waiting for it find the array once they get in
    array = np.load(path, mmap_mode="r")
    if array.shape != shape:
        raise ValueError(f"the cache {path} holds {array.shape}, not {shape}: delete it")
    return array


def _fill_file(path: Path, shape: tuple[int, ...], dtype: np.dtype, fill: Callable) -> None:
    with written_aside(path) as partial:
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(partial, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        fill(array)
        array.flush()
