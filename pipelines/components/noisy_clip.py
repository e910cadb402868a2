"""A CLIP image tower that sees noised pictures and their noise level (GLIDE, Nichol et al. 2022, section 2.3,
https://arxiv.org/abs/2112.10741). It embeds into the space of a text tower that is not part of it.

A vision transformer with pre-norm blocks (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929); the
timestep's embedding is added to every patch. In shape comments B is the batch, N = (sample_size /
patch_size)^2 patches, W the width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class NoisyCLIP(ModelMixin, ConfigMixin):
    """f(x_t, t), whose dot product with the pooled text g(c) is high where c describes x0.

    Args:
        sample_size: side of x_t, in pixels or in latents.
        in_channels: channels of x_t.
        patch_size: side of a patch; divides sample_size.
        width, layers, heads: of the transformer.
        projection_dim: D, the width of the text tower's pooled output.

    Raises ValueError for sizes that do not divide as they must.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64, in_channels: int = 3, patch_size: int = 8, width: int = 160, layers: int = 6,
        heads: int = 5, projection_dim: int = 256,
    ) -> None:  # fmt: skip
        super().__init__()
        rules = ("sample_size", sample_size, patch_size), ("width", width, heads), ("width", width, 2)
        for name, value, divisor in rules:
            if value % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {value}")
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn((sample_size // patch_size) ** 2, width) * width**-0.5)
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        options: Any = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, **options)
        norm = nn.LayerNorm(width)
        self.blocks = nn.TransformerEncoder(block, layers, norm, enable_nested_tensor=False)
        self.projection = nn.Linear(width, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # a logarithm, as in CLIP
        for layer in self.blocks.layers:  # torch initialises all blocks of a stack alike
            nn.init.xavier_uniform_(layer.self_attn.in_proj_weight)
            for linear in (layer.linear1, layer.linear2, layer.self_attn.out_proj):
                nn.init.xavier_uniform_(linear.weight)

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), at most 100 as in CLIP: what multiplies f . g."""
        return self.logit_scale.clamp(max=math.log(100)).exp()

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """x_t (B, in_channels, sample_size, sample_size), t one for all or (B,) -> f, (B, D), l2-normalised.

        Raises ValueError for x_t of another shape.
        """
        config = self.config
        channels, side = config.in_channels, config.sample_size
        if sample.shape[1:] != (channels, side, side):
            raise ValueError(f"sample must be (B, {channels}, {side}, {side}), got {tuple(sample.shape)}")
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))  # (B,)
        waves = get_timestep_embedding(t, config.width, flip_sin_to_cos=True, downscale_freq_shift=0)
        h = self.patches(sample.to(self.dtype)).flatten(2).transpose(1, 2)  # (B, N, W)
        h = h + self.positions + self.time(waves.to(self.dtype))[:, None]
        h = self.blocks(h).mean(1)  # (B, W)
        return F.normalize(self.projection(h).float(), dim=-1)
