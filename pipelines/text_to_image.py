"""Text to image: `TextToImagePipeline`, in pixels or in a VAE's latents."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from .chain.guidance import in_guidance_interval, noise_levels
from .drawing.checks import (
    OUTPUT_TYPES,
    check,
    check_callback,
    check_channels,
    check_clip_skip,
    check_counts,
    check_cross_attention_kwargs,
    check_generator,
    check_guidance,
    check_guidance_models,
    check_shares,
    check_size,
)
from .drawing.images import decode_latents, to_numpy, to_pil, to_unit
from .drawing.sizes import TwoStageMixin
from .drawing.steering import GuidanceInputs, GuidanceMixin
from .drawing.text import (
    TextEmbeddings,
    TextInputs,
    check_prompt,
    context_length,
    encode_prompt,
    estimate_x0,
    join_text,
    plain_texts,
)
from .folders.adapters import AdapterMixin, refuse_ip_adapter, safetensors_only, text_lora_scaled
from .folders.conversion import ConversionMixin
from .folders.loading import LoadMixin, align_weights, own_class
from .folders.model_card import ModelCardMixin
from .folders.saving import SaveMixin


class TextToImagePipeline(
    LoadMixin, ConversionMixin, SaveMixin, ModelCardMixin, AdapterMixin, GuidanceMixin, TwoStageMixin,
    DiffusionPipeline,
):  # fmt: skip
    r"""Draws pictures for prompts: x_T ~ N(0, I), then one U-Net pass (two when guided) for each timestep.

    Args:
        tokenizer: CLIP's, with a vocabulary of any size.
        text_encoder: transformers' CLIPTextModel, or CLIPTextModelWithProjection for projected pooled text.
        unet: ConditionalUNet, or diffusers' UNet2DConditionModel.
        scheduler: any of diffusers' that step in discrete time or sigma, or our DDPMScheduler.
        vae: decodes latents; None means that the U-Net draws pixels in [-1, 1] itself.
        safety_checker, feature_extractor: as Stable Diffusion folders have them; used when present.
        noisy_clip, noisy_classifier: NoisyCLIP and NoisyClassifier, trained on this model's noised pictures.
        clip_guidance_model: GuidanceCLIP, or what `GuidanceCLIP.load` makes one of: a folder, open_clip's
            name. All three are for guidance beyond the U-Net's own, and saved along where they are there.
        image_encoder, requires_safety_checker: unused, kept so that such a folder saves back whole.
        default_guidance_scale, default_num_inference_steps, default_clip_guidance_scale: what a call that
            does not say gets; saved in model_index.json, so that each model folder brings its own.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = [
        "vae", "safety_checker", "feature_extractor", "image_encoder",
        "noisy_clip", "noisy_classifier", "clip_guidance_model",
    ]  # fmt: skip
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

    # what ConversionMixin takes from the other leaves
    own_class = staticmethod(own_class)
    align_weights = staticmethod(align_weights)
    safetensors_only = staticmethod(safetensors_only)

    # ---- what callbacks and callers may read during a call ----

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent, along one side; 1 without a vae."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 1

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip

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
        check_size(height, width, self.size_unit)
        check_counts(num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
        check_shares(eta=eta, guidance_rescale=guidance_rescale)
        check_guidance(guidance_scale, guidance_interval)
        check("output_type", output_type, output_type in OUTPUT_TYPES, f"one of {OUTPUT_TYPES}")
        if self.text_encoder is not None:
            check_clip_skip(clip_skip, self.text_encoder.config.num_hidden_layers)
        check_cross_attention_kwargs(cross_attention_kwargs, hasattr(self.unet, "attn_processors"))
        asked = callback_on_step_end_tensor_inputs or []
        check_callback(callback_on_step_end, asked, self._callback_tensor_inputs)

        context = None if self.text_encoder is None else context_length(self.tokenizer, self.text_encoder)
        guided = guidance_scale > 1 and self.unet.config.get("time_cond_proj_dim") is None
        pictures = check_prompt(text, guided, self.requires_pooled_text, context) * num_images_per_prompt
        check_generator(generator, pictures)
        channels = self.unet.config.in_channels
        check_channels(channels, self.unet.config.out_channels)
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
            inputs, num_images_per_prompt, do_classifier_free_guidance, clip_skip, device, lora_scale
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
        lora_scale: float | None = None,
    ) -> TextEmbeddings:
        """`conditioning.encode_prompt` with this pipeline's tower, textual inversions and precision."""
        tokenizer = self.tokenizer  # with tokens of textual inversion, maybe
        learned = tokenizer and set(tokenizer.added_tokens_encoder) - set(tokenizer.all_special_tokens)
        for name in ("prompt", "negative_prompt"):
            if learned and getattr(inputs, name) is not None:
                converted = self.maybe_convert_prompt(getattr(inputs, name), self.tokenizer)
                inputs = inputs._replace(**{name: converted})
        with text_lora_scaled(self.text_encoder, lora_scale):
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
        """`generator` and `eta` for `scheduler.step`, each only where its signature takes it. DDIM that clips
        pixels shall take eps from the clipped x0 too: strongly guided pictures fall apart otherwise."""
        accepted = inspect.signature(self.scheduler.step).parameters
        clips = self.vae is None and bool(self.scheduler.config.get("clip_sample"))
        offered = {"generator": generator, "eta": eta, "use_clipped_model_output": clips}
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
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
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
        clip_guidance_scale: float | None = None,
        clip_guidance: str = "noised",
        clip_guidance_cut_outs: int = 8,
        clip_guidance_through_unet: bool = False,
        classifier_guidance_scale: float = 0.0,
        class_labels: int | str | list[int] | list[str] | None = None,
        combined_prompts: dict[str, float] | None = None,
        num_candidates: int = 1,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        r"""Draws `num_images_per_prompt` pictures for each prompt.

        Args:
            prompt: one or several; what does not fit the context is cut with a warning. "(red:1.3)" weighs
                words, in negative prompts too.
            height, width: in pixels; default to what the U-Net was trained on. With `pipe.upsampler` set,
                sizes of at least its factor times that are drawn smaller by the factor and then enlarged.
            num_inference_steps: None means the model folder's own, `config.default_num_inference_steps`.
            timesteps, sigmas: descending schedules in place of the scheduler's own, where it takes them.
            guidance_scale: s of uncond + s (cond - uncond). None means the folder's `default_guidance_scale`;
                1 or less is off and runs one U-Net pass a step.
            negative_prompt: takes the place of the null prompt; one for all prompts, or one for each.
            eta: DDIM's, in 0..1; other schedulers ignore it.
            generator: one, drawn from in diffusers' order, or a list with one for each picture (candidate),
                which makes a picture depend on its own seed alone and not on the batch it is in.
            latents: z of N(0, I), (pictures, C, H, W) at the U-Net's resolution, in place of drawn noise.
            prompt_embeds, negative_prompt_embeds: ready token states (B, L, D) in place of the prompts.
            ip_adapter_image, ip_adapter_image_embeds: not supported.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent", undecoded.
            return_dict: False returns (images, nsfw_content_detected).
            cross_attention_kwargs: {"scale": s}, the strength of loaded LoRAs in text encoder and U-Net.
            guidance_rescale: phi in 0..1 of Lin et al. (2023).
            clip_skip: text encoder layers to leave out, for the prompt and the negative prompt alike.
            callback_on_step_end: f(pipe, i, t, tensors) -> dict of those to replace. While guidance is on,
                `prompt_embeds` is [negative, prompt] in one tensor, as in Stable Diffusion's loop.
            callback_on_step_end_tensor_inputs: names out of `_callback_tensor_inputs`; default ["latents"].
            guidance_interval: (lo, hi) in noise level sigma = sqrt((1 - abar) / abar); guidance, of any kind,
                is on where lo < sigma <= hi, elsewhere its passes are left out (Kynkaanniemi et al. 2024).
            pooled_prompt_embeds, negative_pooled_prompt_embeds: (B, P), where `requires_pooled_text` is true.
            clip_guidance_scale: s of CLIP guidance. None: the folder's own if guidance_scale is None, else 0.
            clip_guidance: "noised", by `noisy_clip`, or "clean", by `clip_guidance_model` on the predicted
                x0, seen whole and in `clip_guidance_cut_outs` - 1 random squares; its gradient runs through
                the U-Net with `clip_guidance_through_unet`, which takes twice the time or more.
            classifier_guidance_scale, class_labels: s of classifier guidance by `noisy_classifier`, 0 is off,
                and the classes, by name or number, one for all prompts or one for each.
            combined_prompts: further prompts and their weights w_i, drawn together with each prompt:
                uncond + s [(cond - uncond) + sum_i w_i (cond_i - uncond)], w_i < 0 to stay away.
            num_candidates: so many are drawn for each picture; the best by CLIP, and by a class, is kept.

        Returns images and nsfw_content_detected (None without a safety checker).
        Raises ValueError for arguments that make no sense, before any work.
        """
        # 1. Settle the defaults and check the rest
        refuse_ip_adapter(ip_adapter_image=ip_adapter_image, ip_adapter_image_embeds=ip_adapter_image_embeds)
        sample_size = self.unet.config.sample_size
        sample_height, sample_width = (sample_size,) * 2 if isinstance(sample_size, int) else sample_size
        own = sample_height * self.vae_scale_factor, sample_width * self.vae_scale_factor
        height, width = own[0] if height is None else height, own[1] if width is None else width
        factor = self.enlargement(height, width, own, self.size_unit, prompt is not None)
        if factor > 1:
            height, width = height // factor, width // factor
        steps = self.config.default_num_inference_steps if (n := num_inference_steps) is None else n
        own_guide = clip_guidance == "noised" and prompt is not None and (height, width)
        scale, clip_guidance_scale = self.guidance_defaults(guidance_scale, clip_guidance_scale, own_guide)
        num_images_per_prompt = 1 if num_images_per_prompt is None else num_images_per_prompt
        output_type = "pil" if output_type is None else output_type
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        elif callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]
        inputs = TextInputs(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds,
            pooled_prompt_embeds, negative_pooled_prompt_embeds,
        )  # fmt: skip
        steering = GuidanceInputs(
            clip_guidance_scale, clip_guidance, clip_guidance_cut_outs, clip_guidance_through_unet,
            classifier_guidance_scale, class_labels, combined_prompts, num_candidates,
        )  # fmt: skip
        check_counts(num_images_per_prompt=num_images_per_prompt, num_candidates=num_candidates)
        wanted, num_images_per_prompt = num_images_per_prompt, num_images_per_prompt * num_candidates
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
        self._guidance_scale, self._clip_guidance_scale = scale, clip_guidance_scale
        self._guidance_rescale, self._clip_skip = guidance_rescale, clip_skip
        self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False
        words, guided = plain_texts(prompt), self.do_classifier_free_guidance
        size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        check_guidance_models(steering, self.components, inputs, batch_size, guided, size)
        self._weights = list((combined_prompts or {}).values())
        device, pictures = self._execution_device, batch_size * num_images_per_prompt
        self_conditioning = self.unet.config.get("self_conditioning", False)

        # 2. Lay out the timesteps: first, because a schedule that the scheduler refuses is a bad argument too
        visited, steps = retrieve_timesteps(self.scheduler, steps, device, timesteps, sigmas)
        self._num_timesteps = len(visited)
        climbs = clip_guidance_scale > 0 or classifier_guidance_scale > 0
        needs_levels = guidance_interval is not None or self_conditioning or climbs
        levels = noise_levels(self.scheduler, visited) if needs_levels else [math.nan] * len(visited)

        # 3. Encode the prompts. Negatives come first, so that the last rows are always the prompts' own
        lora_scale = (cross_attention_kwargs or {}).get("scale")
        options: Any = (clip_skip, device, lora_scale)
        text = self.encode_text_inputs(inputs, num_images_per_prompt, guided, *options)
        further = [
            self.encode_text_inputs(TextInputs(one), 1, False, *options) for one in combined_prompts or ()
        ]
        prompt_embeds, pooled = join_text(text, further)
        negative_prompt_embeds = text.negative

        # 4. Prepare the gradients of classifier and CLIP guidance, where they are asked for
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        to_x0 = functools.partial(estimate_x0, None, prediction_type=kind)
        steer = self.prepare_guidance(steering, words, text.pooled, pictures, to_x0)

        # 5. Draw the noise to start from
        channels = self.unet.config.in_channels
        latents = self.prepare_latents(
            pictures, channels, height, width, prompt_embeds.dtype, device, generator, latents
        )
        x0_self = torch.zeros_like(latents) if self_conditioning else None
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 6. Denoise
        warmup_steps = len(visited) - steps * self.scheduler.order
        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(visited):
                if self.interrupt:
                    continue
                active = in_guidance_interval(levels[i], guidance_interval)
                predict = functools.partial(
                    self.predict,
                    t=t,
                    guided=active and self.do_classifier_free_guidance,
                    prompt_embeds=prompt_embeds,
                    pooled=pooled,
                    x0_self=x0_self,
                )
                x_t = self.scheduler.scale_model_input(latents, t)
                model_output, shift = steer(predict, x_t, t, levels[i], active)
                step = self.scheduler.step(model_output, t, latents, **extra_step_kwargs)
                if x0_self is not None:
                    x0_self = estimate_x0(step, model_output[:, :channels], latents, levels[i], kind)
                latents = shift(step.prev_sample)

                if callback_on_step_end is not None:
                    values: Any = (latents, prompt_embeds, negative_prompt_embeds)
                    tensors = dict(zip(self._callback_tensor_inputs, values, strict=True))
                    asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, asked) or {}
                    latents, prompt_embeds, negative_prompt_embeds = list(tensors.values())[:3]
                if i == len(visited) - 1 or ((i + 1) > warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()

        # 7. Decode, the best of the candidates
        kept = torch.arange(pictures)
        if num_candidates > 1:
            kept = self.rank_candidates(steering, latents, words, text.pooled, wanted)
            latents = latents[kept]
        images: Any = latents
        flagged = None
        if output_type != "latent":
            image = decode_latents(self.vae, latents, generator)
            if factor > 1:
                image = self.enlarge(image, words, generator, kept)
            image, flagged = self.run_safety_checker(image, prompt_embeds.dtype)
            images = {"pil": to_pil, "np": to_numpy, "pt": to_unit}[output_type](image)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_latents(self.vae, latents.to(self.unet.dtype))

    def _latents_shape(self, pictures: int, channels: int, height: int, width: int) -> torch.Size:
        return torch.Size(
            (pictures, channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        )
