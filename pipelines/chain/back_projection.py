"""Shrinking, enlarging, and keeping a large picture consistent with a small one.

Pictures are float tensors (B, C, H, W). S shrinks and E enlarges, each by a whole factor. The step

    x <- x + E(y - S(x))        iterative back-projection, Irani and Peleg 1991

moves a large picture x towards those that shrink to y. In diffusion the same step keeps each estimate of x0
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

    With antialiasing torch uses a = -1/2, as Pillow does, which is exact on straight lines; without, -3/4.
    """
    return F.interpolate(y, scale_factor=scale, mode="bicubic", antialias=True)


def back_project(x: torch.Tensor, y: torch.Tensor, scale: int, iterations: int = 8) -> torch.Tensor:
    """Change x smoothly until it shrinks to y: x <- clip(x + E(y - S(x)), -1, 1), `iterations` times.

    One iteration all but removes the difference at the low frequencies of y; the higher the frequency, the
    more it takes. x (B, C, scale h, scale w) and y (B, C, h, w), both in [-1, 1] -> the shape of x.
    """
    for _ in range(iterations):
        x = (x + enlarge(y - shrink(x, scale), scale)).clamp(-1, 1)
    return x
