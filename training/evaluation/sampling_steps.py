"""Bits per dimension and Frechet distance against the number of sampling steps, as Nichol 2021 plots them.

    python -m training.evaluate sampling-steps --output steps.png --json steps.json \\
        --models runs/likelihood-simple/pipeline:fixed_small runs/likelihood-simple/pipeline:fixed_large \\
        runs/likelihood-hybrid/pipeline

The Frechet distance is measured from half A of the real training pictures. The model draws the captions of
half B; the distance of half B's real pictures is the floor.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from pipelines.coding.likelihood import chain_of
from training.evaluation import bits_per_dim as likelihood
from training.evaluation.figures import chart, finish
from training.evaluation.judge import Judge
from training.evaluation.metrics import frechet_distance
from training.evaluation.samples import draw, first_captions, read_pictures, two_halves
from training.evaluation.settings import BatchSettings, CountSettings, JudgeSettings, at_least
from training.run.settings import require, setting


class SamplingStepsConfig(JudgeSettings, CountSettings, BatchSettings):
    """Settings of `training.evaluate sampling-steps`."""

    models: list[str] = setting(
        "Pipelines without a VAE, each FOLDER or FOLDER:VARIANCE_TYPE.",
        ["models/emoji:fixed_small", "models/emoji:fixed_large"],
    )
    steps: list[int] = setting("Numbers of steps to compare.", [10, 25, 50, 100])
    num_pictures: int = setting("Pictures whose bits are counted; at least 2.", 100, likelihood.FOR_AN_ERROR)
    num_drawn: int = setting("Pictures drawn, and in each half of real ones.", 1000, at_least(2))
    guidance_scale: float = setting(
        "Guidance of the drawn pictures; 1 shows the model itself.", 1.0, "0 or more"
    )

    def check(self) -> None:
        """Raise a ValueError that names the argument for any error that can be found before work starts."""
        super().check()
        require(len(self.models) > 0, "models", self.models, "at least one pipeline")
        for model in self.models:
            rule = f"FOLDER:VARIANCE_TYPE, one of {likelihood.VARIANCES}"
            require(split_name(model)[1] in (None, *likelihood.VARIANCES), "models", model, rule)
        require(len(self.steps) > 0 and min(self.steps) >= 1, "steps", self.steps, "numbers of 1 or more")


def split_name(model: str) -> tuple[str, str | None]:
    """FOLDER or FOLDER:VARIANCE_TYPE -> (folder, variance type or None)."""
    folder, colon, variance = model.rpartition(":")
    return (folder, variance) if colon else (model, None)


@dataclass
class RealPictures:
    """Two halves of the real pictures: A's features, B's captions, and B's distance from A."""

    reference: Tensor
    captions: list[str]
    floor: float


def real_pictures(config: SamplingStepsConfig, judge: Judge, side: int) -> RealPictures:
    """Halves with `num_drawn` training pictures each, or with half of the split if there are too few."""
    pictures = read_pictures(config, "train", side)
    require(len(pictures) >= 4, "dataset", config.dataset, "of at least 4 training pictures")
    first, second = two_halves(len(pictures), config.num_drawn, config.seed)
    reference, other = (judge.embed_images(pictures.images(half)) for half in (first, second))
    captions = first_captions(pictures, second)
    return RealPictures(reference, captions, frechet_distance(other, reference))


def sampling_steps(config: SamplingStepsConfig) -> dict[str, Any]:
    """For each model and number of steps: the bits per dimension of held-out pictures under a chain with that
    many timesteps, and the Frechet distance of pictures drawn in that many steps, as many as half A has."""
    judge = Judge(config.judge)
    pipes = {name: likelihood.load_pixel_pipeline(split_name(name)[0]) for name in config.models}
    for name, pipe in pipes.items():  # raises for settings that do not fit, before work starts
        for steps in config.steps:
            likelihood.evaluation_chain(pipe, split_name(name)[1], steps)
    sides = {pipe.unet.config.sample_size for pipe in pipes.values()}
    real = {side: real_pictures(config, judge, side) for side in sides}

    figures: dict[str, Any] = {"pictures": config.num_pictures}
    for name, pipe in pipes.items():
        folder, variance = split_name(name)
        halves = real[pipe.unet.config.sample_size]
        shared = ("dataset", "split", "cache_dir", "num_pictures", "batch_size", "seed")
        counted = likelihood.BitsPerDimConfig(model=folder, **{key: getattr(config, key) for key in shared})
        held_out = likelihood.held_out_pictures(counted, pipe)
        variance = likelihood.evaluation_chain(pipe, variance).config.variance_type
        pipe.scheduler = chain_of(pipe.scheduler, variance_type=variance)
        figures[name] = {"drawn": len(halves.captions), "floor of the Frechet distance": halves.floor}
        for steps in config.steps:
            chain = likelihood.evaluation_chain(pipe, variance, steps)
            title = f"{name}, {steps} steps"
            terms = likelihood.measure(counted, pipe, chain, held_out, held_out.captions, title)
            drawn = draw(pipe, halves.captions, config.seed, steps, config.guidance_scale, config.batch_size)
            figures[name][f"{steps} steps"] = {
                "bits/dim": likelihood.mean_and_error(terms.bits.sum(1)),
                "Frechet distance": frechet_distance(judge.embed_images(drawn), halves.reference),
            }
    if config.output:
        draw_curves(figures, config)
    return figures


def label(model: str) -> str:
    """A model's name in the legend: its folder without the path, or the run's folder for a run's `pipeline`,
    and the variance type if given."""
    folder, variance = split_name(model)
    path = Path(folder)
    name = path.parent.name if path.name == "pipeline" and path.parent.name else path.name
    return f"{name}, {variance}" if variance else name


def draw_curves(figures: dict[str, Any], config: SamplingStepsConfig) -> None:
    """Plot both quantities, with a curve for each model; steps and bits are on logarithmic scales."""
    with chart(config.output, 10, 4, columns=2) as (bits, distance):
        for model in config.models:
            rows = [figures[model][f"{steps} steps"] for steps in config.steps]
            means = [row["bits/dim"]["mean"] for row in rows]
            errors = [2 * row["bits/dim"]["standard error"] for row in rows]
            bits.errorbar(config.steps, means, yerr=errors, marker="o", capsize=2, label=label(model))
            distances = [row["Frechet distance"] for row in rows]
            distance.plot(config.steps, distances, marker="o", label=label(model))
        floor = figures[config.models[0]]["floor of the Frechet distance"]
        distance.axhline(floor, color="grey", ls=":", label="real pictures")
        bits.set_yscale("log")  # a few steps with too small a variance cost ten times as many bits
        bits.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        bits.yaxis.set_major_formatter(ScalarFormatter())
        bits.yaxis.set_minor_formatter(NullFormatter())
        for ax, quantity in ((bits, "bits/dim"), (distance, "Frechet distance, judge's image space")):
            ax.set(xscale="log", xticks=config.steps, xticklabels=config.steps)
            ax.minorticks_off()
            finish(ax, 10, xlabel="steps", ylabel=quantity)
