"""Image to image: `ImageToImagePipeline` draws over a picture's noised self (SDEdit, Meng et al. 2021)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor

from .chain.guidance import in_guidance_interval, noise_levels
from .drawing.checks import check, check_shares
from .drawing.images import (
    decode_latents,
    encode_pictures,
    nearest_size,
    read_pictures,
    to_numpy,
    to_pil,
    to_unit,
)
from .drawing.sizes import TwoStageMixin as TwoStageMixin
from .drawing.text import TextInputs, estimate_x0, join_text

# The code of a saved folder is copied as far as its pipeline's own file imports it, so what only the parent
# needs is imported here too.
from .folders.adapters import refuse_ip_adapter
from .folders.conversion import ConversionMixin as ConversionMixin
from .folders.loading import LoadMixin as LoadMixin
from .folders.model_card import ModelCardMixin as ModelCardMixin
from .folders.saving import SaveMixin as SaveMixin
from .text_to_image import TextToImagePipeline

OUTPUTS: dict[str, Callable[[torch.Tensor], Any]] = {"pil": to_pil, "np": to_numpy, "pt": to_unit}


class ImageToImagePipeline(TextToImagePipeline):
    """Draws prompts over a picture: x_t ~ q(x_t | picture) at the timestep that `strength` says, then as text
    to image from there. The parts are TextToImagePipeline's, and any folder of it loads here."""

    # ---- the stages of __call__ that text to image has not ----

    def read_images(self, image: Any, height: int | None, width: int | None) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], of a size that the model can draw, or ValueError.

        height, width: what to bring the pictures to; None takes them as they are.
        """
        if (height is None) != (width is None):
            raise ValueError(f"`height` and `width` go together, got {height} and {width}.")
        size = None if height is None or width is None else (height, width)
        if size is not None:
            self.check_allowed(*size, "`height` and `width`")
        pictures = read_pictures(image, size)
        self.check_allowed(pictures.shape[-2], pictures.shape[-1], "`image`")
        return pictures

    def check_allowed(self, height: int, width: int, name: str) -> None:
        """ValueError with the nearest size, unless the model can draw one of height x width."""
        unit = self.size_unit
        if height < 1 or width < 1 or height % unit or width % unit:
            nearest = nearest_size(height, width, unit)
            raise ValueError(
                f"{name} must be positive multiples of {unit}, got height {height} and width {width}. The "
                f"nearest are height={nearest[0]}, width={nearest[1]}: pass these to have pictures resized."
            )

    def get_timesteps(
        self,
        num_inference_steps: int,
        strength: float,
        device: torch.device | str,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> tuple[torch.Tensor, int]:
        """(the timesteps of the last int(strength * n) of n steps, and how many steps these are).

        Raises ValueError where none is left.
        """
        visited, steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        left_out = steps - min(int(steps * strength), steps)
        check("strength", strength, left_out < steps, f"at least {1 / steps:.3g}, one of {steps} steps")
        begin = left_out * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return visited[begin:], steps - left_out

    def encode_images(
        self,
        pictures: torch.Tensor,
        count: int,
        device: torch.device | str,
        dtype: torch.dtype,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Latents of `count` pictures, those of one repeated in neighbouring rows.

        With a list of generators each row's draw from the posterior comes from its own.
        """
        if isinstance(generator, list):
            pictures = for_each(pictures, count)
        latents = encode_pictures(self.vae, pictures.to(device=device, dtype=dtype), generator)
        return for_each(latents, count).to(dtype)

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        r"""Draws `num_images_per_prompt` pictures for each prompt, starting from a picture.

        Args: what `TextToImagePipeline.__call__` and diffusers' StableDiffusionImg2ImgPipeline take, and
            image: what to start from, one for all prompts or one for each; see `images.read_pictures` for
                what it may be. A tensor with the channels of the VAE's latents is taken as latents.
            strength: in 0..1, the share of the schedule that is run. 1 starts from almost pure noise, and
                little is kept; int(strength * num_inference_steps) steps are run, at least one.
            height, width: both, and the picture is resized to them; or neither, and it keeps its size.

        A picture of a size that the model cannot draw is an error that names the nearest; diffusers cuts its
        sides to multiples. With several prompts, pictures and `num_images_per_prompt`, picture i stays with
        prompt i.

        Returns images and nsfw_content_detected (None without a safety checker).
        Raises ValueError for arguments that make no sense, before any work.
        """
        # 1. Settle the defaults and check the rest
        refuse_ip_adapter(ip_adapter_image=ip_adapter_image, ip_adapter_image_embeds=ip_adapter_image_embeds)
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
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds,
            pooled_prompt_embeds, negative_pooled_prompt_embeds,
        )  # fmt: skip
        check_shares(strength=strength)
        unit = self.size_unit
        batch_size = self.check_inputs(
            inputs,
            unit,  # the picture's own size is checked below
            unit,
            steps,
            scale,
            num_images_per_prompt,
            eta,
            generator,
            output_type=output_type,
            cross_attention_kwargs=cross_attention_kwargs,
            guidance_rescale=guidance_rescale,
            clip_skip=clip_skip,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            guidance_interval=guidance_interval,
        )
        channels = self.unet.config.in_channels
        if self.vae is not None and isinstance(image, torch.Tensor) and image.shape[-3] == channels:
            picture, is_latent = image.reshape(-1, *image.shape[-3:]), True
        else:
            picture, is_latent = self.read_images(image, height, width), False
        check_rows("image", picture, batch_size)
        self._guidance_scale, self._guidance_rescale, self._clip_skip = scale, guidance_rescale, clip_skip
        self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False
        device, pictures = self._execution_device, batch_size * num_images_per_prompt

        # 2. Lay out the timesteps that are left
        visited, steps = self.get_timesteps(steps, strength, device, timesteps, sigmas)
        self._num_timesteps = len(visited)
        self_conditioning = self.unet.config.get("self_conditioning", False)
        levels = [math.nan] * len(visited)
        if guidance_interval is not None or self_conditioning:
            levels = noise_levels(self.scheduler, self.scheduler.timesteps)[-len(visited) :]

        # 3. Encode the prompts
        guided, lora_scale = self.do_classifier_free_guidance, (cross_attention_kwargs or {}).get("scale")
        text = self.encode_text_inputs(inputs, num_images_per_prompt, guided, clip_skip, device, lora_scale)
        prompt_embeds, pooled = join_text(text)
        negative_prompt_embeds = text.negative

        # 4. Noise the picture
        dtype = prompt_embeds.dtype
        if is_latent:
            latents = for_each(picture.to(device=device, dtype=dtype), pictures)
        else:
            latents = self.encode_images(picture, pictures, device, dtype, generator)
        noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=dtype)
        latents = self.scheduler.add_noise(latents, noise, visited[:1].repeat(pictures))
        x0_self = torch.zeros_like(latents) if self_conditioning else None
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 5. Denoise
        warmup_steps = len(visited) - steps * self.scheduler.order
        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(visited):
                if self.interrupt:
                    continue
                active = guided and in_guidance_interval(levels[i], guidance_interval)
                x_t = self.scheduler.scale_model_input(latents, t)
                model_output = self.predict(x_t, t, active, prompt_embeds, pooled, x0_self)
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
            decoded = decode_latents(self.vae, latents, generator)
            decoded, flagged = self.run_safety_checker(decoded, prompt_embeds.dtype)
            images = OUTPUTS[output_type](decoded)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)


def check_rows(name: str, rows: torch.Tensor, prompts: int) -> None:
    rule = f"one picture, or one for each of {prompts} prompts"
    check(name, f"{len(rows)} pictures", len(rows) in (1, prompts), rule)


def for_each(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows of fewer, each repeated in its place: [a, b] -> [a, a, b, b]."""
    return rows.repeat_interleave(count // len(rows), dim=0)
