"""Learned variance: from the U-Net's doubled output through the scheduler to pictures, and from a folder."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler as DiffusersDDPM

from pipelines import ConditionalUNet, DDPMScheduler, TextToImagePipeline

STEPS = [10, 25, 50, 100]
PROMPT = "a corgi in a party hat"


def scheduler(variance: str, **config: Any) -> DDPMScheduler:
    settings = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    return DDPMScheduler(variance_type=variance, **(settings | config))


def draw(pipe: TextToImagePipeline, steps: int, guidance_scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
    return pipe(PROMPT, generator=generator, **call).images


@pytest.fixture(scope="module")
def unets(make_unet) -> tuple[ConditionalUNet, ConditionalUNet]:
    """A U-Net of 6 output channels, in patches, and one of 3 with the same weights for the first three."""
    double, single = make_unet(out_channels=6, patch_size=2), make_unet(patch_size=2)
    weights = double.state_dict()
    single.load_state_dict(
        {k: v[: v.shape[0] // 2] if k.startswith("conv_out") else v for k, v in weights.items()}
    )
    return double, single


@pytest.mark.parametrize("v, fixed", [(-1.0, "fixed_small_log"), (1.0, "fixed_large_log")])
def test_the_ends_of_the_range_are_the_fixed_variances(v, fixed, unets, make_pipeline, make_unet):
    """A network that says v = -1 everywhere draws what beta~ draws, one that says 1 what beta draws."""
    double, single = make_unet(out_channels=6, patch_size=2), unets[1]
    double.load_state_dict(unets[0].state_dict())
    half = double.conv_out.bias.shape[0] // 2
    with torch.no_grad():
        double.conv_out.weight[half:] = 0
        double.conv_out.bias[half:] = v
    learned = make_pipeline(unet=double, scheduler=scheduler("learned_range"))
    plain = make_pipeline(unet=single, scheduler=scheduler(fixed))
    for scale in (1.0, 3.0):  # guidance leaves the variance alone
        torch.testing.assert_close(draw(learned, 10, scale), draw(plain, 10, scale), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", STEPS)
def test_our_scheduler_draws_what_diffusers_draws(steps, unets, make_pipeline):
    """With `leading`, whose last step is t = 0: there they agree (DDPMScheduler says where they do not)."""
    config = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"}
    theirs = make_pipeline(unet=unets[0], scheduler=DiffusersDDPM(variance_type="learned_range", **config))
    ours = make_pipeline(unet=unets[0], scheduler=scheduler("learned_range", **config))
    fixed = make_pipeline(unet=unets[1], scheduler=scheduler("fixed_small", **config))
    pictures = draw(ours, steps)
    torch.testing.assert_close(pictures, draw(theirs, steps), rtol=0, atol=1e-3)
    assert (pictures - draw(fixed, steps)).abs().mean() > 0.003  # the variance that was told is at work


def test_through_a_folder(unets, make_pipeline, tmp_path):
    """Saved and loaded: classes, doubled output, kind of variance, pictures of each number of steps."""
    pipe = make_pipeline(unet=unets[0], scheduler=scheduler("learned_range"))
    pipe.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.unet) is ConditionalUNet and loaded.unet.config.out_channels == 6
    assert type(loaded.scheduler) is DDPMScheduler
    assert loaded.scheduler.config.variance_type == "learned_range"
    for steps in STEPS:
        assert np.array_equal(draw(loaded, steps).numpy(), draw(pipe, steps).numpy()), steps
