"""A model that tells its own variance, pushed by one process and drawn with by name in others."""

import numpy as np
import pytest
from hub.snippets import DRAW, LOAD, PUSH

from pipelines import DDPMScheduler

STEPS = [10, 25, 50, 100]


@pytest.mark.parametrize("ours", [True, False])
def test_a_pushed_learned_variance_draws_the_same_elsewhere(
    elsewhere, hub, make_pipeline, make_unet, tmp_path, ours
):
    """Loaded with this repository and without it: the pictures of all numbers of steps, guided."""
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", variance_type="learned_range"
    )
    pipe = make_pipeline(unet=make_unet(out_channels=6, patch_size=2), scheduler=scheduler)
    pipe.save_pretrained(tmp_path / "model")
    drawing = "\nvalue = [draw(pipe, num_inference_steps=n) for n in steps]\n"
    before = elsewhere(
        PUSH + drawing, ours=True, folder=str(tmp_path / "model"), name="me/corgi", options={}, steps=STEPS
    )
    elsewhere.forget()
    remote = (
        DRAW + "\nfrom diffusers import DiffusionPipeline as P\npipe = P.from_pretrained(name, **options)\n"
    )
    load, options = (LOAD, {}) if ours else (remote, {"trust_remote_code": True})
    kinds = "value.append([pipe.unet.config.out_channels, pipe.scheduler.config.variance_type])\n"
    *after, kind = elsewhere(load + drawing + kinds, ours=ours, name="me/corgi", options=options, steps=STEPS)
    assert kind == [6, "learned_range"]
    for steps, pictures, expected in zip(STEPS, after, before, strict=True):
        assert np.abs(np.subtract(pictures, expected)).max() < 1e-5, steps
