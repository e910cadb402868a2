"""Tiny models for the golden record, with weights by fixed seeds, however their classes initialise."""

import functools
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image, ImageDraw, ImageFilter
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines import (
    ConditionalUNet,
    DDPMScheduler,
    NoisyClassifier,
    NoisyCLIP,
    SuperResolutionPipeline,
    TextToImagePipeline,
)

PROMPT, LENGTH = "a corgi in a party hat", 48
COSINE = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(model: Any, seed: int) -> Any:
    """The model with weights of about unit gain, whatever its own way to initialise them."""
    generator = seeded(seed)
    for name, parameter in sorted(model.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = drawn / max(parameter[0].numel(), 1) ** 0.5
        elif parameter.ndim == 1:
            parameter.data = 0.1 * drawn + (1.0 if name.endswith("weight") else 0.0)
    return model.eval()


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """Bytes alone, CLIP's way: no merges."""
    printable = [byte for a, b in ("!~", "¡¬", "®ÿ") for byte in range(ord(a), ord(b) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=LENGTH)


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def text_settings() -> dict[str, Any]:
    ends = {key: getattr(tokenizer(), key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return SMALL | {"vocab_size": len(tokenizer()), "max_position_embeddings": LENGTH} | ends


@functools.cache
def text_encoder() -> CLIPTextModelWithProjection:
    return filled(CLIPTextModelWithProjection(CLIPTextConfig(**text_settings(), projection_dim=12)), 1)


def unet(seed: int = 2, **changes: Any) -> ConditionalUNet:
    settings: dict[str, Any] = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
        "block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 16,
        "attention_head_dim": 4, "norm_num_groups": 4,
    }  # fmt: skip
    return filled(ConditionalUNet(**(settings | changes)), seed)


@functools.cache
def vae() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return filled(
        AutoencoderKL(
            block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, scaling_factor=0.5, **blocks
        ),
        3,
    )


@functools.cache
def noisy_clip() -> NoisyCLIP:
    return filled(NoisyCLIP(sample_size=16, patch_size=4, width=16, layers=1, heads=2, projection_dim=12), 4)


@functools.cache
def noisy_classifier() -> NoisyClassifier:
    return filled(NoisyClassifier(["animals", "food", "flags"], 16, 3, 2, (8, 16), 4, 2), 5)


def chain(cls: Any = DDPMScheduler, **changes: Any) -> Any:
    return cls(**(COSINE | {"prediction_type": "v_prediction"} | changes))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixel_pipeline(cls: Any = TextToImagePipeline, **parts: Any) -> Any:
    own = {"tokenizer": tokenizer(), "text_encoder": text_encoder(), "scheduler": chain()}
    own |= {"default_guidance_scale": 3.0, "default_num_inference_steps": 3}
    return quiet(cls(**({"unet": parts.pop("unet", None) or unet()} | own | parts)))


def latent_pipeline(cls: Any = TextToImagePipeline, **parts: Any) -> Any:
    own = {"unet": unet(in_channels=4, out_channels=4), "vae": vae(), "scheduler": chain(clip_sample=False)}
    return pixel_pipeline(cls, **(own | parts))


def upsampler(**parts: Any) -> SuperResolutionPipeline:
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    plain |= {"mid_block_type": "UNetMidBlock2D", "resnet_time_scale_shift": "scale_shift"}
    network = unet(6, in_channels=6, patch_size=4, class_embed_type="timestep", **plain)
    network.conv_out.weight.data *= 0.3
    own = {"unet": network, "low_res_scheduler": chain(), "max_noise_level": 200, "default_noise_level": 0}
    own |= {"scheduler": chain(DDIMScheduler, prediction_type="sample")}
    own |= {"default_guidance_scale": 1.0, "default_num_inference_steps": 2}
    return quiet(SuperResolutionPipeline(**(own | parts)))


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def disc(width: int = 16, height: int = 16, soft: float = 0) -> Image.Image:
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse((width // 4, height // 5, 3 * width // 4, 2 * height // 3), fill=255)
    return mask.filter(ImageFilter.GaussianBlur(soft)) if soft else mask
