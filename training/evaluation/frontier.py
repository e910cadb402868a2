"""What each form of guidance buys: Frechet distance and diversity against CLIP score, over scales.

    python -m training.evaluate frontier --model models/emoji --clip_guidance_model runs/clip-words/clip \\
        --output frontier.png --json frontier.json

GLIDE (Nichol 2022, figure 6) draws such curves for two forms. The judge is a CLIP that guided nothing: CLIP
guidance raises the score of the CLIP that guides whatever the pictures look like.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipelines import DDPMScheduler, TextToImagePipeline
from pipelines.components.guidance_clip import GuidanceCLIP
from training.data.caches import content_key, memory_map, model_key
from training.data.pictures import PictureCache, cache_pictures, load_pictures
from training.evaluation.bits_per_dim import new_figure, save_figure
from training.evaluation.judge import Judge
from training.evaluation.metrics import clip_score, frechet_distance
from training.evaluation.samples import pipeline_key, two_halves, with_guides
from training.evaluation.settings import OWN
from training.run.settings import require

# form -> the component that it needs
FORMS = {
    "classifier_free": "unet",
    "thresholded": "unet",
    "noised_clip": "noisy_clip",
    "clean_clip": "clip_guidance_model",
    "classifier": "noisy_classifier",
}


@dataclass
class FrontierConfig:
    """Settings of `training.evaluate frontier`."""

    model: str = field(default="models/emoji", metadata={"help": "The pipeline to measure."})
    noisy_clip: str = field(default="", metadata={"help": "Folder of a NoisyCLIP; " + OWN})
    noisy_classifier: str = field(default="", metadata={"help": "Folder of a NoisyClassifier; " + OWN})
    clip_guidance_model: str = field(
        default="", metadata={"help": "The clean CLIP that guides, not the judge; the model's own if empty."}
    )
    judge: str = field(default="models/judge", metadata={"help": "The CLIP that scores."})
    classifier_free: list[float] = field(
        default_factory=lambda: [1.0, 1.5, 2.0, 3.0, 5.0, 8.0], metadata={"help": "Scales."}
    )
    thresholded: list[float] = field(
        default_factory=lambda: [3.0, 5.0, 8.0],
        metadata={"help": "Scales of classifier-free guidance with Imagen's dynamic thresholding."},
    )
    noised_clip: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 2.0, 4.0, 8.0], metadata={"help": "Scales."}
    )
    clean_clip: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 2.0, 4.0, 8.0], metadata={"help": "Scales."}
    )
    classifier: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 4.0, 8.0, 16.0], metadata={"help": "Scales."}
    )
    forms: list[str] = field(
        default_factory=list,
        metadata={"help": f"Some of {', '.join(FORMS)}; by default all whose models there are."},
    )
    label_column: str = field(default="group", metadata={"help": "Column of the classifier's classes."})
    dataset: str = field(default="data/emoji", metadata={"help": "Data set that training.emoji built."})
    split: str = field(default="train", metadata={"help": "Split of the captions and the real pictures."})
    cache_dir: str = field(
        default="data/cache", metadata={"help": "Decoded pictures; embeddings of drawn ones."}
    )
    num_captions: int = field(default=250, metadata={"help": "Captions drawn at random."})
    per_caption: int = field(default=4, metadata={"help": "Pictures of each, whose spread is the diversity."})
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps."})
    batch_size: int = field(default=24, metadata={"help": "Pictures drawn at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the captions and of the first picture."})
    output: str = field(default="", metadata={"help": "PNG of the curves."})
    json: str = field(default="", metadata={"help": "File for the figures."})

    def check(self) -> None:
        """Raise a ValueError that names the argument, for everything that can be told before work starts."""
        for name, least in (
            ("num_captions", 2),
            ("per_caption", 2),
            ("num_inference_steps", 1),
            ("batch_size", 1),
        ):
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        for name in FORMS:
            scales = getattr(self, name)
            require(all(scale >= 0 for scale in scales), name, scales, "scales of 0 or more")
        require(set(self.forms) <= set(FORMS), "forms", self.forms, f"some of {', '.join(FORMS)}")


def diversity(embeds: Tensor) -> float:
    """Mean of 1 - cos over all pairs of pictures of one caption; (captions, n, D) l2-normalised.

    0 where every seed gives the same picture. With S = |sum of n unit vectors|^2 the mean cosine of the pairs
    is (S - n) / (n (n - 1)).
    """
    n = embeds.shape[1]
    total = embeds.double().sum(1).square().sum(-1)  # (captions,)
    return float(1 - ((total - n) / (n * (n - 1))).mean())


def forms_of(config: FrontierConfig, pipe: TextToImagePipeline) -> list[str]:
    """Those asked for, or all that can be. ValueError for one whose model the pipeline has not."""
    for form in config.forms:
        part = FORMS[form]
        require(
            getattr(pipe, part) is not None, "forms", form, f"a form whose model is there: it needs {part}"
        )
    return config.forms or [form for form, part in FORMS.items() if getattr(pipe, part) is not None]


def call_of(form: str, scale: float) -> dict[str, Any]:
    """The arguments of a call, labels excepted. What climbs another network's score does so alone, without
    classifier-free guidance."""
    if form in ("classifier_free", "thresholded"):
        return {"guidance_scale": scale}
    if form == "classifier":
        return {"guidance_scale": 1.0, "classifier_guidance_scale": scale}
    kind = "noised" if form == "noised_clip" else "clean"
    return {"guidance_scale": 1.0, "clip_guidance_scale": scale, "clip_guidance": kind}


def embed_drawn(
    pipe: TextToImagePipeline,
    judge: Judge,
    captions: list[str],
    labels: list[str] | None,
    call: dict[str, Any],
    part: str,
    config: FrontierConfig,
    bar: Any,
) -> Tensor:
    """(N, D): the judge's embeddings of one picture for each caption, seeds in a row. Kept in cache_dir under
    a digest of all they depend on, `part` among it, the component that guides, so a stopped run goes on with
    the next scale."""
    keys = [model_key(judge.model), *([] if part == "unet" else [model_key(getattr(pipe, part))])]
    settings = f"{config.num_inference_steps} {config.seed} {sorted(call.items())}"
    key = content_key(pipeline_key(pipe), *keys, settings, *captions, *(labels or []))
    width = judge.model.config.projection_dim

    def fill(target: np.ndarray) -> None:
        for start in range(0, len(captions), config.batch_size):
            rows = slice(start, start + config.batch_size)
            seeds = range(config.seed + start, config.seed + start + len(captions[rows]))
            drawn: Any = pipe(
                captions[rows],
                num_inference_steps=config.num_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                **(call if labels is None else call | {"class_labels": labels[rows]}),
            )
            target[rows] = judge.embed_images(drawn.images.cpu() * 2 - 1).numpy()
            bar.update(len(seeds))

    path = Path(config.cache_dir) / f"frontier-{key}.npy"
    if path.is_file():
        bar.update(len(captions))
    array = memory_map(path, (len(captions), width), np.dtype(np.float32), fill)
    return torch.from_numpy(np.array(array))


def real_pictures(config: FrontierConfig, side: int) -> PictureCache:
    data = load_pictures(config.dataset, config.split)
    return cache_pictures(data, side, config.cache_dir, "image", "caption")


def frontier(config: FrontierConfig) -> dict[str, Any]:
    """For each form and scale: the judge's CLIP score of the drawn pictures with their captions, their
    Frechet distance from as many other real pictures in the judge's space, and `diversity`."""
    judge = Judge(config.judge)
    pipe = with_guides(config.model, config.noisy_clip, config.noisy_classifier)
    if config.clip_guidance_model:
        pipe.register_modules(clip_guidance_model=GuidanceCLIP.load(config.clip_guidance_model))
    pipe.set_progress_bar_config(disable=True)
    guide = pipe.clip_guidance_model
    independent = guide is None or model_key(judge.model) != model_key(guide.model)
    require(independent, "judge", config.judge, "another CLIP than the one that guides")
    forms = forms_of(config, pipe)
    plain = pipe.scheduler
    thresholding = {"thresholding": True, "sample_max_value": 100.0, "clip_sample": False}
    thresholded = DDPMScheduler.from_config(plain.config, **thresholding)

    pictures = real_pictures(config, judge.image_size)
    total = config.num_captions * config.per_caption
    chosen, others = two_halves(len(pictures), total, config.seed)
    chosen = chosen[: config.num_captions]
    reference = judge.embed_images(pictures.images(others))
    captions = [pictures.columns["caption"][i] for i in chosen for _ in range(config.per_caption)]
    labels = [pictures.columns.get(config.label_column, [""] * len(pictures))[i] for i in chosen]
    labels = [label for label in labels for _ in range(config.per_caption)]
    text = judge.embed_texts(captions)
    real = judge.embed_images(pictures.images(chosen))
    figures: dict[str, Any] = {
        "captions": len(chosen),
        "pictures of each": config.per_caption,
        "steps": config.num_inference_steps,
        "CLIP score of the captions' own pictures": float(
            clip_score(real, text[:: config.per_caption]).mean()
        ),
    }
    count = sum(len(getattr(config, form)) for form in forms) * len(captions)
    with tqdm(total=count, desc="drawing", unit="picture", mininterval=5) as bar:
        for form in forms:
            pipe.scheduler = thresholded if form == "thresholded" else plain
            points = []
            for scale in getattr(config, form):
                own = labels if form == "classifier" and scale > 0 else None
                embeds = embed_drawn(
                    pipe, judge, captions, own, call_of(form, scale), FORMS[form], config, bar
                )
                points.append(
                    {
                        "scale": scale,
                        "CLIP score": float(clip_score(embeds, text).mean()),
                        "Frechet distance": frechet_distance(embeds, reference),
                        "diversity": diversity(embeds.unflatten(0, (-1, config.per_caption))),
                    }
                )
            figures[form] = {name: [point[name] for point in points] for name in points[0]}
    if config.output:
        draw_frontier(figures, config.output)
    return figures


def draw_frontier(figures: dict[str, Any], path: str) -> None:
    """Two plots side by side, Frechet distance and diversity over CLIP score, a curve for each form, its
    scales written beside the points."""
    figure, axes = new_figure(11, 4.5, columns=2)
    for ax, quantity in zip(axes, ("Frechet distance", "diversity"), strict=True):
        for form, points in figures.items():
            if isinstance(points, dict):
                ax.plot(points["CLIP score"], points[quantity], marker="o", label=form.replace("_", " "))
                for x, y, scale in zip(points["CLIP score"], points[quantity], points["scale"], strict=True):
                    ax.annotate(f"{scale:g}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        ax.set(xlabel="CLIP score by a judge that guided nothing", ylabel=quantity)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save_figure(figure, path)
