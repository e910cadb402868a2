"""Every form of guidance on Gaussian pairs (x, y) whose scores are known, against closed forms in float64.

x ~ N(M, S^2), y given x ~ N(x, TAU^2), and y = Y was seen. All scores are linear, so the guided sampler is a
chain of affine maps: its mean and variance are propagated exactly, whatever the scale, and at scale 1 they
are those of p(x | y) up to the error of finite steps. At larger scales they are not those of the tilted
density p(x) p(y | x)^s: guidance tilts each noised marginal, and no diffusion has these as its marginals.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines import DDPMScheduler
from pipelines.chain.guidance import classifier_guidance, clip_guidance, guide
from pipelines.drawing.loop import estimate_x0, noise_levels
from pipelines.drawing.steering import GradientGuidance

M, S, TAU, Y = 0.3, 1.0, 0.8, 1.5
COUNT = 10_000
FORMS = ("classifier-free", "classifier", "noised CLIP", "clean CLIP", "clean CLIP through the U-Net")


class Normal(NamedTuple):
    mean: float
    variance: float


def tilted(s: float) -> Normal:
    """p(x) p(y | x)^s, normalised; s = 1 is p(x | y)."""
    variance = 1 / (1 / S**2 + s / TAU**2)
    return Normal(variance * (M / S**2 + s * Y / TAU**2), variance)


def x0_of(x: Tensor | float, abar: float, prior: Normal) -> Tensor | float:
    """E[x0 | x_t]."""
    total = abar * prior.variance + 1 - abar
    return prior.mean + math.sqrt(abar) * prior.variance / total * (x - math.sqrt(abar) * prior.mean)


def log_likelihood(x_t: Tensor, abar: float) -> Tensor:
    """log p(y | x_t) up to a constant, below 0: y given x_t is N(E[x0 | x_t], TAU^2 + Var[x0 | x_t])."""
    spread = TAU**2 + (1 - abar) * S**2 / (abar * S**2 + 1 - abar)
    return -((x0_of(x_t, abar, Normal(M, S**2)) - Y) ** 2) / (2 * spread) - 0.1


def predict_as(kind: str, x_t: Tensor, x0: Tensor, abar: float) -> Tensor:
    eps = (x_t - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0,
    }[kind]


def make_guidance(form: str, scheduler, scale: float) -> GradientGuidance:
    """The form's gradient, from networks that know the exact likelihood."""

    def abar_of(t) -> float:
        return float(scheduler.alphas_cumprod[int(t)])

    def classify(x: Tensor, t) -> Tensor:  # two classes: y was seen, or not
        seen = log_likelihood(x, abar_of(t)).flatten(1)
        return torch.cat([seen, (1 - seen.exp()).log()], dim=1)

    def embed(x: Tensor, t) -> Tensor:  # f . g is the log-likelihood
        value = log_likelihood(x, abar_of(t)).flatten(1)
        return torch.cat([value, torch.ones_like(value)], dim=1)

    def embed_x0(x0: Tensor, seed: int) -> Tensor:  # a clean network that knows how far to trust x0 at t
        abar = abar_of(seed)
        spread = TAU**2 + (1 - abar) * S**2 / (abar * S**2 + 1 - abar)
        value = -((x0 - Y) ** 2).flatten(1) / (2 * spread)
        return torch.stack([torch.cat([value * w, 0 * value], dim=1) for w in (0.5, 1.5)])  # two views

    text = torch.tensor([[1.0, 0.0]])
    labels = torch.zeros(COUNT, dtype=torch.long)
    kind = scheduler.config.prediction_type
    to_x0 = lambda output, x, sigma: estimate_x0(None, output, x, sigma, kind)  # noqa: E731
    settings: dict = {"scheduler": scheduler, "channels": 1, "to_x0": to_x0}
    if form == "classifier":
        term = lambda x, t, _: classifier_guidance(lambda z: classify(z, t), x, labels, scale)  # noqa: E731
        settings["noised"] = [term]
    if form == "noised CLIP":
        term = lambda x, t, _: clip_guidance(lambda z: embed(z, t), x, text / 2, 2.0, scale)  # noqa: E731
        settings["noised"] = [term]
    if form.startswith("clean CLIP"):
        settings["clean"] = (embed_x0, text / 2, 2.0, scale)
        settings["through_unet"] = form.endswith("U-Net")
    return GradientGuidance(**settings)


def sample(form: str, scheduler, steps: int, scale: float) -> Tensor:
    """COUNT draws by the functions under test, float32."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    levels = noise_levels(scheduler, scheduler.timesteps)
    guidance = make_guidance(form, scheduler, scale)
    x = torch.randn(COUNT, 1, 1, 1, generator=generator)
    takes = {"generator": generator} if not isinstance(scheduler, diffusers.DDIMScheduler) else {}
    kind = scheduler.config.prediction_type
    for t, sigma in zip(scheduler.timesteps, levels, strict=True):
        abar = float(scheduler.alphas_cumprod[int(t)])

        def predict(x_t: Tensor, abar: float = abar) -> Tensor:
            parts = [predict_as(kind, x_t, x0_of(x_t, abar, p), abar) for p in (Normal(M, S**2), tilted(1.0))]
            return guide(torch.cat(parts), 1, scale) if form == "classifier-free" else parts[0]

        output, shift = guidance(predict, x, t, sigma)
        x = shift(scheduler.step(output, t, x, **takes).prev_sample)
    return x.flatten()


def propagated(scheduler, steps: int, scale: float, ancestral: bool, classifier_free: bool) -> Normal:
    """Mean and variance of the same chain in float64: x_prev = a x_t + b + deviation z at each step."""
    scheduler.set_timesteps(steps)
    abars = [float(scheduler.alphas_cumprod[int(t)].double()) for t in scheduler.timesteps] + [1.0]
    mean, variance = 0.0, 1.0
    for i in range(steps):
        abar, prev = abars[i], abars[i + 1]

        def slope_and_offset(of: Callable[[float], float]) -> np.ndarray:
            return np.array([of(1.0) - of(0.0), of(0.0)])

        def eps_by(prior: Normal, abar: float = abar) -> np.ndarray:
            root, rest = math.sqrt(abar), math.sqrt(1 - abar)
            return slope_and_offset(
                lambda x: rest * (x - root * prior.mean) / (abar * prior.variance + rest**2)
            )

        identity = np.array([1.0, 0.0])
        eps, cond = eps_by(Normal(M, S**2)), eps_by(tilted(1.0))
        gradient = scale * (eps - cond) / math.sqrt(1 - abar)  # score = -eps / sqrt(1 - abar)
        if classifier_free:
            eps, gradient = eps + scale * (cond - eps), 0 * gradient
        if not ancestral:
            eps = eps - math.sqrt(1 - abar) * gradient
        x0 = (identity - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        if ancestral:
            alpha = abar / prev
            sigma2 = (1 - prev) / (1 - abar) * (1 - alpha)
            a, b = (identity - (1 - alpha) / math.sqrt(1 - abar) * eps) / math.sqrt(alpha) + sigma2 * gradient
        else:
            sigma2 = 0.0
            a, b = math.sqrt(prev) * x0 + math.sqrt(1 - prev) * eps
        mean, variance = a * mean + b, a**2 * variance + sigma2
    return Normal(mean, variance)


def make_scheduler(ancestral: bool, kind: str = "epsilon"):
    settings = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False}
    cls = DDPMScheduler if ancestral else diffusers.DDIMScheduler
    return cls(**settings, prediction_type=kind)


@pytest.mark.parametrize("ancestral", [True, False], ids=["DDPM", "DDIM"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_sampled_moments_are_those_propagated_in_float64(form, scale, ancestral):
    steps = 50  # DDIM finds the step before only where the steps divide T
    drawn = sample(form, make_scheduler(ancestral), steps, scale).double()
    expected = propagated(make_scheduler(ancestral), steps, scale, ancestral, form == "classifier-free")
    aim = tilted(scale)
    print(f"{form}, s = {scale}, {'DDPM' if ancestral else 'DDIM'}: mean {drawn.mean():.3f}, variance "
          f"{drawn.var():.4f}; propagated {expected.mean:.3f}, {expected.variance:.4f}; "
          f"tilted density {aim.mean:.3f}, {aim.variance:.4f}")  # fmt: skip
    # 4 standard errors of COUNT draws
    assert abs(drawn.mean() - expected.mean) < 4 * math.sqrt(expected.variance / COUNT)
    assert abs(drawn.var() / expected.variance - 1) < 4 * math.sqrt(2 / COUNT)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("ancestral", [True, False], ids=["DDPM", "DDIM"])
def test_prediction_types_draw_the_same(kind, ancestral):
    for form in ("classifier", "clean CLIP", "clean CLIP through the U-Net"):
        by_eps, other = (sample(form, make_scheduler(ancestral, k), 20, 3.0) for k in ("epsilon", kind))
        # a single precision chain, whose first step multiplies rounding by 1 / sqrt(abar) for epsilon
        assert (by_eps - other).abs().max() < 0.02 and (by_eps - other).abs().mean() < 1e-3


@pytest.mark.parametrize("ancestral", [True, False], ids=["DDPM", "DDIM"])
@pytest.mark.parametrize("form", ["classifier-free", "classifier"])
def test_at_scale_1_the_chain_samples_the_posterior_and_beyond_it_not_the_tilted_density(form, ancestral):
    """Tolerances: 0.01 of mean, 2 % of variance, at all 1000 steps; the error shrinks with the steps."""
    classifier_free = form == "classifier-free"
    errors = []
    for steps in (50, 200, 1000):
        result = propagated(make_scheduler(ancestral), steps, 1.0, ancestral, classifier_free)
        aim = tilted(1.0)
        errors.append((abs(result.mean - aim.mean), abs(result.variance / aim.variance - 1)))
    assert errors[-1][0] < 0.01 and errors[-1][1] < 0.02, errors
    assert errors[-1][1] < errors[0][1]
    guided = propagated(make_scheduler(ancestral), 1000, 3.0, ancestral, classifier_free)
    aim = tilted(3.0)
    print(f"{form}, s = 3, 1000 steps: mean {guided.mean:.3f}, variance {guided.variance:.4f}; tilted "
          f"density {aim.mean:.3f}, {aim.variance:.4f}")  # fmt: skip
    assert abs(guided.mean - aim.mean) > 0.02 and guided.variance < 0.9 * aim.variance
