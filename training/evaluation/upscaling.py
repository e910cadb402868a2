"""How good enlarged pictures are compared with Pillow's filters, on held-out pictures rendered at both sizes.

    python -m training.evaluate upscaling --model models/emoji-upsampler --output upscaling.png

The judge sees squares of its own size cut out of the large pictures, so that it compares detail: reduced to
that size, all the enlarged pictures would look alike. Squares without an edge in the real picture are left
out, the same ones for every method.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipelines.drawing.images import image_grid, save_png, to_pil, to_tensor
from pipelines.super_resolution import SuperResolutionPipeline
from training.data.pairs import load_pairs
from training.evaluation.judge import Judge
from training.evaluation.metrics import frechet_distance
from training.evaluation.samples import call, load_pipeline_as, own_steps, random_rows
from training.evaluation.settings import CountSettings, JudgedSettings, StepsSettings, at_least
from training.run.settings import PairSettings, require, setting

FILTERS = {method.name.lower(): method for method in Image.Resampling}
EDGE = 0.05  # a square, in [-1, 1], has an edge if its standard deviation is above this


class UpscalingConfig(JudgedSettings, StepsSettings, PairSettings, CountSettings):
    """Settings of `training.evaluate upscaling`."""

    model: str = "models/emoji-upsampler"
    num_pictures: int = setting("Pictures drawn at random.", 200, at_least(2))
    noise_level: int | None = setting("The model's own by default.", None)
    output: str = setting("PNG: small, by the best filter, by the model, real.", "")


def enlarge_by(method: Image.Resampling, small: Tensor, side: int) -> Tensor:
    """Enlarge (N, 3, h, w) in [-1, 1] to (N, 3, side, side) with a Pillow filter on 8-bit pictures."""
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
    """The judge's token states after the patch embedding and after each layer, each (N, tokens, D) and
    l2-normalised."""
    tower = judge.model.vision_model
    states = [
        tower(pixel_values=part, output_hidden_states=True).hidden_states for part in squares.split(128)
    ]
    return [F.normalize(torch.cat(layer), dim=-1) for layer in zip(*states, strict=True)]


def perceptual_distance(a: list[Tensor], b: list[Tensor]) -> float:
    """LPIPS (Zhang 2018, eq. 1) in these layers with all weights w_l = 1: the mean over pictures, layers and
    positions of |a - b|^2 for unit vectors, so in 0 .. 4. Each layer is (N, tokens, D)."""
    layers = [(x - y).square().sum(-1).double().mean() for x, y in zip(a, b, strict=True)]
    return float(torch.stack(layers).mean())


def enlarge_with(pipe: SuperResolutionPipeline, config: UpscalingConfig, small: Tensor) -> Tensor:
    """Enlarge the pictures with the model, one at a time; picture i has the seed seed + i."""
    how = {"num_inference_steps": config.num_inference_steps, "noise_level": config.noise_level}
    drawn = []
    for i in tqdm(range(len(small)), desc="enlarging", unit="picture"):
        picture = call(pipe, [config.seed + i], image=small[i : i + 1] / 2 + 0.5, **how)
        drawn.append(to_tensor(to_pil(picture)[0]))
    return torch.cat(drawn)


def upscaling(config: UpscalingConfig) -> dict[str, Any]:
    """For each method of enlarging: the Frechet distance and the perceptual distance between its squares and
    the real ones in the judge's features; PSNR; the mean absolute difference between the result, reduced
    again, and the small picture; the largest shift of a channel's mean from the real pictures' (both in
    levels of 255); and the seconds per picture."""
    pipe = load_pipeline_as(SuperResolutionPipeline, config.model)
    judge, scale, side = Judge(config.judge), pipe.scale, config.resolution
    rule = f"{scale} times low_resolution, {config.low_resolution}"
    require(side == scale * config.low_resolution, "resolution", side, rule)
    rule = f"a multiple of what the judge sees, {judge.image_size}"
    require(side % judge.image_size == 0, "resolution", side, rule)
    sides = (side, config.low_resolution)
    pairs = load_pairs(config.dataset, config.low_dataset, config.split, *sides, config.cache_dir)
    chosen = random_rows(len(pairs), config.num_pictures, config.seed)
    real, small = pairs.large.images(chosen), pairs.small.images(chosen)

    ways: dict[str, Callable[[], Tensor]] = {
        name: partial(enlarge_by, method, small, side) for name, method in FILTERS.items()
    }
    ways[config.model] = partial(enlarge_with, pipe, config, small)
    squares = cut_squares(real, judge.image_size)
    edges = squares.flatten(1).std(1) > EDGE
    real_layers, real_embeds = layers_of(judge, squares[edges]), judge.embed_images(squares[edges])
    figures: dict[str, Any] = {"split": config.split, "pictures": len(chosen), "squares": int(edges.sum())}
    figures["steps"] = own_steps(pipe, config.num_inference_steps)
    enlarged: dict[str, Tensor] = {}
    for name, way in ways.items():
        start = time.perf_counter()
        pictures = enlarged[name] = way()
        seconds = (time.perf_counter() - start) / len(small)
        own = cut_squares(pictures, judge.image_size)[edges]
        shrunk = torch.cat([to_tensor(picture.reduce(scale)) for picture in to_pil(pictures)])
        shift = (pictures - real).mean(dim=(0, 2, 3)).abs().max()
        figures[name] = {
            "Frechet distance": frechet_distance(judge.embed_images(own), real_embeds),
            "perceptual distance": perceptual_distance(layers_of(judge, own), real_layers),
            "PSNR": psnr(pictures, real),
            "shrunk, from the small picture": float((shrunk - small).abs().mean()) * 127.5,
            "shift of colour": float(shift) * 127.5,
            "seconds": seconds,
        }
    if config.output:
        best = min(FILTERS, key=lambda name: figures[name]["perceptual distance"])
        draw_sheet([small, enlarged[best], enlarged[config.model], real], best, config.output)
    return figures


def draw_sheet(columns: list[Tensor], best: str, path: str) -> None:
    """Save a sheet with up to six rows: small, by the best filter, by the model, real."""
    side = columns[-1].shape[-1]
    rows = min(6, len(columns[0]))
    whole = zip(*(to_pil(column[:rows]) for column in columns), strict=True)
    cells = [cell.resize((side, side), Image.Resampling.NEAREST) for row in whole for cell in row]
    labels = ["small", best, "enlarged", "real"] * rows
    save_png(image_grid(cells, columns=len(columns), labels=labels), path)
