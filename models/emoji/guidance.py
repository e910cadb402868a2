"""Guidance: pure functions that turn a model's predictions into the one the scheduler steps with."""

import inspect
from typing import Any

import torch


def classifier_free_guidance(uncond: torch.Tensor, cond: torch.Tensor, scale: float) -> torch.Tensor:
    """uncond + s (cond - uncond): s = 1 gives `cond`, s = 0 gives `uncond`.

    Both are predictions of one kind (eps, v or x0), of one shape (B, C, H, W). This is GLIDE's and diffusers'
    s; Ho and Salimans (2022) write w = s - 1.
    """
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided: torch.Tensor, cond: torch.Tensor, phi: float) -> torch.Tensor:
    """phi * guided * std(cond) / std(guided) + (1 - phi) * guided, each std over one sample's (C, H, W).

    phi = 0 changes nothing; 0.7 is what Lin et al. (2023, section 3.4) use against overexposure.
    """
    dims = list(range(1, guided.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)  # (B, 1, 1, 1)
    return phi * guided * ratio + (1 - phi) * guided


def guide(model_output: torch.Tensor, channels: int, scale: float, phi: float = 0.0) -> torch.Tensor:
    """One U-Net pass over [negative, prompt], (2B, C or 2C, H, W) -> (B, C or 2C, H, W), guided.

    `channels` = C are guided, and rescaled by `phi`. The other C, where there are any, are a learned
    variance: that is the prompt's own, since s (cond - uncond) would push it out of its range (as in GLIDE).
    """
    uncond, cond = model_output.chunk(2)
    guided = classifier_free_guidance(uncond[:, :channels], cond[:, :channels], scale)
    if phi > 0:
        guided = rescale_guidance(guided, cond[:, :channels], phi)
    return torch.cat([guided, cond[:, channels:]], dim=1)


def takes_variance(scheduler: Any) -> bool:
    """Whether `scheduler.step` wants a learned variance beside the prediction.

    The config alone does not tell: `from_config` hands DDPM's variance_type on to schedulers that do not know
    it (DDIM), or that know it and then cut the output to 3 channels (DPM-Solver).
    """
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    knows = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    return learned and knows and hasattr(scheduler, "_get_variance")


def noise_levels(scheduler: Any, timesteps: torch.Tensor) -> list[float]:
    """sigma_t = sqrt((1 - abar_t) / abar_t) of each timestep `scheduler` will visit (Karras et al. 2022).

    It is the noise's standard deviation where the picture, in [-1, 1], has weight 1: 0 is clean, infinity is
    pure noise. Schedulers that step in sigma hold the exact values (their timesteps may be rounded), the
    others `alphas_cumprod`. Call it after `set_timesteps`.

    Raises ValueError for a scheduler that holds neither.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        return [float(sigma) for sigma in sigmas[: len(timesteps)]]
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} does not tell its noise levels")
    abar = scheduler.alphas_cumprod.double().cpu()[timesteps.cpu().long()]
    return ((1 - abar) / abar).sqrt().tolist()


def in_guidance_interval(sigma: float, interval: tuple[float, float] | None) -> bool:
    """Whether lo < sigma <= hi, the noise levels that are guided (Kynkaanniemi et al. 2024, equation 6).

    No interval means all of them. Outside, the prediction is `cond` alone and no second pass is run.
    """
    return interval is None or interval[0] < sigma <= interval[1]


def guidance_scale_embedding(scale: float, dim: int) -> torch.Tensor:
    """(1, dim) sinusoidal embedding of 1000 (s - 1), for models distilled to take the scale as an input.

    [sin(1000 w f_k), cos(1000 w f_k)], f_k = 10000^(-k / (dim/2 - 1)), w = s - 1; an odd `dim` ends with a
    zero. Their U-Net config has `time_cond_proj_dim` (Meng et al. 2023; latent consistency models).
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000 * torch.tensor([[scale - 1.0]]) * frequencies  # (1, half)
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))
