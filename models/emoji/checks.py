"""What `TextToImagePipeline.__call__` refuses before any work starts, but for the text, which `conditioning`
checks. Every check raises a ValueError that names the argument, its value and what is allowed."""

import math
from typing import Any

import numpy as np
import torch

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
        check(name, size, is_whole(size, 1) and size % unit == 0, f"a positive multiple of {unit}")


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
        raise ValueError(f"Got {len(generators)} generators for {pictures} pictures.")


def check_channels(in_channels: int, out_channels: int) -> None:
    if out_channels not in (in_channels, 2 * in_channels):  # twice: a learned variance
        raise ValueError(f"A U-Net from {in_channels} to {out_channels} channels is no text-to-image model.")
