"""Folders that an earlier version saved load and draw the same, here and by the code that they bring."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT

from pipelines import NoisyClassifier, NoisyCLIP, SuperResolutionPipeline, TextToImagePipeline

SAVED = ROOT / "tests" / "data" / "saved_before"
GUIDED = {"clip_guidance_scale": 2.0, "class_labels": ["dog"], "classifier_guidance_scale": 2.0}
# a picture to enlarge: 8 x 8, any
PIXELS = (np.arange(8 * 8 * 3).reshape(8, 8, 3) * 37 % 256).astype(np.uint8)
# what was drawn -> the folder, and the call beside generator and output_type
DRAWN: dict[str, tuple[str, dict[str, Any]]] = {
    "text_to_image": ("text_to_image", {"prompt": "a cat"}),
    "guided": ("text_to_image", {"prompt": "a cat"} | GUIDED),
    "super_resolution": ("super_resolution", {"image": Image.fromarray(PIXELS)}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved-before")
    for archive in SAVED.glob("*.zip"):
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(place / archive.stem)
    return place


def draw(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np").images


@pytest.mark.parametrize("name", DRAWN)
def test_old_folders_draw_the_same_here(folders: Path, tmp_path: Path, name: str) -> None:
    """As they were saved, and saved anew, also over what was there."""
    folder, call = DRAWN[name]
    cls = SuperResolutionPipeline if name == "super_resolution" else TextToImagePipeline
    pipe = cls.from_pretrained(folders / folder)
    expected = np.load(SAVED / f"{name}.npy")
    assert np.abs(draw(pipe, call) - expected).max() < 1e-5
    pipe.save_pretrained(tmp_path)
    assert np.abs(draw(cls.from_pretrained(tmp_path), call) - expected).max() < 1e-5


ELSEWHERE = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
from PIL import Image
folder, name, output = sys.argv[1:]
assert "pipelines" not in sys.modules
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
picture = Image.fromarray((np.arange(192).reshape(8, 8, 3) * 37 % 256).astype("uint8"))
calls = {"guided": {"prompt": "a cat"} | GUIDED, "super_resolution": {"image": picture}}
np.save(output, pipe(**calls[name], generator=torch.Generator().manual_seed(0), output_type="np").images)
assert type(pipe.unet).__module__ == "diffusers_modules.local.conditional_unet"
""".replace("GUIDED", repr(GUIDED))


@pytest.mark.parametrize("name", ["guided", "super_resolution"])
def test_old_folders_draw_the_same_by_their_own_code(folders: Path, tmp_path: Path, name: str) -> None:
    arguments = [str(folders / DRAWN[name][0]), name, str(tmp_path / "drawn.npy")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.abs(np.load(tmp_path / "drawn.npy") - np.load(SAVED / f"{name}.npy")).max() < 1e-5


@pytest.mark.parametrize("cls, name", [(NoisyClassifier, "noisy_classifier"), (NoisyCLIP, "noisy_clip")])
def test_old_components_answer_the_same(folders: Path, cls: Any, name: str) -> None:
    model = cls.from_pretrained(folders / "text_to_image", subfolder=name)
    x_t = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    with torch.no_grad():
        assert np.abs(model(x_t, 100).numpy() - np.load(SAVED / f"{name}.npy")).max() < 1e-5
