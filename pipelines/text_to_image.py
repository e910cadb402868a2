"""Text to image: `TextToImagePipeline`, in pixels or in a VAE's latents."""

from operator import attrgetter
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from .drawing.loop import Task, draw
from .drawing.request import Request, TextInputs, check, check_size, takes
from .drawing.sizes import enlarge, enlargement
from .drawing.text import encode_for, plain_texts
from .folders.adapters import AdapterMixin
from .folders.conversion import ConversionMixin
from .folders.loading import LoadMixin, own_class
from .folders.model_card import ModelCardMixin
from .folders.saving import SaveMixin


class TextToImage(Task):
    """Draws pictures from noise. With an upsampler, large ones are drawn small and then enlarged."""

    def read(self) -> None:
        pipe, request = self.pipe, self.request
        own_width, own_height = pipe.sample_size
        height = own_height if request.height is None else request.height
        width = own_width if request.width is None else request.width
        if pipe.upsampler is not None:
            factor = enlargement(pipe, height, width, request.prompt is not None)
            if factor > 1:
                height, width, self.enlarge = height // factor, width // factor, self.by_upsampler
        check_size(height, width, pipe.size_unit)
        self.height, self.width = height, width
        # the model's own CLIP guidance, if the call leaves all guidance to it
        size = request.clip_guidance == "noised" and request.prompt is not None and (height, width)
        guidance = request.guidance_scale, request.clip_guidance_scale
        _, request.clip_guidance_scale = pipe.guidance_defaults(*guidance, size)

    def by_upsampler(self, pictures: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        prompts = plain_texts(self.request.prompt)
        return enlarge(self.pipe, pictures, prompts, self.request.generator, kept)


class TextToImagePipeline(
    LoadMixin, ConversionMixin, SaveMixin, ModelCardMixin, AdapterMixin, DiffusionPipeline
):
    r"""Draws pictures for prompts: x_T ~ N(0, I), then one U-Net pass (two when guided) for each timestep.

    Args:
        tokenizer: CLIP's, with a vocabulary of any size.
        text_encoder: transformers' CLIPTextModel, or CLIPTextModelWithProjection for projected pooled text.
        unet: ConditionalUNet, or diffusers' UNet2DConditionModel.
        scheduler: any of diffusers' that steps in discrete time or sigma, or our DDPMScheduler.
        vae: decodes latents; None means that the U-Net draws pixels in [-1, 1] itself.
        safety_checker, feature_extractor: as Stable Diffusion folders have them; used when present.
        noisy_clip, noisy_classifier: NoisyCLIP and NoisyClassifier, trained on this model's noised pictures.
        clip_guidance_model: GuidanceCLIP, or what `GuidanceCLIP.load` takes: a folder or open_clip's name. It
            and the two above are for guidance by other networks, and are saved with the pipeline if present.
        image_encoder, requires_safety_checker: unused; kept so that folders with them are saved complete.
        default_guidance_scale, default_num_inference_steps, default_clip_guidance_scale: for calls that leave
            these out; saved in model_index.json, so that each model folder has its own.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = [
        "vae", "safety_checker", "feature_extractor", "image_encoder",
        "noisy_clip", "noisy_classifier", "clip_guidance_model",
    ]  # fmt: skip
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    # If this is a SuperResolutionPipeline, sizes of at least its factor times the model's own are drawn
    # smaller by the factor, then enlarged. It is a separate pipeline, neither saved nor moved with this one.
    upsampler: Any = None
    # What the last call asked for; callbacks may change the first two between steps
    _guidance_scale: float = 1.0
    _guidance_rescale: float = 0.0
    _clip_guidance_scale: float = 0.0
    _clip_skip: int | None = None
    _cross_attention_kwargs: dict[str, Any] | None = None
    _num_timesteps: int = 0
    _interrupt: bool = False

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel | CLIPTextModelWithProjection,
        unet: ModelMixin | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: ModelMixin | AutoencoderKL | None = None,
        safety_checker: PreTrainedModel | None = None,
        feature_extractor: Any = None,
        image_encoder: PreTrainedModel | None = None,
        noisy_clip: ModelMixin | None = None,
        noisy_classifier: ModelMixin | None = None,
        clip_guidance_model: ModelMixin | str | None = None,
        requires_safety_checker: bool = False,
        default_guidance_scale: float = 7.5,
        default_num_inference_steps: int = 50,
        default_clip_guidance_scale: float = 0.0,
    ) -> None:
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("A `safety_checker` needs its `feature_extractor`; pass both or neither.")
        if isinstance(clip_guidance_model, str):
            clip_class: Any = own_class("GuidanceCLIP")
            rule = "a GuidanceCLIP where that is no file"
            check("clip_guidance_model", clip_guidance_model, clip_class, rule)
            clip_guidance_model = clip_class.load(clip_guidance_model)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            noisy_clip=noisy_clip,
            noisy_classifier=noisy_classifier,
            clip_guidance_model=clip_guidance_model,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
            default_clip_guidance_scale=default_clip_guidance_scale,
        )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along one side; 1 without a vae."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 1

    @property
    def num_channels_latents(self) -> int:
        """C: channels of x_t."""
        return self.unet.config.in_channels

    @property
    def sample_size(self) -> tuple[int, int]:
        """(width, height) in pixels that the U-Net was trained on."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return width * self.vae_scale_factor, height * self.vae_scale_factor

    @property
    def size_unit(self) -> int:
        """Heights and widths must be multiples of this many pixels."""
        return self.vae_scale_factor * self.unet.config.get("patch_size", 1)

    @property
    def requires_pooled_text(self) -> bool:
        """Whether the U-Net reads pooled text, so that ready `prompt_embeds` need `pooled_prompt_embeds`."""
        keys = ("pooled_text_time_embedding", "text_concat_channels")
        return self.unet is not None and any(self.unet.config.get(key) for key in keys)

    # ---- what callbacks and callers may read

    guidance_scale = property(attrgetter("_guidance_scale"))
    guidance_rescale = property(attrgetter("_guidance_rescale"))
    clip_guidance_scale = property(attrgetter("_clip_guidance_scale"))
    clip_skip = property(attrgetter("_clip_skip"))
    cross_attention_kwargs = property(attrgetter("_cross_attention_kwargs"))
    num_timesteps = property(attrgetter("_num_timesteps"))
    interrupt = property(attrgetter("_interrupt"))

    @property
    def do_classifier_free_guidance(self) -> bool:
        """guidance_scale > 1, unless the U-Net takes the scale as an input (time_cond_proj_dim)."""
        return self._guidance_scale > 1 and self.unet.config.get("time_cond_proj_dim") is None

    def guidance_defaults(
        self, guidance_scale: float | None, clip_guidance_scale: float | None, size: tuple[int, int] | Any
    ) -> tuple[float, float]:
        """(s of classifier-free guidance, s of CLIP guidance) of a call. None means the folder's own; for
        CLIP guidance only if both are None and `noisy_clip` sees pictures of this (height, width), else 0."""
        own, clip = self.config.default_clip_guidance_scale, self.noisy_clip
        if clip_guidance_scale is None:
            side = 0 if clip is None else clip.config.sample_size * self.vae_scale_factor
            clip_guidance_scale = own if guidance_scale is None and size == (side, side) else 0.0
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        return guidance_scale, clip_guidance_scale

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(prompt states, negative states), each (B * num_images_per_prompt, L, D); diffusers' arguments.

        For a model with `requires_pooled_text`, `drawing.text.encode_for` returns the pooled text as well.
        """
        inputs = TextInputs(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        guided = do_classifier_free_guidance
        text = encode_for(self, inputs, num_images_per_prompt, guided, clip_skip, device, lora_scale)
        prompt_embeds, negative_prompt_embeds = text.prompt, text.negative
        return prompt_embeds, negative_prompt_embeds

    @torch.no_grad()
    @takes(
        "text_to_image",
        "prompt height width num_inference_steps timesteps sigmas guidance_scale negative_prompt "
        "num_images_per_prompt eta generator latents prompt_embeds negative_prompt_embeds ip_adapter_image "
        "ip_adapter_image_embeds output_type return_dict cross_attention_kwargs guidance_rescale clip_skip "
        "callback_on_step_end callback_on_step_end_tensor_inputs guidance_interval pooled_prompt_embeds "
        "negative_pooled_prompt_embeds clip_guidance_scale clip_guidance clip_guidance_cut_outs "
        "clip_guidance_through_unet classifier_guidance_scale class_labels combined_prompts num_candidates",
    )
    def __call__(self, request: Request) -> Any:
        """Draws `num_images_per_prompt` pictures for each prompt.

        Returns images and nsfw_content_detected (None without a safety checker), as diffusers does.
        Raises ValueError for arguments that make no sense, before any work.
        """
        return draw(self, request, TextToImage(self, request))
