"""Building the pipeline that a run starts from: a saved one, or new weights around frozen parts."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from pipelines import ConditionalUNet, DDPMScheduler, InpaintPipeline, TextToImagePipeline
from training.run.settings import InpaintingSettings, UNetSettings, require, setting

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class PipelineSettings(UNetSettings, InpaintingSettings):
    """What the pipeline to train is made of."""

    pretrained_model_name_or_path: str | None = setting(
        "Start from this pipeline: a folder or a Hub name.", None
    )
    text_encoder: str | None = setting("Folder of a CLIP with its tokenizer, or of a pipeline; frozen.", None)
    vae: str | None = setting("Folder of an AutoencoderKL, frozen; none means pixels.", None)
    prediction_type: str | None = setting("epsilon, sample (x0) or v_prediction.", None, PREDICTION_TYPES)
    self_conditioning: bool = setting(
        "The U-Net sees its last estimate of x0; a saved U-Net is widened.", False
    )

    def check(self) -> None:
        super().check()
        saved, tower = self.pretrained_model_name_or_path, self.text_encoder
        either = "given, or pretrained_model_name_or_path instead of it"
        require((self.unet is None) != (saved is None), "unet", self.unet, either)
        given = saved is not None or tower is not None
        require(given, "text_encoder", tower, "given when training from scratch")
        for name in ("text_encoder", "vae", "noise_scheduler"):
            value = getattr(self, name)
            require(saved is None or value is None, name, value, "left to pretrained_model_name_or_path")


def as_mapping(value: Any, name: str) -> dict[str, Any]:
    """A config given as a mapping (YAML), a JSON string or a JSON file."""
    if value is None or isinstance(value, dict):
        return dict(value or {})
    is_json = value.lstrip().startswith("{")  # then it is not a path, and may be too long for one
    text = value if is_json or not Path(value).is_file() else Path(value).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be JSON or a JSON file, got {value!r}: {error}") from error


def build_pipeline(config: PipelineSettings) -> TextToImagePipeline:
    """The pipeline to train: a saved one, or new weights around a frozen text encoder (and VAE)."""
    pipeline_class = InpaintPipeline if config.inpainting else TextToImagePipeline
    if config.pretrained_model_name_or_path:
        pipe = pipeline_class.from_pretrained(config.pretrained_model_name_or_path)
        if config.prediction_type:
            pipe.scheduler.register_to_config(prediction_type=config.prediction_type)
        changes: dict[str, Any] = {"self_conditioning": True} if config.self_conditioning else {}
        if config.inpainting:  # x_t, the mask and the masked picture, in this order (inpainting.see_mask)
            changes["in_channels"] = 2 * pipe.num_channels_latents + 1
        if any(pipe.unet.config.get(key) != value for key, value in changes.items()):
            pipe.unet = widen_input(pipe.unet, **changes)
        return pipe
    settings = as_mapping(config.noise_scheduler, "noise_scheduler")
    if config.prediction_type:
        settings["prediction_type"] = config.prediction_type
    network = as_mapping(config.unet, "unet")
    if config.self_conditioning:
        network["self_conditioning"] = True
    if config.inpainting:
        network.setdefault("in_channels", 7)
    tokenizer, text_encoder = load_text_tower(config.text_encoder or "")
    vae = AutoencoderKL.from_pretrained(config.vae) if config.vae else None
    parts = {"unet": ConditionalUNet(**network), "scheduler": DDPMScheduler(**settings), "vae": vae}
    return pipeline_class(tokenizer=tokenizer, text_encoder=text_encoder, **parts)


def compile_blocks(unet: ConditionalUNet) -> None:
    """torch.compile each block of the U-Net in place, separately for each input size.

    The U-Net is not compiled as a whole: with torch 2.14, in bf16 on a CPU with AMX, the result is NaN.
    """
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if block is not None:
            block.compile(dynamic=False)


class _TowerOfCLIP(CLIPTextModelWithProjection):
    """Loads the text tower of a complete CLIP without a warning about the other tower's weights."""

    _keys_to_ignore_on_load_unexpected = ["vision_model", "visual_projection", "logit_scale"]


def load_text_tower(folder: str, argument: str = "text_encoder") -> tuple[Any, CLIPTextModelWithProjection]:
    """(tokenizer, text tower) from the folder of a pipeline or a CLIP. Raises a ValueError that names the
    argument if the folder has none."""
    root = Path(folder)
    of_pipeline = (root / "model_index.json").is_file()
    words, weights = (root / "tokenizer", root / "text_encoder") if of_pipeline else (root, root)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(words)
        loaded = _TowerOfCLIP.from_pretrained(weights, dtype=torch.float32)
    except OSError as error:
        rule = "a folder of a pipeline or a CLIP"
        raise ValueError(f"{argument} must be {rule}, got {folder!r}: {error}") from error
    tower = CLIPTextModelWithProjection(loaded.config).eval()
    tower.load_state_dict(loaded.state_dict())
    return tokenizer, tower


def widen_input(unet: ConditionalUNet, **changes: Any) -> ConditionalUNet:
    """The same network with more inputs to `conv_in`: more `in_channels`, self-conditioning, or both. The
    weights of the new inputs are 0, so its predictions do not change until it is trained.

    The groups of inputs keep their order: channels of x_t, of the x0 estimate, and of the pooled text.

    Raises:
        ValueError: `changes` would remove inputs.
    """
    wider = ConditionalUNet.from_config(unet.config, **changes)
    state, narrow, start, end = unet.state_dict(), unet.conv_in.weight, 0, 0
    weight = torch.zeros_like(wider.conv_in.weight, dtype=narrow.dtype)  # (C, inputs, k, k)
    for old, new in zip(input_groups(unet.config), input_groups(wider.config), strict=True):
        if new < old:
            raise ValueError(f"{changes} must not take inputs away: {old} of conv_in would become {new}")
        weight[:, end : end + old] = narrow[:, start : start + old]
        start, end = start + old, end + new
    wider.load_state_dict(state | {"conv_in.weight": weight})
    return wider


def input_groups(config: Any) -> tuple[int, int, int]:
    """The numbers of `conv_in` inputs for x_t (and what is concatenated to it), x0 estimate and text."""
    picture = config.in_channels * config.get("patch_size", 1) ** 2
    return picture, picture if config.get("self_conditioning") else 0, config.get("text_concat_channels", 0)
