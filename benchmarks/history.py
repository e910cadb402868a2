"""The shipped weights over the hours of their training: every version of models/emoji that was committed.

    python -m benchmarks.history                     # outputs/history/history.md, history.png

Each version draws the same training captions with today's sampler, guidance 2 and 25 steps, measured as in
`benchmarks.recipes`; its card says after how many draws of a picture it was made. Takes a clone with its
history, and some minutes for each version.
"""

import argparse
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.recipes import ROOT, Measure, table
from pipelines import TextToImagePipeline
from training.evaluation.samples import draw

MODEL = "models/emoji"
# Hours of one core, of the stages that each version's card names, by its draws
HOURS = {
    102_000: 4.0,
    320_000: 7.0,
    528_000: 9.0,
    835_000: 12.2,
    1_193_000: 16.0,
    1_284_000: 17.4,
    1_351_000: 18.2,
    1_629_000: 21.2,
    2_077_000: 27.0,
}


def git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"benchmarks.history: git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def versions() -> dict[str, str]:
    """Commit -> its date, oldest first, of those that changed the U-Net's weights."""
    weights = f"{MODEL}/unet/diffusion_pytorch_model.safetensors"
    lines = git("log", "--reverse", "--format=%h %as", "--", weights).decode().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def unpack(commit: str, folder: Path) -> Path:
    """The model's folder as of a commit, written below `folder` unless it is there."""
    target = folder / commit
    if not target.is_dir():
        partial = folder / f"{commit}.partial"
        with tarfile.open(fileobj=io.BytesIO(git("archive", commit, MODEL))) as archive:
            archive.extractall(partial, filter="data")
        partial.rename(target)
    return target / MODEL


def draws_of(card: str) -> int:
    """How many pictures training had drawn, as the card says it; the first version's does not."""
    found = re.findall(r"([\d,]{6,}) (?:draws|pictures in all)", card)
    return int(found[-1].replace(",", "")) if found else min(HOURS)


def figure(figures: dict[str, dict[str, float]], real: dict[str, float]) -> plt.Figure:
    draws = [row["draws"] for row in figures.values()]
    page, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for panel, name in zip(panels, ("R@5", "CLIP score", "Frechet distance"), strict=True):
        panel.plot(draws, [row[name] for row in figures.values()], "o-")
        panel.axhline(real[name], color="gray", linestyle=":", label="real pictures")
        panel.set(xlabel="draws of a picture in training", ylabel=name, xlim=(0, None))
        panel.legend()
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.history", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="data/emoji")
    parser.add_argument("--judge", default="models/judge")
    parser.add_argument("--num_pictures", type=int, default=200)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/history"))
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    measure = Measure(options)
    today = TextToImagePipeline.from_pretrained(str(ROOT / MODEL)).scheduler.config
    figures: dict[str, dict[str, Any]] = {}
    for commit, date in versions().items():
        folder = unpack(commit, options.output_dir / "versions")
        card = folder / "README.md"
        draws = draws_of(card.read_text(encoding="utf-8") if card.is_file() else "")
        pipe = TextToImagePipeline.from_pretrained(folder)
        pipe.scheduler = type(pipe.scheduler).from_config(today)
        drawn = draw(
            pipe, measure.captions, guidance_scale=2.0, num_inference_steps=25,
            folder=options.output_dir / "samples", label=commit,
        )  # fmt: skip
        hours = HOURS.get(draws, float("nan"))
        figures[f"{date}, {draws:,} draws"] = {"draws": draws, "hours": hours} | measure.of(drawn)
    real = measure.of(measure.pictures.images(measure.chosen))
    columns = ["hours", "R@1", "R@5", "CLIP score", "Frechet distance"]
    text = table(figures | {"real pictures": real}, columns, "version")
    (options.output_dir / "history.md").write_text(text)
    (options.output_dir / "history.json").write_text(json.dumps(figures | {"real pictures": real}, indent=1))
    figure(figures, real).savefig(options.output_dir / "history.png", dpi=120)
    print(text)


if __name__ == "__main__":
    main()
