"""Drawing pictures for many captions, each with its own seed; with a folder, none is drawn twice."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipelines import TextToImagePipeline
from pipelines.components.noisy_classifier import NoisyClassifier
from pipelines.components.noisy_clip import NoisyCLIP
from pipelines.drawing.images import save_png, to_pil, to_tensor
from pipelines.family import load_guides
from training.data.arrays import content_key, model_key
from training.data.pictures import PictureCache, cache_pictures, load_pictures
from training.run.settings import DataSettings

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def read_pictures(config: DataSettings, split: str, side: int, column: str = "caption") -> PictureCache:
    """A split of the data set: pictures (3, side, side), decoded once, and captions from `column`."""
    return cache_pictures(load_pictures(config.dataset, split), side, config.cache_dir, "image", column)


def first_captions(pictures: PictureCache, rows: list[int]) -> list[str]:
    """The canonical caption of each of these pictures."""
    return [pictures.captions[pictures.choices[row][0]] for row in rows]


def random_rows(total: int, count: int, seed: int) -> list[int]:
    """`count` distinct random numbers from 0 .. total - 1, or all of them if there are fewer."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def load_pipeline_as(kind: type[Pipeline], name: str, argument: str = "model") -> Pipeline:
    """Load a pipeline and turn its progress bar off.

    Raises:
        ValueError: there is no such pipeline; the message names the argument.
    """
    try:
        pipe = kind.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"{argument} {name!r}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(name: str) -> TextToImagePipeline:
    return load_pipeline_as(TextToImagePipeline, name)


def with_guides(model: str, noisy_clip: str = "", noisy_classifier: str = "") -> TextToImagePipeline:
    """The pipeline with guides from the given folders; by default its own guides, or those in the folder
    MODEL-guidance next to it."""
    pipe = load_pipeline(model)
    if pipe.noisy_clip is None or pipe.noisy_classifier is None:
        load_guides(pipe, model)
    if noisy_clip:
        pipe.register_modules(noisy_clip=NoisyCLIP.from_pretrained(noisy_clip))
    if noisy_classifier:
        pipe.register_modules(noisy_classifier=NoisyClassifier.from_pretrained(noisy_classifier))
    return pipe


def pipeline_key(pipe: TextToImagePipeline) -> str:
    """A digest of the U-Net, text encoder and VAE (weights and configs) and the scheduler's config."""
    models = (pipe.unet, pipe.text_encoder, pipe.vae)
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if key[0] != "_"}
    return content_key(
        *(model_key(model) for model in models if model is not None),
        type(pipe.scheduler).__name__ + json.dumps(scheduler, sort_keys=True, default=str),
    )


def own_steps(pipe: DiffusionPipeline, num_inference_steps: int | None) -> int:
    """The given number of steps; if it is None, the pipeline's own."""
    return pipe.config["default_num_inference_steps"] if num_inference_steps is None else num_inference_steps


def own_guidance(
    pipe: TextToImagePipeline, guidance_scale: float | None, clip_guidance_scale: float | None
) -> tuple[float, float]:
    """Both scales; None becomes the pipeline's default at its own size (see `guidance_defaults`)."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    scale, clip_scale = pipe.guidance_defaults(guidance_scale, clip_guidance_scale, (side, side))
    return float(scale), float(clip_scale)


def call(pipe: Any, seeds: Iterable[int], **arguments: Any) -> Tensor:
    """(N, 3, H, W) in [-1, 1]: the pictures that pipe(**arguments) draws, each with its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(**arguments, generator=generators, output_type="pt").images * 2 - 1


def draw(
    pipe: TextToImagePipeline,
    captions: list[str],
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 25,
    folder: str | Path | None = None,
    label: str = "drawing",
    clip_guidance_scale: float | None = None,
    class_labels: list[str] | None = None,
    classifier_guidance_scale: float = 0.0,
    num_candidates: int = 1,
) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] for the captions. Picture i has the seed seed + i, whatever the batch
    size.

    Args:
        num_inference_steps, guidance_scale: None for the model's own.
        clip_guidance_scale: the scale of guidance by the noised CLIP; None for the model's own, or 0 if
            guidance_scale is given.
        folder: where each picture is kept as a PNG, so that all pictures are rounded to 256 levels. The
            file's name is a digest of the model, the caption's tokens, the seed and the settings, so a run
            that was stopped or that needs more pictures draws only the missing ones.
        label: the progress bar's label.
        class_labels, classifier_guidance_scale: a class for each caption, and the scale of guidance towards
            it by the pipeline's noised classifier; 0 turns it off.
        num_candidates: how many pictures are drawn for each caption; the best is kept. The first has the seed
            seed + i, and each further one a seed larger by 2^24 (torch's CPU generator reads 32 bits of it).
            `batch_size` counts all candidates.
    """
    steps = own_steps(pipe, num_inference_steps)
    scale, clip_guidance_scale = own_guidance(pipe, guidance_scale, clip_guidance_scale)
    paths: list[Path] = []
    if folder is not None:
        key, ids = pipeline_key(pipe), pipe.tokenizer(captions, verbose=False).input_ids
        guided = f" {clip_guidance_scale} {model_key(pipe.noisy_clip)}" if clip_guidance_scale > 0 else ""
        settings = [f"{steps} {scale}{guided}"] * len(captions)
        if classifier_guidance_scale > 0 and class_labels is not None:
            classifier = f" {classifier_guidance_scale} {model_key(pipe.noisy_classifier)}"
            settings = [f"{own}{classifier} {one}" for own, one in zip(settings, class_labels, strict=True)]
        best = f" best of {num_candidates}" if num_candidates > 1 else ""
        for i, (tokens, own) in enumerate(zip(ids, settings, strict=True), start=seed):
            paths.append(Path(folder, content_key(key, f"{tokens} {i} {own}{best}") + ".png"))
    missing = [i for i in range(len(captions)) if not paths or not paths[i].is_file()]
    parts: list[Tensor] = []
    shared = {
        "num_inference_steps": steps, "guidance_scale": scale, "clip_guidance_scale": clip_guidance_scale,
        "classifier_guidance_scale": classifier_guidance_scale, "num_candidates": num_candidates,
    }  # fmt: skip
    with tqdm(total=len(captions), initial=len(captions) - len(missing), desc=label, unit="picture") as bar:
        at_once = max(1, batch_size // num_candidates)
        for start in range(0, len(missing), at_once):
            batch = missing[start : start + at_once]
            seeds = [seed + i + j * 2**24 for i in batch for j in range(num_candidates)]
            classes = None if class_labels is None else [class_labels[i] for i in batch]
            parts.append(
                call(pipe, seeds, prompt=[captions[i] for i in batch], class_labels=classes, **shared)
            )
            for i, image in zip(batch, to_pil(parts[-1]), strict=True):
                if paths:
                    save_png(image, paths[i])
            bar.update(len(batch))
    return torch.cat([to_tensor(Image.open(path)) for path in paths] if paths else parts)


def two_halves(total: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Two disjoint random sets of `count` numbers from 0 .. total - 1; half of them each if too few."""
    order, count = random_rows(total, total, seed), min(count, total // 2)
    return order[:count], order[count : 2 * count]


def fewest_matches(labels: list[str]) -> int:
    """The number of places by which to shift all labels so that the fewest stay the same."""

    def matches(k: int) -> int:
        return sum(a == b for a, b in zip(labels, labels[k:] + labels[:k], strict=True))

    return min(range(1, len(labels)), key=matches)
