"""What each form of guidance achieves: Frechet distance and diversity against CLIP score, over scales.

    python -m training.evaluate frontier --model models/emoji --clip_guidance_model runs/clip-words/clip \\
        --output frontier.png --json frontier.json

GLIDE (Nichol 2022, figure 6) shows such curves for two forms. The judge is a CLIP that guided nothing,
because CLIP guidance raises the guiding CLIP's own score whatever the pictures look like.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipelines import DDPMScheduler, TextToImagePipeline
from pipelines.components.guidance_clip import GuidanceCLIP
from training.data.arrays import content_key, memory_map, model_key
from training.evaluation.figures import chart, finish
from training.evaluation.judge import Judge
from training.evaluation.metrics import clip_score, frechet_distance
from training.evaluation.samples import call, pipeline_key, read_pictures, two_halves, with_guides
from training.evaluation.settings import GuidesSettings, JudgedSettings, PassSettings, SplitSettings, at_least
from training.run.settings import Rule, require, setting

# form -> the component that it needs
FORMS = {
    "classifier_free": "unet", "thresholded": "unet", "noised_clip": "noisy_clip",
    "clean_clip": "clip_guidance_model", "classifier": "noisy_classifier",
}  # fmt: skip


SCALES = Rule(lambda scales: all(scale >= 0 for scale in scales), "scales of 0 or more")


class FrontierConfig(JudgedSettings, GuidesSettings, PassSettings, SplitSettings):
    """Settings of `training.evaluate frontier`."""

    clip_guidance_model: str = setting(
        "The clean CLIP that guides, not the judge; the model's own if empty.", ""
    )
    classifier_free: list[float] = setting("Scales.", [1.0, 1.5, 2.0, 3.0, 5.0, 8.0], SCALES)
    thresholded: list[float] = setting(
        "Scales of classifier-free guidance with Imagen's dynamic thresholding.", [3.0, 5.0, 8.0], SCALES
    )
    noised_clip: list[float] = setting("Scales.", [0.5, 1.0, 2.0, 4.0, 8.0], SCALES)
    clean_clip: list[float] = setting("Scales.", [0.5, 1.0, 2.0, 4.0, 8.0], SCALES)
    classifier: list[float] = setting("Scales.", [1.0, 2.0, 4.0, 8.0, 16.0], SCALES)
    forms: list[str] = setting(
        f"Some of {', '.join(FORMS)}; by default all whose models are available.",
        [],
        Rule(lambda forms: set(forms) <= set(FORMS), f"some of {', '.join(FORMS)}"),
    )
    label_column: str = setting("Column of the classifier's classes.", "group")
    split: str = "train"
    num_captions: int = setting("Captions drawn at random.", 250, at_least(2))
    per_caption: int = setting("Pictures of each, whose spread is the diversity.", 4, at_least(2))
    num_inference_steps: int = 25
    batch_size: int = 24
    output: str = setting("PNG of the curves.", "")


def diversity(embeds: Tensor) -> float:
    """Mean of 1 - cos over all pairs of pictures of the same caption, from l2-normalised (captions, n, D).

    It is 0 if every seed gives the same picture. With S = |sum of n unit vectors|^2, the mean cosine of the
    pairs is (S - n) / (n (n - 1)).
    """
    n = embeds.shape[1]
    total = embeds.double().sum(1).square().sum(-1)  # (captions,)
    return float(1 - ((total - n) / (n * (n - 1))).mean())


def forms_of(config: FrontierConfig, pipe: TextToImagePipeline) -> list[str]:
    """The requested forms of guidance, or by default all that the pipeline has the model for. Raises
    ValueError if a requested form lacks its model."""
    there = [form for form, part in FORMS.items() if getattr(pipe, part) is not None]
    for form in config.forms:
        require(form in there, "forms", form, f"a form whose model is there: it needs {FORMS[form]}")
    return config.forms or there


def call_of(form: str, scale: float) -> dict[str, Any]:
    """The arguments of a pipeline call, except labels. Guidance by another network is used alone, without
    classifier-free guidance."""
    if form in ("classifier_free", "thresholded"):
        return {"guidance_scale": scale}
    if form == "classifier":
        return {"guidance_scale": 1.0, "classifier_guidance_scale": scale}
    kind = "noised" if form == "noised_clip" else "clean"
    return {"guidance_scale": 1.0, "clip_guidance_scale": scale, "clip_guidance": kind}


def embed_drawn(
    config: FrontierConfig,
    pipe: TextToImagePipeline,
    judge: Judge,
    form: str,
    scale: float,
    captions: list[str],
    labels: list[str],
    bar: tqdm,
) -> Tensor:
    """(N, D): the judge's embeddings of one picture for each caption, with consecutive seeds. They are kept
    in cache_dir under a digest of everything that they depend on, including the guiding component, so a
    stopped run continues with the next scale."""
    guided, part = call_of(form, scale), FORMS[form]
    by_class = form == "classifier" and scale > 0
    keys = [model_key(judge.model), *([] if part == "unet" else [model_key(getattr(pipe, part))])]
    settings = f"{config.num_inference_steps} {config.seed} {sorted(guided.items())}"
    key = content_key(pipeline_key(pipe), *keys, settings, *captions, *(labels if by_class else []))
    width = judge.model.config.projection_dim

    def fill(target: np.ndarray) -> None:
        for start in range(0, len(captions), config.batch_size):
            rows = slice(start, start + config.batch_size)
            seeds = range(config.seed + start, config.seed + start + len(captions[rows]))
            own = {"class_labels": labels[rows]} if by_class else {}
            steps = config.num_inference_steps
            drawn = call(pipe, seeds, prompt=captions[rows], num_inference_steps=steps, **guided, **own)
            target[rows] = judge.embed_images(drawn.cpu()).numpy()
            bar.update(len(seeds))

    path = Path(config.cache_dir) / f"frontier-{key}.npy"
    if path.is_file():
        bar.update(len(captions))
    array = memory_map(path, (len(captions), width), np.dtype(np.float32), fill)
    return torch.from_numpy(np.array(array))


def load_guided(config: FrontierConfig, judge: Judge) -> TextToImagePipeline:
    """The pipeline with all its guides. Raises ValueError if the judge is one of them."""
    pipe = with_guides(config.model, config.noisy_clip, config.noisy_classifier)
    if config.clip_guidance_model:
        pipe.register_modules(clip_guidance_model=GuidanceCLIP.load(config.clip_guidance_model))
    guide = pipe.clip_guidance_model
    independent = guide is None or model_key(judge.model) != model_key(guide.model)
    require(independent, "judge", config.judge, "another CLIP than the one that guides")
    return pipe


def frontier(config: FrontierConfig) -> dict[str, Any]:
    """For each form and scale: the judge's CLIP score of the generated pictures for their captions, their
    Frechet distance in the judge's space from equally many real pictures of other rows, and their
    `diversity`."""
    judge = Judge(config.judge)
    pipe = load_guided(config, judge)
    forms, plain, several = forms_of(config, pipe), pipe.scheduler, config.per_caption
    thresholding = {"thresholding": True, "sample_max_value": 100.0, "clip_sample": False}
    thresholded = DDPMScheduler.from_config(plain.config, **thresholding)

    pictures = read_pictures(config, config.split, judge.image_size)
    chosen, others = two_halves(len(pictures), config.num_captions * several, config.seed)
    chosen = chosen[: config.num_captions]
    reference = judge.embed_images(pictures.images(others))
    classes = pictures.columns.get(config.label_column, [""] * len(pictures))
    captions = [pictures.columns["caption"][i] for i in chosen for _ in range(several)]
    labels = [classes[i] for i in chosen for _ in range(several)]
    text = judge.embed_texts(captions)
    real = judge.embed_images(pictures.images(chosen))
    figures: dict[str, Any] = {
        "captions": len(chosen),
        "pictures of each": several,
        "steps": config.num_inference_steps,
        "CLIP score of the captions' own pictures": float(clip_score(real, text[::several]).mean()),
    }
    count = sum(len(getattr(config, form)) for form in forms) * len(captions)
    with tqdm(total=count, desc="drawing", unit="picture", mininterval=5) as bar:
        for form in forms:
            pipe.scheduler = thresholded if form == "thresholded" else plain
            scales = getattr(config, form)
            drawn = [embed_drawn(config, pipe, judge, form, scale, captions, labels, bar) for scale in scales]
            figures[form] = {
                "scale": scales,
                "CLIP score": [float(clip_score(embeds, text).mean()) for embeds in drawn],
                "Frechet distance": [frechet_distance(embeds, reference) for embeds in drawn],
                "diversity": [diversity(embeds.unflatten(0, (-1, several))) for embeds in drawn],
            }
    if config.output:
        draw_frontier(figures, config.output)
    return figures


def draw_frontier(figures: dict[str, Any], path: str) -> None:
    """Plot Frechet distance and diversity against CLIP score, side by side. Each form has a curve, with its
    scales written beside the points."""
    above: Any = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
    with chart(path, 11, 4.5, columns=2) as axes:
        for ax, quantity in zip(axes, ("Frechet distance", "diversity"), strict=True):
            for form, points in figures.items():
                if isinstance(points, dict):
                    x, y = points["CLIP score"], points[quantity]
                    ax.plot(x, y, marker="o", label=form.replace("_", " "))
                    for scale, *place in zip(points["scale"], x, y, strict=True):
                        ax.annotate(f"{scale:g}", place, **above)
            finish(ax, xlabel="CLIP score by a judge that guided nothing", ylabel=quantity)
        axes[0].legend(fontsize=8)
