"""Fine-tuning on thirty pictures of something new, whole and by LoRA: before and after, and how long it took.

    python -m benchmarks.fine_tuning                 # outputs/fine-tuning/before-and-after.png

Draws the pictures of `benchmarks.corgi`, trains models/emoji on them twice through accelerate as the README
says, and draws the same prompts with the same seeds before and after. The prompts are combinations that are
not among the thirty; the last two ask for what the model knew before.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from benchmarks.corgi import caption_of, write_pictures
from pipelines import TextToImagePipeline
from pipelines.drawing.images import image_grid

NEW = [
    caption_of("red", "a party hat", True, True),
    caption_of("black", "a crown", False, True),
    caption_of("brown", "a blue scarf", False, False),
    caption_of("red", "", False, True),
    "a corgi in a party hat",
    "a corgi",
]
PROMPTS = [*NEW, "a red heart", "dog face, noto style"]
WAYS = {  # what the two runs differ in
    "whole": ["--learning_rate", "1e-4", "--train_batch_size", "16"],
    "LoRA": ["--learning_rate", "2e-3", "--train_batch_size", "16", "--rank", "8"],
}


def draw(pipe: TextToImagePipeline, seed: int) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(PROMPTS))]
    result: Any = pipe(PROMPTS, num_inference_steps=25, generator=generators)
    return list(result.images)


def train(way: str, settings: argparse.Namespace, pictures: Path) -> tuple[Path, float]:
    """(where the run's result is, its minutes) of one `accelerate launch`, as a user would type it."""
    output = settings.output_dir / way
    steps = settings.max_train_steps
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "-m", "training.text_to_image",
        "--pretrained_model_name_or_path", settings.model, "--train_data_dir", str(pictures),
        "--output_dir", str(output), "--cache_dir", str(settings.output_dir / "cache"),
        "--max_train_steps", str(steps), "--lr_warmup_steps", "20", "--lr_decay_steps", str(steps // 3),
        "--ema_decay", "0.98", "--checkpointing_steps", str(steps), "--report_to", "none", *WAYS[way],
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    return output, (time.perf_counter() - began) / 60


def sheet(rows: dict[str, list[Image.Image]], side: int = 96) -> Image.Image:
    """A row of pictures for each entry, its name to the left."""
    grids = [
        image_grid([im.resize((side, side), Image.Resampling.LANCZOS) for im in r], len(r))
        for r in rows.values()
    ]
    page = Image.new("RGB", (grids[0].width + 110, sum(grid.height for grid in grids)), "white")
    pen, y = ImageDraw.Draw(page), 0
    for name, grid in zip(rows, grids, strict=True):
        page.paste(grid, (110, y))
        pen.multiline_text((6, y + grid.height // 2 - 12), name, fill="black", font_size=13)
        y += grid.height
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.fine_tuning", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/emoji")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/fine-tuning"))
    parser.add_argument("--max_train_steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(argv)
    settings.output_dir = settings.output_dir.resolve()
    if settings.max_train_steps < 3:
        parser.error(f"--max_train_steps must be at least 3, got {settings.max_train_steps}")
    if not (Path(settings.model) / "model_index.json").is_file():
        parser.error(f"--model: there is no pipeline in {settings.model!r}")

    pictures = settings.output_dir / "pictures"
    count = len(write_pictures(pictures))
    shown: list[Image.Image] = [
        Image.open(pictures / f"corgi-{i * count // len(PROMPTS):02d}.png") for i in range(len(PROMPTS))
    ]
    pipe = TextToImagePipeline.from_pretrained(settings.model)
    rows: dict[str, list[Image.Image]] = {
        f"{len(PROMPTS)} of the {count}\npictures": shown,
        "before": draw(pipe, settings.seed),
    }
    for way in WAYS:
        output, minutes = train(way, settings, pictures)
        if way == "LoRA":
            pipe.load_lora_weights(str(output))
            after = draw(pipe, settings.seed)
        else:
            after = draw(TextToImagePipeline.from_pretrained(output / "pipeline"), settings.seed)
        rows[f"{way},\n{settings.max_train_steps} steps,\n{minutes:.1f} minutes"] = after
        print(f"{way}: {settings.max_train_steps} steps in {minutes:.1f} minutes, result in {output}")
    path = settings.output_dir / "before-and-after.png"
    sheet(rows).save(path)
    for number, prompt in enumerate(PROMPTS, start=1):
        print(f"column {number}: {prompt}")
    print(path)


if __name__ == "__main__":
    main()
