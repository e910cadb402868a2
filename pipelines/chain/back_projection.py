"""What a small picture says of a large one: shrinking, enlarging, and keeping to it.

Pictures are float tensors (B, C, H, W). With S the shrinking and E the enlarging, each by a whole number:

    x <- x + E(y - S(x))        iterative back-projection, Irani and Peleg 1991

brings a large picture x onto those that shrink to y. Within diffusion the same step keeps each estimate of x0
consistent with what is known (ILVR, Choi 2021, arXiv 2108.02938; DDNM, Wang 2022, arXiv 2212.00490).
"""

import torch
import torch.nn.functional as F


def shrink(x: torch.Tensor, scale: int) -> torch.Tensor:
    """S: the mean over each scale x scale square, as an antialiased renderer draws the smaller picture.

    (B, C, scale h, scale w) -> (B, C, h, w).
    """
    return F.avg_pool2d(x, scale)


def enlarge(y: torch.Tensor, scale: int) -> torch.Tensor:
    """E: cubic convolution, Keys 1981. (B, C, h, w) -> (B, C, scale h, scale w).

    With antialiasing torch takes a = -1/2, which is exact on straight lines, as Pillow does; without, -3/4.
    """
    return F.interpolate(y, scale_factor=scale, mode="bicubic", antialias=True)


def back_project(x: torch.Tensor, y: torch.Tensor, scale: int, iterations: int = 8) -> torch.Tensor:
    """x, in [-1, 1], changed smoothly until it shrinks to y: x <- clip(x + E(y - S(x))), `iterations` times.

    What is left of the difference is all but gone after one at the coarse waves of y, and falls slower the
    finer they are. (B, C, scale h, scale w) and (B, C, h, w), both in [-1, 1] -> the shape of x.
    """
    for _ in range(iterations):
        x = (x + enlarge(y - shrink(x, scale), scale)).clamp(-1, 1)
    return x
