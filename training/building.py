"""The pipeline that a run starts from: a saved one, or new weights around frozen parts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from pipelines import ConditionalUNet, DDPMScheduler, TextToImagePipeline

if TYPE_CHECKING:
    from training.text_to_image import TextToImageConfig


def as_mapping(value: Any, name: str) -> dict[str, Any]:
    """A config given as a mapping (YAML), a JSON string or a JSON file."""
    if value is None or isinstance(value, dict):
        return dict(value or {})
    is_json = value.lstrip().startswith("{")  # and so no path, for which it may be too long
    text = value if is_json or not Path(value).is_file() else Path(value).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be JSON or a JSON file, got {value!r}: {error}") from error


def build_pipeline(config: "TextToImageConfig") -> TextToImagePipeline:
    """The pipeline to train: a saved one, or new weights around a frozen text encoder (and VAE)."""
    if config.pretrained_model_name_or_path:
        pipe = TextToImagePipeline.from_pretrained(config.pretrained_model_name_or_path)
        if config.prediction_type:
            pipe.scheduler.register_to_config(prediction_type=config.prediction_type)
        if config.self_conditioning and not pipe.unet.config.get("self_conditioning", False):
            pipe.unet = with_self_conditioning(pipe.unet)
        return pipe
    settings = as_mapping(config.noise_scheduler, "noise_scheduler")
    if config.prediction_type:
        settings["prediction_type"] = config.prediction_type
    network = as_mapping(config.unet, "unet")
    if config.self_conditioning:
        network["self_conditioning"] = True
    tower = Path(config.text_encoder or "")
    of_pipeline = (tower / "model_index.json").is_file()
    return TextToImagePipeline(
        tokenizer=CLIPTokenizer.from_pretrained(tower / "tokenizer" if of_pipeline else tower),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(
            tower / "text_encoder" if of_pipeline else tower, dtype=torch.float32
        ),
        unet=ConditionalUNet(**network),
        scheduler=DDPMScheduler(**settings),
        vae=AutoencoderKL.from_pretrained(config.vae) if config.vae else None,
    )


def with_self_conditioning(unet: ConditionalUNet) -> ConditionalUNet:
    """The same network with self_conditioning on (Chen 2022): `conv_in` gains the inputs of the x0 estimate,
    whose weights are 0, so that it predicts what it did until it is trained."""
    wider = ConditionalUNet.from_config(unet.config, self_conditioning=True)
    state = unet.state_dict()
    own = unet.config.in_channels * unet.config.patch_size**2  # inputs of x_t, which come first
    weight = state["conv_in.weight"]  # (C, inputs, k, k)
    new = torch.zeros_like(weight[:, :own])
    state["conv_in.weight"] = torch.cat([weight[:, :own], new, weight[:, own:]], dim=1)
    wider.load_state_dict(state)
    return wider
