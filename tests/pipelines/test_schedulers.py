"""Schedulers both ways: diffusers' drive our pipeline, and our DDPMScheduler drives diffusers'."""

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from pipelines import DDPMScheduler

PROMPTS = ["a corgi in a party hat", "a cat"]
DIFFUSERS = {
    "DDIM": diffusers.DDIMScheduler,
    "DPM-Solver++ multistep": diffusers.DPMSolverMultistepScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "LCM": diffusers.LCMScheduler,
    "DDPM": diffusers.DDPMScheduler,
}
OURS = {"our DDPM": DDPMScheduler}  # against diffusers' of that name, in both pipelines
SETTINGS: dict[str, dict[str, Any]] = {
    "as the folder says": {},
    "v, trailing": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    # down to t = 0: where a chain stops above it, diffusers' DDPM leaves noise in the picture, not ours
    "large variance": {"variance_type": "fixed_large", "steps_offset": 0},
}


def draw(pipe: Any, scheduler: Any) -> np.ndarray:
    pipe.scheduler = copy.deepcopy(scheduler)
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    call = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "np"}
    images = pipe(PROMPTS, generator=generator, **call).images
    assert type(pipe.scheduler) is type(scheduler)
    return images


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", [*DIFFUSERS, *OURS])
def test_scheduler_draws_the_same_in_both_pipelines(both, name, settings):
    """The switch is diffusers' idiom, `pipe.scheduler = X.from_config(pipe.scheduler.config)`."""
    theirs, ours = both
    config = dict(ours.scheduler.config) | settings
    cls = (DIFFUSERS | OURS)[name]
    scheduler = cls.from_config(config)
    pictures = [draw(theirs, scheduler), draw(ours, scheduler)]
    if cls is DDPMScheduler:
        pictures += [draw(pipe, diffusers.DDPMScheduler.from_config(config)) for pipe in both]
    difference = max(np.abs(picture - pictures[0]).max() for picture in pictures[1:])
    print(f"{name}, {settings}: {difference:.1e}, a picture's spread {pictures[0].std():.2f}")
    assert pictures[0].shape == (2, 32, 32, 3) and pictures[0].std() > 0.05
    assert np.abs(pictures[0][0] - pictures[0][1]).max() > 0.1
    assert difference < 1e-4


def test_ddim_takes_eps_from_the_clipped_x0(make_pipeline):
    """Two points of a chain, x = sqrt(abar) x0 + sqrt(1 - abar) eps, give the x0 that joined them: within
    the range of pictures, which a strong guidance would leave."""
    pipe = make_pipeline()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    chain: list[tuple[int, torch.Tensor]] = []

    def keep(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        chain.append((int(t), tensors["latents"].double()))
        return {}

    start = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe(PROMPTS[0], num_inference_steps=5, guidance_scale=9.0, latents=start, callback_on_step_end=keep)
    abar = pipe.scheduler.alphas_cumprod.double()
    levels = [int(t) for t, _ in chain]
    found = []
    for (_, x), (_, after), t, s in zip(chain, chain[1:], levels[1:], levels[2:], strict=False):
        a, b = (abar[i] ** 0.5 for i in (t, s))
        x0 = (after * (1 - abar[t]) ** 0.5 - (1 - abar[s]) ** 0.5 * x) / (
            b * (1 - abar[t]) ** 0.5 - a * (1 - abar[s]) ** 0.5
        )
        found.append(x0.abs().max())
    assert len(found) == 3 and max(found) < 1 + 1e-4 and max(found) > 1 - 1e-4
