"""A classifier of noised pictures, p(y | x_t, t): the downward half of the U-Net, then attention pooling over
its output (Dhariwal and Nichol 2021, section 4, https://arxiv.org/abs/2105.05233). It may answer more than
one question about a picture, such as what it shows and how it is drawn, each with its own classes. It may
also be an ensemble of networks trained separately (deep ensembles, Lakshminarayanan 2017,
https://arxiv.org/abs/1612.01474).

In shape comments B is the batch, C channels, H x W positions, E the width of the time embedding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; the second norm is scaled and shifted by the time embedding.

    x: (B, in_channels, H, W), emb: (B, E) -> (B, out_channels, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, stride: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
        self.time = nn.Linear(emb_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, stride, stride)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(emb))[:, :, None, None].chunk(2, dim=1)  # 2 x (B, C, 1, 1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class NoisyClassifier(ModelMixin, ConfigMixin):
    """Logits of p(y | x_t, t), or log p for each of several sets of classes.

    Args:
        labels: the classes' names, in the order of the logits.
        sample_size: side of the x_t that it was trained on, in pixels or in latents; others work too.
        in_channels: channels of x_t.
        patch_size: side of the squares that are folded into channels on the way in.
        block_out_channels: width of each level; all but the first halve the side.
        norm_num_groups: groups of the norms; divides every width.
        heads: heads of the pooling attention; divides the last width.
        label_sets: how many of the labels belong to each set, in their order; each set's probabilities sum to
            1. None: all labels are one set.
        timestep_limits: for each set, the t below which it was trained; from there on its classes are all
            equally likely, so that it does not guide. None: no limits.
        guidance_limit: how far its guidance may move the predicted noise of a picture, as a root mean square
            (that of the noise itself is 1): a larger sqrt(1 - abar) s grad is scaled down. None: no limit.
        ensemble: number of networks of these sizes whose logits are averaged: p is the geometric mean of
            theirs, normalized to sum to 1. `others` holds all but the first.
    """

    @register_to_config
    def __init__(
        self,
        labels: Sequence[str] = ("0", "1"), sample_size: int = 64, in_channels: int = 3, patch_size: int = 4,
        block_out_channels: Sequence[int] = (48, 80, 96), norm_num_groups: int = 8, heads: int = 4,
        label_sets: Sequence[int] | None = None, timestep_limits: Sequence[int] | None = None,
        guidance_limit: float | None = None, ensemble: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if ensemble < 1:
            raise ValueError(f"ensemble must be at least 1, got {ensemble}")
        if label_sets is not None and (sum(label_sets) != len(labels) or min(label_sets) < 1):
            raise ValueError(f"label_sets must sum to {len(labels)}, the labels, got {tuple(label_sets)}")
        if timestep_limits is not None and len(timestep_limits) != len(label_sets or [0]):
            raise ValueError(f"timestep_limits must be one for each set, got {tuple(timestep_limits)}")
        first, last = block_out_channels[0], block_out_channels[-1]
        if any(width % norm_num_groups for width in block_out_channels) or last % heads:
            rule = f"multiples of norm_num_groups={norm_num_groups}, the last of heads={heads}"
            raise ValueError(f"block_out_channels must be {rule}, got {tuple(block_out_channels)}")
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, first, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(first, 4 * first), nn.SiLU(), nn.Linear(4 * first, 4 * first))
        inputs = (first, *block_out_channels[:-1])
        self.blocks = nn.ModuleList(
            ResidualBlock(a, b, 4 * first, 1 if i == 0 else 2, norm_num_groups)
            for i, (a, b) in enumerate(zip(inputs, block_out_channels, strict=True))
        )
        self.norm_out = nn.GroupNorm(norm_num_groups, last)
        self.query = nn.Parameter(torch.randn(1, 1, last) * last**-0.5)
        self.pool = nn.MultiheadAttention(last, heads, batch_first=True)
        self.head = nn.Linear(last, len(labels))
        sizes = labels, sample_size, in_channels, patch_size, block_out_channels, norm_num_groups, heads
        self.others = nn.ModuleList(NoisyClassifier(*sizes) for _ in range(ensemble - 1))

    def own_logits(self, sample: Tensor, t: Tensor) -> Tensor:
        """Logits of this network alone, without `others`: x_t, t (B,) -> (B, classes) float32."""
        patch = self.config.patch_size
        waves = get_timestep_embedding(t, self.time[0].in_features, True, downscale_freq_shift=0)
        emb = self.time(waves.to(self.dtype))  # (B, E)
        h = self.conv_in(F.pixel_unshuffle(sample.to(self.dtype), patch))  # (B, C, H, W)
        for block in self.blocks:
            h = block(h, emb)
        h = F.silu(self.norm_out(h)).flatten(2).transpose(1, 2)  # (B, H * W, C)
        pooled = self.pool(self.query.expand(len(h), -1, -1), h, h, need_weights=False)[0][:, 0]  # (B, C)
        return self.head(pooled).float()

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """x_t (B, in_channels, height, width), t one for all or (B,) -> logits, (B, classes) float32.

        With label_sets they are log p of each set's own classes. A softmax over all classes divides these p
        by the number of sets, which changes no gradient, so guidance can treat them as ordinary logits.

        Raises ValueError for another number of channels, and for sides that patch_size does not divide.
        """
        channels, patch = self.config.in_channels, self.config.patch_size
        if sample.shape[1] != channels or sample.shape[-1] % patch or sample.shape[-2] % patch:
            rule = f"(B, {channels}, height, width), both multiples of {patch}"
            raise ValueError(f"sample must be {rule}, got {tuple(sample.shape)}")
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))  # (B,)
        networks = (self, *self.others)
        logits = torch.stack([network.own_logits(sample, t) for network in networks]).mean(0)
        sizes, limits = self.config.label_sets, self.config.timestep_limits
        if sizes is None and limits is None:
            return logits
        sets = logits.split([*(sizes or [logits.shape[1]])], dim=1)
        if limits is not None:  # equal logits, so no gradient, at t it was not trained on
            sets = [own * (t < limit)[:, None] for own, limit in zip(sets, limits, strict=True)]
        return torch.cat([F.log_softmax(own, dim=1) for own in sets], dim=1)
