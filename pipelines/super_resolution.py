"""Super-resolution: `SuperResolutionPipeline` enlarges pictures and adds details."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from .chain.back_projection import back_project, enlarge
from .drawing.images import decode_latents, read_pictures
from .drawing.loop import Denoise, Task, draw
from .drawing.request import Request, check, takes
from .text_to_image import TextToImagePipeline

UNSET_SCALING_FACTOR, SCALING_FACTOR = 0.18215, 0.08333  # AutoencoderKL's default; what an upscaler needs


class SuperResolution(Task):
    """The U-Net sees the small picture, noised to `noise_level`, beside x_t, and is told that level."""

    def read(self) -> None:
        self.reads_text = self.pipe.reads_text
        self.low = read_pictures(self.request.image)  # (1 or prompts, 3, h, w)
        self.height, self.width = (side * self.pipe.scale for side in self.low.shape[-2:])

    def defaults(self) -> dict[str, Any]:
        config = self.pipe.config
        if not self.reads_text:
            self.request.guidance_scale = 1.0
        scales = {"guidance_scale": config.default_guidance_scale, "clip_guidance_scale": 0.0}
        steps, level = config.default_num_inference_steps, config.default_noise_level
        return scales | {"num_inference_steps": steps, "noise_level": level}

    def check(self) -> int:
        pipe, level, highest = self.pipe, self.request.noise_level, self.pipe.config.max_noise_level
        self.level: int = level or 0
        check("noise_level", level, self.level <= highest, f"a whole number in 0..{highest}")
        prompts, count = super().check(), len(self.low)
        if self.reads_text:
            rule = f"one, or one for each of {prompts} prompts"
            check("image", f"{count} pictures", count in (1, prompts), rule)
            count = prompts
        patch, (h, w) = pipe.unet.config.get("patch_size", 1), self.low.shape[-2:]
        good = pipe.vae is not None or (self.height % patch == 0 and self.width % patch == 0)
        check("image", f"{w} x {h}", good, f"of {patch} x {patch} patches")
        return count

    def check_channels(self) -> None:
        channels, given = self.channels, self.pipe.unet.config.in_channels
        check("unet.config.in_channels", given, given == channels + 3, f"{channels} and the picture's 3")

    def start(self, pictures: int, visited: torch.Tensor, device: Any, dtype: torch.dtype) -> torch.Tensor:
        low = self.low.to(device=device, dtype=dtype)
        told = self.noise_image(low, pictures)  # (B, 3, h, w)
        self.low = low.repeat_interleave(pictures // len(low), dim=0)
        self.beside = enlarge(told, self.pipe.scale) if self.pipe.vae is None else told
        return super().start(pictures, visited, device, dtype)

    def noise_image(self, low: torch.Tensor, count: int) -> torch.Tensor:
        """y_s = sqrt(abar_s) y + sqrt(1 - abar_s) eps for `count` rows, s the noise level.

        A single generator draws eps once for each small picture, as in diffusers, and its results share it; a
        list of generators draws for each row.
        """
        generator = self.request.generator
        if isinstance(generator, list):
            low = low.repeat_interleave(count // len(low), dim=0)
        noise = randn_tensor(low.shape, generator=generator, device=low.device, dtype=low.dtype)
        level = torch.tensor([self.request.noise_level], device=low.device)
        noised = self.pipe.low_res_scheduler.add_noise(low, noise, level)
        return noised.repeat_interleave(count // len(noised), dim=0)

    def see(self, x_t: torch.Tensor) -> torch.Tensor:
        return torch.cat([x_t, self.beside], dim=1)

    def told(self, rows: int) -> dict[str, Any]:
        return {"class_labels": torch.full((rows,), self.level, device=self.beside.device)}

    def wrap(self, denoise: Denoise) -> Denoise:
        """In pixels, add the prediction to the enlarged picture and back-project it onto the small one."""
        if self.pipe.vae is not None:
            return denoise

        def consistent(x_t: torch.Tensor, t: Any, sigma: float) -> torch.Tensor:
            x0 = self.beside + denoise(x_t, t, sigma)
            return x0.lerp(back_project(x0, self.low, self.pipe.scale), self.request.consistency)

        return consistent

    def report(self, i: int, t: Any, latents: torch.Tensor) -> None:
        if self.request.callback is not None and i % self.request.callback_steps == 0:
            self.request.callback(i // self.pipe.scheduler.order, t, latents)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode in float32 if the vae's config says that float16 overflows in it."""
        vae = self.pipe.vae
        if vae is None or vae.dtype != torch.float16 or not vae.config.force_upcast:
            return decode_latents(vae, latents)
        vae.to(torch.float32)
        image = decode_latents(vae, latents.float())
        vae.to(torch.float16)
        return image

    def finish(self, pictures: torch.Tensor, kept: torch.Tensor) -> Any:
        images = super().finish(pictures, kept)
        if self.request.output_type == "pil" and self.pipe.watermarker is not None:
            images = self.pipe.watermarker.apply_watermark(images)
        return images


class SuperResolutionPipeline(TextToImagePipeline):
    r"""Enlarges pictures by a whole factor, in a few U-Net passes that see the small picture beside x_t.

    With a `vae` it is Stable Diffusion's x4 upscaler: x_t are latents of the small picture's height and
    width, which the vae decodes to `vae_scale_factor` times that size. The U-Net sees [x_t, y_s], where y_s
    is the small picture noised to `noise_level` by `low_res_scheduler` (Ho 2021, "Cascaded diffusion
    models", 4.2).

    Without a `vae`, x_t is the large picture, E enlarges smoothly, and the U-Net predicts what E(y_s) lacks:

        x0 = E(y_s) + U-Net([x_t, E(y_s)], t, s),  then moved onto the small picture by `back_project`

    so that the result, shrunk, is the given picture.

    Args:
        unet: sees 3 channels more than x_t has; ConditionalUNet, or diffusers' UNet2DConditionModel.
        low_res_scheduler: noises the small picture.
        scheduler: steps x_t; without a vae it must take x0, that is, have the prediction_type "sample".
        vae, text_encoder, tokenizer: optional; a U-Net without cross-attention reads no text.
        safety_checker, feature_extractor, watermarker: as Stable Diffusion folders have them.
        noisy_clip, noisy_classifier, clip_guidance_model: as TextToImagePipeline's, for guidance.
        max_noise_level: the highest `noise_level` that the U-Net was trained on.
        upscale_factor: the factor of a pipeline without a vae.
        default_guidance_scale, default_num_inference_steps, default_noise_level: for calls that leave these
            out; saved in model_index.json.
    """

    _optional_components = [
        "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "watermarker",
        "noisy_clip", "noisy_classifier", "clip_guidance_model",
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
        noisy_clip: ModelMixin | None = None,
        noisy_classifier: ModelMixin | None = None,
        clip_guidance_model: ModelMixin | None = None,
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
            noisy_clip=noisy_clip,
            noisy_classifier=noisy_classifier,
            clip_guidance_model=clip_guidance_model,
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
        """How many times larger the result is along each side."""
        return self.config.upscale_factor if self.vae is None else self.vae_scale_factor

    @property
    def num_channels_latents(self) -> int:
        """C: channels of x_t; the U-Net sees the small picture's 3 beside them."""
        return self.unet.config.out_channels

    @property
    def reads_text(self) -> bool:
        """Whether the U-Net has cross-attention. One without it accepts a prompt and ignores it."""
        kinds = (*self.unet.config.down_block_types, self.unet.config.mid_block_type)
        return any("CrossAttn" in (kind or "") for kind in kinds)

    @torch.no_grad()
    @takes(
        "super_resolution",
        "prompt image num_inference_steps guidance_scale noise_level negative_prompt num_images_per_prompt "
        "eta generator latents prompt_embeds negative_prompt_embeds output_type return_dict callback "
        "callback_steps cross_attention_kwargs clip_skip callback_on_step_end "
        "callback_on_step_end_tensor_inputs consistency",
    )
    def __call__(self, request: Request) -> Any:
        """Enlarges pictures of any height and width (diffusers first cuts the sides to multiples of 8 or so).

        A U-Net without cross-attention ignores the prompt. A higher `noise_level` invents more detail, which
        suits pictures that have faults of their own, such as drawn ones. With several pictures and
        `num_images_per_prompt`, the results of one picture are next to each other.

        Returns images and nsfw_content_detected (None without a safety checker).
        Raises ValueError for arguments that make no sense, before any work.
        """
        return draw(self, request, SuperResolution(self, request))

    # ---- its model card ----

    def make_card(
        self, name: str, has_code: bool, card: str | None = None, given: dict[str, Any] | Any = None
    ) -> str:
        """As in `ModelCardMixin`, for a model that takes a picture and no prompt."""
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
