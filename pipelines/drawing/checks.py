"""What `TextToImagePipeline.__call__` refuses before any work starts, but for the text, which `conditioning`
checks. Every check raises a ValueError that names the argument, its value and what is allowed."""

import math
from typing import Any

import numpy as np
import torch

CLIP_FORMS = ("noised", "clean")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check(name: str, value: Any, good: bool, rule: str) -> None:
    if not good:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def is_whole(value: Any, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and not math.isnan(value)
    )


def check_size(height: Any, width: Any, unit: int) -> None:
    for name, size in {"height": height, "width": width}.items():
        nearest = f"; the nearest is {max(1, round(size / unit)) * unit}" if is_number(size) else ""
        check(name, size, is_whole(size, 1) and size % unit == 0, f"a positive multiple of {unit}{nearest}")


def check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        check(name, count, is_whole(count, 1), "a whole number above 0")


def check_shares(**shares: Any) -> None:
    for name, share in shares.items():
        check(name, share, is_number(share) and 0 <= share <= 1, "in 0..1")


def check_guidance(guidance_scale: Any, guidance_interval: Any) -> None:
    good = is_number(guidance_scale) and 0 <= guidance_scale < math.inf
    check("guidance_scale", guidance_scale, good, "0 or more (1 or less is off)")
    if (interval := guidance_interval) is not None:
        pair = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(map(is_number, interval))
        rule = "noise levels (lo, hi), 0 <= lo < hi"
        check("guidance_interval", interval, pair and 0 <= interval[0] < interval[1], rule)


def check_guidance_models(
    given: Any, parts: dict[str, Any], text: Any, prompts: int, guided: bool, size: tuple[int, int]
) -> None:
    """The arguments of `guidance.GuidanceInputs`, and whether the models that they need are there.

    parts: the pipeline's components; text: its TextInputs, of so many prompts; guided: by classifier-free
    guidance; size: (height, width) of x_t.
    """
    words = text.prompt is not None
    pooled = words or text.pooled_prompt_embeds is not None
    for name in ("clip_guidance_scale", "classifier_guidance_scale"):
        value = getattr(given, name)
        check(name, value, is_number(value) and 0 <= value < math.inf, "0 (off) or more")
    check("clip_guidance", given.clip_guidance, given.clip_guidance in CLIP_FORMS, f"one of {CLIP_FORMS}")
    for name in ("clip_guidance_cut_outs", "num_candidates"):
        check(name, getattr(given, name), is_whole(getattr(given, name), 1), "a whole number above 0")
    clip, noised, classifier = map(parts.get, ("clip_guidance_model", "noisy_clip", "noisy_classifier"))
    scale, by_noised = given.clip_guidance_scale, given.clip_guidance == "noised"
    if scale > 0 and by_noised:
        check_part("clip_guidance_scale", scale, noised, "noisy_clip", "training.clip --noised")
        check("clip_guidance_scale", scale, pooled, "0 without `pooled_prompt_embeds`")
    elif scale > 0:
        check_part("clip_guidance", "clean", clip, "clip_guidance_model", "training.clip")
        check("clip_guidance", "clean", words, "'noised' without `prompt`, which the CLIP reads")

    scale, labels = given.classifier_guidance_scale, given.class_labels
    if scale > 0:
        check_part("classifier_guidance_scale", scale, classifier, "noisy_classifier", "training.classifier")
        names = list(parts["noisy_classifier"].config.labels)
        listed = labels if isinstance(labels, list) else [labels]
        known = all((is_whole(one, 0) and one < len(names)) or one in names for one in listed)
        rule = f"one of {names}, by name or number, or a list of {prompts}, one for each prompt"
        check("class_labels", labels, known and len(listed) in (1, prompts), rule)
    else:
        check("class_labels", labels, labels is None, "left out without classifier_guidance_scale above 0")

    if (further := given.combined_prompts) is not None:
        pairs = further.items() if isinstance(further, dict) and further else [(None, None)]
        good = all(isinstance(prompt, str) and is_number(weight) for prompt, weight in pairs)
        check("combined_prompts", further, good, "a dict of prompts and their weights")
        rule = "left out without `prompt` and guidance_scale above 1"
        check("combined_prompts", further, guided and words, rule)

    reranks = given.num_candidates > 1 and given.classifier_guidance_scale == 0  # else by what guides
    by_clip = clip is not None and words
    if reranks and not by_clip:
        models = "noisy_clip or clip_guidance_model"
        check_part(
            "num_candidates", given.num_candidates, noised if pooled else None, models, "training.clip"
        )
    if noised is not None and ((given.clip_guidance_scale > 0 and by_noised) or (reranks and not by_clip)):
        side, dim, tower = noised.config.sample_size, noised.config.projection_dim, parts["text_encoder"]
        check("height and width", size, size == (side, side), f"such that noisy_clip sees {side} x {side}")
        if tower is not None:
            width = (
                tower.config.projection_dim if hasattr(tower, "text_projection") else tower.config.hidden_size
            )
            rule = f"trained for this model, whose pooled text has {width} dimensions"
            check("noisy_clip", f"one of {dim} dimensions", dim == width, rule)


def check_part(name: str, value: Any, part: Any, wanted: str, recipe: str) -> None:
    """ValueError for an argument whose model the pipeline has not, with the ways to get one."""
    if part is None:
        shipped = "noisy" in wanted  # models/emoji-guidance, for models/emoji
        ways = "pipe.load_guides(folder) takes those beside a model, such as models/emoji-guidance; or train"
        raise ValueError(
            f"`{name}`={value!r} needs a model that this pipeline has not, {wanted}: "
            f"{ways if shipped else 'train'} one with {recipe} and pass it to from_pretrained by that name."
        )


def check_clip_skip(clip_skip: Any, layers: int) -> None:
    good = clip_skip is None or (is_whole(clip_skip, 0) and clip_skip <= layers)
    check("clip_skip", clip_skip, good, f"in 0..{layers}, the text encoder's layers")


def check_cross_attention_kwargs(kwargs: Any, has_processors: bool) -> None:
    """`has_processors`: the U-Net is one of diffusers', whose attention processors take arguments too."""
    good = kwargs is None or (isinstance(kwargs, dict) and (has_processors or set(kwargs) <= {"scale"}))
    check("cross_attention_kwargs", kwargs, good, "a dict, its only key 'scale', the strength of LoRAs")
    if kwargs and "scale" in kwargs:
        check("cross_attention_kwargs['scale']", kwargs["scale"], is_number(kwargs["scale"]), "a number")


def check_callback(callback: Any, asked: list[str], known: list[str]) -> None:
    good = callback is None or callable(callback)
    check("callback_on_step_end", callback, good, "callable")
    check("callback_on_step_end_tensor_inputs", asked, set(asked) <= set(known), f"among {known}")


def check_generator(generator: Any, pictures: int) -> None:
    generators = generator if isinstance(generator, list) else [generator] * pictures
    good = all(isinstance(one, torch.Generator | None) for one in generators)
    check("generator", generator, good, "a torch.Generator or a list of them")
    if len(generators) != pictures:
        raise ValueError(
            f"Got {len(generators)} generators for {pictures} pictures: each of num_images_per_prompt, and "
            "each of num_candidates, has its own."
        )


def check_channels(in_channels: int, out_channels: int) -> None:
    if out_channels not in (in_channels, 2 * in_channels):  # twice: a learned variance
        raise ValueError(f"A U-Net from {in_channels} to {out_channels} channels is no text-to-image model.")
