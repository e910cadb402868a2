"""Guidance: pure functions that turn a model's predictions into the one the scheduler steps with.

There are two kinds. Classifier-free guidance combines the U-Net's own predictions. Classifier and CLIP
guidance climb the score of another network: both give s grad_{x_t} score, which enters the chain in one of
two ways:

    ancestral steps:          x_prev + Sigma s grad, x_prev ~ N(mean, Sigma)     Dhariwal 2021, algorithm 1
    deterministic schedulers: eps - sqrt(1 - abar_t) s grad                      Dhariwal 2021, algorithm 2
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .equations import PREDICTION_TYPES, SMALLEST_ABAR, require

# ---- classifier-free guidance


def classifier_free_guidance(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """uncond + s (cond - uncond): s = 1 gives `cond`, s = 0 gives `uncond`.

    Both are predictions of one kind (eps, v or x0) and one shape, (B, C, H, W). s is the scale of GLIDE and
    diffusers. Ho and Salimans (2022, equation 6) write (1 + w) cond - w uncond, w = s - 1.
    """
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """phi x_cfg sigma_pos/sigma_cfg + (1 - phi) x_cfg. Lin et al. 2023, section 3.4.

    x_cfg is `guided`; sigma_pos and sigma_cfg are the standard deviations of `cond` and `guided` over one
    sample's (C, H, W). phi = 0 changes nothing; the paper uses 0.7 against overexposure.
    """
    dims = list(range(1, guided.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)  # (B, 1, 1, 1)
    return phi * guided * ratio + (1 - phi) * guided


def compose(uncond: Tensor, cond: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """cond + sum_i w_i (cond_i - uncond): several prompts as one prediction. Liu 2022, equation 11.

    With guidance this becomes the paper's uncond + s [(cond - uncond) + sum_i w_i (cond_i - uncond)]. w_i is
    a prompt's weight relative to the first prompt, whose weight is 1; below 0 it steers away from the prompt
    (equation 13). All are of one shape, (B, C, H, W), and one kind (eps, v or x0).
    """
    return cond + sum(w * (other - uncond) for w, other in zip(weights, others, strict=True))


def guide(
    model_output: Tensor, channels: int, scale: float, phi: float = 0.0, weights: Sequence[float] = ()
) -> Tensor:
    """One U-Net pass over [negative, prompt], (2B, C or 2C, H, W) -> (B, C or 2C, H, W), guided.

    The first `channels` = C are guided, and rescaled by `phi`. The other C, if any, are a learned variance,
    taken from the prompt alone, since s (cond - uncond) would push it out of its range (as in GLIDE). With
    `weights` the pass is over [negative, further prompts, prompt]; see `compose`.
    """
    uncond, *others, cond = model_output.chunk(2 + len(weights))
    together = cond[:, :channels]
    if weights:
        together = compose(uncond[:, :channels], together, [one[:, :channels] for one in others], weights)
    guided = classifier_free_guidance(uncond[:, :channels], together, scale)
    if phi > 0:
        guided = rescale_guidance(guided, cond[:, :channels], phi)
    return torch.cat([guided, cond[:, channels:]], dim=1)


def in_guidance_interval(sigma: float, interval: tuple[float, float] | None) -> bool:
    """Whether lo < sigma <= hi, the noise levels that are guided (Kynkaanniemi et al. 2024, equation 6).

    No interval means all of them. Outside, the prediction is `cond` alone and no second pass is run.
    """
    return interval is None or interval[0] < sigma <= interval[1]


def guidance_scale_embedding(scale: float, dim: int) -> Tensor:
    """(1, dim) sinusoidal embedding of 1000 w, w = s - 1, for models distilled to take the scale as an input.

    [sin(1000 w f_k), cos(1000 w f_k)], f_k = 10000^(-k / (dim/2 - 1)); an odd `dim` ends with a zero. Such
    models have `time_cond_proj_dim` in their U-Net's config (Meng et al. 2023; latent consistency models).
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000 * torch.tensor([[scale - 1.0]]) * frequencies  # (1, half)
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


# ---- classifier and CLIP guidance


def gradient_of(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """grad_x of each row's own score, (B, ...) in float32 or better, whatever precision `score` uses.

    `score` maps (B, ...) to (B,), row by row. Gradients are enabled for it, even under torch.no_grad.
    """
    with torch.enable_grad():
        leaf = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        return torch.autograd.grad(score(leaf).sum(), leaf)[0]


def log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each row's class, (B,), from logits (B, classes)."""
    return F.log_softmax(logits.float(), dim=-1).gather(1, labels[:, None])[:, 0]


def classifier_guidance(
    classify: Callable[[Tensor], Tensor], x_t: Tensor, labels: Tensor, scale: float, limit: float = math.inf
) -> Tensor:
    """s grad_{x_t} log p(y | x_t, t), the shape of x_t. Dhariwal and Nichol 2021, section 4.

    `classify` maps x_t to logits (B, classes) at its noise level; labels (B,) are class indices. A picture's
    gradient is scaled down to a root mean square of `limit`, since it can be of any size on pictures that the
    classifier does not know.
    """
    gradient = scale * gradient_of(lambda x: log_prob(classify(x), labels), x_t)
    size = gradient.square().mean(tuple(range(1, x_t.ndim)), keepdim=True).sqrt()  # (B, 1, ...)
    return gradient * (limit / size.clamp(min=1e-12)).clamp(max=1.0)


def clip_guidance(
    embed: Callable[[Tensor], Tensor], x_t: Tensor, text_embeds: Tensor, logit_scale: float, scale: float
) -> Tensor:
    """s grad_{x_t} (l f(x_t) . g(c)), the shape of x_t; l is CLIP's logit scale. GLIDE, section 2.3.

    `embed` maps x_t to l2-normalised f, (B, D): an image tower trained on noised pictures, or a clean one
    applied to the predicted x0. It may return (N, B, D), N views of each picture, whose scores are averaged.
    text_embeds: g, (B, D).
    """

    def score(x: Tensor) -> Tensor:
        similarity = logit_scale * (embed(x).float() * text_embeds.float()).sum(-1)  # (B,) or (N, B)
        return similarity.reshape(-1, len(x)).mean(0)

    return scale * gradient_of(score, x_t)


def shift_mean(sample: Tensor, gradient: Tensor, variance: Tensor | float) -> Tensor:
    """x + Sigma s grad: shift the mean of an ancestral step, or a sample from it. Dhariwal 2021, algorithm 1.

    gradient is s grad, (B, C, ...) like `sample`; variance is Sigma and broadcasts to it.
    """
    return sample + variance * gradient


def shift_prediction(prediction: Tensor, gradient: Tensor, abar_t: float, prediction_type: str) -> Tensor:
    """The prediction of a model whose score is grad log p(x_t) + s grad. All tensors are (B, C, ...).

    epsilon: eps - sqrt(1 - abar_t) s grad                     Dhariwal 2021, algorithm 2
    sample: x0 + (1 - abar_t)/sqrt(abar_t) s grad              the same eps, by x_t = sqrt(abar) x0 + ...
    v_prediction: v - sqrt((1 - abar_t)/abar_t) s grad         v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0

    Unlike `shift_mean`, this works with deterministic schedulers; the two agree in the limit of many steps.
    Raises ValueError for another prediction type.
    """
    known = prediction_type in PREDICTION_TYPES
    require(known, "prediction_type", prediction_type, f"one of {PREDICTION_TYPES}")
    noise = (1 - abar_t) ** 0.5
    root = max(abar_t, SMALLEST_ABAR) ** 0.5  # as in predict_x0 at zero terminal SNR
    factor = {"epsilon": -noise, "sample": noise**2 / root, "v_prediction": -noise / root}[prediction_type]
    return prediction + factor * gradient


def clip_prediction(prediction: Tensor, x0: Tensor, limit: float, abar_t: float, kind: str) -> Tensor:
    """Change a prediction that implies `x0` into one that implies x0 clipped to [-limit, limit], at the same
    x_t. All tensors are (B, C, ...).

    `kind` is its prediction_type. x0 moves by d if s grad = d sqrt(abar_t)/(1 - abar_t).
    """
    gradient = (abar_t**0.5 / (1 - abar_t)) * (x0.clamp(-limit, limit) - x0)
    return shift_prediction(prediction, gradient, abar_t, kind).to(prediction.dtype)


def cut_outs(images: Tensor, count: int, size: int, seed: int) -> Tensor:
    """(B, C, H, W) -> (count, B, C, size, size): the whole picture, and squares of random position and side.

    Sides are uniform from half the picture's shorter side to all of it. Squares depend on the seed alone and
    are the same for all pictures of a batch, so that no picture depends on another. Differentiable.
    """
    height, width = images.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    views = [images]
    for side, top, left in torch.rand(count - 1, 3, generator=generator).tolist():
        edge = round(min(height, width) * (0.5 + 0.5 * side))
        y, x = round(top * (height - edge)), round(left * (width - edge))
        views.append(images[..., y : y + edge, x : x + edge])
    return torch.stack([F.interpolate(view, (size, size), mode="bilinear", antialias=True) for view in views])
