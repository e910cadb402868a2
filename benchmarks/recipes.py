"""Short trials of the training recipe, with equal CPU time and one thing changed in each.

    python -m benchmarks.recipes --minutes 20                    # outputs/recipes/recipes.md, recipes.json
    python -m benchmarks.recipes --only baseline v-prediction

All trials start from the same random weights and read the same shipped text tower, with half the U-Net's
width and half the batch size, so that some hundreds of updates fit. A finished trial is not run again, a
stopped one is continued, and several processes may share an output_dir. `Measure` says what is measured.
After minutes of training, few pictures are recognised yet, so the CLIP score, which has no threshold, and the
error of x0, which needs no sampling, say more than R@5.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pipelines import TextToImagePipeline
from pipelines.chain.equations import predict_x0
from pipelines.drawing.text import encode_text
from pipelines.folders.files import write_file
from training.data.pictures import cache_pictures, load_pictures
from training.evaluation.card import markdown_table
from training.evaluation.judge import Judge, embed_concepts, recall
from training.evaluation.metrics import clip_score, frechet_distance
from training.evaluation.samples import draw, load_pipeline, two_halves
from training.objectives.denoising import training_scheduler

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "training/configs/emoji.yaml"
WIDTHS = {"block_out_channels": [64, 128]}
SHARED = {
    "train_batch_size": 32, "ema_decay": 0.997, "lr_warmup_steps": 50, "checkpointing_steps": 200,
    "validation_steps": 10**6,
}  # fmt: skip
EVEN = {"transformer_layers_per_block": [1, 2], "reverse_transformer_layers_per_block": None}
TRIALS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "v-prediction": {"prediction_type": "v_prediction", "snr_floor": 0.0},
    "plain loss": {"snr_gamma": None, "snr_floor": 0.0},
    "min-SNR without a floor": {"snr_floor": 0.0},
    "noisier timesteps": {"timestep_shift": 2.0},
    "cleaner timesteps": {"timestep_shift": 0.5},
    "AdamW": {"optimizer": "adamw"},
    "concepts evenly": {"concept_power": 0.0},
    "pictures evenly": {"concept_power": 1.0},
    "styles evenly": {"style_power": 0.0},
    "without self-conditioning": {"unet": {"self_conditioning": False}},
    "narrow at 16 x 16": {"unet": {"block_out_channels": [32, 128], "layers_per_block": 1, **EVEN}},
    "deep, not wide": {"unet": {"block_out_channels": [64, 96], "layers_per_block": 2, **EVEN}},
}


def settings_of(name: str) -> dict[str, Any]:
    """The settings of emoji.yaml, overridden by the trial's own."""
    base, own = yaml.safe_load(RECIPE.read_text(encoding="utf-8")) | SHARED, TRIALS[name]
    return base | own | {"unet": base["unet"] | WIDTHS | own.get("unet", {})}


def train(name: str, options: argparse.Namespace) -> Path:
    """Train a trial through accelerate for `options.minutes` of CPU time; return its folder."""
    output = options.output_dir / name.replace(" ", "-")
    if (output / "pipeline").is_dir():
        return output
    output.mkdir(parents=True, exist_ok=True)
    config = output / "config.yaml"
    config.write_text(yaml.safe_dump(settings_of(name)), encoding="utf-8")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "-m", "training.text_to_image",
        "--config", str(config), "--output_dir", str(output), "--report_to", "none",
        "--max_train_minutes", str(options.minutes),
    ]  # fmt: skip
    if list(output.glob("checkpoint-*")):
        command += ["--resume_from_checkpoint", "latest"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return output


class Measure:
    """Measures a trial by pictures of training captions, as the judge sees them."""

    def __init__(self, options: argparse.Namespace):
        self.judge, self.options = Judge(options.judge), options
        self.concepts = embed_concepts(self.judge, options.dataset)
        data = load_pictures(options.dataset, split="train")
        self.pictures = cache_pictures(data, self.judge.image_size, "data/cache")
        half_a, self.chosen = two_halves(len(self.pictures), options.num_pictures, seed=0)
        self.reference = self.judge.embed_images(self.pictures.images(half_a))
        columns = self.pictures.columns
        self.captions, self.truth = ([columns[c][i] for i in self.chosen] for c in ("caption", "concept"))

    def of(self, images: Tensor) -> dict[str, float]:
        embeds = self.judge.embed_images(images)
        ranks = self.concepts.rank(embeds, self.truth)
        return {
            **recall(ranks),
            "CLIP score": float(clip_score(embeds, self.judge.embed_texts(self.captions)).mean()),
            "Frechet distance": frechet_distance(embeds, self.reference),
        }

    def drawn_by(self, folder: Path) -> dict[str, float]:
        """The figures of the pipeline in `folder`."""
        pipe = load_pipeline(str(folder))
        drawn = self.of(draw(pipe, self.captions, guidance_scale=3.0, label=folder.parent.name))
        return drawn | {"x0 error": self.x0_error(pipe)}

    @torch.no_grad()
    def x0_error(self, pipe: TextToImagePipeline, batch: int = 50) -> float:
        """Mean squared error of x0 predicted from x_t in one step, with fixed eps and t spread over the
        chain: the loss in the same unit for every prediction_type and weighting."""
        chain, errors = training_scheduler(pipe.scheduler), []
        generator = torch.Generator().manual_seed(0)
        for start in range(0, len(self.chosen), batch):
            rows = self.chosen[start : start + batch]
            x0 = self.pictures.images(rows)
            t = torch.arange(start, start + len(rows)) * 617 % len(chain)
            x_t = chain.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
            captions = self.captions[start : start + batch]
            states, pooled, _ = encode_text(pipe.tokenizer, pipe.text_encoder, captions)
            added = {"pooled_text": pooled, "x0_self": torch.zeros_like(x_t)}
            output = pipe.unet(x_t, t, states, added_cond_kwargs=added).sample
            found = predict_x0(output, x_t, chain.alphas_cumprod[t], chain.config.prediction_type)
            errors.append((found.clamp(-1, 1) - x0).square().flatten(1).mean(1))
        return float(torch.cat(errors).mean())


def written(path: Path) -> dict[str, Any]:
    """The figures of all finished trials, whichever process ran them."""
    return json.loads(path.read_text()) if path.is_file() else {}


COLUMNS = ["updates", "x0 error", "R@1", "R@5", "CLIP score", "Frechet distance"]


def table(figures: dict[str, Any]) -> str:
    """A Markdown table with a row for each trial."""
    rows = [
        [name, *(f"{values[c]:.4g}" if c in values else "" for c in COLUMNS)]
        for name, values in figures.items()
    ]
    return markdown_table(["recipe", *COLUMNS], rows) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.recipes", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="CPU time of each trial")
    parser.add_argument("--only", nargs="+", choices=list(TRIALS), default=list(TRIALS), metavar="NAME")
    parser.add_argument("--dataset", default="data/emoji")
    parser.add_argument("--judge", default="models/judge")
    parser.add_argument("--num_pictures", type=int, default=400)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/recipes"))
    options = parser.parse_args(argv)
    options.output_dir = options.output_dir.resolve()
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")

    torch.manual_seed(0)
    measure = Measure(options)
    path = options.output_dir / "recipes.json"
    for name in options.only:
        if name in written(path):
            continue
        run = train(name, options)
        updates = max(int(checkpoint.name.split("-")[1]) for checkpoint in run.glob("checkpoint-*"))
        figures = {name: {"updates": updates} | measure.drawn_by(run / "pipeline")}
        write_file(path, json.dumps(written(path) | figures, indent=1))
    figures = written(path) | {"real pictures": measure.of(measure.pictures.images(measure.chosen))}
    write_file(options.output_dir / "recipes.md", table(figures))
    print(table(figures))


if __name__ == "__main__":
    main()
