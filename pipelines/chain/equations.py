"""The diffusion chain: beta schedules, noising, and its posterior.

    q(x_t | x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t I),  alpha_t = 1 - beta_t,  abar_t = alpha_0 .. alpha_t

Timesteps count t = 0 .. T-1 from clean to noisy; abar_{-1} = 1 stands for the clean picture. A chain may skip
timesteps: "prev" is the next cleaner one that it visits, alpha_t = abar_t/abar_prev and beta_t = 1 - alpha_t.

`abar_t` and `abar_prev` may be a float, a 0-d tensor, one value per sample (B,), or anything that broadcasts
against x, which may have any rank. Arithmetic is in float32 (float64 if x is), and results have the dtype of
x. Shapes that do not fit and integer pictures raise ValueError.

Papers: Ho 2020 (arXiv 2006.11239), Song 2020 (2010.02502), Nichol 2021 (2102.09672), Salimans 2022
(2202.00512), Imagen (2205.11487), Lin 2023 (2305.08891).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
LEARNED_VARIANCES = ("learned", "learned_range")  # the model has 2C output channels
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
SMALLEST_VARIANCE = 1e-20  # lower limit before a logarithm
SMALLEST_ABAR = 2.0**-48  # what predict_x0 divides by at zero terminal SNR


def invalid(name: str, value: object, allowed: str) -> ValueError:
    """An error that names an argument, its value and what is allowed."""
    return ValueError(f"{name}={value!r}: must be {allowed}")


def require(condition: object, name: str, value: object, allowed: str) -> None:
    """Raises `invalid` unless the condition holds."""
    if not condition:
        raise invalid(name, value, allowed)


def expand(coefficient: Tensor | float, x: Tensor) -> Tensor:
    """A coefficient of shape (), (B,) or broadcastable -> the rank and device of x, float32 or better."""
    require(x.is_floating_point(), "dtype", x.dtype, "floating point (pictures are in [-1, 1])")
    c = torch.as_tensor(coefficient, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    c = c.reshape(tuple(c.shape) + (1,) * (x.ndim - c.ndim))  # (B,) -> (B, 1, 1, 1)
    fits = c.ndim == x.ndim and all(n == m or 1 in (n, m) for n, m in zip(c.shape, x.shape, strict=True))
    require(fits, "coefficient shape", tuple(c.shape), f"broadcastable against {tuple(x.shape)}")
    return c


# ------------------------------------------------------------ beta schedules: float32 tensors of shape (T,)


def linear_betas(T: int, beta_start: float, beta_end: float) -> Tensor:
    """beta_t evenly spaced from beta_start to beta_end. Ho 2020, section 4."""
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float32)


def scaled_linear_betas(T: int, beta_start: float, beta_end: float) -> Tensor:
    """beta_t = s_t^2, s_t evenly spaced from sqrt(beta_start) to sqrt(beta_end). arXiv 2112.10752."""
    return linear_betas(T, beta_start**0.5, beta_end**0.5) ** 2


def sigmoid_betas(T: int, beta_start: float, beta_end: float) -> Tensor:
    """beta_t = beta_start + (beta_end - beta_start) sigmoid(u_t), u_t evenly spaced in [-6, 6].
    arXiv 2203.02923."""
    return torch.sigmoid(linear_betas(T, -6, 6)) * (beta_end - beta_start) + beta_start


def cosine_abar(u: float) -> float:
    """abar(u) = cos^2((u + 0.008)/1.008 pi/2), u = t/T in [0, 1], up to a constant. Nichol 2021, eq. 17."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def laplace_abar(u: float) -> float:
    """abar(u) = sqrt(snr/(1 + snr)), log snr = -sign(1/2 - u)/2 log(1 - 2|1/2 - u| + 1e-6), u in [0, 1].

    The Laplace schedule of Hang 2024 (arXiv 2407.03297) with mu = 0, b = 1/2, in diffusers' form.
    """
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def betas_from_abar(abar: Callable[[float], float], T: int, max_beta: float = 0.999) -> Tensor:
    """beta_t = min(1 - abar((t+1)/T)/abar(t/T), max_beta). Nichol 2021, section 3.2."""
    betas = [min(1 - abar((t + 1) / T) / abar(t / T), max_beta) for t in range(T)]
    return torch.tensor(betas, dtype=torch.float32)


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that it keeps its first value and ends at 0. Lin 2023, algorithm 1."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def make_betas(beta_schedule: str, T: int, beta_start: float, beta_end: float) -> Tensor:
    """The betas of the named schedule; squaredcos_cap_v2 and laplace ignore beta_start and beta_end."""
    require(beta_schedule in BETA_SCHEDULES, "beta_schedule", beta_schedule, f"one of {BETA_SCHEDULES}")
    if beta_schedule == "squaredcos_cap_v2":
        return betas_from_abar(cosine_abar, T)
    if beta_schedule == "laplace":
        return betas_from_abar(laplace_abar, T)
    betas = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "sigmoid": sigmoid_betas}
    return betas[beta_schedule](T, beta_start, beta_end)


# ------------------------------------------------------------ forward process


def q_sample(x0: Tensor, eps: Tensor, abar_t: Tensor | float) -> Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps; x0 (B, ...) in [-1, 1], eps ~ N(0, I). Ho 2020, eq. 4."""
    abar_t = expand(abar_t, x0)
    return (abar_t.sqrt() * x0 + (1 - abar_t).sqrt() * eps).to(torch.result_type(x0, eps))


def velocity(x0: Tensor, eps: Tensor, abar_t: Tensor | float) -> Tensor:
    """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0, (B, ...), the target of v-prediction. Salimans 2022, D."""
    abar_t = expand(abar_t, x0)
    return (abar_t.sqrt() * eps - (1 - abar_t).sqrt() * x0).to(torch.result_type(x0, eps))


def signal_to_noise_ratio(abar_t: Tensor) -> Tensor:
    """SNR = abar_t/(1 - abar_t), elementwise: from 0 at zero terminal SNR to inf for a clean picture."""
    return abar_t / (1 - abar_t)


# ------------------------------------------------------------ reverse process


def predict_x0(
    model_output: Tensor, x_t: Tensor, abar_t: Tensor | float, prediction_type: str = "epsilon"
) -> Tensor:
    """The clean picture that a model's output implies, in the shape of x_t, not clipped.

    epsilon: (x_t - sqrt(1 - abar_t) eps)/sqrt(abar_t)         Ho 2020, eq. 15
    v_prediction: sqrt(abar_t) x_t - sqrt(1 - abar_t) v        Salimans 2022, App. D
    sample: the output itself

    Where abar_t = 0, eps says nothing about x0, and the divisor is sqrt(2^-48) to keep the result finite.
    """
    known = prediction_type in PREDICTION_TYPES
    require(known, "prediction_type", prediction_type, f"one of {PREDICTION_TYPES}")
    if prediction_type == "sample":
        return model_output
    abar_t = expand(abar_t, x_t)
    if prediction_type == "epsilon":
        x0 = (x_t - (1 - abar_t).sqrt() * model_output) / abar_t.clamp(min=SMALLEST_ABAR).sqrt()
    else:
        x0 = abar_t.sqrt() * x_t - (1 - abar_t).sqrt() * model_output
    return x0.to(torch.result_type(x_t, model_output))


def posterior_mean(
    x0: Tensor, x_t: Tensor, abar_t: Tensor | float, abar_prev: Tensor | float, eta: float = 1.0
) -> Tensor:
    """Mean of q(x_prev | x_t, x0), shape of x_t; x0 itself where abar_prev = 1. Ho 2020, eq. 7.

    mu~ = [sqrt(abar_prev) beta_t x0 + sqrt(alpha_t) (1 - abar_prev) x_t]/(1 - abar_t)

    eta < 1 is for the chain with the same q(x_t | x0) whose steps add noise of variance sigma_t^2 =
    eta^2 beta~_t. Song 2020, eq. 7, whose alpha_t is abar_t here:

    mu~ = sqrt(abar_prev) x0 + sqrt(1 - abar_prev - sigma_t^2) (x_t - sqrt(abar_t) x0)/sqrt(1 - abar_t)
    """
    abar_t, abar_prev = expand(abar_t, x_t), expand(abar_prev, x_t)
    alpha_t = abar_t / abar_prev
    x0_weight = abar_prev.sqrt() * (1 - alpha_t) / (1 - abar_t)
    x_t_weight = alpha_t.sqrt() * (1 - abar_prev) / (1 - abar_t)
    if eta < 1:
        x_t_weight = ((1 - abar_prev - eta**2 * posterior_variance(abar_t, abar_prev)) / (1 - abar_t)).sqrt()
        x0_weight = abar_prev.sqrt() - x_t_weight * abar_t.sqrt()
    return (x0_weight * x0 + x_t_weight * x_t).to(torch.result_type(x0, x_t))


def posterior_variance(abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """Variance of q(x_prev | x_t, x0), elementwise; where abar_prev = 1 it is 0, without a logarithm.
    Ho 2020, eq. 7.

    beta~_t = (1 - abar_prev)/(1 - abar_t) beta_t
    """
    return (1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)


def learned_range_log_variance(v: Tensor, log_beta: Tensor, log_posterior_variance: Tensor) -> Tensor:
    """log Sigma = f log beta_t + (1 - f) log beta~_t, f = (v + 1)/2, v in about [-1, 1]. Nichol 2021, eq. 15,
    which writes v for f; here v is the model's output."""
    f = (v + 1) / 2
    return f * log_beta + (1 - f) * log_posterior_variance


def dynamic_threshold(x0: Tensor, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    """x0 <- clamp(x0, -s, s)/s, s = min(max(1, the ratio-quantile of |x0| over one image), max_value).

    (B, ...), each sample by itself; the result is in [-1, 1]. Imagen, section 2.3; max_value is diffusers'.
    """
    x = x0.to(torch.promote_types(x0.dtype, torch.float32))
    s = torch.stack([torch.quantile(image.abs(), ratio) for image in x])  # (B,); at most 2^24 values each
    s = expand(s.clamp(min=1, max=max_value), x)  # (B, 1, 1, 1)
    return (torch.clamp(x, -s, s) / s).to(x0.dtype)


def reverse_variance(
    variance_type: str | None, abar_t: Tensor, abar_prev: Tensor, stand_in: Tensor, v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sigma_t^2 of p(x_prev | x_t) and its logarithm, in the shape of v if it is learned, else of abar_t.

    fixed_large: beta_t; fixed_small: beta~_t (Ho 2020, section 3.2); learned: exp(v); learned_range: see
    `learned_range_log_variance`. Where abar_prev = 1, beta~_t is 0 and `stand_in` is used instead. Raises
    ValueError for a learned variance without v.
    """
    beta = (1 - abar_t / abar_prev).clamp(min=SMALLEST_VARIANCE)
    if variance_type in ("fixed_large", "fixed_large_log"):
        return beta, beta.log()
    small = torch.where(abar_prev < 1, posterior_variance(abar_t, abar_prev), stand_in)
    small = small.clamp(min=SMALLEST_VARIANCE)
    if variance_type not in LEARNED_VARIANCES:
        return small, small.log()
    if v is None:
        raise ValueError(f"predicted_variance=None: must be given with variance_type={variance_type!r}")
    v = v.to(abar_t.dtype)
    learned = variance_type == "learned"
    log_variance = v if learned else learned_range_log_variance(v, beta.log(), small.log())
    return log_variance.exp(), log_variance


class ReverseStep(NamedTuple):
    """p(x_prev | x_t) = N(mean, variance I), float32 or better; the variances broadcast to the mean."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_x0: Tensor


def p_mean_variance(
    model_output: Tensor, x_t: Tensor, abar_t: Tensor, abar_prev: Tensor, prediction_type: str,
    variance_type: str | None, stand_in: tuple[Tensor, Tensor] | None = None,
    clip_range: float | None = None, threshold: tuple[float, float] | None = None, eta: float = 1.0,
) -> ReverseStep:  # fmt: skip
    """p(x_prev | x_t) from a model's output: x0, clipped or thresholded, its posterior mean, the variance.

    Args:
        model_output: (B, C, ...), or (B, 2C, ...) with a learned variance, whose v is the last C channels.
        x_t: (B, C, ...).
        stand_in: (abar_t, abar_prev) of the step whose beta~ is used where abar_prev = 1; with None it is
            1 - abar_t.
        clip_range: x0 is clamped to +-clip_range, unless None.
        threshold: (ratio, max_value) of `dynamic_threshold`, which replaces clipping.
        eta: for the mean, see `posterior_mean`; the variance is that of eta = 1.
    """
    v = None
    if variance_type in LEARNED_VARIANCES:
        model_output, v = model_output.chunk(2, dim=1)  # (B, 2C, ...) -> 2 x (B, C, ...)
    abar_t, abar_prev = expand(abar_t, x_t), expand(abar_prev, x_t)  # (B, 1, 1, 1)
    x_t = x_t.to(abar_t.dtype)
    x0 = predict_x0(model_output.to(abar_t.dtype), x_t, abar_t, prediction_type)
    if threshold is not None:
        x0 = dynamic_threshold(x0, *threshold)
    elif clip_range is not None:
        x0 = x0.clamp(-clip_range, clip_range)
    mean = posterior_mean(x0, x_t, abar_t, abar_prev, eta)
    small = 1 - abar_t if stand_in is None else posterior_variance(*stand_in)
    return ReverseStep(mean, *reverse_variance(variance_type, abar_t, abar_prev, small, v), x0)


def spaced_timesteps(spacing: str, T: int, n: int, offset: int = 0) -> np.ndarray:
    """n timesteps out of T, noisiest first, int64. Lin 2023, table 2; offset is added to `leading` only.

    linspace: round(linspace(0, T - 1, n)); leading: i floor(T/n) + offset; trailing: round(T - i T/n) - 1
    """
    require(spacing in TIMESTEP_SPACINGS, "timestep_spacing", spacing, f"one of {TIMESTEP_SPACINGS}")
    if spacing == "linspace":
        return np.linspace(0, T - 1, n).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return (np.arange(n)[::-1] * (T // n) + offset).astype(np.int64)
    # [:n] because rounding can make arange one entry too long
    return np.arange(T, 0, -T / n).round()[:n].astype(np.int64) - 1
