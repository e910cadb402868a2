"""Image to image against StableDiffusionImg2ImgPipeline, against a loop by hand, and against its promises."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from pipelines import ImageToImagePipeline

PROMPT = "a corgi in a party hat"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    """Smooth colours and noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def edits(stable_diffusion_folder):
    """(theirs, ours), both loaded from one Stable Diffusion folder."""
    classes = (StableDiffusionImg2ImgPipeline, ImageToImagePipeline)
    pipes = [cls.from_pretrained(stable_diffusion_folder) for cls in classes]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


CALLS = [
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {"strength": 0.35, "guidance_scale": 1.0}),
    ("DDIMScheduler", {"eta": 0.6, "num_images_per_prompt": 2}),
    ("DDPMScheduler", {"prompt": [PROMPT, "a cat"], "image": [picture(seed=1), picture(seed=2)]}),
    ("DDPMScheduler", {"strength": 1.0, "negative_prompt": "blue"}),
    ("DDPMScheduler", {"timesteps": [900, 500, 100, 3], "strength": 0.5}),
    ("DPMSolverMultistepScheduler", {"image": picture(40, 24)}),
    ("EulerDiscreteScheduler", {"strength": 0.6, "image": torch.rand(1, 3, 32, 32, generator=seeded())}),
    ("EulerAncestralDiscreteScheduler", {"num_images_per_prompt": 2, "generator": [1, 2]}),
    ("HeunDiscreteScheduler", {"strength": 0.6}),
    ("UniPCMultistepScheduler", {"image": np.random.default_rng(0).random((32, 32, 3), dtype=np.float32)}),
    ("LCMScheduler", {"image": torch.randn(1, 4, 16, 16, generator=seeded())}),
]


@pytest.mark.parametrize(
    "name, arguments", CALLS, ids=lambda value: value if isinstance(value, str) else str(list(value))
)
def test_pictures_equal_stable_diffusions(edits, name, arguments):
    drawn = []
    for pipe in edits:
        settings = {
            "prompt": PROMPT,
            "image": picture(),
            "num_inference_steps": 6,
            "guidance_scale": 7.5,
            "generator": 0,
        } | arguments
        seeds = settings.pop("generator")
        settings["generator"] = [seeded(seed) for seed in seeds] if isinstance(seeds, list) else seeded(seeds)
        if "timesteps" in settings:
            del settings["num_inference_steps"]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        drawn.append(pipe(**settings, output_type="np").images)
    difference = np.abs(drawn[0] - drawn[1]).max()
    print(f"{name}: {difference:.1e}")
    assert drawn[0].std() > 0.05 and drawn[0].shape == drawn[1].shape
    assert difference < 1e-4
