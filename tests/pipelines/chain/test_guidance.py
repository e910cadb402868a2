"""Guidance against hand-worked numbers and against diffusers."""

import math

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    StableDiffusionPipeline,
    rescale_noise_cfg,
)

from pipelines import DDPMScheduler
from pipelines.chain.equations import predict_x0
from pipelines.chain.guidance import (
    classifier_free_guidance,
    classifier_guidance,
    guidance_scale_embedding,
    guide,
    in_guidance_interval,
    rescale_guidance,
)
from pipelines.drawing.loop import noise_levels
from pipelines.drawing.steering import GradientGuidance


def test_classifier_free_guidance_by_hand():
    uncond, cond = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[2.0, 0.0, -1.0]])
    assert classifier_free_guidance(uncond, cond, 0.0).tolist() == uncond.tolist()
    assert classifier_free_guidance(uncond, cond, 1.0).tolist() == cond.tolist()
    assert classifier_free_guidance(uncond, cond, 3.0).tolist() == [[4.0, -4.0, -1.0]]


def test_ho_and_salimans_form_is_one_less():
    torch.manual_seed(0)
    uncond, cond = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    w = 2.5  # their equation 6: (1 + w) cond - w uncond
    torch.testing.assert_close(classifier_free_guidance(uncond, cond, 1 + w), (1 + w) * cond - w * uncond)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_matches_diffusers_and_restores_the_spread(phi):
    torch.manual_seed(0)
    cond, guided = torch.randn(4, 3, 8, 8), 5 * torch.randn(4, 3, 8, 8) + 1
    guided[0] *= 10  # each sample has its own spread
    ours = rescale_guidance(guided, cond, phi)
    torch.testing.assert_close(ours, rescale_noise_cfg(guided, cond, phi))
    expected = phi * cond.flatten(1).std(1) + (1 - phi) * guided.flatten(1).std(1)
    torch.testing.assert_close(ours.flatten(1).std(1), expected)


def test_guide_guides_the_prediction_and_keeps_the_prompts_variance():
    torch.manual_seed(0)
    output = torch.randn(4, 6, 5, 5)  # two pictures, [negative, prompt], three channels and their variances
    guided = guide(output, channels=3, scale=4.0, phi=0.5)
    uncond, cond = output[:2], output[2:]
    plain = uncond[:, :3] + 4 * (cond[:, :3] - uncond[:, :3])
    torch.testing.assert_close(guided[:, :3], rescale_noise_cfg(plain, cond[:, :3], 0.5))
    assert torch.equal(guided[:, 3:], cond[:, 3:])
    assert torch.equal(guide(output, 6, 4.0), uncond + 4 * (cond - uncond))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip_sample", [True, False])
def test_a_guided_prediction_is_that_of_the_clipped_x0(kind, clip_sample):
    """At the same x_t, for a class that has no clipping and only keeps the key; not where it says no."""
    ours = DDPMScheduler(prediction_type=kind, clip_sample=clip_sample, clip_sample_range=0.8)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(ours.config)
    torch.manual_seed(0)
    prediction, x_t, gradient = torch.randn(3, 2, 3, 4, 4)
    abar = 0.4
    to_x0 = lambda output, x, sigma: predict_x0(output, x, 1 / (1 + sigma**2), kind)  # noqa: E731
    steer = GradientGuidance(scheduler, 3, to_x0, [lambda x, t, sigma: gradient])
    guided, _ = steer(lambda x: prediction, x_t, 0, (1 / abar - 1) ** 0.5)
    x0 = predict_x0(prediction, x_t, abar, kind) + (1 - abar) / abar**0.5 * gradient
    assert (x0.abs() > 0.8).float().mean() > 0.2
    expected = x0.clamp(-0.8, 0.8) if clip_sample else x0
    torch.testing.assert_close(predict_x0(guided, x_t, abar, kind), expected)


SCHEDULERS = [
    DDPMScheduler,
    diffusers.DDPMScheduler,
    diffusers.DDIMScheduler,
    diffusers.PNDMScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.LCMScheduler,
    diffusers.HeunDiscreteScheduler,
]


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda cls: cls.__module__.split(".")[0] + "-" + cls.__name__)
def test_noise_levels_are_those_the_scheduler_adds(cls):
    """add_noise gives a x0 + b eps; the level is b / a (sigma schedulers: a = 1), read off real pictures."""
    scheduler = cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(10)
    levels = noise_levels(scheduler, scheduler.timesteps)
    assert len(levels) == len(scheduler.timesteps)
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for level, t in zip(levels, scheduler.timesteps, strict=True):
        a = scheduler.add_noise(one, zero, t[None]).item()
        b = scheduler.add_noise(zero, one, t[None]).item()
        assert level == pytest.approx(b / a, rel=1e-4)


def test_noise_levels_by_hand_and_at_zero_terminal_snr():
    scheduler = DDPMScheduler(num_train_timesteps=2, trained_betas=[0.5, 0.5])  # abar = 1/2, 1/4
    scheduler.set_timesteps(2)
    assert noise_levels(scheduler, scheduler.timesteps) == pytest.approx([math.sqrt(3), 1.0])
    scheduler = DDPMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    scheduler.set_timesteps(4)
    levels = noise_levels(scheduler, scheduler.timesteps)
    assert levels[0] > 1e6 and levels == sorted(levels, reverse=True)
    assert in_guidance_interval(levels[0], (1.0, math.inf))


def test_noise_levels_refuse_a_scheduler_without_them():
    with pytest.raises(ValueError, match="noise levels"):
        noise_levels(object(), torch.arange(3))


def test_interval_is_open_below_and_closed_above():
    assert [in_guidance_interval(sigma, (0.5, 2.0)) for sigma in (0.4, 0.5, 0.51, 2.0, 2.01)] == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert in_guidance_interval(math.inf, None) and in_guidance_interval(0.0, None)


@pytest.mark.parametrize("dim", [8, 9, 256])
def test_scale_embedding_matches_diffusers(dim):
    for scale in (1.0, 1.5, 8.0):
        theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1]), dim)
        torch.testing.assert_close(guidance_scale_embedding(scale, dim), theirs)


def test_combined_prompts_are_rescaled_to_the_spread_of_the_first_one_alone():
    torch.manual_seed(0)
    uncond, other, cond = (scale * torch.randn(2, 3, 5, 5) for scale in (1.0, 9.0, 2.0))
    guided = guide(torch.cat([uncond, other, cond]), 3, 4.0, 0.7, [0.5])
    plain = uncond + 4 * ((cond - uncond) + 0.5 * (other - uncond))
    torch.testing.assert_close(guided, rescale_noise_cfg(plain, cond, 0.7))


def test_a_small_phi_is_not_rounded_away():
    torch.manual_seed(0)
    uncond, cond = torch.randn(2, 3, 5, 5), 3 * torch.randn(2, 3, 5, 5)
    plain = uncond + 4 * (cond - uncond)
    guided = guide(torch.cat([uncond, cond]), 3, 4.0, 0.01)
    torch.testing.assert_close(guided, rescale_noise_cfg(plain, cond, 0.01))
    assert not torch.equal(guided, plain)


def test_each_pictures_gradient_has_a_limit_of_its_own():
    """A linear classifier, whose gradient is known: s (w_y - sum_k p_k w_k)."""
    torch.manual_seed(0)
    weights, x, labels = torch.randn(4, 12), torch.randn(3, 3, 2, 2), torch.tensor([1, 3, 0])
    p = (x.flatten(1) @ weights.T).softmax(1)
    exact = 2.0 * (weights[labels] - p @ weights)
    size = exact.square().mean(1, keepdim=True).sqrt()
    limit = float(size.sort(0).values[1])  # the median: one picture is above it, one below
    gradient = classifier_guidance(lambda x: x.flatten(1) @ weights.T, x, labels, 2.0, limit)
    torch.testing.assert_close(gradient.flatten(1), exact * (limit / size).clamp(max=1))
