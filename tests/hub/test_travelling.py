"""Each pipeline and each component by itself, pulled from the Hub where none of our package is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

import pipelines
from pipelines import NoisyClassifier, NoisyCLIP
from pipelines.components.guidance_clip import GuidanceCLIP

DRAW = """
import numpy, torch
from PIL import Image
def draw(pipe, kind):
    pipe.set_progress_bar_config(disable=True)
    picture = Image.fromarray((numpy.arange(16 * 16 * 3).reshape(16, 16, 3) * 37 % 256).astype("uint8"))
    left = Image.fromarray((numpy.arange(256).reshape(16, 16) % 16 < 8).astype("uint8") * 255)
    call = {
        "TextToImagePipeline": dict(prompt="a red heart", class_labels=["b"], classifier_guidance_scale=1.0,
                                    clip_guidance_scale=2.0, num_inference_steps=3),
        "ImageToImagePipeline": dict(prompt="a red heart", image=picture),
        "InpaintPipeline": dict(prompt="a red heart", image=picture, mask_image=left),
        "SuperResolutionPipeline": dict(image=picture),
    }[kind]
    return pipe(**call, generator=torch.Generator().manual_seed(7), output_type="np").images.tolist()
"""
PUSH = (
    DRAW
    + """
import pipelines
pipe = getattr(pipelines, kind).from_pretrained(folder)
pipe.push_to_hub("me/model")
value = draw(pipe, kind)
"""
)
PULL = (
    DRAW
    + """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
pipe.save_pretrained(again)
assert type(pipe).__name__ == kind and type(pipe).__module__.startswith("diffusers_modules")
try:
    import pipelines
except ModuleNotFoundError:
    value = draw(pipe, kind)
"""
)


@pytest.fixture(scope="module")
def guides(tokenizer: Any) -> dict[str, Any]:
    torch.manual_seed(5)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = tower | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "pad_token_id": 0}
    vision = tower | {"image_size": 16, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    return {
        "noisy_clip": NoisyCLIP(16, 3, 8, 16, 1, 2, 24).eval(),
        "noisy_classifier": NoisyClassifier(["a", "b"], 16, 3, 4, (8, 8), 4, 2).eval(),
        "clip_guidance_model": GuidanceCLIP.of(clip, tokenizer),
    }


@pytest.fixture
def make_saved(make_pipeline, make_unet, make_upsampler, guides, tmp_path):
    """make_saved(kind): a folder of such a pipeline, in which our components have features of ours."""

    def make(kind: str) -> Path:
        if kind == "SuperResolutionPipeline":
            pipe = make_upsampler()
        else:
            unet = make_unet(patch_size=2, pooled_text_time_embedding=True, pooled_text_dim=24)
            text = kind == "TextToImagePipeline"
            pipe = make_pipeline(unet=unet, **(guides if text else {}))
            pipe = pipe if text else getattr(pipelines, kind).from_pipe(pipe)
        pipe.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


@pytest.mark.parametrize(
    "kind", ["TextToImagePipeline", "ImageToImagePipeline", "InpaintPipeline", "SuperResolutionPipeline"]
)
def test_each_pipeline_travels(elsewhere, hub, make_saved, tmp_path, kind):
    """From the Hub, and from a folder that the process which pulled it saved, where nothing else is."""
    drawn = elsewhere(PUSH, ours=True, folder=str(make_saved(kind)), kind=kind)
    elsewhere.forget()
    hub.requests.clear()
    far = elsewhere(PULL, name="me/model", again=str(tmp_path / "again"), kind=kind)
    assert np.abs(np.subtract(far, drawn)).max() < 1e-5
    code = [path for path in hub.model("me/model").files() if path.endswith(".py")]
    asked = sum("GET /api/models/me/model" in line for line in hub.requests)
    assert asked <= len(code) + 3, "diffusers asks once for each path through the graph of imports"

    elsewhere.forget()
    hub.repositories.clear()
    names = {"name": str(tmp_path / "again"), "again": str(tmp_path / "once-more"), "kind": kind}
    assert np.abs(np.subtract(elsewhere(PULL, **names), drawn)).max() < 1e-5
    for place in (tmp_path / "again").rglob("*.py"):  # code that travelled is saved as it is
        there = tmp_path / "once-more" / place.relative_to(tmp_path / "again")
        assert there.read_bytes() == place.read_bytes()
        assert place.read_bytes() == (tmp_path / "model" / place.relative_to(tmp_path / "again")).read_bytes()


COMPONENT = """
import torch
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from huggingface_hub import snapshot_download
folder = snapshot_download("me/model", allow_patterns=[part + "/*"])
cls = get_class_from_dynamic_module(folder, module + ".py", subfolder=part, class_name=class_name,
                                    trust_remote_code=True)
made = cls.from_pretrained(folder, subfolder=part)
"""
ANSWER = """
torch.manual_seed(0)
x = torch.rand(2, 3, 16, 16) * 2 - 1
with torch.no_grad():
    if class_name == "DDPMScheduler":
        made.set_timesteps(5)
        outputs = [made.step(x, int(made.timesteps[0]), x.flip(0), torch.Generator().manual_seed(0))[0],
                   made.add_noise(x, x.flip(0), torch.tensor([3, 500])), made.betas]
    elif class_name == "ConditionalUNet":
        outputs = [made(x, 10, torch.ones(2, 4, 32), added_cond_kwargs={"pooled_text": torch.ones(2, 24)})[0]]
    elif class_name == "GuidanceCLIP":
        outputs = [made(x, ["a cat", "a red heart"])]
    else:
        outputs = [made(x, 10)]
value = [output.tolist() for output in outputs]
"""
OURS = """
import importlib, torch
cls = getattr(importlib.import_module("pipelines.components." + module), class_name)
made = cls.from_pretrained(folder, subfolder=part)
"""
COMPONENTS = {
    "unet": ("conditional_unet", "ConditionalUNet"),
    "scheduler": ("ddpm_scheduler", "DDPMScheduler"),
    "noisy_clip": ("noisy_clip", "NoisyCLIP"),
    "noisy_classifier": ("noisy_classifier", "NoisyClassifier"),
    "clip_guidance_model": ("guidance_clip", "GuidanceCLIP"),
}


def test_each_component_travels_by_itself(elsewhere, hub, make_saved):
    """Its folder is all that is there of it: one file of code, and the weights or the config."""
    folder = str(make_saved("TextToImagePipeline"))
    elsewhere(PUSH, ours=True, folder=folder, kind="TextToImagePipeline")
    for part, (module, class_name) in COMPONENTS.items():
        elsewhere.forget()
        names = {"part": part, "module": module, "class_name": class_name}
        expected = elsewhere(OURS + ANSWER, ours=True, folder=folder, **names)
        there = elsewhere(COMPONENT + ANSWER + "assert 'pipelines' not in __import__('sys').modules", **names)
        assert len(there) == len(expected)
        for ours, theirs in zip(expected, there, strict=True):
            assert np.abs(np.subtract(ours, theirs)).max() < 1e-5, part
        code = [path for path in hub.model("me/model").files() if path.startswith(f"{part}/")]
        assert [path for path in code if path.endswith(".py")] == [f"{part}/{module}.py"]
