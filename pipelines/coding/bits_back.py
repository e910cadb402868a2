"""Lossless coding of pictures by a diffusion model: bits back, in the order of Bit-Swap.

    -log2 p(x0 | x_1) + sum of log2 q(x_t | x_{t-1})/p(x_t | x_{t+1}) + log2 q(x_T | x_{T-1})/p(x_T)

x_t are rounded to a grid and drawn with the bits of earlier pictures; the sum's mean is the bound. Papers:
Townsend 2019 (arXiv 1901.04866), Kingma 2019 (Bit-Swap, 1905.06845), Kingma 2021 (2107.00630, section 7.3).
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..chain.equations import posterior_variance
from ..components.ddpm_scheduler import DDPMScheduler
from .coding_model import Cost, flat
from .entropy_coding import Stack
from .likelihood import prior_term, vlb_term

BINS = 2.0  # grid points of x_t per standard deviation of the distribution that codes it
INITIAL_BITS = 16  # for each dimension: more than two latents need. Unused bits are not stored


class Grid(NamedTuple):
    """x_t = spacing * whole number; N(scale * x_prev, std^2) draws it, x_prev being cleaner."""

    t: int
    spacing: float
    scale: float
    std: float


def grids(chain: DDPMScheduler) -> list[Grid]:
    """Cleanest first. The spacing is half the smaller deviation of p(x_t | x_{t+1}) and q(x_t | x_{t-1})."""
    visited = chain.timesteps.flip(0).tolist()
    abar = [1.0, *chain.alphas_cumprod.double()[visited].tolist()]
    result = []
    for i, t in enumerate(visited, start=1):
        alpha = abar[i] / abar[i - 1]
        last = i == len(visited)
        smaller = 1.0 if last else float(posterior_variance(*torch.tensor([abar[i + 1], abar[i]]).double()))
        spacing = math.sqrt(min(1 - alpha, smaller)) / BINS
        result.append(Grid(t, spacing, math.sqrt(alpha), math.sqrt(1 - alpha)))
    return result


def in_units(std: Any, spacing: float) -> Any:
    """A deviation in units of the grid, less the variance of 1/12 that rounding to the grid adds (Sheppard).

    So the rounded x_t have the variance that the model has learnt to expect."""
    return np.sqrt(np.maximum((std / spacing) ** 2 - 1 / 12, 0.05))


class BitsBack:
    """A stack of complete pictures. Bit-Swap's order: x_1 is drawn, x_0 pushed, x_2 drawn, x_1 pushed, ..."""

    def __init__(self, chain: DDPMScheduler, stack: Stack, shape: tuple[int, ...]):
        self.chain, self.stack, self.grids, self.shape = chain, stack, grids(chain), shape

    def _q(self, grid: Grid, x_prev: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        std = float(in_units(grid.std, grid.spacing))
        return grid.scale / grid.spacing * x_prev, np.full(x_prev.shape, std), std

    def _gaussian(self, grid: Grid, mean: np.ndarray, std: np.ndarray) -> tuple[Any, Any, float]:
        units = in_units(std, grid.spacing)
        return mean / grid.spacing, units, float(units.max())

    def _p(self, model: Any, grid: Grid, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, Tensor, Any]:
        """(mean and std of p(x_prev | x_t), x_t, the model's output)."""
        x_t = torch.from_numpy(numbers * grid.spacing).reshape(self.shape)
        output = model(x_t, grid.t)
        p = self.chain.p_mean_variance(output, grid.t, x_t)
        return flat(p.mean, x_t), flat((0.5 * p.log_variance).exp(), x_t), x_t, output

    def _prior(self) -> tuple[Any, Any, float]:
        size = math.prod(self.shape)
        return self._gaussian(self.grids[-1], np.zeros(size), np.ones(size))

    def push(self, model: Any, x0: Tensor, cost: Cost) -> None:
        x_prev, numbers = flat(x0, x0), np.rint((flat(x0, x0) + 1) * 127.5)
        terms = [float(prior_term(self.chain, x0))]
        for i, grid in enumerate(self.grids):
            drawn = self.stack.draw(*self._q(grid, x_prev))
            mean, std, x_t, output = self._p(model, grid, drawn)
            if i == 0:
                self.stack.push_levels(numbers, (mean + 1) * 127.5, std * 127.5)
            else:
                self.stack.push(numbers, *self._gaussian(self.grids[i - 1], mean, std))
            terms.append(float(vlb_term(self.chain, output, grid.t, x0, x_t).bits))
            numbers, x_prev = drawn, drawn * grid.spacing
        self.stack.push(numbers, *self._prior())
        cost.kl += x0.numel() * sum(terms)
        cost.last += x0.numel() * terms[1]

    def pop(self, model: Any) -> Tensor:
        numbers = self.stack.pop(*self._prior())
        for i, grid in reversed(list(enumerate(self.grids))):
            mean, std, _, _ = self._p(model, grid, numbers)
            if i == 0:
                before = self.stack.pop_levels((mean + 1) * 127.5, std * 127.5)
                x_prev = before / 127.5 - 1
            else:
                before = self.stack.pop(*self._gaussian(self.grids[i - 1], mean, std))
                x_prev = before * self.grids[i - 1].spacing
            self.stack.undraw(numbers, *self._q(grid, x_prev))
            numbers = before
        return torch.from_numpy(x_prev).reshape(self.shape)


def initial_words(seed: int, size: int) -> np.ndarray:
    words = np.random.default_rng([seed, 2]).integers(0, 2**32, INITIAL_BITS * size // 32 + 64, np.uint32)
    words[-1] |= 1  # the coder's last word is never 0
    return words
