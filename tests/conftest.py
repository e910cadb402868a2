"""Tiny models with random weights, built in milliseconds, the same in every run."""

import copy
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # spinning threads slow everything else on the machine down
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network

import diffusers
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from pipelines import ConditionalUNet, DDPMScheduler, NoisyClassifier, NoisyCLIP, TextToImagePipeline
from pipelines.components.guidance_clip import GuidanceCLIP
from training.data.tokenizer import build_clip_tokenizer

CONTEXT = 32


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    """CLIP's first 1000 merges; prompts of up to 32 tokens."""
    return build_clip_tokenizer(1000, model_max_length=CONTEXT)


@pytest.fixture(scope="session")
def make_text_encoder(tokenizer: CLIPTokenizer) -> Callable[..., Any]:
    """make_text_encoder(cls=CLIPTextModelWithProjection, **config): 3 layers, 32 wide, 24 projected."""

    def make(cls: type = CLIPTextModelWithProjection, **config: Any) -> Any:
        torch.manual_seed(1)
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        model = cls(CLIPTextConfig(**(settings | config))).eval()
        for (
            parameter
        ) in model.parameters():  # CLIP's initial weights are so small that all prompts look alike
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., Any]:
    """make_unet(cls=ConditionalUNet, **config): 16 x 16 pixels, two levels, text at the second."""

    def make(cls: type = ConditionalUNet, **config: Any) -> Any:
        torch.manual_seed(2)
        settings = {
            "sample_size": 16,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        }
        return cls(**(settings | config)).eval()

    return make


@pytest.fixture(scope="session")
def _pixel_parts(tokenizer: Any, make_text_encoder: Any, make_unet: Any) -> dict[str, Any]:
    return {"tokenizer": tokenizer, "text_encoder": make_text_encoder(), "unet": make_unet()}


@pytest.fixture
def make_pipeline(_pixel_parts: dict[str, Any]) -> Callable[..., TextToImagePipeline]:
    """make_pipeline(**parts): a pixel pipeline of 5 steps and guidance 3, any part or setting replaced."""

    def make(**parts: Any) -> TextToImagePipeline:
        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
        defaults = {
            **_pixel_parts,
            "scheduler": scheduler,
            "default_guidance_scale": 3.0,
            "default_num_inference_steps": 5,
        }
        pipe = TextToImagePipeline(**(defaults | parts))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pipeline(make_pipeline: Callable[..., TextToImagePipeline]) -> TextToImagePipeline:
    return make_pipeline()


@pytest.fixture(scope="session")
def stable_diffusion_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, make_text_encoder: Any, make_unet: Any
) -> Any:
    """A tiny Stable Diffusion with random weights, built and saved by diffusers, of 32 x 32 pixels."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.5,
    ).eval()
    folder = tmp_path_factory.mktemp("stable-diffusion")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=make_text_encoder(CLIPTextModel, eos_token_id=2),  # as in Stable Diffusion 1's config
        tokenizer=copy.deepcopy(tokenizer),
        unet=make_unet(UNet2DConditionModel, in_channels=4, out_channels=4),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def both(stable_diffusion_folder: Any) -> list[Any]:
    """(theirs, ours), both loaded from one Stable Diffusion folder."""
    from diffusers import StableDiffusionPipeline

    pipes = [
        cls.from_pretrained(stable_diffusion_folder) for cls in (StableDiffusionPipeline, TextToImagePipeline)
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="session")
def make_upsampler(make_unet: Any) -> Any:
    """make_upsampler(unet={}, **parts): convolutions only, no text, predicts what enlarging lacks."""

    def make(unet: dict[str, Any] | None = None, **parts: Any) -> Any:
        convolutional: dict[str, Any] = {
            "in_channels": 6,
            "out_channels": 3,
            "patch_size": 4,
            "down_block_types": ("DownBlock2D",) * 2,
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ("UpBlock2D",) * 2,
            "class_embed_type": "timestep",
            "resnet_time_scale_shift": "scale_shift",
        }
        network = make_unet(**(convolutional | (unet or {})))
        from pipelines.super_resolution import SuperResolutionPipeline

        cosine = {"beta_schedule": "squaredcos_cap_v2"}
        steps = {"prediction_type": "sample", "timestep_spacing": "trailing"}
        defaults: dict[str, Any] = {
            "unet": network,
            "low_res_scheduler": DDPMScheduler(**cosine),
            "scheduler": diffusers.DDIMScheduler(**cosine, **steps),
            "max_noise_level": 200,
            "default_guidance_scale": 1.0,
            "default_num_inference_steps": 3,
            "default_noise_level": 0,
        }
        pipe = SuperResolutionPipeline(**(defaults | parts))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def guides(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """The three models that guide, with random weights of some size."""
    torch.manual_seed(4)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shared | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=text | {"bos_token_id": tokenizer.bos_token_id, "max_position_embeddings": 32},
        vision_config=shared | {"image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    clip = CLIPModel(config)
    noisy = NoisyCLIP(sample_size=16, patch_size=4, width=16, layers=1, heads=2, projection_dim=24)
    classifier = NoisyClassifier(["animals", "food", "flags"], 16, 3, 2, (8, 16), 4, 2)
    for model in (clip, noisy, classifier):
        for name, parameter in model.named_parameters():
            if "logit_scale" not in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
    parts = {"noisy_clip": noisy.eval(), "noisy_classifier": classifier.eval()}
    return parts | {"clip_guidance_model": GuidanceCLIP.of(clip, copy.deepcopy(tokenizer))}
