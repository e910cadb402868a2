"""A digit and a Swiss roll, and the chains that the lecture notes run on them, each in a few lines."""

import math

import numpy as np
import torch
from torch import Tensor

from pipelines import DDPMScheduler
from pipelines.chain.equations import posterior_mean, posterior_variance, q_sample

# The first digit of scikit-learn's load_digits, 8 x 8 values in 0 .. 16, as a picture (1, 8, 8) in [-1, 1].
# From "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI 1998, CC BY 4.0.
DIGIT = torch.tensor(
    [
        0, 0, 5, 13, 9, 1, 0, 0,   0, 0, 13, 15, 10, 15, 5, 0,
        0, 3, 15, 2, 0, 11, 8, 0,  0, 4, 12, 0, 0, 8, 8, 0,
        0, 5, 8, 0, 0, 9, 8, 0,    0, 4, 11, 0, 1, 12, 7, 0,
        0, 2, 14, 5, 10, 12, 0, 0, 0, 0, 6, 13, 10, 0, 0, 0,
    ]
).reshape(1, 8, 8) / 8 - 1  # fmt: skip


def swiss_roll(n: int, seed: int = 0) -> Tensor:
    """n points, (n, 2), in order along a spiral of one and a half turns, with mean 0 and variance 1."""
    angle = 1.5 * np.pi * (1 + 2 * np.sort(np.random.default_rng(seed).random(n)))
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1)
    points -= points.mean(0)
    return torch.tensor(points / points.std(), dtype=torch.float32)


def forward_chain(x0: Tensor, beta: float, T: int, generator: torch.Generator) -> Tensor:
    """x_0 .. x_T, (T + 1, *x0.shape), x_t ~ N(sqrt(1 - beta) x_{t-1}, beta I). Ho 2020, eq. 2."""
    chain = [x0]
    for _ in range(T):
        chain.append(q_sample(chain[-1], torch.randn(x0.shape, generator=generator), 1 - beta))
    return torch.stack(chain)


def posterior_chain(x0: Tensor, x_T: Tensor, beta: float, T: int, generator: torch.Generator) -> Tensor:
    """x_T .. x_0, (T + 1, *x0.shape), x_{t-1} ~ q(x_{t-1} | x_t, x_0): it ends at x0. Ho 2020, eq. 7."""
    chain = [x_T]
    for t in range(T, 0, -1):
        abar_t, abar_prev = torch.tensor((1 - beta) ** t), torch.tensor((1 - beta) ** (t - 1))
        z = torch.randn(x0.shape, generator=generator)
        mean = posterior_mean(x0, chain[-1], abar_t, abar_prev)
        chain.append(mean + posterior_variance(abar_t, abar_prev).sqrt() * z)
    return torch.stack(chain)


def backward_chain(points: Tensor, x_T: Tensor, beta: float, T: int, generator: torch.Generator) -> Tensor:
    """x_T .. x_0, (T + 1, *x_T.shape), by the sampler with the exact model for x0 uniform over `points`."""
    scheduler = DDPMScheduler(T, trained_betas=[beta] * T, clip_sample=False)
    chain = [x_T]
    for t in range(T - 1, -1, -1):
        eps = expected_noise(points, chain[-1], float(scheduler.alphas_cumprod[t]))
        chain.append(scheduler.step(eps, t, chain[-1], generator=generator).prev_sample)
    return torch.stack(chain)


def expected_noise(points: Tensor, x_t: Tensor, abar: float) -> Tensor:
    """E[eps | x_t] for x0 uniform over `points` (n, D); x_t (B, D) -> (B, D).

    E[x0 | x_t] weights the points by softmax(-|x_t - sqrt(abar) x0|^2/(2 (1 - abar))).
    """
    distances = (x_t[:, None] - math.sqrt(abar) * points).square().sum(-1)  # (B, n)
    x0 = (-distances / (2 * (1 - abar))).softmax(-1) @ points
    return (x_t - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
