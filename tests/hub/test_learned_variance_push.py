"""A model that tells its own variance, pushed by one process and drawn with by name in others."""

from typing import Any

import numpy as np
from hub.snippets import DRAW

from pipelines import DDPMScheduler

STEPS = [10, 25, 50, 100]
PUSH = """
from pipelines import TextToImagePipeline
TextToImagePipeline.from_pretrained(folder).push_to_hub("me/corgi")
"""
LOAD_AND_DRAW = """
pipe = Pipeline.from_pretrained("me/corgi", **options)
value = [draw(pipe, num_inference_steps=n) for n in steps]
value += [type(pipe.unet).__module__.split(".")[0], pipe.scheduler.config.variance_type]
"""
WITH_OURS = "from pipelines import TextToImagePipeline as Pipeline" + DRAW + LOAD_AND_DRAW
WITHOUT = "from diffusers import DiffusionPipeline as Pipeline" + DRAW + LOAD_AND_DRAW


def pictures(pipe: Any) -> list[np.ndarray]:
    """What `DRAW` draws elsewhere, for each number of steps."""
    drawing: dict[str, Any] = {}
    exec(DRAW, drawing)
    return [np.array(drawing["draw"](pipe, num_inference_steps=n)) for n in STEPS]


def test_a_pushed_learned_variance_draws_the_same_elsewhere(
    elsewhere, hub, make_pipeline, make_unet, tmp_path
):
    """With this repository and without it: guided pictures of every number of steps, and not those of a fixed
    variance."""
    config = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    scheduler = DDPMScheduler(**config, variance_type="learned_range")
    pipe = make_pipeline(unet=make_unet(out_channels=6, patch_size=2), scheduler=scheduler)
    pipe.save_pretrained(tmp_path / "model")
    expected = pictures(pipe)
    pipe.scheduler = DDPMScheduler(**config, variance_type="fixed_small")
    for steps, learned, fixed in zip(STEPS, expected, pictures(pipe), strict=True):
        assert np.abs(learned - fixed).mean() > 0.003, steps

    elsewhere(PUSH, ours=True, folder=str(tmp_path / "model"))
    for code, ours, options, home in (
        (WITH_OURS, True, {}, "pipelines"),
        (WITHOUT, False, {"trust_remote_code": True}, "diffusers_modules"),
    ):
        elsewhere.forget()
        *drawn, module, variance = elsewhere(code, ours=ours, options=options, steps=STEPS)
        assert (module, variance) == (home, "learned_range")
        for steps, theirs, mine in zip(STEPS, drawn, expected, strict=True):
            assert np.abs(np.array(theirs) - mine).max() < 1e-5, (home, steps)
