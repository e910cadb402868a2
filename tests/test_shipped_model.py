"""What is shipped in models/: its size, and that it draws what it is asked for."""

import json
import os
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from places import ROOT
from safetensors import safe_open

from pipelines import TextToImagePipeline
from training.evaluation.judge import Judge

MODELS = ROOT / "models"
# Of the concepts that tests/data/emoji64 shows
NAMES = [
    "cat face", "crown", "dog face", "fire", "grinning face", "house", "pizza", "red apple", "red heart",
    "rocket", "sunflower", "umbrella",
]  # fmt: skip


def test_the_weights_are_fp16_safetensors_within_their_budget():
    size = {path: path.stat().st_size for path in MODELS.rglob("*") if path.is_file()}
    assert not [p for p in size if p.suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl")]
    weights = [path for path in size if path.suffix == ".safetensors"]
    assert max(size.values()) <= 45e6 and sum(size.values()) <= 80e6
    assert sum(size[path] for path in weights if (MODELS / "emoji") in path.parents) <= 55e6
    for path in weights:
        with safe_open(path, "pt") as file:
            kinds = {str(file.get_tensor(name).dtype) for name in file.keys()}
        assert kinds <= {"torch.float16", "torch.int64"}, path


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in MODELS.glob("*/README.md")))
def test_each_model_has_a_card_with_its_licences_and_no_path(folder):
    card = (MODELS / folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "license:" in card
    for word in ("MIT", "Apache-2.0", "CC-BY-4.0", "NOTICE"):
        assert word in card, word
    for path in (MODELS / folder).rglob("*config.json"):
        for value in leaves(json.loads(path.read_text(encoding="utf-8"))):
            assert not (isinstance(value, str) and value.startswith(("/", "runs/"))), path


def test_what_is_shipped_is_whole_once_saved(tmp_path):
    """No copy of our code lies in models/; a saved or pushed folder has it, and plain diffusers draws with it
    what our class draws, in a process that cannot see this repository."""
    assert not list(MODELS.rglob("*.py"))
    pipe = TextToImagePipeline.from_pretrained(MODELS / "emoji")
    pipe.save_pretrained(tmp_path / "saved")
    code = (
        "import numpy, sys, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('saved', trust_remote_code=True)\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "images = pipe('red heart', num_inference_steps=2, generator=generator, output_type='np').images\n"
        "assert 'pipelines' not in sys.modules\n"
        "numpy.save('drawn.npy', images)\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    generator = torch.Generator().manual_seed(0)
    ours = pipe("red heart", num_inference_steps=2, generator=generator, output_type="np").images
    assert np.abs(ours - np.load(tmp_path / "drawn.npy")).max() < 1e-5


def leaves(value):
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


@pytest.fixture(scope="module")
def pictures():
    """(24, 3, 64, 64) in [0, 1]: each of NAMES twice, seeds 0 to 23, the model's own guidance and steps."""
    pipe = TextToImagePipeline.from_pretrained(MODELS / "emoji")
    pipe.set_progress_bar_config(disable=True)
    prompts = [f"{name}, {style} style" for name in NAMES for style in ("noto", "twemoji")]
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, generator=generators, output_type="pt").images


def test_a_red_heart_is_red_and_on_white(pictures):
    for picture in pictures[2 * NAMES.index("red heart") :][:2]:
        red, green, blue = picture[:, 20:40, 24:40].mean(dim=(1, 2))  # inside any heart
        assert red > 0.6 and green < 0.45 and blue < 0.45
        corners = picture[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() > 0.9


def test_the_judge_knows_what_was_drawn(pictures):
    """Among the twelve names; by chance one in twelve would be right."""
    judge = Judge(str(MODELS / "judge"))
    scores = judge.embed_images(pictures * 2 - 1) @ judge.embed_names(NAMES).T  # (24, 12)
    truth = np.repeat(np.arange(len(NAMES)), 2)
    right = scores.argmax(dim=1).numpy() == truth
    assert right.mean() >= 0.7, [NAMES[i] for i in scores.argmax(dim=1)]


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_schedulers_that_do_not_clip_draw_the_same_thing_by_clip_guidance(name):
    """At the noisiest steps its gradient moves x0 far beyond [-1, 1], from where no later step comes back."""
    pipe = TextToImagePipeline.from_pretrained(MODELS / "emoji")
    pipe.load_guides(MODELS / "emoji-guidance")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.default_clip_guidance_scale > 0

    def draw() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return pipe(["red heart", "dog face, flat style"], generator=generators, output_type="pt").images

    ours = draw()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    error = (draw() - ours).abs().mean().item()
    print(f"{name}: mean difference {error:.3f} of [0, 1]")
    assert error < 0.08
