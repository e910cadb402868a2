"""The denoiser: a U-Net that sees a noised picture, the noise level and the text.

    conv_in -> down levels -> middle -> up levels on skip-concatenated input -> GroupNorm, SiLU, conv_out

Ho et al. 2020 (https://arxiv.org/abs/2006.11239) gave the ResNet U-Net with a sinusoidal time embedding,
Dhariwal and Nichol 2021 (https://arxiv.org/abs/2105.05233) the scale-shift norm, Rombach et al. 2022
(https://arxiv.org/abs/2112.10752) cross-attention to text, Nichol et al. 2022 (GLIDE,
https://arxiv.org/abs/2112.10741) the pooled text vector in the time embedding.

Config keys and state-dict names are those of diffusers' `UNet2DConditionModel` wherever the two share
something, so a folder saved by either class loads into the other. In shape comments B is the batch, C
channels, H x W the picture as the network sees it (after `patch_size` folding), N = H * W positions, L text
tokens, D text width, E the width of the time embedding. `config` is always the model's own config.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor, nn

from .lora import lora_scaled

# The implemented values of keys that offer a choice; anything else is refused (see `check_config`).
ALLOWED: dict[str, tuple[Any, ...]] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep"),
    "mid_block_only_cross_attention": (None, False),
}
# diffusers' keys that neither Stable Diffusion up to 2.1 nor our models set: only the default is accepted.
# The number of heads is in attention_head_dim, not in num_attention_heads.
ONLY_DEFAULT = (
    "center_input_sample downsample_padding mid_block_scale_factor act_fn encoder_hid_dim "
    "encoder_hid_dim_type num_attention_heads dual_cross_attention addition_embed_type "
    "resnet_skip_time_act resnet_out_scale_factor time_embedding_type time_embedding_act_fn "
    "timestep_post_act conv_in_kernel conv_out_kernel attention_type "
    "projection_class_embeddings_input_dim class_embeddings_concat cross_attention_norm"
).split()


def time_embed_dim(config: Any) -> int:
    """E, the width of the time embedding."""
    return config.time_embedding_dim or 4 * config.block_out_channels[0]


class ResnetBlock2D(nn.Module):
    """GroupNorm, activation, 3x3 convolution, twice, with the time embedding in between; plus the input.

    With h the first half's output and e = Linear(act(emb)), the second half starts from norm(h + e) if
    `resnet_time_scale_shift` is "default", or norm(h) * (1 + e_scale) + e_shift if it is "scale_shift"
    (adaptive GroupNorm).
    x: (B, in_channels, H, W), emb: (B, E) -> (B, out_channels, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, config: Any) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(
            time_embed_dim(config), 2 * out_channels if self.scale_shift else out_channels
        )
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        e = self.time_emb_proj(F.silu(emb))[:, :, None, None]  # (B, C or 2C, 1, 1)
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)  # 2 x (B, C, 1, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        h = self.conv2(self.dropout(F.silu(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nn.Module):
    """3x3 convolution with stride 2, (B, C, H, W) -> (B, C, H/2, W/2), odd sides rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Module):
    """Nearest-neighbour enlargement, then a 3x3 convolution. `size` is the size of the next skip connections
    (twice the input's, or one less), so odd sizes fit."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(x, size=list(size), mode="nearest"))  # (B, C, *size)


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(d)) v, d = `dim_head` (Vaswani et al. 2017, eq. 1).

    x: (B, N, dim); `context`: (B, M, context_dim), None for self-attention. Returns (B, N, dim). `upcast`
    computes in float32, whatever the dtype of the weights.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, dim_head: int, upcast: bool) -> None:
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim))  # Sequential for its name, to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        # (B, N or M, heads * d) -> (B, heads, N or M, d)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.upcast:
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return self.to_out(out.transpose(1, 2).flatten(2).to(x.dtype))  # (B, N, dim)


class BasicTransformerBlock(nn.Module):
    """x + self-attention, + cross-attention to the text, + feed-forward, each reading a LayerNorm of the sum
    so far. With `only_cross` the first attention reads the text too. x: (B, N, dim), text: (B, L, D)."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, text_dim: int, only_cross: bool, upcast: bool
    ) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, text_dim if only_cross else dim, heads, dim_head, upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, text_dim, heads, dim_head, upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), text if self.only_cross else None)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a picture: GroupNorm, projection in, blocks, projection out;
    plus the input. (B, C, H, W) -> (B, C, H, W). `use_linear_projection`: Linear in place of 1x1 Conv2d."""

    def __init__(
        self, channels: int, num_layers: int, heads: int, text_dim: int, only_cross: bool, config: Any
    ) -> None:
        super().__init__()
        dim_head = channels // heads
        inner = heads * dim_head
        self.linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if self.linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, heads, dim_head, text_dim, only_cross, config.upcast_attention)
            for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(inner, channels) if self.linear else nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, text)
        h = self.proj_out(h) if self.linear else h
        h = h.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + (h if self.linear else self.proj_out(h))


# (channels, layers) -> the transformer that follows a ResNet block of that width.
MakeAttention = Callable[[int, int], Transformer2DModel]


class Level(nn.Module):
    """What all levels share: a ResNet block for each of `inputs`, from that many channels to `width`. If the
    level has attention, each block is followed by a transformer of the given depth. With gradient
    checkpointing, activations are not kept but computed again in the backward pass."""

    _gradient_checkpointing_func: Callable[..., Tensor]  # set by ModelMixin

    def __init__(
        self, inputs: list[int], width: int, depths: list[int], attention: MakeAttention | None, config: Any
    ) -> None:
        super().__init__()
        if attention is not None:  # else left unset: diffusers looks for it to weight by block
            self.attentions = nn.ModuleList()
        self.resnets = nn.ModuleList()
        for channels, depth in zip(inputs, depths, strict=True):
            self.resnets.append(ResnetBlock2D(channels, width, config))
            if attention is not None:
                self.attentions.append(attention(width, depth))
        self.width, self.has_cross_attention = width, attention is not None
        self.gradient_checkpointing = False

    def run(self, module: nn.Module, *args: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)

    def layer(self, i: int, x: Tensor, emb: Tensor, text: Tensor | None) -> Tensor:
        x = self.run(self.resnets[i], x, emb)
        return self.run(self.attentions[i], x, text) if self.has_cross_attention else x


class DownBlock2D(Level):
    """A level on the way down. Returns its output and the skip connections: each layer's output and, with
    `downsample`, the downsampled one. `level`: the arguments of `Level`."""

    def __init__(self, *level: Any, downsample: bool) -> None:
        super().__init__(*level)
        self.downsamplers = nn.ModuleList([Downsample2D(self.width)] if downsample else [])

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, text)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class UNetMidBlock2D(Level):
    """ResNet block, transformer, ResNet block, all at one width; without attention a single ResNet block."""

    def __init__(self, width: int, depth: int, attention: MakeAttention | None, config: Any) -> None:
        super().__init__([width], width, [depth], attention, config)
        if attention is not None:
            self.resnets.append(ResnetBlock2D(width, width, config))

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None) -> Tensor:
        x = self.layer(0, x, emb, text)
        return self.run(self.resnets[1], x, emb) if self.has_cross_attention else x


class UpBlock2D(Level):
    """A level on the way up. Each ResNet block reads the running state concatenated with a skip connection,
    taken off the end of `skips`. With `upsample`, the result is enlarged to the size of the next skip
    connection. `level`: the arguments of `Level`."""

    s1: float | None = None  # with index, s2, b1, b2: see `ConditionalUNet.enable_freeu`

    def __init__(self, *level: Any, upsample: bool) -> None:
        super().__init__(*level)
        self.upsamplers = nn.ModuleList([Upsample2D(self.width)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, text: Tensor | None) -> Tensor:
        for i in range(len(self.resnets)):
            skip = skips.pop()
            if self.s1 is not None:
                x, skip = apply_freeu(self.index, x, skip, s1=self.s1, s2=self.s2, b1=self.b1, b2=self.b2)
            x = torch.cat([x, skip], dim=1)  # (B, state + skip, H, W)
            x = self.layer(i, x, emb, text)  # (B, C, H, W)
        for upsampler in self.upsamplers:
            x = upsampler(x, skips[-1].shape[-2:])
        return x


def check_config(config: Any) -> None:
    """Raises ValueError for anything not implemented, naming the key, the value and what is allowed."""
    defaults = inspect.signature(ConditionalUNet.__init__).parameters
    for key, allowed in (ALLOWED | {key: (defaults[key].default,) for key in ONLY_DEFAULT}).items():
        for value in config[key] if key.endswith("block_types") else [config[key]]:
            if value not in allowed:
                choice = ", ".join(map(repr, allowed))
                raise ValueError(f"{key}={value!r} is not implemented; allowed: {choice}")
    for key in ("norm_num_groups", "patch_size"):
        if config[key] is None or config[key] < 1:
            raise ValueError(f"{key}={config[key]!r} is not implemented; allowed: 1 or more")


def spread(value: Any, count: int, key: str) -> list[Any]:
    """A single value `count` times, or the given list, which must have `count` values."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{key}={value!r} is not implemented; allowed: one value, or a list of {count}")
    return values


def required(added_cond: dict[str, Tensor], name: str, key: str) -> Tensor:
    """added_cond[name], or a ValueError that names it and the config key that asks for it."""
    if added_cond.get(name) is None:
        raise ValueError(f"added_cond_kwargs must hold {name!r}: the config has {key}")
    return added_cond[name]


class ConditionalUNet(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts eps, v or x0 from a noised picture x_t, the timestep t and text states.

    Keys shared with diffusers' `UNet2DConditionModel` mean what they mean there, and have the same defaults.
    Some need an explanation:

    - `attention_head_dim`: the NUMBER of heads, one int or one per level, despite its name (an old mistake
      that every published config repeats). `num_attention_heads` must stay None.
    - `layers_per_block`, `only_cross_attention`, `cross_attention_dim`, `transformer_layers_per_block`: one
      value, or one per level. In the last, a level's value may be a list with one number per layer; the up
      levels then need `reverse_transformer_layers_per_block`, in the order in which they run.
    - `class_embed_type`: None or "timestep". With None, `num_class_embeds` is the size of an embedding table
      (the x4 upscaler's noise level).

    Keys of our own, all off by default:

    - `patch_size` (1): p x p patches become channels on the way in and are unfolded on the way out, so the
      network works on height/p x width/p positions. `conv_in` has in_channels * p^2 inputs, `conv_out`
      out_channels * p^2 outputs, in the order of `torch.nn.functional.pixel_unshuffle`.
    - `self_conditioning` (False): the previous estimate of x0 is concatenated to the picture, as in_channels
      more channels (Chen et al. 2022, https://arxiv.org/abs/2208.04202); zeros if none is passed.
    - `text_concat_channels` (0): width of Linear(pooled text), which is repeated at every position and
      concatenated to the folded picture, after its own channels.
    - `pooled_text_time_embedding` (False): as in GLIDE, the time embedding is MLP(t) + Linear(pooled text).
    - `pooled_text_dim` (None): width of the pooled text vector; None means `cross_attention_dim`.

    Raises ValueError for any value that is not implemented, naming the key, the value and what is allowed.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D", "UpBlock2D"]
    _skip_layerwise_casting_patterns = ["norm"]
    _repeated_blocks = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None, in_channels: int = 4, out_channels: int = 4,
        center_input_sample: bool = False, flip_sin_to_cos: bool = True, freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2, downsample_padding: int = 1,
        mid_block_scale_factor: float = 1, dropout: float = 0.0, act_fn: str = "silu",
        norm_num_groups: int = 32, norm_eps: float = 1e-5, cross_attention_dim: int | tuple[int, ...] = 1280,
        transformer_layers_per_block: int | tuple[Any, ...] = 1,
        reverse_transformer_layers_per_block: tuple[Any, ...] | None = None,
        encoder_hid_dim: int | None = None, encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int, ...] = 8, num_attention_heads: None = None,
        dual_cross_attention: bool = False, use_linear_projection: bool = False,
        class_embed_type: str | None = None, addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None, num_class_embeds: int | None = None,
        upcast_attention: bool = False, resnet_time_scale_shift: str = "default",
        resnet_skip_time_act: bool = False, resnet_out_scale_factor: float = 1.0,
        time_embedding_type: str = "positional", time_embedding_dim: int | None = None,
        time_embedding_act_fn: str | None = None, timestep_post_act: str | None = None,
        time_cond_proj_dim: int | None = None, conv_in_kernel: int = 3, conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None, attention_type: str = "default",
        class_embeddings_concat: bool = False, mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: str | None = None, addition_embed_type_num_heads: int = 64,
        # our own
        patch_size: int = 1, self_conditioning: bool = False, text_concat_channels: int = 0,
        pooled_text_time_embedding: bool = False, pooled_text_dim: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        config: Any = self.config
        check_config(config)
        levels = len(down_block_types)
        channels = spread(block_out_channels, levels, "block_out_channels")
        layers = spread(layers_per_block, levels, "layers_per_block")
        heads = spread(attention_head_dim, levels, "attention_head_dim")
        text_dims = spread(cross_attention_dim, levels, "cross_attention_dim")
        only_cross = spread(only_cross_attention, levels, "only_cross_attention")
        depths = spread(transformer_layers_per_block, levels, "transformer_layers_per_block")
        up_kinds = spread(up_block_types, levels, "up_block_types")
        up_depths, key = depths[::-1], "reverse_transformer_layers_per_block"
        if reverse_transformer_layers_per_block is not None:
            up_depths = spread(reverse_transformer_layers_per_block, levels, key)

        # 1. The input, and everything that is added to the time embedding
        self.patch_size = patch_size
        joined = in_channels * patch_size**2 * (2 if self_conditioning else 1) + text_concat_channels
        self.conv_in = nn.Conv2d(joined, channels[0], 3, padding=1)
        time_dim = time_embed_dim(config)
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim, cond_proj_dim=time_cond_proj_dim)
        self.class_embedding: nn.Module | None = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(channels[0], time_dim)
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, time_dim)

        # 2. The levels
        def transformer(level: int, only_cross: bool) -> MakeAttention:
            settings = heads[level], text_dims[level], only_cross, config
            return lambda width, depth: Transformer2DModel(width, depth, *settings)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, kind in enumerate(down_block_types):
            own, n = channels[i], layers[i]
            attention = transformer(i, only_cross[i]) if kind == "CrossAttnDownBlock2D" else None
            inputs = [channels[max(i - 1, 0)]] + [own] * (n - 1)
            deep = spread(depths[i], n, "transformer_layers_per_block")
            level = inputs, own, deep, attention, config
            self.down_blocks.append(DownBlock2D(*level, downsample=i < levels - 1))

        attention = transformer(-1, False) if mid_block_type == "UNetMidBlock2DCrossAttn" else None
        self.mid_block = UNetMidBlock2D(channels[-1], deep[0], attention, config)

        for kind, up_depth, i in zip(up_kinds, up_depths, reversed(range(levels)), strict=True):
            own, n = channels[i], layers[i]
            attention = transformer(i, only_cross[i]) if kind == "CrossAttnUpBlock2D" else None
            below, above = channels[min(i + 1, levels - 1)], channels[max(i - 1, 0)]
            inputs = [x + skip for x, skip in zip([below] + [own] * n, [own] * n + [above], strict=True)]
            deep = spread(up_depth, n + 1, key)
            self.up_blocks.append(UpBlock2D(inputs, own, deep, attention, config, upsample=i > 0))

        # 3. The output, and the two projections of the pooled text
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(channels[0], out_channels * patch_size**2, 3, padding=1)
        pooled_dim = pooled_text_dim or text_dims[0]
        self.pooled_text_time_proj = nn.Linear(pooled_dim, time_dim) if pooled_text_time_embedding else None
        self.pooled_text_concat_proj = None
        if text_concat_channels:
            self.pooled_text_concat_proj = nn.Linear(pooled_dim, text_concat_channels)

    def enable_freeu(self, s1: float | None, s2: float | None, b1: float | None, b2: float | None) -> None:
        """FreeU (Si et al. 2023, https://arxiv.org/abs/2309.11497): at the first up level, multiply half of
        the state's channels by b1 and the skips' lowest frequencies by s1; at the second, by b2 and s2."""
        for i, block in enumerate(self.up_blocks):
            block.index, block.s1, block.s2, block.b1, block.b2 = i, s1, s2, b1, b2  # type: ignore[assignment]

    def disable_freeu(self) -> None:
        """Undoes `enable_freeu`."""
        self.enable_freeu(None, None, None, None)

    def set_adapters(self, adapter_names: list[str] | str, weights: Any = None) -> None:
        """As in diffusers. Weights may be given by block, {"down": 0.5, "up": {"block_1": [1, 0]}}, if all
        levels have equally many layers."""
        listed = weights if isinstance(weights, list) else [weights]
        if any(isinstance(weight, dict) for weight in listed):
            listed = _maybe_expand_lora_scales(self, listed)
        super().set_adapters(adapter_names, listed if isinstance(weights, list) else listed[0])

    def embed_time(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None,
        timestep_cond: Tensor | None, added_cond: dict[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """The vector that every ResNet block sees: MLP(sinusoid(t)), plus the pooled text and the class if
        the config asks for them. Returns (B, E)."""
        if timestep_cond is not None and self.config.time_cond_proj_dim is None:
            raise ValueError("timestep_cond was given, but the config has time_cond_proj_dim=None")
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])  # (B,)
        emb = self.time_embedding(self.time_proj(t).to(sample.dtype), timestep_cond)  # (B, E)
        if self.pooled_text_time_proj is not None:
            pooled = required(added_cond, "pooled_text", "pooled_text_time_embedding")  # (B, pooled_text_dim)
            emb = emb + self.pooled_text_time_proj(pooled)
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("class_labels must be given: the config has a class embedding")
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(sample.dtype)
            emb = emb + self.class_embedding(class_labels).to(sample.dtype)
        return emb

    def join_input(self, sample: Tensor, added_cond: dict[str, Tensor]) -> Tensor:
        """The input of conv_in: the picture, concatenated with the last x0 estimate, folded into patches and
        concatenated with the pooled text, each only if the config asks for it.
        (B, in_channels, height, width) -> (B, inputs of conv_in, H, W)."""
        if self.config.self_conditioning:
            x0 = added_cond.get("x0_self")
            x0 = torch.zeros_like(sample) if x0 is None else x0
            sample = torch.cat([sample, x0], dim=1)  # (B, 2 * in_channels, height, width)
        if self.patch_size > 1:
            height, width = sample.shape[-2:]
            if height % self.patch_size or width % self.patch_size:
                raise ValueError(f"patch_size={self.patch_size} does not divide the sample, {height}x{width}")
            sample = F.pixel_unshuffle(sample, self.patch_size)  # (B, channels * p^2, H, W)
        if self.pooled_text_concat_proj is not None:
            pooled = self.pooled_text_concat_proj(required(added_cond, "pooled_text", "text_concat_channels"))
            tiles = pooled[:, :, None, None].expand(-1, -1, *sample.shape[-2:])  # (B, text channels, H, W)
            sample = torch.cat([sample, tiles], dim=1)
        return sample

    def forward(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor | None,
        class_labels: Tensor | None = None, timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None, return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:  # fmt: skip
        """Predict from x_t. Returns `.sample`, (B, out_channels, height, width), or a tuple of it.

        Args:
            sample: x_t, (B, in_channels, height, width). Height and width must be multiples of `patch_size`,
                but not of the downsampling of the levels.
            timestep: 0 .. T-1, int or float, one for all or (B,).
            encoder_hidden_states: text states, (B, L, D); None only for a network without attention.
            class_labels: (B,), rows of the table or, with "timestep", numbers like t.
            timestep_cond: (B, time_cond_proj_dim), the embedded guidance scale of distilled models.
            cross_attention_kwargs: {"scale": s}, the strength of the loaded LoRA adapters.
            added_cond_kwargs: "pooled_text" (B, pooled_text_dim); "x0_self" like sample.

        Raises ValueError if an input that the config requires is missing, if one is given that the config
        cannot use, or if `patch_size` does not divide the sample.
        """
        if encoder_hidden_states is None and any(isinstance(module, Attention) for module in self.modules()):
            raise ValueError("encoder_hidden_states must be given: the network has cross-attention")
        added_cond = added_cond_kwargs or {}
        options = dict(cross_attention_kwargs or {})
        scale = options.pop("scale", 1.0)
        if options:
            raise ValueError(f"cross_attention_kwargs={options!r} is not implemented; allowed: 'scale'")
        with lora_scaled(self, scale) if scale != 1 else nullcontext():
            # 1. Noise level and text
            emb = self.embed_time(sample, timestep, class_labels, timestep_cond, added_cond)  # (B, E)

            # 2. Down
            x = self.conv_in(self.join_input(sample, added_cond))  # (B, C, H, W)
            skips = [x]
            for block in self.down_blocks:
                x, outputs = block(x, emb, encoder_hidden_states)
                skips += outputs

            # 3. Middle
            x = self.mid_block(x, emb, encoder_hidden_states)

            # 4. Up
            for block in self.up_blocks:
                x = block(x, skips, emb, encoder_hidden_states)

            # 5. Out
            x = self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, out_channels * p^2, H, W)
            if self.patch_size > 1:
                x = F.pixel_shuffle(x, self.patch_size)  # (B, out_channels, height, width)
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)
