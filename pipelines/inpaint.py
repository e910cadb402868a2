"""Inpainting and outpainting: `InpaintPipeline` repaints where a mask is white and leaves the rest alone.

It takes two kinds of U-Net. With any text-to-image model, the known region, noised to the level of each step,
is merged into the latents (Lugmayr et al. 2022, "RePaint", with its resampling as an option). A model trained
for inpainting, as GLIDE was, sees the mask and the masked picture as further input channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from .drawing.images import check_pixels, read_masks, read_pictures, to_grey, to_pil, to_rgb
from .drawing.loop import draw
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
from .drawing.request import COUNT, Request, check, is_whole, takes
from .drawing.sizes import check_allowed
from .image_to_image import ImageToImage, ImageToImagePipeline, check_rows, for_each


class Inpaint(ImageToImage):
    """Draws the masked part and keeps the known region, by merging it in or by a U-Net that sees it."""

    soft: torch.Tensor  # the mask as given, (1 or prompts, 1, H, W) in [0, 1]
    binary: torch.Tensor  # 1 where it is 1/2 or more
    box: Box | None = None  # with `padding_mask_crop`, the region of a larger picture that is repainted
    whole: Image.Image  # that picture, in RGB
    grey: Image.Image  # its mask

    def read(self) -> None:
        request, sees_mask = self.request, self.pipe.sees_mask
        if request.jump_n_sample > 1:
            kind = type(self.pipe.scheduler).__name__
            check("scheduler", kind, kind in FORGETFUL, f"one of {FORGETFUL} for `jump_n_sample` above 1")
            check("jump_n_sample", request.jump_n_sample, not sees_mask, "1 for a U-Net made for inpainting")
        if request.padding_mask_crop is not None:
            kind = request.output_type
            check("output_type", kind, kind == "pil", "'pil' with `padding_mask_crop`")
            self.box, self.whole, self.grey, self.pictures, mask = crop_around_mask(
                self.pipe,
                request.image,
                request.mask_image,
                request.height,
                request.width,
                request.padding_mask_crop,
            )
            self.soft = mask  # the result is blended into the whole picture, at its size
        else:
            self.pictures = self.read_images(request.image)
            size = (self.pictures.shape[2], self.pictures.shape[3])
            mask = read_masks(request.mask_image, size)
            # Lanczos leaves ripples
            self.soft = read_masks(request.mask_image, size, Image.Resampling.BILINEAR)
        self.binary = (mask >= 0.5).float()
        if not self.binary.any(dim=0).any():
            raise ValueError("`mask_image` has nothing to repaint: white is repainted, black is kept.")
        self.height, self.width = self.pictures.shape[2:]

    def check(self) -> int:
        prompts = super().check()
        check_rows("mask_image", self.binary, prompts)
        return prompts

    def check_channels(self) -> None:
        channels, config = self.channels, self.pipe.unet.config
        if config.in_channels not in (channels, 2 * channels + 1) or config.out_channels % channels:
            raise ValueError(
                f"The U-Net must have {channels} or {2 * channels + 1} input channels and {channels} or "
                f"{2 * channels} output channels, got {config.in_channels} and {config.out_channels}."
            )

    def visit(self, device: Any) -> tuple[torch.Tensor, int]:
        self.visited, steps = super().visit(device)
        return self.visited, steps

    def order(self, count: int) -> Sequence[int]:
        return repaint_order(count, self.request.jump_length, self.request.jump_n_sample)

    def start(self, pictures: int, visited: torch.Tensor, device: Any, dtype: torch.dtype) -> torch.Tensor:
        """Encode the picture, noise it, and encode its unmasked part; draws are in diffusers' order."""
        request, scheduler = self.request, self.pipe.scheduler
        merges = not self.pipe.sees_mask
        picture = None
        if request.strength < 1 or merges:
            picture = self.encode(self.pictures, pictures, device, dtype)
        self.known, self.z = picture if merges else None, self.noise(pictures, device, dtype)
        if request.strength == 1 or picture is None:
            latents = self.z * scheduler.init_noise_sigma
        else:
            latents = scheduler.add_noise(picture, self.z, visited[:1].repeat(pictures))
        mask = F.interpolate(self.binary, latents.shape[2:]).to(device=device, dtype=dtype)
        masked = request.masked_image_latents
        if masked is None:
            masked = self.encode(self.pictures * (1 - self.binary), pictures, device, dtype)
        masked = for_each(masked.to(device=device, dtype=dtype), pictures)
        self.tensors = {"mask": for_each(mask, pictures), "masked_image_latents": masked}
        return latents

    def see(self, x_t: torch.Tensor) -> torch.Tensor:
        if not self.pipe.sees_mask:
            return x_t
        return torch.cat([x_t, *self.tensors.values()], dim=1)  # (B, 2C + 1, H, W)

    def before(self, latents: torch.Tensor, k: int, last: int | None) -> torch.Tensor:
        """If resampling goes back: noise the latents that step `last` left to step k's noise level."""
        if last is None or k > last:
            return latents
        abar = self.pipe.scheduler.alphas_cumprod.double().cpu()[self.visited.cpu()].tolist() + [1.0]
        z = randn_tensor(latents.shape, self.request.generator, latents.device, latents.dtype)
        return renoise(latents, z, abar[last + 1], abar[k])

    def after(self, latents: torch.Tensor, k: int) -> torch.Tensor:
        """Replace what was drawn in the known region by the picture, noised to the level after step k."""
        if self.known is None:
            return latents
        if self.request.jump_n_sample > 1:
            self.z = randn_tensor(latents.shape, self.request.generator, self.z.device, self.z.dtype)
        known, mask = self.known, self.tensors["mask"]
        if k < len(self.visited) - 1:
            known = self.pipe.scheduler.add_noise(known, self.z, self.visited[k + 1 : k + 2])
        return (1 - mask) * known + mask * latents

    def finish(self, pictures: torch.Tensor, kept: torch.Tensor) -> Any:
        """Put back the pixels that were to be kept."""
        if self.box is not None:
            drawn = super().finish(pictures, kept)
            return [put_back(one, self.whole, self.grey, self.box) for one in drawn]
        count = len(self.tensors["mask"])
        soft, picture = (for_each(x.to(pictures.device), count)[kept] for x in (self.soft, self.pictures))
        return super().finish(torch.lerp(picture, pictures.float(), soft), kept)


class InpaintPipeline(ImageToImagePipeline):
    """Repaints the masked part of a picture from a prompt. The components are TextToImagePipeline's, whose
    folders load here, with a U-Net of either kind.

    With C channels of latents (3 in pixels), a U-Net with C input channels is a text-to-image model; one with
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
        """C: channels of the drawn latents, without the further inputs of a U-Net made for inpainting."""
        return 3 if self.vae is None else self.vae.config.latent_channels

    @property
    def sees_mask(self) -> bool:
        """Whether the U-Net was made for inpainting."""
        return self.unet.config.in_channels == 2 * self.num_channels_latents + 1

    @torch.no_grad()
    @takes(
        "inpaint",
        "prompt image mask_image masked_image_latents height width padding_mask_crop strength "
        "num_inference_steps timesteps sigmas guidance_scale negative_prompt num_images_per_prompt eta "
        "generator latents prompt_embeds negative_prompt_embeds ip_adapter_image ip_adapter_image_embeds "
        "output_type return_dict cross_attention_kwargs clip_skip callback_on_step_end "
        "callback_on_step_end_tensor_inputs guidance_rescale guidance_interval pooled_prompt_embeds "
        "negative_pooled_prompt_embeds jump_length jump_n_sample",
        strength=1.0,
    )
    def __call__(self, request: Request) -> Any:
        """Repaints the white part of `mask_image` in `image`, `num_images_per_prompt` times for each prompt.

        Where the mask is 0, the returned pictures equal `image` bit for bit, whatever the model and the size.
        The model repaints where the mask is 1/2 or more. Where a soft mask is between 0 and 1, pixels do
        change: the result is mask * drawn + (1 - mask) * image. A mask of another size than `image` is
        stretched to it.

        `height` and `width`, which go together, resize picture and mask; without them these keep the
        picture's size (diffusers resizes them to the U-Net's). `padding_mask_crop` takes one PIL picture, for
        one prompt, and returns PIL pictures. Callbacks may also see and replace "mask" and
        "masked_image_latents", a row for each picture. RePaint's resampling (`jump_n_sample` above 1) makes
        the two regions agree better and multiplies the time. It needs a DDPM or DDIM scheduler and a U-Net
        that does not see the mask.

        With a list of generators, all of a picture's noise comes from its own (in diffusers the encoder's
        does not).

        Returns images and nsfw_content_detected (None without a safety checker).
        Raises ValueError for arguments that make no sense, and for a mask that is below 1/2 everywhere,
        before any work.
        """
        return draw(self, request, Inpaint(self, request))

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
        """Extends pictures by these numbers of pixels and draws there; the originals are kept bit for bit.

        The canvas is covered by windows of the U-Net's own size, from the picture outwards, and each is
        inpainted where it is still empty. A window that borders on what is already there shares `overlap`
        pixels with it (default: half a window).

        `image` is one for all prompts or one for each. `call` has further arguments of `__call__`; the output
        is always PIL. Returns pictures of (width + left + right) x (height + top + bottom) pixels.
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
        check("num_images_per_prompt", num_images_per_prompt, is_whole(num_images_per_prompt, 1), COUNT.text)
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

        # a canvas must be as large as a window: what is added for that is cut off at the end
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


def crop_around_mask(
    pipe: Any, image: Any, mask_image: Any, height: int | None, width: int | None, padding: int
) -> tuple[Box, Image.Image, Image.Image, torch.Tensor, torch.Tensor]:
    """(box, the whole picture in RGB, its mask in grey, and the box of both as tensors of height x width,
    which default to the model's own)."""
    for name, given in (("image", image), ("mask_image", mask_image)):
        check(name, type(given).__name__, isinstance(given, Image.Image), "a PIL picture to be cropped")
        check_pixels(given.width, given.height, name)
    whole, grey = to_rgb(image), to_grey(mask_image)
    if grey.size != whole.size:
        grey = grey.resize(whole.size, Image.Resampling.BILINEAR)
    width, height = width or pipe.sample_size[0], height or pipe.sample_size[1]
    check_allowed(height, width, pipe.size_unit, "`height` and `width`")
    box = crop_region(grey, width, height, padding)
    parts = [shrink_to_fit(part.crop(box), width, height) for part in (whole, grey)]
    return box, whole, grey, read_pictures(parts[0]), read_masks(parts[1])


def put_back(drawn: Image.Image, whole: Image.Image, grey: Image.Image, box: Box) -> Image.Image:
    """`whole` with `drawn` in `box`, blended by the mask `grey`: all of it at 255, none at 0."""
    pasted = whole.copy()
    pasted.paste(grow_to_fill(drawn, box[2] - box[0], box[3] - box[1]), box)
    return Image.composite(pasted, whole, grey)
