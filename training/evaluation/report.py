"""A full report on a model in one command: report.json, and a page with pictures.

    python -m training.evaluate report --model models/emoji --output report

Pictures are drawn once and used for every figure: for captions of training pictures, and of compositions and
concepts that training never saw. They are kept in OUTPUT/samples, so a stopped report can be continued.
"""

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipelines import TextToImagePipeline
from pipelines.chain.equations import LEARNED_VARIANCES
from pipelines.folders.files import read_json, write_file
from training.data.arrays import model_key
from training.data.caches import LiveText, cache_latents
from training.data.pictures import PictureCache
from training.evaluation import metrics, samples
from training.evaluation.inception import find_weights, inception_figures
from training.evaluation.judge import Concepts, Judge, embed_concepts, embed_pictures
from training.evaluation.report_page import page
from training.evaluation.report_parts import NEAR, SPLITS, Part
from training.evaluation.samples import read_pictures
from training.evaluation.settings import GuidanceSettings, JudgedSettings, SeededSettings, at_least
from training.objectives.denoising import BUCKETS, DenoisingLoss, DenoisingSettings, validation_loss
from training.run.settings import require, setting

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
NOISE_DRAWS = 4  # noise draws for the validation loss, which give its standard error


class ReportConfig(JudgedSettings, GuidanceSettings, SeededSettings):
    """Settings of `training.evaluate report`."""

    output: str = setting("Folder of the report and its pictures.", "report")
    num_pictures: int = setting(
        "Pictures drawn for training captions, and real ones in either half; 6 or more.", 500, at_least(6)
    )
    num_held_out: int = setting("Pictures drawn for each held-out split, at most.", 200, at_least(2))
    num_validation: int = setting(
        "Pictures of each split for the loss, some used twice if it has fewer.", 256, at_least(40)
    )
    replicates: int = setting("Bootstrap replicates of each interval.", 200, at_least(20))
    num_shown: int = setting("Pictures of each split on the page.", 60, at_least(1))
    inception_weights: str = setting("Inception's weights for FID and IS; else torch's hub cache.", "")

    def check(self) -> None:
        """Raise a ValueError that names the argument for any error that can be found before work starts."""
        super().check()
        find_weights(self.inception_weights)
        try:
            Path(self.output, "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output must be a folder to write to, got {self.output!r}: {error}") from error


# ------------------------------------------------------------ the pictures


def read_parts(
    config: ReportConfig, judge: Judge, pipe: TextToImagePipeline
) -> tuple[dict[str, Part], list[int]]:
    """(the three splits by name, the rows of half A of the training pictures). Of the training split, the
    captions of half B are drawn."""
    side = pipe.unet.config.sample_size
    require(isinstance(side, int), "model", config.model, "a pipeline of square pictures")
    parts: dict[str, Part] = {}
    reference: list[int] = []
    for name, split in SPLITS.items():
        pictures = read_pictures(config, split, side * pipe.vae_scale_factor)
        embeds = embed_pictures(judge, pictures, config.cache_dir)
        if split == "train":
            require(len(pictures) >= 12, "dataset", config.dataset, "of at least 12 training pictures")
            reference, numbers = samples.two_halves(len(pictures), config.num_pictures, config.seed)
        else:
            numbers = samples.random_rows(len(pictures), config.num_held_out, config.seed)
        parts[name] = Part(pictures, embeds, numbers)
    return parts, reference


# ------------------------------------------------------------ the figures


def estimate(
    config: ReportConfig, statistic: Callable[..., float], *samples: Tensor
) -> dict[str, float | list[float]]:
    """A figure with its 95 % bootstrap interval."""
    interval = metrics.bootstrap_interval(statistic, *samples, replicates=config.replicates, seed=config.seed)
    return {"value": statistic(*samples), "interval": list(interval)}


def against_captions(config: ReportConfig, judge: Judge, concepts: Concepts, part: Part) -> dict[str, Any]:
    """Retrieval among all concepts, and CLIP score, for the generated pictures, for the real pictures of the
    same captions, and for the generated pictures with their captions shuffled."""
    texts = judge.embed_texts(part.captions)
    columns = {
        "generated": part.drawn_embeds,
        "real": part.embeds[part.numbers],
        "shuffled": part.drawn_embeds.roll(-samples.fewest_matches(part.concepts), dims=0),
    }
    figures: dict[str, Any] = {"pictures": len(part.numbers), "concepts": len(set(part.concepts))}
    for column, embeds in columns.items():
        ranks = part.ranks[column] = concepts.rank(embeds, part.concepts)
        figures[column] = {
            f"R@{k}": estimate(config, lambda r, k=k: metrics.recall_at(r, k), ranks) for k in (1, 5)
        }
        scores = metrics.clip_score(embeds, texts)
        figures[column]["CLIP score"] = estimate(config, lambda s: float(s.mean()), scores)
    return figures


def distribution(config: ReportConfig, reference: Tensor, columns: dict[str, Tensor]) -> dict[str, Any]:
    """Distances of pictures from half A in the judge's image space; all are (N, D) with the same N."""
    figures: dict[str, Any] = {"pictures": len(reference)}
    scale = reference.shape[1] ** 0.5  # scales unit vectors to the size that KID's kernel expects
    for column, embeds in tqdm(columns.items(), desc="bootstrap of the distances", unit="column"):
        figures[column] = {
            "Frechet distance": estimate(config, metrics.frechet_distance, embeds, reference),
            "KID": estimate(config, metrics.kernel_distance, scale * embeds, scale * reference),
        }
        for names, measure in (
            (("precision", "recall"), metrics.precision_recall),
            (("density", "coverage"), metrics.density_coverage),
        ):
            for name, value in zip(names, measure(reference, embeds), strict=True):
                figures[column][name] = {"value": value}
    return figures


def losses(config: ReportConfig, pipe: TextToImagePipeline, parts: dict[str, Part]) -> dict[str, Any]:
    """The unweighted loss in each bucket of timesteps, with its standard error over draws of the noise."""
    learned = pipe.scheduler.config.get("variance_type") in LEARNED_VARIANCES
    settings = DenoisingSettings(loss="hybrid" if learned else "simple", snr_gamma=None)
    loss = DenoisingLoss(settings, pipe, pipe.unet, None, LiveText(pipe.tokenizer, pipe.text_encoder))
    total = loss.scheduler.config.num_train_timesteps
    edges = [-(-total * i // BUCKETS) for i in range(BUCKETS + 1)]
    figures: dict[str, Any] = {
        "target": pipe.scheduler.config.prediction_type,
        "loss": settings.loss,
        "draws of the noise": NOISE_DRAWS,
        "timesteps": [f"{low} .. {high - 1}" for low, high in zip(edges, edges[1:], strict=False)],
    }
    bar = tqdm(total=len(parts) * NOISE_DRAWS, desc="validation loss", unit="draw")
    for name, part in parts.items():
        order = samples.random_rows(len(part.pictures), len(part.pictures), config.seed)
        chosen = [order[i % len(order)] for i in range(config.num_validation)]  # so that no bucket is empty
        pictures: Any = picked(part.pictures, chosen)
        if pipe.vae is not None:
            pictures = cache_latents(pictures, pipe.vae, config.cache_dir)
        values = []
        for draw_number in range(NOISE_DRAWS):
            values.append(validation_loss(loss, pictures, config.seed + draw_number, len(chosen)))
            bar.update()
        drawn = torch.tensor(values, dtype=torch.float64)  # (draws, buckets)
        figures[name] = {
            "pictures": len(set(chosen)),
            "mean": drawn.mean(0).tolist(),
            "standard error": (drawn.std(0) / NOISE_DRAWS**0.5).tolist(),
        }
    bar.close()
    return figures


def picked(pictures: PictureCache, numbers: list[int]) -> PictureCache:
    """Some of the pictures as a cache of their own."""
    rows = np.array(numbers) if pictures.rows is None else pictures.rows[numbers]
    choices = [pictures.choices[i] for i in numbers]
    return PictureCache(pictures.pixels, pictures.captions, choices, {}, rows, pictures.name)


def memorisation(parts: dict[str, Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Cosine distance to the nearest training picture, for generated pictures and for real ones that training
    never saw (for training pictures, to the nearest other one).

    The pictures of a model that copies are nearer to its training pictures than unseen real pictures of the
    same kind are.
    """
    train = parts["seen captions"]
    distances = {}
    for name, part in parts.items():
        part.neighbours = metrics.nearest_neighbours(part.drawn_embeds, train.embeds)
        distances[f"generated, {name}"] = part.neighbours[0]
        own = torch.tensor(part.numbers)
        if part is train:
            distances["real, training"] = metrics.nearest_neighbours(train.embeds[own], train.embeds, own)[0]
        else:
            distances[f"real, {name}"] = metrics.nearest_neighbours(part.embeds, train.embeds)[0]
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    figures: dict[str, Any] = {"quantiles": list(QUANTILES)}
    unseen = distances["real, held-out concepts"].double().quantile(0.05)
    for name, values in distances.items():
        figures[name] = {
            "pictures": len(values),
            "distances": values.double().quantile(levels).tolist(),
            NEAR: float((values < unseen).double().mean()),
        }
    for name, part in parts.items():
        copies = train.pictures.images(part.neighbours[1])
        errors = 127.5 * (part.drawn - copies).square().flatten(1).mean(1).sqrt()  # of 0 .. 255
        figures[f"generated, {name}"]["smallest RMSE to that picture, of 255 levels"] = float(errors.min())
    return figures, distances


# ------------------------------------------------------------ all of it


def describe_data(config: ReportConfig, parts: dict[str, Part]) -> dict[str, Any]:
    """Where the pictures come from, as far as the data set records it."""
    train = parts["seen captions"].pictures
    figures: dict[str, Any] = {
        "name": config.dataset,
        "pictures": {split: len(parts[name].pictures) for name, split in SPLITS.items()},
        "training concepts": len(set(train.columns["concept"])),
    }
    for column in ("licence", "style"):
        if column in train.columns:
            figures[f"training pictures by {column}"] = dict(Counter(train.columns[column]).most_common())
    summary = Path(config.dataset, "splits.json")
    if summary.is_file():
        figures["packages"] = read_json(summary)["packages"]
    return figures


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Record in `seconds` how long the block took."""
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 1)


def draw_parts(
    config: ReportConfig, pipe: TextToImagePipeline, judge: Judge, parts: dict[str, Part]
) -> dict[str, Any]:
    """Draw the pictures that are not in OUTPUT/samples yet; return the settings that they were drawn with."""
    for name, part in parts.items():
        kept: Any = {"folder": Path(config.output, "samples"), "label": f"drawing {name}"}
        part.drawn = samples.draw(pipe, part.captions, config.seed, **config.drawing(), **kept)
        part.drawn_embeds = judge.embed_images(part.drawn)
    eta = pipe.scheduler.config.get("eta", 1.0)
    scale, clip_scale = samples.own_guidance(pipe, config.guidance_scale, config.clip_guidance_scale)
    return {
        "steps": samples.own_steps(pipe, config.num_inference_steps),
        "guidance scale": scale,
        "CLIP guidance scale": clip_scale,
        "scheduler": type(pipe.scheduler).__name__ + (f" with eta {eta:g}" if eta < 1 else ""),
        "seeds": f"{config.seed} on, one for each picture of a split",
        "drawn": sum(len(part.numbers) for part in parts.values()),
    }


def count_parameters(pipe: TextToImagePipeline, drawing: dict[str, Any]) -> int:
    """The number of parameters of all networks used for drawing."""
    idle = {"noisy_classifier"} | (set() if drawing["CLIP guidance scale"] > 0 else {"noisy_clip"})
    networks = [part for name, part in pipe.components.items() if name not in idle]
    return sum(p.numel() for one in networks if isinstance(one, torch.nn.Module) for p in one.parameters())


def report(config: ReportConfig) -> dict[str, Any]:
    """Measure the model, write report.json and index.html to `output`, and return the figures."""
    seconds: dict[str, float] = {}
    judge, pipe = Judge(config.judge), samples.with_guides(config.model)
    with timed(seconds, "reading and embedding real pictures"):
        concepts = embed_concepts(judge, config.dataset)
        parts, reference = read_parts(config, judge, pipe)
    folder = Path(config.output)
    there = set(folder.glob("samples/*.png"))
    with timed(seconds, "drawing"):
        drawing = draw_parts(config, pipe, judge, parts)
    drawn_now = len(set(folder.glob("samples/*.png")) - there)
    train = parts["seen captions"]
    with timed(seconds, "retrieval and CLIP score"):
        retrieval = {name: against_captions(config, judge, concepts, part) for name, part in parts.items()}
    with timed(seconds, "distances between distributions"):
        columns = {"generated": train.drawn_embeds, "real": train.embeds[train.numbers]}
        distances = distribution(config, train.embeds[reference], columns)
    with timed(seconds, "validation loss"):
        validation = losses(config, pipe, parts)
    with timed(seconds, "nearest neighbours"):
        neighbours, nearest = memorisation(parts)
    with timed(seconds, "Inception"):
        real = train.pictures.images(reference)
        inception = inception_figures(find_weights(config.inception_weights), train.drawn, real)
    computed = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    figures = {
        "model": config.model,
        "model key": samples.pipeline_key(pipe),
        "parameters": count_parameters(pipe, drawing),
        "judge": config.judge,
        "judge key": model_key(judge.model)[:16],
        "concepts": len(concepts.ids),
        "seed": config.seed,
        "data": describe_data(config, parts),
        "drawing": drawing,
        "against captions": retrieval,
        "against half of the training pictures": distances,
        "validation loss": validation,
        "nearest training pictures": neighbours,
        "Inception": inception,
        "bootstrap replicates": config.replicates,
        "seconds": seconds | {"of these, pictures drawn anew": drawn_now},
        "computed with": computed | {"python": platform.python_version()},
    }
    # report.json first, so that the figures are kept even if the page cannot be drawn
    write_file(folder / "report.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    write_file(folder / "index.html", page(figures, parts, nearest, folder, config.num_shown))
    return figures
