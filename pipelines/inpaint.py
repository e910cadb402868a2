"""Inpainting and outpainting: `InpaintPipeline` repaints where a mask is white and leaves the rest alone.

Two kinds of U-Net, one call. Any text-to-image model: the known region, noised to the level of each step, is
merged into the latents (Lugmayr et al. 2022, "RePaint", with its resampling as an option). A model trained
for it, as GLIDE was: it sees the mask and the masked picture as further input channels.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from .chain.guidance import in_guidance_interval, noise_levels
from .drawing.checks import (
    OUTPUT_TYPES,
    check,
    check_callback,
    check_clip_skip,
    check_counts,
    check_cross_attention_kwargs,
    check_generator,
    check_guidance,
    check_shares,
    is_whole,
)
from .drawing.images import check_pixels, decode_latents, read_masks, read_pictures, to_grey, to_pil, to_rgb
from .drawing.masks import (
    FORGETFUL,
    Box,
    crop_region,
    extend_canvas,
    grow_to_fill,
    outpainting_windows,
    renoise,
    repaint_order,
    shrink_to_fit,
)
from .drawing.sizes import TwoStageMixin as TwoStageMixin
from .drawing.text import TextInputs, check_prompt, context_length, estimate_x0, join_text

# The code of a saved folder is copied as far as its pipeline's own file imports it, so what only the parents
# need is imported here too.
from .folders.adapters import refuse_ip_adapter
from .folders.conversion import ConversionMixin as ConversionMixin
from .folders.loading import LoadMixin as LoadMixin
from .folders.model_card import ModelCardMixin as ModelCardMixin
from .folders.saving import SaveMixin as SaveMixin
from .image_to_image import OUTPUTS, ImageToImagePipeline, check_rows, for_each
from .text_to_image import TextToImagePipeline as TextToImagePipeline


class InpaintPipeline(ImageToImagePipeline):
    """Repaints the masked part of a picture by a prompt. The parts are TextToImagePipeline's, and any folder
    of it loads here, with a U-Net of either kind.

    With C channels of latents (3 in pixels), a U-Net of C input channels is a text-to-image model; one of
    2C + 1 was trained for inpainting and sees [x_t, mask, masked picture's latents].
    """

    _callback_tensor_inputs = [
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "mask",
        "masked_image_latents",
    ]

    @property
    def num_channels_latents(self) -> int:
        """C: channels of the latents that are drawn, without those that a U-Net made for inpainting adds."""
        return 3 if self.vae is None else self.vae.config.latent_channels

    @property
    def sees_mask(self) -> bool:
        """Whether the U-Net was made for inpainting."""
        return self.unet.config.in_channels == 2 * self.num_channels_latents + 1

    # ---- the stages of __call__ that image to image has not ----

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
        channels, config = self.num_channels_latents, self.unet.config
        if config.in_channels not in (channels, 2 * channels + 1) or config.out_channels % channels:
            raise ValueError(
                f"The U-Net must have {channels} or {2 * channels + 1} input channels and {channels} or "
                f"{2 * channels} output channels, got {config.in_channels} and {config.out_channels}."
            )
        shape, given = self._latents_shape(pictures, channels, height, width), getattr(latents, "shape", None)
        check("latents", given, latents is None or given == shape, f"a tensor of {shape}")
        return pictures // num_images_per_prompt

    def crop_around_mask(
        self, image: Any, mask_image: Any, height: int | None, width: int | None, padding: int
    ) -> tuple[Box, Image.Image, Image.Image, torch.Tensor, torch.Tensor]:
        """(box, the whole picture in RGB, its mask in grey, and of the box both as tensors)."""
        for name, given in (("image", image), ("mask_image", mask_image)):
            check(name, type(given).__name__, isinstance(given, Image.Image), "a PIL picture to be cropped")
            check_pixels(given.width, given.height, name)
        whole, grey = to_rgb(image), to_grey(mask_image)
        if grey.size != whole.size:
            grey = grey.resize(whole.size, Image.Resampling.BILINEAR)
        sample_width, sample_height = self.sample_size
        height, width = height or sample_height, width or sample_width
        self.check_allowed(height, width, "`height` and `width`")
        box = crop_region(grey, width, height, padding)
        parts = [shrink_to_fit(part.crop(box), width, height) for part in (whole, grey)]
        return box, whole, grey, read_pictures(parts[0]), read_masks(parts[1])

    @property
    def sample_size(self) -> tuple[int, int]:
        """(width, height) in pixels that the U-Net was made for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return width * self.vae_scale_factor, height * self.vae_scale_factor

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
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
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        jump_length: int = 10,
        jump_n_sample: int = 1,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        r"""Repaints the white part of `mask_image` in `image`, `num_images_per_prompt` times for each prompt.

        Where the mask is 0 the pictures returned equal `image` to the last bit, whatever the model and the
        size. The model repaints where it is 1/2 or more. Between 0 and 1, in a soft mask, what it drew is
        blended in by that share, mask * drawn + (1 - mask) * image: there pixels do change.

        Args: what `TextToImagePipeline.__call__` and diffusers' StableDiffusionInpaintPipeline take, and
            image: what to repaint, one for all prompts or one for each; see `images.read_pictures`.
            mask_image: white is repainted, black or transparent is kept; one, or one for each prompt. Of
                another size than `image` it is stretched to its size.
            masked_image_latents: ready latents of the picture with the masked part grey (0), in place of
                encoding it; for a U-Net made for inpainting.
            height, width: both, and picture and mask are resized to them; or neither, and they keep the
                picture's size (diffusers squeezes them into the U-Net's).
            padding_mask_crop: repaint only the region around the mask, with so many pixels on each side,
                enlarged or shrunk to `height` x `width` (default: what the U-Net was made for), and put it
                back. For PIL pictures and output, and one prompt's picture.
            strength: in 0..1, the share of the schedule that is run. 1 starts from pure noise; less lets the
                masked part of the picture show through.
            latents: z of N(0, I) in place of drawn noise, also where `strength` is below 1.
            callback_on_step_end: may also see and replace "mask" and "masked_image_latents", a row a picture.
            jump_length, jump_n_sample: RePaint's resampling: every `jump_length` steps go so many back and
                denoise them anew, `jump_n_sample` times in all; 1 is off, 10 is the paper's. It makes the two
                regions agree better and multiplies the time. For DDPM and DDIM schedulers, and U-Nets that do
                not see the mask.

        With a list of generators all of a picture's noise comes from its own (in diffusers that of the
        encoder does not).

        Returns images and nsfw_content_detected (None without a safety checker).
        Raises ValueError for arguments that make no sense, and a mask that nowhere reaches 1/2, before any
        work.
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
        check_counts(jump_length=jump_length, jump_n_sample=jump_n_sample)
        if jump_n_sample > 1:
            kind = type(self.scheduler).__name__
            check("scheduler", kind, kind in FORGETFUL, f"one of {FORGETFUL} for `jump_n_sample` above 1")
            check("jump_n_sample", jump_n_sample, not self.sees_mask, "1 for a U-Net made for inpainting")
        box = None
        if padding_mask_crop is not None:
            check("padding_mask_crop", padding_mask_crop, is_whole(padding_mask_crop, 0), "pixels, 0 or more")
            check("output_type", output_type, output_type == "pil", "'pil' with `padding_mask_crop`")
            box, whole, grey, picture, mask_condition = self.crop_around_mask(
                image, mask_image, height, width, padding_mask_crop
            )
            soft = mask_condition  # what comes back is blended into the whole, at its size
        else:
            picture = self.read_images(image, height, width)
            size = (picture.shape[2], picture.shape[3])
            mask_condition = read_masks(mask_image, size)
            soft = read_masks(mask_image, size, Image.Resampling.BILINEAR)  # Lanczos leaves ripples
        binary = (mask_condition >= 0.5).float()  # (1 or B, 1, H, W)
        if not binary.any(dim=0).any():
            raise ValueError("`mask_image` has nothing to repaint: white is repainted, black is kept.")
        height, width = picture.shape[2:]
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
        check_rows("image", picture, batch_size)
        check_rows("mask_image", binary, batch_size)
        self._guidance_scale, self._guidance_rescale, self._clip_skip = scale, guidance_rescale, clip_skip
        self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False
        device, pictures, channels = (
            self._execution_device, batch_size * num_images_per_prompt, self.num_channels_latents
        )  # fmt: skip

        # 2. Lay out the timesteps that are left, and the order to take them in
        visited, steps = self.get_timesteps(steps, strength, device, timesteps, sigmas)
        order = repaint_order(len(visited), jump_length, jump_n_sample)
        steps += len(order) - len(visited)
        self._num_timesteps = len(order)
        self_conditioning = self.unet.config.get("self_conditioning", False)
        levels = [math.nan] * len(visited)
        if guidance_interval is not None or self_conditioning:
            levels = noise_levels(self.scheduler, self.scheduler.timesteps)[-len(visited) :]

        # 3. Encode the prompts
        guided, lora_scale = self.do_classifier_free_guidance, (cross_attention_kwargs or {}).get("scale")
        text = self.encode_text_inputs(inputs, num_images_per_prompt, guided, clip_skip, device, lora_scale)
        prompt_embeds, pooled = join_text(text)
        negative_prompt_embeds = text.negative

        # 4. Encode the picture, noise it, and encode what the mask leaves of it: draws in diffusers' order
        dtype = prompt_embeds.dtype
        encode = lambda x: self.encode_images(x, pictures, device, dtype, generator)  # noqa: E731
        image_latents = encode(picture) if strength < 1 or not self.sees_mask else None
        shape = self._latents_shape(pictures, channels, height, width)
        noise = latents
        if noise is None:
            noise = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype)
        noise = noise.to(device=device, dtype=dtype)
        if strength == 1 or image_latents is None:
            latents = noise * self.scheduler.init_noise_sigma
        else:
            latents = self.scheduler.add_noise(image_latents, noise, visited[:1].repeat(pictures))
        mask = for_each(F.interpolate(binary, shape[2:]).to(device=device, dtype=dtype), pictures)
        if masked_image_latents is None:
            masked_image_latents = encode(picture * (1 - binary))
        masked_image_latents = for_each(masked_image_latents.to(device=device, dtype=dtype), pictures)
        x0_self = torch.zeros_like(latents) if self_conditioning else None
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 5. Denoise
        warmup_steps = len(order) - steps * self.scheduler.order
        with self.progress_bar(total=steps) as progress_bar:
            for i, k in enumerate(order):
                if self.interrupt:
                    continue
                t = visited[k]
                if i > 0 and k <= order[i - 1]:
                    latents = self._go_back(latents, visited, order[i - 1], k, generator)
                active = guided and in_guidance_interval(levels[k], guidance_interval)
                x_t = self.scheduler.scale_model_input(latents, t)
                if self.sees_mask:
                    x_t = torch.cat([x_t, mask, masked_image_latents], dim=1)  # (B, 2C + 1, H, W)
                model_output = self.predict(x_t, t, active, prompt_embeds, pooled, x0_self)
                step = self.scheduler.step(model_output, t, latents, **extra_step_kwargs)
                if x0_self is not None:
                    kind = self.scheduler.config.prediction_type
                    x0_self = estimate_x0(step, model_output[:, :channels], latents, levels[k], kind)
                latents = step.prev_sample
                if image_latents is not None and not self.sees_mask:
                    if jump_n_sample > 1:
                        noise = randn_tensor(shape, generator=generator, device=noise.device, dtype=dtype)
                    known = image_latents
                    if k < len(visited) - 1:
                        known = self.scheduler.add_noise(image_latents, noise, visited[k + 1 : k + 2])
                    latents = (1 - mask) * known + mask * latents

                if callback_on_step_end is not None:
                    values: Any = (
                        latents, prompt_embeds, negative_prompt_embeds, mask, masked_image_latents
                    )  # fmt: skip
                    tensors = dict(zip(self._callback_tensor_inputs, values, strict=True))
                    asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, asked) or {}
                    latents, prompt_embeds, negative_prompt_embeds, mask, masked_image_latents = list(
                        tensors.values()
                    )[:5]
                if i == len(order) - 1 or ((i + 1) > warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()

        # 6. Decode, and put back what was to be kept
        images: Any = latents
        flagged = None
        if output_type != "latent":
            decoded = decode_latents(self.vae, latents, generator)
            decoded, flagged = self.run_safety_checker(decoded, dtype)
            if box is None:
                soft, picture = (for_each(x.to(decoded.device), pictures) for x in (soft, picture))
                decoded = torch.lerp(picture, decoded.float(), soft)
            images = OUTPUTS[output_type](decoded)
            if box is not None:
                images = [put_back(drawn, whole, grey, box) for drawn in images]
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    def _unet_kwargs(
        self, rows: int, pooled: torch.Tensor | None, x0_self: torch.Tensor | None
    ) -> dict[str, Any]:
        if x0_self is not None:  # the U-Net has as many inputs for it as for the rest
            x0_self = pad_channels(x0_self, self.unet.config.in_channels)
        return super()._unet_kwargs(rows, pooled, x0_self)

    def _go_back(
        self,
        latents: torch.Tensor,
        visited: torch.Tensor,
        done: int,
        k: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """From where step `done` left the latents to the noise level that step `k` starts from."""
        abar = self.scheduler.alphas_cumprod.double().cpu()[visited.cpu()].tolist() + [1.0]
        z = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        return renoise(latents, z, abar[done + 1], abar[k])

    def outpaint(
        self,
        prompt: str | list[str],
        image: Any,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        overlap: int | None = None,
        num_images_per_prompt: int = 1,
        negative_prompt: str | list[str] | None = None,
        **call: Any,
    ) -> StableDiffusionPipelineOutput:
        """Grows pictures by so many pixels on each side, and draws there; inside they stay, to the last bit.

        The canvas is covered by windows of the size that the U-Net was made for, from the picture outwards,
        and each is inpainted where it is still empty; one that touches on what is there already shares
        `overlap` pixels with it (default: half a window).

        `image` is one for all prompts or one for each, `call` what `__call__` takes besides, with output in
        PIL. Returns (width + left + right) x (height + top + bottom) pixels.
        Raises ValueError for arguments that make no sense.
        """
        sides = {"left": left, "top": top, "right": right, "bottom": bottom}
        for name, pixels in sides.items():
            check(name, pixels, is_whole(pixels, 0), "a whole number of pixels, 0 or more")
        if not any(sides.values()):
            raise ValueError("Outpainting needs `left`, `top`, `right` or `bottom` above 0.")
        side = self.sample_size
        overlap = min(side) // 2 if overlap is None else overlap
        rule = f"1..{min(side) - 1}, less than a window"
        check("overlap", overlap, is_whole(overlap, 1) and overlap < min(side), rule)
        check("output_type", call.get("output_type", "pil"), call.get("output_type", "pil") == "pil", "'pil'")
        check_counts(num_images_per_prompt=num_images_per_prompt)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        check("prompt", prompt, isinstance(prompts, list), "a str or a list of them")
        originals = to_pil(read_pictures(image))
        number = len(originals)
        check("image", f"{number} pictures", number in (1, len(prompts)), "one, or one for each prompt")
        if number < len(prompts):
            originals = originals * len(prompts)
        prompts = [one for one in prompts for _ in range(num_images_per_prompt)]
        originals = [one for one in originals for _ in range(num_images_per_prompt)]
        if isinstance(negative_prompt, list):
            negative_prompt = [one for one in negative_prompt for _ in range(num_images_per_prompt)]

        # windows may not be longer than the canvas: what it has too much of is cut off at the end
        (inner_width, inner_height), (side_width, side_height) = originals[0].size, side
        width, height = inner_width + left + right, inner_height + top + bottom
        spare_x, spare_y = max(side_width - width, 0), max(side_height - height, 0)
        x, y = left + spare_x // 2, top + spare_y // 2
        size = (width + spare_x, height + spare_y)
        check_pixels(*size, "the grown picture")
        canvases = [
            extend_canvas(one, x, y, size[0] - inner_width - x, size[1] - inner_height - y)
            for one in originals
        ]
        empty = np.ones(size[::-1], dtype=bool)
        empty[y : y + inner_height, x : x + inner_width] = False
        flagged: list[bool] | None = None
        known = (x, y, x + inner_width, y + inner_height)
        for box in outpainting_windows(size, known, side, overlap):
            window = np.s_[box[1] : box[3], box[0] : box[2]]
            if not empty[window].any():
                continue
            drawn: Any = self(
                prompts,
                image=[canvas.crop(box) for canvas in canvases],
                mask_image=Image.fromarray(empty[window]),
                negative_prompt=negative_prompt,
                **call,
            )
            for canvas, piece in zip(canvases, drawn.images, strict=True):
                canvas.paste(piece, box)
            if (now := drawn.nsfw_content_detected) is not None:
                flagged = [a or b for a, b in zip(flagged or now, now, strict=True)]
            empty[window] = False
        cut = (x - left, y - top, x - left + width, y - top + height)
        images = [canvas.crop(cut) for canvas in canvases]
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)


def pad_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, channels, H, W), the new ones 0."""
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))


def put_back(drawn: Image.Image, whole: Image.Image, grey: Image.Image, box: Box) -> Image.Image:
    """`whole` with `drawn` in `box`, as far as the mask `grey` says: all of it at 255, none at 0."""
    pasted = whole.copy()
    pasted.paste(grow_to_fill(drawn, box[2] - box[0], box[3] - box[1]), box)
    return Image.composite(pasted, whole, grey)
