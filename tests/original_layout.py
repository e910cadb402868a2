"""A Stable Diffusion pipeline's weights under the names of the original code (CompVis, Stability AI), as the
single files people share have them: what loading such a file has to undo."""

from typing import Any

import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
CLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def original_state_dict(pipe: Any, version: int) -> dict[str, Tensor]:
    """`version` 1 has transformers' text tower, 2 open_clip's with q, k and v in one matrix."""
    text = text_tower_1 if version == 1 else text_tower_2
    state = {"model.diffusion_model." + unet_name(k, pipe.unet): v for k, v in pipe.unet.state_dict().items()}
    state |= {"first_stage_model." + vae_name(k, pipe.vae): v for k, v in pipe.vae.state_dict().items()}
    for name in state:  # attention by 1x1 convolutions
        if name.startswith("first_stage_model") and ".attn_1." in name and state[name].ndim == 2:
            state[name] = state[name][:, :, None, None]
    state |= {"cond_stage_model." + k: v for k, v in text(pipe.text_encoder.state_dict()).items()}
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def unet_name(name: str, unet: Any) -> str:
    """Levels and their layers are counted through: a downsampler is an input block of its own, an upsampler
    the last part of its level's last output block."""
    layers = unet.config.layers_per_block
    for end, original in UNET_ENDS.items():
        if name.startswith(end + "."):
            return original + name.removeprefix(end)
    place, rest = name.split(".", 1)
    if place == "mid_block":
        kind, i, rest = rest.split(".", 2)
        return f"middle_block.{2 * int(i) if kind == 'resnets' else 1}.{inner(kind, rest)}"
    level, kind, i, rest = rest.split(".", 3)
    part = "1" if kind == "attentions" else "0"
    if place == "down_blocks":
        block = (layers + 1) * int(level) + 1 + (layers if kind == "downsamplers" else int(i))
        return f"input_blocks.{block}.{part}.{inner(kind, rest)}"
    block = (layers + 1) * int(level) + (layers if kind == "upsamplers" else int(i))
    if kind == "upsamplers":
        part = "2" if hasattr(unet.up_blocks[int(level)], "attentions") else "1"
    return f"output_blocks.{block}.{part}.{inner(kind, rest)}"


def inner(kind: str, rest: str) -> str:
    if kind == "downsamplers":
        return rest.replace("conv.", "op.")
    if kind != "resnets":
        return rest
    part, end = rest.rsplit(".", 1)
    return f"{RESNET[part]}.{end}"


def vae_name(name: str, vae: Any) -> str:
    """The decoder's levels are counted from the picture's resolution, the other way round."""
    last = len(vae.config.block_out_channels) - 1
    half, *parts = name.split(".")
    if half not in ("encoder", "decoder"):  # quant_conv, post_quant_conv
        return name
    rest = ".".join(parts)
    if parts[0] == "mid_block" and parts[1] == "attentions":
        part, end = ".".join(parts[3:]).rsplit(".", 1)
        return f"{half}.mid.attn_1.{VAE_ATTENTION[part]}.{end}"
    if parts[0] == "mid_block":
        return f"{half}.mid.block_{int(parts[2]) + 1}.{shortcut(parts[3:])}"
    if parts[0] in ("down_blocks", "up_blocks"):
        level = int(parts[1]) if half == "encoder" else last - int(parts[1])
        way = parts[0].split("_")[0]
        if parts[2] == "resnets":
            return f"{half}.{way}.{level}.block.{parts[3]}.{shortcut(parts[4:])}"
        return f"{half}.{way}.{level}.{way}sample.{'.'.join(parts[4:])}"
    return f"{half}.{rest.replace('conv_norm_out', 'norm_out')}"


def shortcut(parts: list[str]) -> str:
    return ".".join(parts).replace("conv_shortcut", "nin_shortcut")


def text_tower_1(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {"transformer.text_model." + name.removeprefix("text_model."): v for name, v in state.items()}
    positions = state["transformer.text_model.embeddings.position_embedding.weight"].shape[0]
    return state | {"transformer.text_model.embeddings.position_ids": torch.arange(positions)[None]}


def text_tower_2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    width = state["final_layer_norm.weight"].shape[0]
    out = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "text_projection": torch.eye(width),
        "logit_scale": torch.tensor(4.6),
    }
    for name, tensor in state.items():
        part, end = name.rsplit(".", 1)
        if part == "final_layer_norm":
            out[f"ln_final.{end}"] = tensor
            continue
        _, _, i, part = part.split(".", 3)
        block = f"transformer.resblocks.{i}"
        if part == "self_attn.q_proj":
            each = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            out[f"{block}.attn.in_proj_{end}"] = torch.cat(each)
        elif part == "self_attn.out_proj":
            out[f"{block}.attn.out_proj.{end}"] = tensor
        elif part in CLIP_LAYER:
            out[f"{block}.{CLIP_LAYER[part]}.{end}"] = tensor
    return {f"model.{name}": tensor for name, tensor in out.items()}
