"""A golden record of what pipelines and recipes compute at fixed seeds: hashes of pictures, losses, files.

    python tests/golden.py --part full --out tests/golden/record.json      # make the record
    python tests/golden.py --part full --compare tests/golden/record.json  # a line per difference, exit 1

It runs from the root of any checkout, also one whose modules are in other places (`cd OTHER && python
HERE/tests/golden.py ...`), since it uses only what stays: the names that `pipelines` exports, their calls,
and the command lines `python -m pipelines` and `python -m training.*`. Torch runs in one thread.

On a machine like the one that made the record all entries must be equal bit for bit. Other CPUs and other
versions of the libraries differ in the last digits: there, the means over a coarse grid that stand beside
each hash must agree within `TOLERANCE`.
"""

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    os.environ |= {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    # the checkout in the current folder comes first, what stands beside this file last
    others = [path for path in sys.path if Path(path or ".").resolve() != HERE]
    sys.path[:] = [os.getcwd(), *others, str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

# of means over the cells of pictures in [0, 1] and of latents of about unit variance, see `close`
TOLERANCE = 0.01
FLAGS = "avx avx2 fma f16c avx512f avx512bw avx512_vnni avx512_bf16 amx_bf16 asimd".split()
LIBRARIES = (
    "torch numpy diffusers transformers tokenizers accelerate peft safetensors datasets pillow constriction"
).split()

Entry = dict[str, Any]
Section = Callable[["Record"], None]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def fingerprint() -> dict[str, Any]:
    """What the last digits depend on: "cpu" what computes, "libraries" by whose code."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    there = set(flags[1].split()) if flags else set()
    cpu = {
        "machine": platform.machine(),
        "model": model[1] if model else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in FLAGS if flag in there],
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
    }
    return {"cpu": cpu, "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES}}


class Record:
    """Entries by name, in the order in which they were computed; `folder` is scratch space."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        if name in self.entries:
            raise KeyError(f"{name} is recorded twice")
        self.entries[name] = entry

    def failed(self, name: str, error: BaseException) -> None:
        print(f"--- {name}", *traceback.format_exception(error), sep="\n", file=sys.stderr)
        self.add(name, {"kind": "error", "error": f"{type(error).__name__}: {error}"})

    def array(self, name: str, array: Any, grid: int = 4) -> None:
        """The bytes of an array, and its means over `grid` x `grid` cells where it holds pictures."""
        array = np.ascontiguousarray(array.detach().numpy() if isinstance(array, torch.Tensor) else array)
        values = torch.from_numpy(array.astype(np.float64)) / (255 if array.dtype == np.uint8 else 1)
        if values.ndim == 4:
            rows = values.permute(0, 3, 1, 2) if values.shape[-1] == 3 else values
            cells = torch.nn.functional.adaptive_avg_pool2d(rows, grid)
        else:
            cells = values.reshape(-1)[:64]
        entry = {"kind": "array", "sha256": sha256(array.tobytes()), "dtype": str(array.dtype)}
        entry |= {"shape": list(array.shape), "mean": round(float(values.mean()), 5)}
        self.add(name, entry | {"cells": [round(number, 3) for number in cells.flatten().tolist()]})

    def pictures(self, name: str, images: Any, grid: int = 4) -> None:
        """PIL pictures of one size, by their pixels, or what a pipeline returns of the other output types."""
        if isinstance(images, list):
            images = np.stack([np.asarray(image) for image in images])
        self.array(name, images, grid)

    def png(self, name: str, path: Path, grid: int = 4) -> None:
        with Image.open(path) as image:
            self.pictures(name, [image.convert("RGB")], grid)

    def file(self, name: str, path: Path) -> None:
        """The bytes of a file; of a text without the versions of the libraries that wrote it."""
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".txt"):
            content = re.sub(rb'"(_diffusers_version|transformers_version)": "[^"]*"', rb'"\1": ""', content)
            self.add(name, {"kind": "text", "sha256": sha256(content), "bytes": len(content)})
        elif path.suffix == ".safetensors":
            self.add(name, weights_entry(path, content))
        else:
            self.add(name, {"kind": "binary", "sha256": sha256(content), "bytes": len(content)})

    def tree(self, name: str, folder: Path) -> None:
        """The names of all files of a folder but its code, and of JSON and weights what `file` records."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files if path.suffix != ".py"]
        self.add(f"{name}/", {"kind": "names", "names": names})
        for path in files:
            if path.suffix in (".json", ".safetensors"):
                self.file(f"{name}/{path.relative_to(folder)}", path)

    def numbers(self, name: str, numbers: dict[str, float] | list[float]) -> None:
        """Floats, exactly (as hexadecimals) and for people."""
        values = [float(number) for number in (numbers.values() if isinstance(numbers, dict) else numbers)]
        entry = {"kind": "numbers", "hex": [number.hex() for number in values]}
        self.add(name, entry | {"cells": [float(f"{number:.5g}") for number in values]})

    def printed(self, name: str, text: str) -> None:
        """The numbers in what a command printed, without those in paths and times, which say nothing."""
        words = " ".join(word for word in text.split() if "/" not in word)
        plain = re.sub(r"in [\d.]+ s\b|\d+ min\b", "", words)
        found = [float(number) for number in re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?", plain)]
        self.add(name, {"kind": "printed", "cells": found})


def weights_entry(path: Path, content: bytes) -> Entry:
    from safetensors.torch import load_file

    tensors = load_file(path)
    if "lora" in path.name:  # peft's metadata in it lists a set, in the order of the process's hashes
        content = b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
    numbers = torch.cat([tensor.double().flatten() for tensor in tensors.values()])
    entry = {"kind": "weights", "sha256": sha256(content), "bytes": len(content)}
    shape = [len(tensors), len(numbers)]  # how many tensors and numbers
    return entry | {"shape": shape, "cells": [float(f"{numbers.abs().mean():.5g}")]}


def compute(sections: dict[str, Section], only: str = "*") -> dict[str, Entry]:
    """The entries of every section whose name fits; a section that fails is an entry that says why."""
    entries: dict[str, Entry] = {}
    for title, section in sections.items():
        if not fnmatch.fnmatch(title, only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            record = Record(Path(folder))
            try:
                section(record)
            except (Exception, SystemExit) as error:
                record.failed("broke off", error)
            entries |= {f"{title}: {name}": entry for name, entry in record.entries.items()}
    return entries


def close(old: Entry, new: Entry) -> bool:
    """Whether the means are within `TOLERANCE`: relative for weights and above 1, else absolute."""
    least = 0.0 if old["kind"] == "weights" else 1.0
    return len(old["cells"]) == len(new["cells"]) and all(
        abs(a - b) <= TOLERANCE * max(least, abs(a)) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(old["cells"], new["cells"], strict=True)
    )


def difference(old: Entry, new: Entry, exact: bool, same_libraries: bool) -> str:
    """What differs between two entries, or nothing."""
    if "error" in new:
        return new["error"].splitlines()[0]
    for key in ("kind", "dtype", "shape", "names"):
        if old.get(key) != new.get(key):
            if key != "names":
                return f"{key} {old.get(key)} -> {new.get(key)}"
            gone, come = (sorted(set(a) - set(b)) for a, b in ((old[key], new[key]), (new[key], old[key])))
            return f"files gone {gone}, files come {come}"
    if exact or (old["kind"] == "text" and same_libraries):
        keys = ["cells"] if old["kind"] == "printed" else ["sha256", "bytes", "hex"]
        if all(old.get(key) == new.get(key) for key in keys):
            return ""
        if "cells" not in old:
            return f"{old['bytes']} bytes {old['sha256'][:8]} -> {new['bytes']} bytes {new['sha256'][:8]}"
        if len(old["cells"]) != len(new["cells"]):
            return f"{len(old['cells'])} numbers -> {len(new['cells'])}"
        apart = max((abs(a - b) for a, b in zip(old["cells"], new["cells"], strict=True)), default=0.0)
        return f"not bit for bit, means up to {apart:.3g} apart"
    if old["kind"] in ("text", "binary", "names", "printed"):
        return ""
    return "" if close(old, new) else f"means more than {TOLERANCE} apart"


def differences(
    old: dict[str, Entry], new: dict[str, Entry], exact: bool, same_libraries: bool
) -> Iterator[str]:
    """A line for each difference; a section that broke off is one line, without all it did not reach."""
    broken = {name.split(":")[0] for name in new if name.endswith(": broke off")}
    for name in old | new:
        if name not in new:
            if name.split(":")[0] not in broken:
                yield f"{name}: is gone"
        elif name not in old:
            yield f"{name}: {new[name].get('error', 'is not in the record')}".splitlines()[0]
        elif line := difference(old[name], new[name], exact, same_libraries):
            yield f"{name}: {line}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make or compare the golden record of the current checkout.")
    parser.add_argument("--part", choices=("cheap", "full"), default="cheap", help="full includes cheap")
    parser.add_argument("--only", default="*", help="sections by pattern, such as 'inpaint*'")
    parser.add_argument("--out", type=Path, help="write the record here")
    parser.add_argument("--compare", type=Path, help="a record to compare with")
    parser.add_argument("--note", default="", help="what made the record; goes into it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from golden_cheap import CHEAP
    from golden_full import FULL

    parts = {"cheap": CHEAP} | ({"full": FULL} if args.part == "full" else {})
    made = {part: compute(sections, args.only) for part, sections in parts.items()}
    record: dict[str, Any] = {"note": args.note, "fingerprint": fingerprint()} | made
    if args.out is not None:
        lines = [f"{json.dumps(key)}: {json.dumps(record[key])}" for key in ("note", "fingerprint")]
        for part, entries in made.items():
            rows = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
            lines.append(f'"{part}": {{\n' + ",\n".join(rows) + "\n}")
        args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    found: list[str] = []
    if args.compare is not None:
        old = json.loads(args.compare.read_text())
        same = {key: old["fingerprint"][key] == record["fingerprint"][key] for key in ("cpu", "libraries")}
        exact = all(same.values())
        for part, entries in made.items():
            wanted = {k: v for k, v in old[part].items() if fnmatch.fnmatch(k.split(":")[0], args.only)}
            found += differences(wanted, entries, exact, same["libraries"])
            how = "bit for bit" if exact else f"within {TOLERANCE}, since CPU or libraries are others"
            print(f"{part}: {len(wanted)} entries compared {how}", file=sys.stderr)
    else:
        every = [entry for part in made.values() for entry in part.items()]
        found = [f"{name}: {entry['error']}" for name, entry in every if "error" in entry]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    # the siblings import this module by name
    sys.modules["golden"] = sys.modules["__main__"]
    sys.exit(main())
