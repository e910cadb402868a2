"""Training a U-Net to inpaint, as GLIDE was (Nichol 2022, section 2.4): the masks, and the U-Net's input."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from training.data.pictures import seed_for

KINDS = ("brush", "box", "half", "all")
SHARES = (0.4, 0.3, 0.2, 0.1)  # with "all", the model still learns to draw without a picture


# ---- the masks ----


def random_masks(
    seed: int, step: int, count: int, height: int, width: int, rank: int = 0, world: int = 1
) -> Tensor:
    """Masks (count, 1, height, width) in {0, 1}, 1 where the model is to paint: brush strokes, a box (or
    everything but a box), part of one side, or everything, with the probabilities `SHARES`.

    A function of (seed, step) and the place in the global batch alone, however many processes share it.
    """
    seeds = [seed_for(seed, "mask", step, n) for n in range(rank * count, (rank + 1) * count)]
    masks = [draw_mask(np.random.default_rng(one), height, width) for one in seeds]
    return torch.from_numpy(np.stack(masks)).float()[:, None]


def draw_mask(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One mask, (height, width) bool, never empty."""
    draw = {"brush": brush_mask, "box": box_mask, "half": half_mask, "all": all_mask}
    mask = draw[random.choice(KINDS, p=SHARES)](random, height, width)
    return mask if mask.any() else ~mask


def brush_mask(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One to four strokes of three to eight segments. Each has a width of 1/16 to 1/4 of the shorter side."""
    image, side = Image.new("1", (width, height)), min(height, width)
    draw = ImageDraw.Draw(image)
    for _ in range(random.integers(1, 5)):
        thick = side * random.uniform(1 / 16, 1 / 4)
        point = random.uniform((0, 0), (width, height))
        angle = random.uniform(0, 2 * np.pi)
        for _ in range(random.integers(3, 9)):
            angle += random.normal(0, 1)
            length = side * random.uniform(0.1, 0.4)
            end = np.clip(point + length * np.array([np.cos(angle), np.sin(angle)]), 0, (width, height))
            draw.line([*point, *end], fill=1, width=max(round(thick), 1))
            for x, y in (point, end):  # round ends
                draw.ellipse([x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2], fill=1)
            point = end
    return np.array(image)


def box_mask(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A box of 1/4 to 3/4 of each side; with probability 1/4 everything but the box, as in outpainting."""
    mask = np.zeros((height, width), dtype=bool)
    box_height, box_width = (max(round(side * random.uniform(0.25, 0.75)), 1) for side in (height, width))
    top, left = (random.integers(0, side + 1) for side in (height - box_height, width - box_width))
    mask[top : top + box_height, left : left + box_width] = True
    return ~mask if random.random() < 0.25 else mask


def half_mask(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A quarter to three quarters of the picture, along one of its four sides."""
    mask = np.zeros((height, width), dtype=bool)
    share, side = random.uniform(0.25, 0.75), random.integers(4)
    part = mask.T if side < 2 else mask
    part[: max(round(share * len(part)), 1)] = True
    return mask[::-1, ::-1] if side % 2 else mask


def all_mask(_: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.ones((height, width), dtype=bool)


# ---- what the U-Net sees ----


def see_mask(x_t: Tensor, x0: Tensor, mask: Tensor) -> Tensor:
    """The input of an inpainting U-Net: [x_t, mask, x0 (1 - mask)], (B, 2C + 1, H, W), in the same order as
    Stable Diffusion's. x_t and x0 are (B, C, H, W), mask is (B, 1, H, W)."""
    return torch.cat([x_t, mask, x0 * (1 - mask)], dim=1)
