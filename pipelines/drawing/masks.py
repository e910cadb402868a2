"""What is repainted, where and when: the region around a mask, the canvas and windows of outpainting, and the
order of RePaint's resampling. Boxes are (left, top, right, bottom) in pixels, sizes (width, height).
"""

import math

import numpy as np
import torch
from PIL import Image

Box = tuple[int, int, int, int]
FORGETFUL = ("DDPMScheduler", "DDIMScheduler")  # their steps depend on x_t and t alone


# ---- one region of a larger picture ----


def crop_region(mask: Image.Image, width: int, height: int, pad: int = 0) -> Box:
    """The part of a picture that contains its whole mask (where it is not 0) and `pad` pixels around it.

    It is widened about its centre to the aspect ratio width : height, as far as the picture allows, with the
    same results as in diffusers.

    Raises ValueError for a mask that is 0 everywhere.
    """
    box = mask.getbbox()
    if box is None:
        raise ValueError("`mask_image` is black everywhere: what is to be repainted must be white.")
    left, top, right, bottom = box
    left, right = max(left - pad, 0), min(right + pad, mask.width)
    top, bottom = max(top - pad, 0), min(bottom + pad, mask.height)
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _widen(top, bottom, int((right - left) / ratio - (bottom - top)), mask.height)
    else:
        left, right = _widen(left, right, int((bottom - top) * ratio - (right - left)), mask.width)
    return left, top, right, bottom


def _widen(start: int, end: int, extra: int, limit: int) -> tuple[int, int]:
    """start..end, longer by `extra`, half on each side, then moved into 0..limit and cut if too long."""
    start, end = start - extra // 2, end + extra - extra // 2
    shift = max(end - limit, 0)
    start, end = start - shift, end - shift
    return max(start, 0), min(end - min(start, 0), limit)


def shrink_to_fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture, scaled to fit into width x height and centred, with its outermost rows or columns
    repeated up to the border. diffusers' resize_mode "fill"."""
    inner = _resize_one_side(image, width, height, image.width * height > width * image.height)
    left, top = width // 2 - inner.width // 2, height // 2 - inner.height // 2
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(inner, (left, top))
    for start, end, edge in ((0, top, 0), (top + inner.height, height, inner.height)):
        if end > start:
            rows = inner.resize((inner.width, end - start), box=(0, edge, inner.width, edge))
            canvas.paste(rows, (left, start))
    for start, end, edge in ((0, left, 0), (left + inner.width, width, inner.width)):
        if end > start:
            columns = inner.resize((end - start, inner.height), box=(edge, 0, edge, inner.height))
            canvas.paste(columns, (start, top))
    return canvas


def grow_to_fill(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture, scaled to cover width x height and cropped to the middle, which undoes `shrink_to_fit`.
    diffusers' resize_mode "crop"."""
    outer = _resize_one_side(image, width, height, image.width * height <= width * image.height)
    left, top = outer.width // 2 - width // 2, outer.height // 2 - height // 2
    return outer.crop((left, top, left + width, top + height))


def _resize_one_side(image: Image.Image, width: int, height: int, by_width: bool) -> Image.Image:
    """Resize to that width, or else to that height, with the other side in proportion."""
    size = (width, image.height * width // image.width) if by_width else None
    size = size or (image.width * height // image.height, height)
    return image.resize((max(size[0], 1), max(size[1], 1)), Image.Resampling.LANCZOS)


# ---- outpainting ----


def extend_canvas(image: Image.Image, left: int, top: int, right: int, bottom: int) -> Image.Image:
    """A picture with pixels added on each side, which repeat its outermost ones."""
    pixels = np.asarray(image)
    borders = [(top, bottom), (left, right), (0, 0)]
    return Image.fromarray(np.pad(pixels, borders[: pixels.ndim], mode="edge"))


def outpainting_windows(size: tuple[int, int], known: Box, side: tuple[int, int], overlap: int) -> list[Box]:
    """Boxes of `side` that cover a canvas of `size`, from the one around `known` outwards.

    Neighbours share at least `overlap` pixels, and so do `known` and each box that reaches beyond it on one
    axis. Each box comes after those between it and `known`. No side may be longer than the canvas.
    """
    columns, rows = (
        _starts(size[axis], known[axis], known[axis + 2], side[axis], overlap) for axis in (0, 1)
    )
    steps = sorted((abs(i) + abs(j), i, j) for i in columns for j in rows)
    corners = [(columns[i], rows[j]) for _, i, j in steps]
    return [(x, y, x + side[0], y + side[1]) for x, y in corners]


def _starts(length: int, known_start: int, known_end: int, side: int, overlap: int) -> dict[int, int]:
    """Position of a window, .. -1, 0, 1 .., 0 being in the middle of what is known -> where it starts."""
    last, stride = length - side, side - overlap
    middle = min(max((known_start + known_end - side) // 2, 0), last)
    before, after = math.ceil(middle / stride), math.ceil((last - middle) / stride)
    return {step: min(max(middle + step * stride, 0), last) for step in range(-before, after + 1)}


# ---- RePaint's resampling ----


def repaint_order(steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """The steps 0 (noisiest) .. steps - 1 in the order that RePaint takes them (Lugmayr et al. 2022, 4.2).

    After every `jump_length` steps, except at the start of the chain, it goes back that many steps, so that
    each is taken `jump_n_sample` times in all. Where the order does not ascend, noise is added again
    (`renoise`).
    """
    order: list[int] = []
    for step in range(steps):
        order.append(step)
        left = steps - 1 - step
        if left % jump_length == 0 and left < steps - jump_length:
            order += [*range(step - jump_length + 1, step + 1)] * (jump_n_sample - 1)
    return order


def renoise(x_s: torch.Tensor, z: torch.Tensor, abar_s: float, abar_t: float) -> torch.Tensor:
    """sqrt(abar_t/abar_s) x_s + sqrt(1 - abar_t/abar_s) z ~ q(x_t | x_s), t noisier than s, z ~ N(0, I)."""
    ratio = abar_t / abar_s
    return ratio**0.5 * x_s + (1 - ratio) ** 0.5 * z
