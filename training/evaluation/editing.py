"""How well editing follows the prompt: the new words in the repainted region, and the seam around it.

    python -m training.evaluate editing --models models/emoji models/emoji:10 --output editing.png

One region of real pictures of a concept is repainted according to the words for another. Each model is a way
to inpaint: FOLDER, FOLDER:N for RePaint's resampling with N samples per jump, or the folder of a model that
was trained to inpaint. There are two references: the unchanged picture, and a picture of the other concept
pasted into the hole, which matches the words but has a seam.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipelines import InpaintPipeline
from pipelines.drawing.images import image_grid, save_png, to_pil
from pipelines.drawing.masks import crop_region
from training.evaluation.judge import Judge
from training.evaluation.samples import call, load_pipeline_as, read_pictures
from training.evaluation.settings import JudgeSettings, SplitSettings, StepsSettings
from training.run.settings import require, setting

# left, top, right, bottom as shares of the sides
REGIONS = {"middle": (0.25, 0.25, 0.75, 0.75), "top": (0.1, 0.0, 0.9, 0.45), "right": (0.5, 0.0, 1.0, 1.0)}
CHANGES = [
    "cat face > cat face with a crown @ top",
    "dog face > dog face with sunglasses @ top",
    "grinning face > crying face @ middle",
    "red heart > yellow star @ right",
    "dog face > cat face @ right",
]


class EditingConfig(JudgeSettings, StepsSettings, SplitSettings):
    """Settings of `training.evaluate editing`."""

    models: list[str] = setting(
        "Ways to inpaint, each FOLDER or FOLDER:N, resampled N times.", ["models/emoji", "models/emoji:10"]
    )
    changes: list[str] = setting(
        f"Changes, each 'name > words @ region', in a region of {', '.join(REGIONS)}.", CHANGES
    )
    split: str = "train"
    guidance_scale: float | None = setting("The model's own by default.", None)
    output: str = setting("PNG to write: picture, mask, and each way's result.", "")

    def check(self) -> None:
        """Raise a ValueError that names the argument for any error that can be found before work starts."""
        super().check()
        for name in ("models", "changes"):
            require(len(getattr(self, name)) > 0, name, getattr(self, name), "at least one")
        for change in self.changes:
            parse_change(change)
        for model in self.models:
            require(split_model(model)[1] >= 1, "models", model, "FOLDER or FOLDER:N, N at least 1")


def parse_change(change: str) -> tuple[str, str, str]:
    """'cat face > cat face with a crown @ top' -> its three parts."""
    words, _, region = change.partition("@")
    before, _, after = (part.strip() for part in words.partition(">"))
    region = region.strip()
    good = bool(before and after) and region in REGIONS
    require(good, "changes", change, f"'name > words @ region', region one of {', '.join(REGIONS)}")
    return before, after, region


def split_model(model: str) -> tuple[str, int]:
    folder, colon, samples = model.rpartition(":")
    return (folder, int(samples)) if colon and samples.isdecimal() else (model, 1)


def region_mask(region: str, side: int) -> Image.Image:
    """A white box on black, (side, side)."""
    mask = Image.new("L", (side, side))
    left, top, right, bottom = (round(share * side) for share in REGIONS[region])
    mask.paste(255, (left, top, right, bottom))
    return mask


def border_energy(pictures: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference between neighbouring pixels on the two sides of the mask's border, (B,), for
    pictures (B, C, H, W) in [-1, 1] and a mask (H, W) in {0, 1}. A seam makes it larger than in real
    pictures."""
    energies, counts = torch.zeros(len(pictures)), 0
    for axis in (0, 1):
        crosses = mask.int().diff(dim=axis) != 0
        step = pictures.diff(dim=axis - 2).square().mean(1)  # (B, H, W) less one in that axis
        energies += step[:, crosses].sum(1)
        counts += int(crosses.sum())
    return energies / counts


@dataclass
class Case:
    """The pictures of one change, in several styles."""

    pictures: Tensor  # (B, 3, H, W), unchanged
    others: Tensor  # (B, 3, H, W), of the concept that they change to, or the closest one
    mask: Image.Image
    before: list[str]
    after: list[str]

    @property
    def hole(self) -> Tensor:
        """(H, W) bool, True where the mask is not black."""
        return torch.from_numpy(np.array(self.mask)) > 0


def find_cases(config: EditingConfig, side: int) -> list[Case]:
    """One case for each change, in all styles that the data set has for both names. Raises ValueError if a
    change has no such style.

    If the new words are not a concept's name, `others` shows the concept with the longest name that they
    start with, or else the old one.
    """
    data = read_pictures(config, config.split, side)
    places = {key: i for i, key in enumerate(zip(data.columns["name"], data.columns["style"], strict=True))}
    names = sorted({name for name, _ in places}, key=len)
    cases = []
    for change in config.changes:
        before, after, region = parse_change(change)
        nearest = [name for name in names if after == name or after.startswith(name + " ")]
        other = nearest[-1] if nearest else before
        styles = [style for name, style in places if name == before and (other, style) in places]
        require(len(styles) > 0, "changes", change, f"about a name that the {config.split} split has")
        chosen = [[places[name, style] for style in styles] for name in (before, other)]
        captions = [[f"{words}, {style} style" for style in styles] for words in (before, after)]
        pictures, others = (data.images(torch.tensor(rows)) for rows in chosen)
        cases.append(Case(pictures, others, region_mask(region, side), *captions))
    return cases


def repaint(config: EditingConfig, pipe: InpaintPipeline, samples: int, case: Case) -> Tensor:
    """Repaint the pictures of a case: (B, 3, H, W) in [-1, 1]; picture i has the seed seed + i."""
    how = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    what = {"prompt": case.after, "image": case.pictures / 2 + 0.5, "mask_image": case.mask}
    seeds = range(config.seed, config.seed + len(case.after))
    return call(pipe, seeds, **what, **how, jump_n_sample=samples)


def measure(judge: Judge, case: Case, edited: Tensor) -> Tensor:
    """(B, 3): the judge's scores of the region for the new and the old words, and the border energy."""
    side = case.mask.width
    left, top, right, bottom = crop_region(case.mask, 1, 1, pad=side // 16)
    embeds = judge.embed_images(edited[..., top:bottom, left:right])
    scores = [(embeds * judge.embed_texts(words)).sum(1) for words in (case.after, case.before)]
    return torch.stack([*scores, border_energy(edited, case.hole)], dim=1)


def editing(config: EditingConfig) -> dict[str, Any]:
    """For each way to inpaint: the judge's mean score of the repainted regions for the new words and for the
    old words, how often the new words win, and the seam.

    The seam is the mean energy along the borders as a multiple of the real pictures' mean. The mean is over
    all pictures, since a border that runs through a flat colour has no energy to divide by.
    """
    judge = Judge(config.judge)
    folders = {model: split_model(model)[0] for model in config.models}
    pipes = {model: load_pipeline_as(InpaintPipeline, folders[model], "models") for model in folders}
    sides = {pipe.sample_size for pipe in pipes.values()}
    require(len(sides) == 1, "models", config.models, "of one size")
    cases = find_cases(config, sides.pop()[0])
    results: dict[str, list[Tensor]] = {way: [] for way in ("as it was", "cut and pasted", *pipes)}
    for case in cases:
        results["as it was"].append(case.pictures)
        results["cut and pasted"].append(torch.where(case.hole, case.others, case.pictures))
    with tqdm(total=len(pipes) * len(cases), unit="change") as bar:
        for model, pipe in pipes.items():
            for case in cases:
                results[model].append(repaint(config, pipe, split_model(model)[1], case))
                bar.update()
    if config.output:
        draw_sheet(cases, results, config.output)
    figures: dict[str, Any] = {"pictures": sum(len(case.after) for case in cases)}
    real = torch.cat([border_energy(case.pictures, case.hole) for case in cases]).mean()
    for way, edited in results.items():
        rows = torch.cat([measure(judge, case, part) for case, part in zip(cases, edited, strict=True)])
        figures[way] = {
            "score of the new words": rows[:, 0].mean().item(),
            "score of the old words": rows[:, 1].mean().item(),
            "new words win": (rows[:, 0] > rows[:, 1]).float().mean().item(),
            "seam, times real": (rows[:, 2].mean() / real).item(),
        }
    return figures


def draw_sheet(cases: list[Case], results: dict[str, list[Tensor]], path: str) -> None:
    """Save a sheet: for each change, the first picture, its mask, and the result of each way."""
    cells, labels = [], []
    ways = [way for way in results if way != "as it was"]
    for i, case in enumerate(cases):
        cells += [to_pil(case.pictures[:1])[0], case.mask.convert("RGB")]
        cells += [to_pil(results[way][i][:1])[0] for way in ways]
        labels += [case.before[0], case.after[0], *ways]
    wide = [cell.resize((128, 128), Image.Resampling.LANCZOS) for cell in cells]
    save_png(image_grid(wide, columns=len(results) + 1, labels=labels), path)
