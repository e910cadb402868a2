"""Editing pictures of any size with a model made for one size: the picture is resized to the model's size and
the result is put back at the picture's own, so that pixels to be kept do not change.
"""

from typing import Any

from PIL import Image

from .drawing.images import nearest_size
from .inpaint import crop_around_mask, put_back


def enlarged(pipe: Any, image: Image.Image, prompt: str, generator: Any) -> Image.Image:
    """The picture, enlarged by `pipe.upsampler` if there is one."""
    upsampler = pipe.upsampler
    if upsampler is None:
        return image
    return upsampler(prompt if upsampler.reads_text else None, image=image, generator=generator).images[0]


def repaint(
    pipe: Any,
    prompt: str,
    picture: Image.Image,
    mask: Image.Image,
    padding: int,
    generator: Any,
    **call: Any,
) -> Image.Image:
    """InpaintPipeline's `padding_mask_crop`, with the upsampler for a region larger than what is drawn.

    Pixels where the mask is black come back bit for bit. Raises ValueError as the pipeline does.
    """
    box, whole, grey, part, part_mask = crop_around_mask(pipe, picture, mask, None, None, padding)
    part = part / 2 + 0.5  # [-1, 1] -> [0, 1]
    drawn = pipe(prompt, image=part, mask_image=part_mask, generator=generator, **call).images[0]
    if box[2] - box[0] > drawn.width or box[3] - box[1] > drawn.height:
        drawn = enlarged(pipe, drawn, prompt, generator)
    return put_back(drawn, whole, grey, box)


def extend(
    pipe: Any,
    prompt: str,
    picture: Image.Image,
    sides: dict[str, int],
    generator: Any,
    **call: Any,
) -> Image.Image:
    """`InpaintPipeline.outpaint` at the model's scale: a larger picture is first shrunk to the model's size,
    and finally pasted into the enlarged result.

    sides: how many of the picture's pixels to add, by "left", "top", "right" and "bottom".
    """
    scale = max(a / b for a, b in zip(picture.size, pipe.sample_size, strict=True))
    if scale <= 1:
        return pipe.outpaint(prompt, picture, generator=generator, **sides, **call).images[0]
    small = picture.resize([max(1, round(a / scale)) for a in picture.size], Image.Resampling.LANCZOS)
    # whole numbers throughout, rounded up: the canvas reaches at least as far as was asked
    axes = {"left": 0, "top": 1, "right": 0, "bottom": 1}
    added = {name: -(-sides[name] * small.size[axis] // picture.size[axis]) for name, axis in axes.items()}
    drawn = pipe.outpaint(prompt, small, generator=generator, **added, **call).images[0]
    size = [-(-drawn.size[axis] * picture.size[axis] // small.size[axis]) for axis in (0, 1)]
    drawn = enlarged(pipe, drawn, prompt, generator).resize(size, Image.Resampling.LANCZOS)
    left, top = (added[name] * picture.size[axes[name]] // small.size[axes[name]] for name in ("left", "top"))
    drawn.paste(picture, (left, top))
    return drawn.crop(
        (
            left - sides["left"],
            top - sides["top"],
            left + picture.width + sides["right"],
            top + picture.height + sides["bottom"],
        )
    )


def restyle(
    pipe: Any,
    prompt: str,
    picture: Image.Image,
    size: tuple[int, int],
    generator: Any,
    **call: Any,
) -> Image.Image:
    """Image to image within the model's `size`, in the picture's shape, enlarged if the picture is larger."""
    scale = min(a / b for a, b in zip(size, picture.size, strict=True))
    unit = pipe.vae_scale_factor * pipe.unet.config.get("patch_size", 1)
    height, width = nearest_size(round(picture.height * scale), round(picture.width * scale), unit)
    drawn = pipe(prompt, image=picture, height=height, width=width, generator=generator, **call).images[0]
    return enlarged(pipe, drawn, prompt, generator) if scale < 1 else drawn
