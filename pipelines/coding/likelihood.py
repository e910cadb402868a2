"""The variational bound on -log p(x0), term by term, in bits per dimension.

    -log2 p(x0) <= L_0 + L_1 + ... + L_T                               Ho 2020, eq. 5

    L_0 = -log2 p(x0 | x_1)
    L_{t-1} = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))
    L_T = KL(q(x_T | x0) || N(0, I))

The paper counts t = 1 .. T and the code 0 .. T-1, so that L_k is the term at code timestep k, and L_T the
prior's. Pictures have 256 levels, x0 = level/127.5 - 1. A chain that visits n of the T timesteps has n + 1
terms, whose sum is a bound too.

Papers: Ho 2020 (arXiv 2006.11239), Nichol 2021 (2102.09672).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chain.equations import SMALLEST_VARIANCE, expand, posterior_mean, posterior_variance
from ..components.ddpm_scheduler import DDPMScheduler

HALF_BIN = 1 / 255  # the levels are 2/255 apart in [-1, 1]


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(m1, e^lv1) || N(m2, e^lv2)) in nats, elementwise; the four broadcast.

    (lv2 - lv1 + e^(lv1 - lv2) - 1 + (m1 - m2)^2 e^-lv2)/2
    """
    ratio = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(ratio) - ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the mass of N(mean, e^log_variance) in x's bin, in nats, elementwise. Ho 2020, eq. 13.

    The bin is [x - 1/255, x + 1/255]; those of -1 and 1 extend to -infinity and infinity, so that the 256
    masses sum to 1. x is level/127.5 - 1. The result is exact up to rounding however far x is from the mean:
    no mass is cut off.
    """
    centred = x - mean
    to_deviations = torch.exp(-0.5 * log_variance)
    # Mirrored where x is above the mean: both edges lie in the lower tail, where log Phi keeps its digits
    lower = (-centred.abs() - HALF_BIN) * to_deviations
    upper = (-centred.abs() + HALF_BIN) * to_deviations
    log_upper = _log_ndtr(upper)
    # log(Phi(upper) - Phi(lower)); if rounding makes the two equal, the smallest difference that exists
    tiny = torch.finfo(lower.dtype).eps
    gap = (_log_ndtr(lower) - log_upper).clamp(max=-tiny)
    inner = log_upper + torch.log(-torch.expm1(gap))
    first = _log_ndtr((centred + HALF_BIN) * to_deviations)
    last = _log_ndtr((HALF_BIN - centred) * to_deviations)
    return -torch.where(x < -1 + HALF_BIN, first, torch.where(x > 1 - HALF_BIN, last, inner))


def chain_of(scheduler: Any, **changes: Any) -> DDPMScheduler:
    """Our DDPMScheduler with the chain of any scheduler, all its T timesteps, and `changes` to its config.

    It is a copy: setting fewer steps on one does not change the other. diffusers' `from_config` alone loses
    what `register_to_config` or a positional argument set, because it takes that for a default.
    """
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    return DDPMScheduler.from_config(config | changes)


class VLBTerm(NamedTuple):
    """One term of the bound for each sample, and the predicted picture."""

    bits: Tensor  # (B,), per dimension
    pred_x0: Tensor  # (B, ...)


def vlb_term(scheduler: Any, model_output: Tensor, t: int | Tensor, x0: Tensor, x_t: Tensor) -> VLBTerm:
    """The bound's term at timestep t, given x_t ~ q(x_t | x0): an estimate of L_t from one draw.

    KL(q(x_prev | x_t, x0) || p(x_prev | x_t)), or -log2 p(x0 | x_t) on the chain's last step; mean over
    dimensions. p is from `scheduler.p_mean_variance`, with x0 clipped if it clips. Differentiable.

    Args:
        scheduler: our DDPMScheduler; its `timesteps` are the chain.
        model_output: as `p_mean_variance` takes it; t: one for all, or (B,).
        x0, x_t: (B, ...) of one shape; float64 makes all of it float64.
    """
    p = scheduler.p_mean_variance(model_output, t, x_t)
    prev = torch.as_tensor(scheduler.previous_timestep(t), device=x_t.device)
    abar_t, abar_prev = (expand(scheduler.abar(step, p.mean), p.mean) for step in (t, prev))
    # 0 on the last step, whose KL is not used; clamped so that its logarithm and gradients stay finite
    variance = posterior_variance(abar_t, abar_prev).clamp(min=SMALLEST_VARIANCE)
    mean = posterior_mean(x0.to(p.mean.dtype), x_t.to(p.mean.dtype), abar_t, abar_prev)
    bits = _mean_bits(gaussian_kl(mean, variance.log(), p.mean, p.log_variance))
    last = (prev < 0).expand(len(bits))
    if last.any():
        nll = discretized_gaussian_nll(x0.to(p.mean.dtype), p.mean, p.log_variance)
        bits = torch.where(last, _mean_bits(nll), bits)
    return VLBTerm(bits, p.pred_x0)


def prior_term(scheduler: Any, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x0) || N(0, I)), (B,) in bits per dimension; x_T is the noisiest the chain visits."""
    abar = expand(scheduler.abar(scheduler.timesteps[0], x0), x0)
    zero = torch.zeros_like(x0)
    return _mean_bits(gaussian_kl(abar.sqrt() * x0, torch.log1p(-abar), zero, zero))


class VLBTerms(NamedTuple):
    """Every term for each sample. The bound is `bits.sum(1)`."""

    timesteps: Tensor  # (n,) that the chain visits, cleanest first
    bits: Tensor  # (B, n + 1) per dimension, float64: L at timesteps[k] in column k, L_T in the last
    x0_mse: Tensor  # (B, n), float64: mean (x0 - predicted x0)^2 at timesteps[k], pictures in [-1, 1]


@torch.no_grad()
def vlb_terms(
    model: Callable[[Tensor, int], Tensor], scheduler: Any, x0: Tensor, noise: Callable[[int], Tensor]
) -> VLBTerms:
    """All terms of the bound, from one draw of noise each, as in Improved DDPM (Nichol 2021, section 3).

    It is unbiased for any number of draws; the expectation is over noise. In float64, except for the model.

    Args:
        model: (x_t, t) -> output, as `scheduler.p_mean_variance` takes it. x_t is rounded to the dtype of x0;
            the bound holds whatever a model does with its input.
        scheduler: our DDPMScheduler. It visits all T timesteps until `set_timesteps` says otherwise.
        x0: (B, ...), level/127.5 - 1.
        noise: t -> eps (B, ...) ~ N(0, I), so that the caller decides what the noise depends on.

    Raises:
        ValueError: the scheduler has no `p_mean_variance`, or x0 leaves [-1, 1] (latents do, and they have no
            levels).
    """
    if not hasattr(scheduler, "p_mean_variance"):
        raise ValueError(f"scheduler={type(scheduler).__name__}: must be our DDPMScheduler")
    if not -1 <= x0.min() <= x0.max() <= 1:
        raise ValueError(f"x0={x0.min():g} .. {x0.max():g}: must be in [-1, 1], pictures and not latents")
    exact = x0.double()
    bits, errors = [prior_term(scheduler, exact)], []
    for t in scheduler.timesteps.tolist():
        x_t = scheduler.add_noise(exact, noise(t).double(), torch.tensor(t))
        output = model(x_t.to(x0.dtype), t).double()
        term = vlb_term(scheduler, output, t, exact, x_t)
        bits.append(term.bits)
        errors.append(_mean((exact - term.pred_x0) ** 2))
    return VLBTerms(scheduler.timesteps.flip(0), torch.stack(bits[::-1], 1), torch.stack(errors[::-1], 1))


def rate_distortion(terms: VLBTerms) -> tuple[Tensor, Tensor]:
    """(rate, distortion), each (n,), of stopping early at each timestep (Ho 2020, section 4.3, figure 5).

    After x_T .. x_t are sent, the receiver's guess is the x0 predicted from x_t.
    rate: bits per dimension sent so far, L_T + ... + L_{t+1}, mean over samples.
    distortion: root of the mean (x0 - predicted x0)^2 on the scale 0 .. 255. Noisiest timestep first.
    """
    sent = terms.bits.mean(0).flip(0).cumsum(0)  # (n + 1,): L_T, L_T + L_{T-1}, ..., the bound
    return sent[:-1], terms.x0_mse.mean(0).flip(0).sqrt() * 127.5


def _log_ndtr(z: Tensor) -> Tensor:
    """log Phi(z). torch.special.log_ndtr has the values, but its gradients use e^-(log Phi(z) + z^2/2), which
    has no digits left a thousand deviations below 0, where an untrained model may be."""
    below, above = z.clamp(max=0), z.clamp(min=0)
    tail = torch.log(torch.special.erfcx(below * -math.sqrt(0.5)) / 2) - below**2 / 2
    return torch.where(z < 0, tail, torch.special.log_ndtr(above))


def _mean(x: Tensor) -> Tensor:
    """Mean over dimensions: (B, ...) -> (B,)."""
    return x.reshape(len(x), -1).mean(1)


def _mean_bits(nats: Tensor) -> Tensor:
    return _mean(nats) / math.log(2)
