"""Small webdataset tars: 0.png beside 0.txt, and so on."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def write_tars(folder: Path, tars: list[Iterable[int]], suffix: str = "png") -> Path:
    """A tar for each list of numbers; picture i is 4 x 4, its red 10 i, its caption "picture i"."""
    folder.mkdir(parents=True, exist_ok=True)
    for at, numbers in enumerate(tars):
        with tarfile.open(folder / f"{at:03}.tar", "w") as tar:
            for number in numbers:
                file = io.BytesIO()
                Image.new("RGB", (4, 4), (10 * number, 0, 0)).save(file, format="PNG")
                for kind, content in ((suffix, file.getvalue()), ("txt", f"picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number:03}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder
