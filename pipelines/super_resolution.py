"""Super-resolution: `SuperResolutionPipeline` enlarges pictures four times, with details of its own."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from .chain.back_projection import back_project, enlarge
from .chain.guidance import classifier_free_guidance
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
from .drawing.images import decode_latents, read_pictures, to_numpy, to_pil, to_unit
from .drawing.sizes import TwoStageMixin as TwoStageMixin
from .drawing.text import TextInputs, check_prompt, context_length

# The code of a saved folder is copied as far as its pipeline's own file imports it, so what only the parent
# needs is imported here too.
from .folders.adapters import AdapterMixin as AdapterMixin
from .folders.conversion import ConversionMixin as ConversionMixin
from .folders.loading import LoadMixin as LoadMixin
from .folders.model_card import ModelCardMixin as ModelCardMixin
from .folders.saving import SaveMixin as SaveMixin
from .text_to_image import TextToImagePipeline

UNSET_SCALING_FACTOR, SCALING_FACTOR = 0.18215, 0.08333  # AutoencoderKL's default; what an upscaler's means


class SuperResolutionPipeline(TextToImagePipeline):
    r"""Enlarges pictures by a whole factor, in a few U-Net passes that see the small picture beside x_t.

    With a `vae` it is Stable Diffusion's x4 upscaler: x_t are latents of the small picture's height and
    width, which the vae decodes to `vae_scale_factor` times that, and the U-Net sees [x_t, y_s], y_s the
    small picture noised to `noise_level` by `low_res_scheduler` (Ho 2021, "Cascaded diffusion models", 4.2).

    Without one x_t is the large picture, E enlarges smoothly, and the U-Net predicts what E(y_s) lacks:

        x0 = E(y_s) + U-Net([x_t, E(y_s)], t, s),  then brought back onto the small picture by `back_project`

    so that the result, shrunk, is the picture that was given.

    Args:
        unet: sees 3 channels more than it steps with; ConditionalUNet, or diffusers' UNet2DConditionModel.
        low_res_scheduler: noises the small picture. scheduler: of x_t; without a vae it must take x0, that
            is, have the prediction_type "sample".
        vae, text_encoder, tokenizer: optional; a U-Net without cross-attention reads no text.
        safety_checker, feature_extractor, watermarker: as Stable Diffusion folders have them.
        max_noise_level: the highest `noise_level` that the U-Net was trained on.
        upscale_factor: of a pipeline without a vae.
        default_guidance_scale, default_num_inference_steps, default_noise_level: what a call that does not
            say gets; saved in model_index.json.
    """

    _optional_components = [
        "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "watermarker",
    ]  # fmt: skip

    def __init__(
        self,
        unet: ModelMixin | UNet2DConditionModel,
        low_res_scheduler: SchedulerMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | AutoencoderKL | None = None,
        text_encoder: CLIPTextModel | CLIPTextModelWithProjection | None = None,
        tokenizer: CLIPTokenizer | None = None,
        safety_checker: PreTrainedModel | None = None,
        feature_extractor: Any = None,
        watermarker: Any = None,
        max_noise_level: int = 350,
        upscale_factor: int = 4,
        default_guidance_scale: float = 9.0,
        default_num_inference_steps: int = 75,
        default_noise_level: int = 20,
    ) -> None:
        DiffusionPipeline.__init__(self)  # the parent's registers other parts
        if vae is None and scheduler is not None and scheduler.config.get("prediction_type") != "sample":
            kind = scheduler.config.get("prediction_type")
            raise ValueError(
                f"Without a vae `scheduler` must have the prediction_type 'sample', got {kind!r}."
            )
        if getattr(getattr(vae, "config", None), "scaling_factor", None) == UNSET_SCALING_FACTOR:
            vae.register_to_config(scaling_factor=SCALING_FACTOR)  # type: ignore[union-attr]
        self.register_modules(
            unet=unet,
            low_res_scheduler=low_res_scheduler,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            watermarker=watermarker,
        )
        self.register_to_config(
            max_noise_level=max_noise_level,
            upscale_factor=upscale_factor,
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
            default_noise_level=default_noise_level,
        )

    @property
    def scale(self) -> int:
        """How many times larger the result is, along each side."""
        return self.config.upscale_factor if self.vae is None else self.vae_scale_factor

    @property
    def reads_text(self) -> bool:
        """Whether the U-Net has cross-attention. One that has none takes a prompt and does not look at it."""
        kinds = (*self.unet.config.down_block_types, self.unet.config.mid_block_type)
        return any("CrossAttn" in (kind or "") for kind in kinds)

    # ---- the stages of __call__ that text to image has not ----

    def check_upscaling(
        self,
        text: TextInputs,
        pictures: torch.Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        noise_level: int,
        num_images_per_prompt: int,
        consistency: float,
        latents: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> int:
        """The number of small pictures to enlarge. Raises ValueError for whatever `__call__` cannot do."""
        check_counts(num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
        check_guidance(guidance_scale, None)
        check_shares(consistency=consistency)
        highest = self.config.max_noise_level
        good = is_whole(noise_level, 0) and noise_level <= highest
        check("noise_level", noise_level, good, f"a whole number in 0..{highest}")
        count = len(pictures)
        if self.reads_text:
            guided = guidance_scale > 1 and self.unet.config.get("time_cond_proj_dim") is None
            context = None if self.text_encoder is None else context_length(self.tokenizer, self.text_encoder)
            prompts = check_prompt(text, guided, self.requires_pooled_text, context)
            rule = f"one, or one for each of {prompts} prompts"
            check("image", f"{count} pictures", count in (1, prompts), rule)
            count = prompts
        check_generator(generator, count * num_images_per_prompt)
        channels = self.unet.config.out_channels
        given = self.unet.config.in_channels
        check("unet.config.in_channels", given, given == channels + 3, f"{channels} and the picture's 3")
        height, width = (side * self.scale for side in pictures.shape[-2:])
        patch = self.unet.config.get("patch_size", 1)
        good = self.vae is not None or (height % patch == 0 and width % patch == 0)
        check(
            "image", f"{width // self.scale} x {height // self.scale}", good, f"of {patch} x {patch} patches"
        )
        shape = self._latents_shape(count * num_images_per_prompt, channels, height, width)
        size = getattr(latents, "shape", None)
        check("latents", size, latents is None or size == shape, f"a tensor of {shape}")
        return count

    def noise_image(
        self,
        pictures: torch.Tensor,
        noise_level: int,
        count: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """y_s = sqrt(abar_s) y + sqrt(1 - abar_s) eps of `count` rows, s the noise level.

        One generator draws once for each picture, as in diffusers, and those drawn of one picture share it; a
        list of them draws for each row.
        """
        if isinstance(generator, list):
            pictures = pictures.repeat_interleave(count // len(pictures), dim=0)
        noise = randn_tensor(
            pictures.shape, generator=generator, device=pictures.device, dtype=pictures.dtype
        )
        level = torch.tensor([noise_level], device=pictures.device)
        noised = self.low_res_scheduler.add_noise(pictures, noise, level)
        return noised.repeat_interleave(count // len(noised), dim=0)

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        noise_level: int | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Any, torch.Tensor], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        consistency: float = 1.0,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        r"""Enlarges pictures. Arguments are those of diffusers' StableDiffusionUpscalePipeline, and the last:

        Args:
            prompt: what the picture shows; for U-Nets that read text, and ignored by the others.
            image: what to enlarge, one, or one for each prompt; see `images.read_pictures` for what it may
                be. Any height and width (diffusers first cuts the sides to multiples of 8 or so).
            num_inference_steps, guidance_scale, noise_level: None means the model folder's own defaults.
            noise_level: in 0..max_noise_level, noise added to the small picture. More of it, and more is made
                up: right for pictures that have faults of their own, such as drawn ones.
            generator: one, drawn from in diffusers' order, or a list with one for each result, which makes it
                depend on its own seed alone and not on the batch it is in.
            callback, callback_steps: f(i, t, x_t) after every so many steps.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in text to image.
            consistency: without a vae, in 0..1: how far each x0 goes from the U-Net's own (0) to the one that
                shrinks to the small picture (1).

        With several pictures and `num_images_per_prompt`, results of picture i are neighbours.

        Returns images and nsfw_content_detected (None without a safety checker).
        Raises ValueError for arguments that make no sense, before any work.
        """
        # 1. Settle the defaults and check the rest
        defaults, reads_text = self.config, self.reads_text
        steps = defaults.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = defaults.default_guidance_scale if guidance_scale is None else guidance_scale
        level = defaults.default_noise_level if noise_level is None else noise_level
        num_images_per_prompt = 1 if num_images_per_prompt is None else num_images_per_prompt
        output_type = "pil" if output_type is None else output_type
        asked_for = callback_on_step_end_tensor_inputs or ["latents"]
        check("output_type", output_type, output_type in OUTPUT_TYPES, f"one of {OUTPUT_TYPES}")
        check_shares(eta=eta)
        check_counts(callback_steps=callback_steps)
        check_callback(callback_on_step_end, asked_for, self._callback_tensor_inputs)
        check_cross_attention_kwargs(cross_attention_kwargs, hasattr(self.unet, "attn_processors"))
        if self.text_encoder is not None:
            check_clip_skip(clip_skip, self.text_encoder.config.num_hidden_layers)
        inputs = TextInputs(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        low = read_pictures(image)  # (1 or count, 3, h, w)
        count = self.check_upscaling(
            inputs, low, steps, guidance, level, num_images_per_prompt, consistency, latents, generator
        )
        self._guidance_scale, self._guidance_rescale = guidance if reads_text else 1.0, 0.0
        self._clip_skip, self._cross_attention_kwargs, self._interrupt = (
            clip_skip,
            cross_attention_kwargs,
            False,
        )
        device, dtype, results = self._execution_device, self.unet.dtype, count * num_images_per_prompt
        guided = self.do_classifier_free_guidance

        # 2. Encode the prompts, where the U-Net reads them. Negatives come first
        text_states = negative_prompt_embeds = None
        if reads_text:
            options: Any = (clip_skip, device, (cross_attention_kwargs or {}).get("scale"))
            text = self.encode_text_inputs(inputs, num_images_per_prompt, guided, *options)
            text_states, negative_prompt_embeds = text.prompt, text.negative
            if text.negative is not None:
                text_states = torch.cat([text.negative, text.prompt])  # (2B, L, D)

        # 3. Lay out the timesteps, noise the small picture and draw the noise to start from
        self.scheduler.set_timesteps(steps, device=device)
        visited = self.scheduler.timesteps
        self._num_timesteps = len(visited)
        low = low.to(device=device, dtype=dtype)
        told = self.noise_image(low, level, results, generator)  # (B, 3, h, w)
        low = low.repeat_interleave(results // len(low), dim=0)
        height, width = (side * self.scale for side in low.shape[-2:])
        if self.vae is None:
            told = enlarge(told, self.scale)  # (B, 3, height, width)
        latents = self.prepare_latents(
            results, self.unet.config.out_channels, height, width, dtype, device, generator, latents
        )
        copies = 2 if guided else 1  # of the pictures in one U-Net pass
        labels = torch.full((copies * results,), level, device=device)
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 4. Denoise
        warmup_steps = len(visited) - steps * self.scheduler.order
        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(visited):
                if self.interrupt:
                    continue
                x_t = self.scheduler.scale_model_input(latents, t)
                model_output = self.unet(
                    torch.cat([torch.cat([x_t, told], dim=1)] * copies),
                    t,
                    encoder_hidden_states=text_states,
                    class_labels=labels,
                    cross_attention_kwargs=cross_attention_kwargs,
                    return_dict=False,
                )[0]
                if guided:
                    uncond, cond = model_output.chunk(2)
                    model_output = classifier_free_guidance(uncond, cond, self.guidance_scale)
                if self.vae is None:
                    x0 = told + model_output
                    model_output = x0.lerp(back_project(x0, low, self.scale), consistency)
                latents = self.scheduler.step(model_output, t, latents, **extra_step_kwargs).prev_sample

                if callback_on_step_end is not None:
                    values: Any = (latents, text_states, negative_prompt_embeds)
                    tensors = dict(zip(self._callback_tensor_inputs, values, strict=True))
                    chosen = {name: tensors[name] for name in asked_for}
                    tensors |= callback_on_step_end(self, i, t, chosen) or {}
                    latents, text_states, negative_prompt_embeds = list(tensors.values())[:3]
                if i == len(visited) - 1 or ((i + 1) > warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
                    if callback is not None and i % callback_steps == 0:
                        callback(i // self.scheduler.order, t, latents)

        # 5. Decode
        images: Any = latents
        flagged = None
        if output_type != "latent":
            decoded, flagged = self.run_safety_checker(self._decode_large(latents), dtype)
            images = {"pil": to_pil, "np": to_numpy, "pt": to_unit}[output_type](decoded)
            if output_type == "pil" and self.watermarker is not None:
                images = self.watermarker.apply_watermark(images)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    def _decode_large(self, latents: torch.Tensor) -> torch.Tensor:
        """The decoder in float32 where its config says that float16 overflows in it."""
        upcast = self.vae is not None and self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if not upcast:
            return decode_latents(self.vae, latents)
        self.vae.to(torch.float32)
        image = decode_latents(self.vae, latents.float())
        self.vae.to(torch.float16)
        return image

    # ---- its model card ----

    def make_card(
        self, name: str, has_code: bool, card: str | None = None, given: dict[str, Any] | Any = None
    ) -> str:
        """As `ModelCardMixin`'s, for a model that is given a picture and no prompt."""
        if given is None and card is not None:
            return card
        if given is None or isinstance(given, dict):
            task = {
                "pipeline_tag": "image-to-image",
                "tags": ["super-resolution", "diffusers"],
                "widget": None,
            }
            given = task | (given or {})
        return super().make_card(name, has_code, card, given)

    def _card_body(self, name: str, has_code: bool, data: Any) -> str:
        trust = ", trust_remote_code=True" if has_code else ""
        usage = "\n".join(
            [
                f"Enlarges pictures {self.scale} times.",
                "",
                "```python",
                "from diffusers import DiffusionPipeline",
                "from PIL import Image",
                "",
                f'pipe = DiffusionPipeline.from_pretrained("{name}"{trust})',
                'pipe(image=Image.open("small.png")).images[0]',
                "```",
            ]
        )
        # the parent's, from its second fence on: the licence, the data and the results
        return f"# {name.split('/')[-1]}\n\n{usage}{super()._card_body(name, has_code, data).split('```')[2]}"
