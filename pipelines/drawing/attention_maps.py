"""Where the U-Net looks when it reads a word: cross-attention maps over the picture (DAAM, Tang et al. 2022,
https://arxiv.org/abs/2210.04885).

    with AttentionMaps(pipe, "a dog in a hat", ["dog", "hat"]) as maps:
        image = pipe("a dog in a hat", callback_on_step_end=maps).images[0]
    overlay = draw_attention(image, maps["hat"][0])
"""

import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .text import context_length


def word_places(tokenizer: Any, prompt: str, word: str) -> list[int]:
    """Positions of a word's or phrase's tokens in the tokenized prompt, wherever it occurs as a whole word.

    Raises ValueError if the prompt does not contain it.
    """
    tokens = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    found = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)]
    places = []
    for i, (left, right) in enumerate(tokens.offset_mapping):
        if any(left < end and right > start for start, end in found):
            places.append(i)
    if not places or not word.strip():
        raise ValueError(f"words must be words of the prompt {prompt!r}, got {word!r}")
    return places


class AttentionMaps:
    """A callback for `callback_on_step_end` that records each picture's attention to chosen words.

    A map is softmax(q k^T / sqrt(d)) for the prompts' rows, not the negative prompts', summed over the word's
    tokens and averaged over heads, layers (enlarged to the size of the latents) and steps: shares in [0, 1].
    Leaving the `with` block, or `close`, removes the hooks from the U-Net; the maps remain.

    Args:
        pipe: a pipeline with ConditionalUNet or diffusers' UNet2DConditionModel.
        prompt: what the pipeline will draw, as plain text.
        words: words or phrases of the prompt.

    Raises ValueError for a word that the prompt does not contain, or that lies beyond the context.
    """

    def __init__(self, pipe: Any, prompt: str, words: list[str]) -> None:
        if getattr(pipe, "tokenizer", None) is None:
            raise ValueError(f"`pipe` must read text, and this {type(pipe).__name__} has no tokenizer")
        self.places = {word: word_places(pipe.tokenizer, prompt, word) for word in words}
        context = context_length(pipe.tokenizer, pipe.text_encoder)
        for word, places in self.places.items():
            if places[-1] > context - 2:
                rule = f"within the {context} tokens that the model reads"
                raise ValueError(f"words must be {rule}, got {word!r}")
        self.steps: list[Tensor] = []  # one for each step, (pictures, words, H, W)
        self._layers: list[Tensor] = []  # of the current step, (rows, words, N) each
        layers = [module for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
        self._handles = [layer.register_forward_hook(self._see, with_kwargs=True) for layer in layers]

    def _see(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]  # ours, diffusers'
        with torch.no_grad():
            q, k = layer.to_q(args[0]).float(), layer.to_k(text).float()
            # (B, heads, N or L, d)
            q, k = (t.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for t in (q, k))
            shares = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)  # (B, N, L)
            words = [shares[:, :, places].sum(-1) for places in self.places.values()]
            self._layers.append(torch.stack(words, dim=1))  # (B, words, N)

    def __call__(self, pipe: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average the layers of the step that has just run into one map."""
        pictures, _, height, width = tensors["latents"].shape
        maps = []
        for layer in self._layers:
            rows = round((layer.shape[-1] * height / width) ** 0.5)
            grid = layer[-pictures:].unflatten(-1, (rows, -1))  # the last rows are the prompts'
            maps.append(F.interpolate(grid, (height, width), mode="bilinear"))
        self.steps.append(torch.stack(maps).mean(0).cpu())
        self._layers.clear()
        return {}

    def __getitem__(self, word: str) -> Tensor:
        """The map of a word, (pictures, H, W): the mean over the steps so far."""
        return torch.stack(self.steps).mean(0)[:, list(self.places).index(word)]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "AttentionMaps":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def draw_attention(image: Image.Image, attention: Tensor, strength: float = 0.7) -> Image.Image:
    """The picture under a heat map of `attention`, (H, W), stretched from its smallest to its largest value.

    `strength`, in [0, 1], is how opaque the colour is at the hottest place; the coldest is left as it is.
    """
    from matplotlib import colormaps

    low, high = attention.min(), attention.max()
    heat = (attention - low) / (high - low).clamp(min=1e-12)
    large = F.interpolate(heat[None, None].float(), (image.height, image.width), mode="bicubic")
    shares = large[0, 0].clamp(0, 1).numpy()
    colours = np.asarray(colormaps["inferno"](shares))[..., :3]  # (H, W, 3)
    cover = strength * shares[..., None]
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    mixed = (1 - cover) * pixels + cover * colours
    return Image.fromarray((mixed * 255).round().astype(np.uint8))
