"""The strength of loaded LoRA adapters, in the U-Net and the text encoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils import scale_lora_layers
from torch import nn


@contextmanager
def lora_scaled(model: nn.Module | None, scale: float | None) -> Iterator[None]:
    """Inside the block, the LoRA layers of `model` are multiplied by `scale`; None leaves them as they are.

    diffusers' `unscale_lora_layers` cannot undo a scale of 0, so the previous scales are restored.
    """
    layers: list[Any] = []
    if model is not None and scale is not None and scale != 1:
        layers = [layer for layer in model.modules() if isinstance(getattr(layer, "scaling", None), dict)]
        before = [dict(layer.scaling) for layer in layers]
        scale_lora_layers(model, scale)
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before if layers else [], strict=True):
            layer.scaling.update(scaling)
