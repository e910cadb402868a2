"""Image to image: `ImageToImagePipeline` starts from a noised picture (SDEdit, Meng et al. 2021)."""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from .drawing.images import encode_pictures, read_pictures
from .drawing.loop import Task, draw
from .drawing.request import Request, check, takes
from .drawing.sizes import check_allowed
from .text_to_image import TextToImagePipeline


class ImageToImage(Task):
    """x_t ~ q(x_t | picture) at the timestep that `strength` sets, then the rest of the chain."""

    pictures: torch.Tensor  # (1 or prompts, 3, H, W) in [-1, 1]; latents where `is_latent`
    is_latent = False

    def read(self) -> None:
        pipe, image = self.pipe, self.request.image
        tensor = isinstance(image, torch.Tensor) and image.ndim >= 3
        if pipe.vae is not None and tensor and image.shape[-3] == self.channels:
            self.pictures, self.is_latent = image.reshape(-1, *image.shape[-3:]), True
        else:
            self.pictures = self.read_images(image)
        unit = self.factor if self.is_latent else 1
        self.height, self.width = (side * unit for side in self.pictures.shape[-2:])

    def read_images(self, image: Any) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], at `height` x `width` if these are given. Raises ValueError for a size
        that the model cannot draw."""
        height, width = self.request.height, self.request.width
        if (height is None) != (width is None):
            raise ValueError(f"`height` and `width` go together, got {height} and {width}.")
        size = None if height is None or width is None else (height, width)
        if size is not None:
            check_allowed(*size, self.pipe.size_unit, "`height` and `width`")
        pictures = read_pictures(image, size)
        check_allowed(pictures.shape[-2], pictures.shape[-1], self.pipe.size_unit, "`image`")
        return pictures

    def check(self) -> int:
        prompts = super().check()
        check_rows("image", self.pictures, prompts)
        return prompts

    def visit(self, device: Any) -> tuple[torch.Tensor, int]:
        """The last int(strength * n) of n steps. Raises ValueError if none is left."""
        visited, steps = super().visit(device)
        scheduler, strength = self.pipe.scheduler, self.request.strength
        left_out = steps - min(int(steps * strength), steps)
        check("strength", strength, left_out < steps, f"at least {1 / steps:.3g}, one of {steps} steps")
        begin = left_out * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return visited[begin:], steps - left_out

    def start(self, pictures: int, visited: torch.Tensor, device: Any, dtype: torch.dtype) -> torch.Tensor:
        if self.is_latent:
            latents = for_each(self.pictures.to(device=device, dtype=dtype), pictures)
        else:
            latents = self.encode(self.pictures, pictures, device, dtype)
        noise = randn_tensor(latents.shape, self.request.generator, device, dtype)
        return self.pipe.scheduler.add_noise(latents, noise, visited[:1].repeat(pictures))

    def encode(self, images: torch.Tensor, count: int, device: Any, dtype: torch.dtype) -> torch.Tensor:
        """Latents for `count` pictures; repeats of one picture are in neighbouring rows.

        With a list of generators, each row is drawn from the encoder's posterior by its own.
        """
        generator = self.request.generator
        if isinstance(generator, list):
            images = for_each(images, count)
        latents = encode_pictures(self.pipe.vae, images.to(device=device, dtype=dtype), generator)
        return for_each(latents, count).to(dtype)


class ImageToImagePipeline(TextToImagePipeline):
    """Draws prompts over a picture. The components are TextToImagePipeline's, whose folders load here."""

    @torch.no_grad()
    @takes(
        "image_to_image",
        "prompt image strength num_inference_steps timesteps sigmas guidance_scale negative_prompt "
        "num_images_per_prompt eta generator prompt_embeds negative_prompt_embeds ip_adapter_image "
        "ip_adapter_image_embeds output_type return_dict cross_attention_kwargs clip_skip "
        "callback_on_step_end callback_on_step_end_tensor_inputs guidance_rescale guidance_interval "
        "pooled_prompt_embeds negative_pooled_prompt_embeds height width",
    )
    def __call__(self, request: Request) -> Any:
        """Draws `num_images_per_prompt` pictures for each prompt, starting from a picture.

        A tensor with as many channels as the VAE's latents is taken as latents. int(strength *
        num_inference_steps) steps are run, at least one. `height` and `width`, which go together, resize the
        picture. Without them it keeps its size; a size that the model cannot draw raises an error that names
        the nearest one (diffusers cuts the sides to multiples). With several prompts, pictures and
        `num_images_per_prompt`, picture i stays with prompt i.

        Returns images and nsfw_content_detected (None without a safety checker).
        Raises ValueError for arguments that make no sense, before any work.
        """
        return draw(self, request, ImageToImage(self, request))


def check_rows(name: str, rows: torch.Tensor, prompts: int) -> None:
    rule = f"one picture, or one for each of {prompts} prompts"
    check(name, f"{len(rows)} pictures", len(rows) in (1, prompts), rule)


def for_each(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat rows in place until there are `count`: [a, b] -> [a, a, b, b]."""
    return rows.repeat_interleave(count // len(rows), dim=0)
