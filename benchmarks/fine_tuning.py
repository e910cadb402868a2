"""Fine-tuning on thirty pictures of something new, in full and by LoRA: before, after, and the time it took.

    python -m benchmarks.fine_tuning                 # outputs/fine-tuning/before-and-after.png

Draws the pictures of `benchmarks.corgi`, trains models/emoji on them twice through accelerate as
docs/training.md describes, and draws the same prompts with the same seeds before and after. The prompts are
combinations that are not among the thirty pictures; the last two ask for things that the model knew before.
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

POSES: list[tuple[str, str, bool, bool]] = [
    ("red", "a party hat", True, True), ("black", "a crown", False, True),
    ("brown", "a blue scarf", False, False), ("red", "", False, True),
]  # fmt: skip
NEW = [*(caption_of(*pose) for pose in POSES), "a corgi in a party hat", "a corgi"]
PROMPTS = [*NEW, "a red heart", "dog face, noto style"]
WAYS = {  # the arguments in which the two runs differ
    "whole": ["--learning_rate", "1e-4", "--train_batch_size", "16"],
    "LoRA": ["--learning_rate", "2e-3", "--train_batch_size", "16", "--rank", "8"],
}


def draw(pipe: TextToImagePipeline) -> list[Any]:
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    result: Any = pipe(PROMPTS, num_inference_steps=25, generator=generators)
    return list(result.images)


def train(way: str, settings: argparse.Namespace, pictures: Path) -> tuple[Path, float]:
    """Run one `accelerate launch`, as a user would type it; return (output folder, minutes taken)."""
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


def sheet(rows: dict[str, list[Any]], side: int = 96) -> Image.Image:
    """A row of pictures for each entry, with its name on the left."""
    small = [[image.resize((side, side), Image.Resampling.LANCZOS) for image in row] for row in rows.values()]
    grids = [image_grid(row, len(row)) for row in small]
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
    settings = parser.parse_args(argv)
    settings.output_dir = settings.output_dir.resolve()
    steps = settings.max_train_steps
    if steps < 3:
        parser.error(f"--max_train_steps must be at least 3, got {steps}")
    if not (Path(settings.model) / "model_index.json").is_file():
        parser.error(f"--model: there is no pipeline in {settings.model!r}")

    pictures, wanted = settings.output_dir / "pictures", len(PROMPTS)
    count = len(write_pictures(pictures))
    shown = [Image.open(pictures / f"corgi-{i * count // wanted:02d}.png") for i in range(wanted)]
    pipe = TextToImagePipeline.from_pretrained(settings.model)
    rows = {f"{wanted} of the {count}\npictures": shown, "before": draw(pipe)}
    for way in WAYS:
        output, minutes = train(way, settings, pictures)
        if way == "LoRA":
            pipe.load_lora_weights(str(output))
        trained = pipe if way == "LoRA" else TextToImagePipeline.from_pretrained(output / "pipeline")
        rows[f"{way},\n{steps} steps,\n{minutes:.1f} minutes"] = draw(trained)
        print(f"{way}: {steps} steps in {minutes:.1f} minutes, result in {output}")
    path = settings.output_dir / "before-and-after.png"
    sheet(rows).save(path)
    print(*(f"column {number}: {prompt}" for number, prompt in enumerate(PROMPTS, 1)), path, sep="\n")


if __name__ == "__main__":
    main()
