"""What was computed before is computed still: pictures, losses and files against tests/golden/record.json."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import Record, differences

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, RECORD = ROOT / "tests" / "golden.py", ROOT / "tests" / "golden" / "record.json"


def compare(part: str) -> None:
    call = [sys.executable, str(SCRIPT), "--part", part, "--compare", str(RECORD)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"differs from the record:\n{done.stdout or done.stderr[-4000:]}"
    assert "entries compared" in done.stderr


def test_every_kind_of_call_gives_what_it_gave():
    """Bit for bit on a machine like the record's, else within golden.TOLERANCE."""
    compare("cheap")


@pytest.mark.slow
def test_shipped_weights_and_recipes_give_what_they_gave():
    compare("full")


@pytest.fixture
def entries(tmp_path):
    """entries(shift): the record of a picture, of numbers and of a text, each moved by `shift`."""

    def make(shift: float = 0.0) -> dict:
        record = Record(tmp_path)
        picture = torch.linspace(0, 1, 192).reshape(1, 8, 8, 3)
        picture[0, 2, 2] += shift
        record.array("picture", picture)
        record.numbers("losses", [0.5, 0.25 + shift])
        (tmp_path / "config.json").write_text(str({"sample_size": 16 + shift}))
        record.file("config", tmp_path / "config.json")
        return record.entries

    return make


def names(*arguments) -> list[str]:
    return [line.split(":")[0] for line in differences(*arguments)]


def test_differences_are_named(entries):
    """One float's last bits where it has to be exact; elsewhere what moves a mean by more than the tolerance
    (a cell has four pixels: 0.1 moves its mean by 0.025), and texts where the libraries are the same."""
    old = entries()
    assert names(old, entries(), True, True) == []
    assert names(old, entries(1e-6), True, True) == ["picture", "losses", "config"]
    assert names(old, entries(0.009), False, False) == []
    assert names(old, entries(0.009), False, True) == ["config"]
    assert names(old, entries(0.1), False, False) == ["picture", "losses"]
    lines = list(differences(old | {"gone": old["losses"]}, old | {"come": old["losses"]}, True, True))
    assert lines == ["gone: is gone", "come: is not in the record"]
    failed = {"inpaint: broke off": {"kind": "error", "error": "ValueError: no mask\nfurther lines"}}
    assert list(differences({"inpaint: soft": old["picture"]}, failed, True, True)) == [
        "inpaint: broke off: ValueError: no mask"
    ]


def test_versions_in_configs_do_not_count(tmp_path):
    records = []
    for version in ("1.0", "2.0"):
        record = Record(tmp_path)
        (tmp_path / "config.json").write_text(f'{{"_diffusers_version": "{version}", "sample_size": 16}}')
        record.file("config", tmp_path / "config.json")
        (tmp_path / "plain.bin").write_text(version)
        record.file("plain", tmp_path / "plain.bin")
        records.append(record.entries)
    assert names(*records, True, True) == ["plain"]
