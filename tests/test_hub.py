"""Model folders: what saving writes, what loading makes of it, and whose classes come out."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from pipelines import ConditionalUNet, DDPMScheduler, TextToImagePipeline

PROMPT = "a corgi in a party hat"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_stable_diffusion_folder_loads_into_our_classes(both):
    theirs, ours = both
    assert type(theirs.unet) is UNet2DConditionModel and type(ours.unet) is ConditionalUNet
    assert ours.unet.state_dict().keys() == theirs.unet.state_dict().keys()


def test_old_scheduler_configs_are_read_as_stable_diffusion_reads_them(stable_diffusion_folder, tmp_path):
    """clip_sample and steps_offset of the first checkpoints, which StableDiffusionPipeline overrules."""
    for name in ("DDIMScheduler", "DDPMScheduler"):
        folder = shutil.copytree(stable_diffusion_folder, tmp_path / name)
        getattr(diffusers, name)(clip_sample=True, steps_offset=0).save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
        theirs, ours = (cls.from_pretrained(folder) for cls in (StableDiffusionPipeline, TextToImagePipeline))
        assert (type(ours.scheduler) is DDPMScheduler) == (name == "DDPMScheduler")
        call = {"num_inference_steps": 4, "output_type": "np"}
        difference = (
            theirs(PROMPT, generator=seeded(), **call).images
            - ours(PROMPT, generator=seeded(), **call).images
        )
        assert np.abs(difference).max() < 1e-4


def test_round_trip_gives_identical_pictures(make_pipeline, make_unet, tmp_path):
    pipe = make_pipeline(unet=make_unet(pooled_text_time_embedding=True, pooled_text_dim=24, patch_size=2))
    drawn = pipe(PROMPT, generator=seeded(), output_type="np").images
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["conditional_unet", "ConditionalUNet"]
    assert index["scheduler"] == ["ddpm_scheduler", "DDPMScheduler"]
    assert index["_class_name"] == "TextToImagePipeline"
    weights = [
        path.suffix for path in tmp_path.rglob("*") if path.stat().st_size > 20_000 and path.suffix != ".json"
    ]
    assert set(weights) == {".safetensors"}
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is ConditionalUNet and type(loaded.scheduler) is DDPMScheduler
    assert not loaded.unet.training and not loaded.text_encoder.training
    assert loaded.config.default_guidance_scale == 3.0 and loaded.config.default_num_inference_steps == 5
    assert np.array_equal(loaded(PROMPT, generator=seeded(), output_type="np").images, drawn)
    replaced = TextToImagePipeline.from_pretrained(
        tmp_path, scheduler=diffusers.DDIMScheduler(), unet=pipe.unet
    )
    assert type(replaced.scheduler) is diffusers.DDIMScheduler and replaced.unet is pipe.unet


def test_stable_diffusion_survives_our_saving(both, tmp_path):
    _, ours = both
    ours.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    call = {"num_inference_steps": 3, "output_type": "np"}
    assert np.array_equal(
        ours(PROMPT, generator=seeded(), **call).images, again(PROMPT, generator=seeded(), **call).images
    )


def test_half_precision_on_disk_loads_as_single(make_pipeline, make_unet, make_text_encoder, tmp_path):
    pipe = make_pipeline(unet=make_unet(), text_encoder=make_text_encoder()).to(torch.float16)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    pipe.to(torch.float32)  # what single precision makes of the rounded weights
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert {p.dtype for model in (loaded.unet, loaded.text_encoder) for p in model.parameters()} == {
        torch.float32
    }
    drawn = [p(PROMPT, generator=seeded(), output_type="np").images for p in (pipe, loaded)]
    assert np.array_equal(*drawn)
    half = TextToImagePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert {p.dtype for model in (half.unet, half.text_encoder) for p in model.parameters()} == {
        torch.float16
    }


def test_pickles_are_neither_written_nor_read(pipeline, tmp_path, caplog):
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert "safetensors only" in caplog.text and not list(tmp_path.rglob("*.bin"))
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(pipeline.unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        TextToImagePipeline.from_pretrained(tmp_path)


def test_variants_load_where_they_exist(pipeline, tmp_path):
    drawn = pipeline(PROMPT, generator=seeded(), output_type="np").images
    pipeline.save_pretrained(tmp_path, variant="ema")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.ema.safetensors").is_file()
    loaded = TextToImagePipeline.from_pretrained(tmp_path, variant="ema")
    assert np.array_equal(loaded(PROMPT, generator=seeded(), output_type="np").images, drawn)
    with pytest.raises(ValueError, match="variant=fp16"):
        TextToImagePipeline.from_pretrained(tmp_path, variant="fp16")


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(OSError, match="model_index.json"):
        TextToImagePipeline.from_pretrained(tmp_path)
