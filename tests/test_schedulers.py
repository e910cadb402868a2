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
