"""Text to image: `TextToImagePipeline`, in pixels or in a VAE's latents."""

import inspect
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from .conditioning import TextEmbeddings, TextInputs, check_prompt, context_length, encode_prompt, estimate_x0
from .guidance import guidance_scale_embedding, guide, in_guidance_interval, noise_levels, takes_variance
from .hub import align_weights, finish_saved_folder, follow_stable_diffusion, prepare_loading
from .images import decode_latents, to_numpy, to_pil, to_unit

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class TextToImagePipeline(DiffusionPipeline, StableDiffusionMixin, TextualInversionLoaderMixin):
    r"""Draws pictures for prompts: x_T ~ N(0, I), then one U-Net pass (two when guided) for each timestep.

    Args:
        tokenizer: CLIP's, with a vocabulary of any size.
        text_encoder: transformers' CLIPTextModel, or CLIPTextModelWithProjection for projected pooled text.
        unet: ConditionalUNet, or diffusers' UNet2DConditionModel.
        scheduler: any of diffusers' that step in discrete time or sigma, or our DDPMScheduler.
        vae: decodes latents; None means that the U-Net draws pixels in [-1, 1] itself.
        safety_checker, feature_extractor: as Stable Diffusion folders have them; used when present.
        image_encoder, requires_safety_checker: unused, kept so that such a folder saves back whole.
        default_guidance_scale, default_num_inference_steps: what a call that does not say gets; they are
            saved in model_index.json, so that each model folder brings its own.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

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
        requires_safety_checker: bool = False,
        default_guidance_scale: float = 7.5,
        default_num_inference_steps: int = 50,
    ) -> None:
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("A `safety_checker` needs its `feature_extractor`; pass both or neither.")
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "TextToImagePipeline":
        """As diffusers', with our U-Net and scheduler wherever the folder names theirs or ours.

        Weights come from safetensors only, and as float32 unless `torch_dtype` says otherwise, whatever the
        precision on disk. A name that is no folder is taken as the Hub's.
        """
        folder, keywords = prepare_loading(pretrained_model_name_or_path, kwargs)
        pipeline = super().from_pretrained(str(folder), **keywords)
        align_weights(pipeline)
        if "scheduler" not in kwargs:
            follow_stable_diffusion(folder, pipeline.scheduler)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As diffusers', but always in safetensors: a pickle could run code on whoever loads it."""
        if not safe_serialization:
            logger.warning("safe_serialization=False is ignored: weights are saved as safetensors only.")
        super().save_pretrained(str(save_directory), True, *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes model_index.json; `save_pretrained` calls it last, after the components."""
        super().save_config(save_directory, *args, **kwargs)
        finish_saved_folder(Path(save_directory))

    # ---- what callbacks and callers may read during a call ----

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent, along one side; 1 without a vae."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 1

    @property
    def requires_pooled_text(self) -> bool:
        """Whether the U-Net reads pooled text, so that ready `prompt_embeds` must come with theirs."""
        keys = ("pooled_text_time_embedding", "text_concat_channels")
        return self.unet is not None and any(self.unet.config.get(key) for key in keys)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        return self._cross_attention_kwargs

    @property
    def do_classifier_free_guidance(self) -> bool:
        """guidance_scale > 1, unless the U-Net takes the scale as an input (time_cond_proj_dim)."""
        return self._guidance_scale > 1 and self.unet.config.get("time_cond_proj_dim") is None

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # ---- the stages of __call__ ----

    def check_inputs(
        self,
        text: TextInputs,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> int:
        """The number of prompts. Raises ValueError for whatever `__call__` cannot do."""

        def check(name: str, value: Any, good: bool, rule: str) -> None:
            if not good:
                raise ValueError(f"`{name}` must be {rule}, got {value!r}.")

        unit = self.vae_scale_factor * self.unet.config.get("patch_size", 1)
        for name, size in {"height": height, "width": width}.items():
            check(name, size, _is_whole(size, 1) and size % unit == 0, f"a positive multiple of {unit}")
        counts = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        for name, count in counts.items():
            check(name, count, _is_whole(count, 1), "a whole number above 0")
        for name, share in {"eta": eta, "guidance_rescale": guidance_rescale}.items():
            check(name, share, _is_number(share) and 0 <= share <= 1, "in 0..1")
        good = _is_number(guidance_scale) and 0 <= guidance_scale < math.inf
        check("guidance_scale", guidance_scale, good, "0 or more (1 or less is off)")
        if (interval := guidance_interval) is not None:
            pair = (
                isinstance(interval, (tuple, list)) and len(interval) == 2 and all(map(_is_number, interval))
            )
            rule = "noise levels (lo, hi), 0 <= lo < hi"
            check("guidance_interval", interval, pair and 0 <= interval[0] < interval[1], rule)
        check("output_type", output_type, output_type in OUTPUT_TYPES, f"one of {OUTPUT_TYPES}")
        if clip_skip is not None and self.text_encoder is not None:
            layers = self.text_encoder.config.num_hidden_layers
            good = _is_whole(clip_skip, 0) and clip_skip <= layers
            check("clip_skip", clip_skip, good, f"in 0..{layers}, the text encoder's layers")
        good = isinstance(cross_attention_kwargs, dict | None)
        check("cross_attention_kwargs", cross_attention_kwargs, good, "a dict")
        good = callback_on_step_end is None or callable(callback_on_step_end)
        check("callback_on_step_end", callback_on_step_end, good, "callable")
        asked, known = callback_on_step_end_tensor_inputs or [], self._callback_tensor_inputs
        check("callback_on_step_end_tensor_inputs", asked, set(asked) <= set(known), f"among {known}")

        context = None if self.text_encoder is None else context_length(self.tokenizer, self.text_encoder)
        guided = guidance_scale > 1 and self.unet.config.get("time_cond_proj_dim") is None
        pictures = check_prompt(text, guided, self.requires_pooled_text, context) * num_images_per_prompt
        generators = generator if isinstance(generator, list) else [generator] * pictures
        good = all(isinstance(one, torch.Generator | None) for one in generators)
        check("generator", generator, good, "a torch.Generator or a list of them")
        if len(generators) != pictures:
            raise ValueError(f"Got {len(generators)} generators for {pictures} pictures.")
        channels, out_channels = self.unet.config.in_channels, self.unet.config.out_channels
        if out_channels not in (channels, 2 * channels):  # twice: a learned variance
            raise ValueError(f"A U-Net from {channels} to {out_channels} channels is no text-to-image model.")
        shape, given = self._latents_shape(pictures, channels, height, width), getattr(latents, "shape", None)
        check("latents", given, latents is None or given == shape, f"a tensor of {shape}")
        return pictures // num_images_per_prompt

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

        For a model with `requires_pooled_text`, `encode_text_inputs` gives the pooled text as well.
        """
        inputs = TextInputs(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        text = self.encode_text_inputs(
            inputs, num_images_per_prompt, do_classifier_free_guidance, clip_skip, device
        )
        prompt_embeds, negative_prompt_embeds = text.prompt, text.negative
        return prompt_embeds, negative_prompt_embeds

    def encode_text_inputs(
        self,
        inputs: TextInputs,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        clip_skip: int | None = None,
        device: torch.device | str | None = None,
    ) -> TextEmbeddings:
        """`conditioning.encode_prompt` with this pipeline's tower, textual inversions and precision."""
        for name in ("prompt", "negative_prompt"):
            if getattr(inputs, name) is not None and self.tokenizer is not None:
                converted = self.maybe_convert_prompt(getattr(inputs, name), self.tokenizer)
                inputs = inputs._replace(**{name: converted})
        return encode_prompt(
            self.tokenizer,
            self.text_encoder,
            inputs,
            num_images_per_prompt,
            do_classifier_free_guidance,
            clip_skip,
            device=self._execution_device if device is None else device,
            dtype=(self.text_encoder if self.unet is None else self.unet).dtype,
        )

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x_T = init_noise_sigma * z, z the given `latents` or drawn, once for each generator of a list."""
        shape = self._latents_shape(batch_size, num_channels_latents, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype)
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """`generator` and `eta` for `scheduler.step`, each only where its signature takes it."""
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"generator": generator, "eta": eta}
        return {name: value for name, value in offered.items() if name in accepted}

    def run_safety_checker(
        self, image: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, list[bool] | None]:
        """(B, 3, H, W) in [-1, 1] -> the same with flagged pictures black, and which are flagged."""
        if self.safety_checker is None:
            return image, None
        features = self.feature_extractor(to_pil(image), return_tensors="pt").to(self._execution_device)
        unit, flagged = self.safety_checker(images=to_unit(image), clip_input=features.pixel_values.to(dtype))
        return unit * 2 - 1, flagged

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        r"""Draws `num_images_per_prompt` pictures for each prompt.

        Args:
            prompt: one or several; what does not fit the context is cut with a warning.
            height, width: in pixels; default to what the U-Net was trained on.
            num_inference_steps: None means the model folder's own, `config.default_num_inference_steps`.
            timesteps, sigmas: descending schedules in place of the scheduler's own, where it takes them.
            guidance_scale: s of uncond + s (cond - uncond). None means the folder's `default_guidance_scale`;
                1 or less is off and runs one U-Net pass a step.
            negative_prompt: takes the place of the null prompt; one for all prompts, or one for each.
            eta: DDIM's, in 0..1; other schedulers ignore it.
            generator: one, drawn from in diffusers' order, or a list with one for each picture, which makes a
                picture depend on its own seed alone and not on the batch it is in.
            latents: z of N(0, I), (pictures, C, H, W) at the U-Net's resolution, in place of drawn noise.
            prompt_embeds, negative_prompt_embeds: ready token states (B, L, D) in place of the prompts.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent", undecoded.
            return_dict: False returns (images, nsfw_content_detected).
            cross_attention_kwargs: passed to the U-Net.
            guidance_rescale: phi in 0..1 of Lin et al. (2023).
            clip_skip: text encoder layers to leave out, for the prompt and the negative prompt alike.
            callback_on_step_end: f(pipe, i, t, tensors) -> dict of those to replace. While guidance is on,
                `prompt_embeds` is [negative, prompt] in one tensor, as in Stable Diffusion's loop.
            callback_on_step_end_tensor_inputs: names out of `_callback_tensor_inputs`; default ["latents"].
            guidance_interval: (lo, hi) in noise level sigma = sqrt((1 - abar) / abar); guidance is on where
                lo < sigma <= hi, and elsewhere the unconditional pass is left out (Kynkaanniemi et al. 2024).
            pooled_prompt_embeds, negative_pooled_prompt_embeds: (B, P), needed beside ready token states by
                models with `requires_pooled_text`.

        Returns images and nsfw_content_detected (None without a safety checker).
        Raises ValueError for arguments that make no sense, before any work.
        """
        # 1. Settle the defaults and check the rest
        sample_size = self.unet.config.sample_size
        sample_height, sample_width = (sample_size,) * 2 if isinstance(sample_size, int) else sample_size
        height = sample_height * self.vae_scale_factor if height is None else height
        width = sample_width * self.vae_scale_factor if width is None else width
        steps = (
            self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        )
        scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        num_images_per_prompt = 1 if num_images_per_prompt is None else num_images_per_prompt
        output_type = "pil" if output_type is None else output_type
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        elif callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]
        inputs = TextInputs(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
        )
        batch_size = self.check_inputs(
            inputs,
            height,
            width,
            steps,
            scale,
            num_images_per_prompt,
            eta,
            generator,
            latents,
            output_type,
            cross_attention_kwargs,
            guidance_rescale,
            clip_skip,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            guidance_interval,
        )
        self._guidance_scale, self._guidance_rescale, self._clip_skip = scale, guidance_rescale, clip_skip
        self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False
        device, pictures = self._execution_device, batch_size * num_images_per_prompt
        self_conditioning = self.unet.config.get("self_conditioning", False)

        # 2. Lay out the timesteps: first, because a schedule that the scheduler refuses is a bad argument too
        visited, steps = retrieve_timesteps(self.scheduler, steps, device, timesteps, sigmas)
        self._num_timesteps = len(visited)
        needs_levels = guidance_interval is not None or self_conditioning
        levels = noise_levels(self.scheduler, visited) if needs_levels else [math.nan] * len(visited)

        # 3. Encode the prompts. Negatives come first, so that the last rows are always the prompts' own
        text = self.encode_text_inputs(
            inputs, num_images_per_prompt, self.do_classifier_free_guidance, clip_skip, device
        )
        prompt_embeds, negative_prompt_embeds, pooled = text.prompt, text.negative, text.pooled
        if text.negative is not None:
            prompt_embeds = torch.cat([text.negative, text.prompt])  # (2B, L, D)
            if self.requires_pooled_text and text.pooled is not None and text.negative_pooled is not None:
                pooled = torch.cat([text.negative_pooled, text.pooled])  # (2B, P)

        # 4. Draw the noise to start from
        channels = self.unet.config.in_channels
        latents = self.prepare_latents(
            pictures, channels, height, width, prompt_embeds.dtype, device, generator, latents
        )
        x0_self = torch.zeros_like(latents) if self_conditioning else None
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 5. Denoise
        warmup_steps = len(visited) - steps * self.scheduler.order
        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(visited):
                if self.interrupt:
                    continue
                guided = self.do_classifier_free_guidance and in_guidance_interval(
                    levels[i], guidance_interval
                )
                copies = 2 if guided else 1  # of the pictures in one U-Net pass
                model_output = self.unet(
                    self.scheduler.scale_model_input(torch.cat([latents] * copies), t),
                    t,
                    encoder_hidden_states=prompt_embeds[-copies * pictures :],
                    return_dict=False,
                    **self._unet_kwargs(copies * pictures, pooled, x0_self),
                )[0]
                if guided:
                    model_output = guide(model_output, channels, self.guidance_scale, self.guidance_rescale)
                if not takes_variance(self.scheduler):
                    model_output = model_output[:, :channels]
                step = self.scheduler.step(model_output, t, latents, **extra_step_kwargs)
                if x0_self is not None:
                    kind = self.scheduler.config.prediction_type
                    x0_self = estimate_x0(step, model_output[:, :channels], latents, levels[i], kind)
                latents = step.prev_sample

                if callback_on_step_end is not None:
                    values: Any = (latents, prompt_embeds, negative_prompt_embeds)
                    tensors = dict(zip(self._callback_tensor_inputs, values, strict=True))
                    asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, asked) or {}
                    latents, prompt_embeds, negative_prompt_embeds = list(tensors.values())[:3]
                if i == len(visited) - 1 or ((i + 1) > warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()

        # 6. Decode
        images: Any = latents
        flagged = None
        if output_type != "latent":
            image = decode_latents(self.vae, latents, generator)
            image, flagged = self.run_safety_checker(image, prompt_embeds.dtype)
            images = {"pil": to_pil, "np": to_numpy, "pt": to_unit}[output_type](image)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    def _latents_shape(self, pictures: int, channels: int, height: int, width: int) -> torch.Size:
        return torch.Size(
            (pictures, channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        )

    def _unet_kwargs(
        self, rows: int, pooled: torch.Tensor | None, x0_self: torch.Tensor | None
    ) -> dict[str, Any]:
        """What the U-Net is told besides x_t, t and the token states: only what its config asks for."""
        added: dict[str, torch.Tensor] = {}
        if self.requires_pooled_text and pooled is not None:
            added["pooled_text"] = pooled[-rows:]  # (rows, P)
        if x0_self is not None:
            added["x0_self"] = torch.cat([x0_self] * (rows // len(x0_self)))
        kwargs: dict[str, Any] = {"cross_attention_kwargs": self.cross_attention_kwargs}
        if (dim := self.unet.config.get("time_cond_proj_dim")) is not None:
            embedding = guidance_scale_embedding(self.guidance_scale, dim)  # (1, dim)
            kwargs["timestep_cond"] = embedding.to(self.unet.device, self.unet.dtype).expand(rows, -1)
        return kwargs | {"added_cond_kwargs": added or None}


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and not math.isnan(value)
    )
