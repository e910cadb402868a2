"""Pictures drawn for many captions, a seed each; with a folder, none is drawn twice."""

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
    """A split of the data set, decoded once, (3, side, side) each; its captions are in `column`."""
    return cache_pictures(load_pictures(config.dataset, split), side, config.cache_dir, "image", column)


def first_captions(pictures: PictureCache, rows: list[int]) -> list[str]:
    """The canonical caption of each of these pictures."""
    return [pictures.captions[pictures.choices[row][0]] for row in rows]


def random_rows(total: int, count: int, seed: int) -> list[int]:
    """`count` different numbers of 0 .. total - 1 at random; all, if there are fewer."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def load_pipeline_as(kind: type[Pipeline], name: str, argument: str = "model") -> Pipeline:
    """A pipeline that shows no progress bar.

    Raises:
        ValueError: there is none to load; the message names the argument.
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
    """The pipeline with the guides in these folders, where given; else its own, or those in the folder
    MODEL-guidance beside it."""
    pipe = load_pipeline(model)
    if pipe.noisy_clip is None or pipe.noisy_classifier is None:
        load_guides(pipe, model)
    if noisy_clip:
        pipe.register_modules(noisy_clip=NoisyCLIP.from_pretrained(noisy_clip))
    if noisy_classifier:
        pipe.register_modules(noisy_classifier=NoisyClassifier.from_pretrained(noisy_classifier))
    return pipe


def pipeline_key(pipe: TextToImagePipeline) -> str:
    """A digest of the weights and configs of U-Net, text encoder and VAE, and of the scheduler's config."""
    models = (pipe.unet, pipe.text_encoder, pipe.vae)
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if key[0] != "_"}
    return content_key(
        *(model_key(model) for model in models if model is not None),
        type(pipe.scheduler).__name__ + json.dumps(scheduler, sort_keys=True, default=str),
    )


def own_steps(pipe: DiffusionPipeline, num_inference_steps: int | None) -> int:
    """The pipeline's own number of steps where None is given."""
    return pipe.config["default_num_inference_steps"] if num_inference_steps is None else num_inference_steps


def own_guidance(
    pipe: TextToImagePipeline, guidance_scale: float | None, clip_guidance_scale: float | None
) -> tuple[float, float]:
    """Both scales with the pipeline's defaults at its own size filled in; see `guidance_defaults`."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    scale, clip_scale = pipe.guidance_defaults(guidance_scale, clip_guidance_scale, (side, side))
    return float(scale), float(clip_scale)


def call(pipe: Any, seeds: Iterable[int], **arguments: Any) -> Tensor:
    """(N, 3, H, W) in [-1, 1]: what pipe(**arguments) draws, each picture with a seed of its own."""
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
    """(N, 3, H, W) in [-1, 1]; picture i has the seed seed + i, whatever the batch.

    Args:
        num_inference_steps, guidance_scale: None: the model's own.
        clip_guidance_scale: by the noised CLIP. None: the model's own, or 0 if guidance_scale is given.
        folder: each picture is kept here as a PNG, so all are rounded to 256 levels. Its name is a digest of
            the model, the caption's tokens, the seed and the settings, so a run that was stopped, or wants
            more pictures, draws only the missing ones.
        label: of the progress bar.
        class_labels, classifier_guidance_scale: a class for each caption, and the scale of guidance towards
            it by the pipeline's noised classifier; 0 is off.
        num_candidates: pictures drawn for each caption, of which the best is kept. The first has the seed
            seed + i, each further one 2^24 more (torch's CPU generator reads 32 bits of it); `batch_size`
            counts all of them.
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
    """`count` random numbers of 0 .. total - 1, and as many others; at most half of them in each."""
    order, count = random_rows(total, total, seed), min(count, total // 2)
    return order[:count], order[count : 2 * count]


def fewest_matches(labels: list[str]) -> int:
    """By how many places to move all labels on, so that the fewest stay what they were."""

    def matches(k: int) -> int:
        return sum(a == b for a, b in zip(labels, labels[k:] + labels[:k], strict=True))

    return min(range(1, len(labels)), key=matches)
