"""How good enlarged pictures are, beside Pillow's filters: held-out pictures drawn at both sizes.

    python -m training.evaluate upscaling --model models/emoji-upsampler --output upscaling.png

The judge sees squares of its own size cut out of the large pictures, so what it compares is detail: all of
the enlarged pictures look alike once they are shrunk. Squares without an edge in the real picture are left
out, the same ones for every way.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipelines.drawing.images import image_grid, to_pil, to_tensor
from pipelines.folders.files import save_png
from pipelines.super_resolution import SuperResolutionPipeline
from training.data.pairs import load_pairs
from training.evaluation.judge import Judge
from training.evaluation.metrics import frechet_distance
from training.run.settings import require

FILTERS = {
    name: getattr(Image.Resampling, name.upper())
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
}
EDGE = 0.05  # standard deviation, in a square of a picture in [-1, 1], that is an edge


@dataclass
class UpscalingConfig:
    """Settings of `training.evaluate upscaling`."""

    model: str = field(default="models/emoji-upsampler", metadata={"help": "The upsampler to measure."})
    judge: str = field(default="models/judge", metadata={"help": "The CLIP in whose features is measured."})
    dataset: str = field(default="data/emoji-256", metadata={"help": "Data set of the large pictures."})
    low_dataset: str = field(default="data/emoji", metadata={"help": "The same pictures, small."})
    cache_dir: str = field(default="data/cache", metadata={"help": "Decoded pictures."})
    split: str = field(default="validation", metadata={"help": "Split to take; concepts never trained on."})
    resolution: int = field(default=256, metadata={"help": "Side of the large pictures, in pixels."})
    low_resolution: int = field(default=64, metadata={"help": "Side of the small ones."})
    num_pictures: int = field(default=200, metadata={"help": "Pictures drawn at random."})
    num_inference_steps: int | None = field(default=None, metadata={"help": "The model's own by default."})
    noise_level: int | None = field(default=None, metadata={"help": "The model's own by default."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice, and of the first picture."})
    output: str = field(default="", metadata={"help": "PNG: small, by the best filter, by the model, real."})
    json: str = field(default="", metadata={"help": "File for the figures."})

    def check(self) -> None:
        """Raise a ValueError that names the argument, for everything that can be told before work starts."""
        require(self.num_pictures >= 2, "num_pictures", self.num_pictures, "at least 2")


def enlarge_by(method: Image.Resampling, small: Tensor, side: int) -> Tensor:
    """(N, 3, h, w) in [-1, 1] -> (N, 3, side, side), by one of Pillow's filters on 8-bit pictures."""
    return torch.cat([to_tensor(picture.resize((side, side), method)) for picture in to_pil(small)])


def cut_squares(pictures: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) -> (N (H/side) (W/side), 3, side, side), row by row."""
    rows = pictures.unfold(2, side, side).unfold(3, side, side)  # (N, 3, H/side, W/side, side, side)
    return rows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over pictures (N, 3, H, W) in [-1, 1] of 10 log10(4 / MSE), in dB."""
    return float(-10 * ((a - b).square().mean(dim=(1, 2, 3)).clamp(min=1e-10) / 4).log10().mean())


@torch.no_grad()
def layers_of(judge: Judge, squares: Tensor) -> list[Tensor]:
    """The judge's token states after the patches and after each layer, (N, tokens, D) each, l2-normalised."""
    states: list[list[Tensor]] = []
    for part in squares.split(128):
        output = judge.model.vision_model(pixel_values=part, output_hidden_states=True)
        states.append([F.normalize(layer, dim=-1) for layer in output.hidden_states])
    return [torch.cat(layer) for layer in zip(*states, strict=True)]


def perceptual_distance(a: list[Tensor], b: list[Tensor]) -> float:
    """LPIPS (Zhang 2018, eq. 1) in these layers, all weights 1: mean over pictures, layers and positions of
    |a - b|^2, (N, tokens, D) each, of unit vectors: 0 .. 4."""
    return float(
        torch.stack([(x - y).square().sum(-1).double().mean() for x, y in zip(a, b, strict=True)]).mean()
    )


def upscaling(config: UpscalingConfig) -> dict[str, Any]:
    """For each way: Frechet distance and perceptual distance of the squares from the real ones in the judge's
    features, PSNR, mean absolute difference of the shrunk result from the small picture and the largest
    shift of a channel's mean from the real pictures' (both of 255 levels), seconds for a picture."""
    try:
        pipe = SuperResolutionPipeline.from_pretrained(config.model)
    except OSError as error:
        raise ValueError(f"model {config.model!r}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    sides = (config.resolution, config.low_resolution)
    require(config.resolution == pipe.scale * config.low_resolution, "resolution", config.resolution,
            f"{pipe.scale} times low_resolution, {config.low_resolution}")  # fmt: skip
    judge, scale = Judge(config.judge), pipe.scale
    require(config.resolution % judge.image_size == 0, "resolution", config.resolution,
            f"a multiple of what the judge sees, {judge.image_size}")  # fmt: skip
    pairs = load_pairs(config.dataset, config.low_dataset, config.split, *sides, config.cache_dir)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(pairs), generator=generator)[: config.num_pictures].tolist()
    real, small = pairs.large.images(chosen), pairs.small.images(chosen)

    ways: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for name, method in FILTERS.items():
        start = time.perf_counter()
        ways[name] = enlarge_by(method, small, config.resolution)
        seconds[name] = (time.perf_counter() - start) / len(small)
    start, drawn = time.perf_counter(), []
    for i in tqdm(range(len(small)), desc="enlarging", unit="picture"):
        result: Any = pipe(
            image=small[i : i + 1] / 2 + 0.5,
            num_inference_steps=config.num_inference_steps,
            noise_level=config.noise_level,
            generator=torch.Generator().manual_seed(config.seed + i),
            output_type="pt",
        )
        drawn.append(to_tensor(to_pil(result.images * 2 - 1)[0]))
    ways[config.model] = torch.cat(drawn)
    seconds[config.model] = (time.perf_counter() - start) / len(small)

    squares = cut_squares(real, judge.image_size)
    edges = squares.flatten(1).std(1) > EDGE
    real_layers, real_embeds = layers_of(judge, squares[edges]), judge.embed_images(squares[edges])
    figures: dict[str, Any] = {
        "split": config.split,
        "pictures": len(chosen),
        "squares": int(edges.sum()),
        "steps": pipe.config["default_num_inference_steps"]
        if config.num_inference_steps is None
        else config.num_inference_steps,
    }
    for name, pictures in ways.items():
        own = cut_squares(pictures, judge.image_size)[edges]
        shrunk = torch.cat([to_tensor(picture.reduce(scale)) for picture in to_pil(pictures)])
        shift = (pictures - real).mean(dim=(0, 2, 3)).abs().max()
        figures[name] = {
            "Frechet distance": frechet_distance(judge.embed_images(own), real_embeds),
            "perceptual distance": perceptual_distance(layers_of(judge, own), real_layers),
            "PSNR": psnr(pictures, real),
            "shrunk, from the small picture": float((shrunk - small).abs().mean()) * 127.5,
            "shift of colour": float(shift) * 127.5,
            "seconds": seconds[name],
        }
    if config.output:
        best = min(FILTERS, key=lambda name: figures[name]["perceptual distance"])
        draw_sheet([small, ways[best], ways[config.model], real], best, config.output)
    return figures


def draw_sheet(columns: list[Tensor], best: str, path: str) -> None:
    """Six pictures, a row each: small, by the best filter, by the model, real."""
    side = columns[-1].shape[-1]
    cells = [
        to_pil(column[i : i + 1])[0].resize((side, side), Image.Resampling.NEAREST)
        for i in range(min(6, len(columns[0])))
        for column in columns
    ]
    labels = ["small", best, "enlarged", "real"] * (len(cells) // len(columns))
    save_png(image_grid(cells, columns=len(columns), labels=labels), path)
