"""Kept for one minor version: the module is `pipelines.drawing.attention_maps`."""

import warnings

from .drawing.attention_maps import AttentionMaps, draw_attention, word_places

__all__ = ["AttentionMaps", "draw_attention", "word_places"]

warnings.warn(
    "pipelines.attention_maps has moved: import from pipelines.drawing.attention_maps",
    FutureWarning,
    stacklevel=2,
)
