"""Model folders that mean harm, or look like it: pickles, code, and paths that lead out of the folder."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from pipelines import ConditionalUNet, TextToImagePipeline

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def draw(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a corgi", generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np"
    ).images


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(pipeline, tmp_path) -> Path:
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_pickles_are_neither_written_nor_read(pipeline, folder, caplog):
    pipeline.save_pretrained(folder, safe_serialization=False)
    assert "safetensors only" in caplog.text and not list(folder.rglob("*.bin"))
    pickle = folder / "unet/diffusion_pytorch_model.bin"
    torch.save(pipeline.unet.state_dict(), pickle)
    TextToImagePipeline.from_pretrained(folder)  # beside safetensors it is left alone
    (folder / WEIGHTS).unlink()
    for options in ({}, {"use_safetensors": None}, {"trust_remote_code": True}):
        with pytest.raises(OSError, match=r"weights of unet are a pickle.*convert it"):
            TextToImagePipeline.from_pretrained(folder, **options)
    with pytest.raises(ValueError, match="use_safetensors"):
        TextToImagePipeline.from_pretrained(folder, use_safetensors=False)
    # the way out that the message names
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=False)
    theirs.save_pretrained(folder / "unet")
    assert np.array_equal(draw(TextToImagePipeline.from_pretrained(folder)), draw(pipeline))


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_pickles_of_components_that_are_not_ours_are_refused_too(
    stable_diffusion_folder, tmp_path, component
):
    folder = shutil.copytree(stable_diffusion_folder, tmp_path / "model")
    for path in (folder / component).glob("*.safetensors"):
        torch.save(
            load_file(path),
            path.with_name({"vae": "diffusion_pytorch_model.bin"}.get(component, "pytorch_model.bin")),
        )
        path.unlink()
    with pytest.raises(OSError, match=f"weights of {component} are a pickle"):
        TextToImagePipeline.from_pretrained(folder)


def test_no_code_of_a_folder_runs_unasked(folder, tmp_path):
    """Neither the pipeline's nor the components'; and with trust_remote_code our classes are still ours."""
    marker = tmp_path / "ran"
    for path in folder.rglob("*.py"):
        path.write_text(f"open({str(marker)!r}, 'a').write('x')\n" + path.read_text())
    for options in ({}, {"trust_remote_code": True}):
        loaded = TextToImagePipeline.from_pretrained(folder, **options)
        assert type(loaded) is TextToImagePipeline and type(loaded.unet) is ConditionalUNet
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
    assert not marker.exists()

    source = (
        f"open({str(marker)!r}, 'a').write('x')\nfrom diffusers import ModelMixin, UNet2DConditionModel\n"
    )
    (folder / "unet/strange.py").write_text(source + "class Strange(UNet2DConditionModel):\n    pass\n")
    edit(folder / "model_index.json", unet=["strange", "Strange"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        TextToImagePipeline.from_pretrained(folder)
    assert not marker.exists()
    assert (
        type(TextToImagePipeline.from_pretrained(folder, trust_remote_code=True).unet).__name__ == "Strange"
    )
    assert marker.exists()


def test_code_that_a_config_names_does_not_run(folder):
    """transformers' Auto classes ask on the terminal whether to run what `auto_map` names."""
    edit(folder / "text_encoder/config.json", auto_map={"AutoModel": "strange.Strange"})
    TextToImagePipeline.from_pretrained(folder)  # the class of the index reads no auto_map
    edit(folder / "model_index.json", text_encoder=["transformers", "AutoModel"])
    with pytest.raises(OSError, match=r"config.json asks for code through AutoModel"):
        TextToImagePipeline.from_pretrained(folder)


def test_attention_code_that_a_config_names_is_not_fetched(folder):
    """transformers fetches kernels from the repositories that a config names, and runs them."""
    edit(folder / "text_encoder/config.json", attn_implementation="sdpa")
    TextToImagePipeline.from_pretrained(folder)
    edit(folder / "text_encoder/config.json", text_config={"_attn_implementation": {"": "me/attention"}})
    with pytest.raises(OSError, match=r"config.json asks for attention code, .*me/attention.*take"):
        TextToImagePipeline.from_pretrained(folder)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("shard", ["../../outside.safetensors", "ABSOLUTE", "missing.safetensors"])
def test_an_index_of_shards_names_only_its_own_folders_files(pipeline, folder, tmp_path, component, shard):
    outside = tmp_path / "outside.safetensors"
    model, inside = getattr(pipeline, component), next((folder / component).glob("*.safetensors"))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, outside, {"format": "pt"}
    )
    inside.unlink()
    shard = str(outside) if shard == "ABSOLUTE" else shard
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(model.state_dict(), shard)}
    inside.with_name(inside.name + ".index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match=f"names the shard '{re.escape(shard)}'"):
        TextToImagePipeline.from_pretrained(folder)


@pytest.mark.parametrize("linked", [WEIGHTS, "unet", "tokenizer/tokenizer.json", "model_index.json"])
def test_links_out_of_the_folder_are_not_followed(folder, tmp_path, linked):
    outside = tmp_path / "model-outside"  # its name begins with the folder's own
    shutil.move(folder / linked, outside)
    (folder / linked).symlink_to(outside)
    with pytest.raises(OSError, match=r"is a link to .*outside"):
        TextToImagePipeline.from_pretrained(folder)


def test_links_within_the_hubs_cache_are_followed(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--me--corgi/snapshots/0123", tmp_path / "models--me--corgi/blobs"
    blobs.mkdir(parents=True)
    shutil.move(folder, snapshot)
    for number, path in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        shutil.move(path, blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert type(TextToImagePipeline.from_pretrained(snapshot)) is TextToImagePipeline


def test_adapters_that_name_another_model_are_not_followed(pipeline, folder, tmp_path):
    shutil.move(folder / "text_encoder", tmp_path / "elsewhere")
    (folder / "text_encoder").mkdir()
    shutil.copy(tmp_path / "elsewhere/config.json", folder / "text_encoder")
    adapter = {"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"}
    (folder / "text_encoder/adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(OSError, match=r"adapter_config\.json says to load adapters"):
        TextToImagePipeline.from_pretrained(folder)


def test_files_that_are_cut_or_missing_are_named(folder):
    index = (folder / "model_index.json").read_text()
    for text, message in ((index[:100], "is not JSON"), ("[]", r"must hold a JSON object, and holds \[\]")):
        (folder / "model_index.json").write_text(text)
        with pytest.raises(OSError, match=f"model_index.json {message}"):
            TextToImagePipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text(index)
    shutil.move(folder / "text_encoder/model.safetensors", folder)  # not looked for there
    shutil.move(folder / "text_encoder/config.json", folder)
    (folder / "text_encoder").rmdir()
    with pytest.raises(OSError, match="has no folder text_encoder, which its model_index.json names"):
        TextToImagePipeline.from_pretrained(folder)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("content", ["cut", "pointer", "pickle", "empty"])
def test_weights_that_are_not_whole_are_named_before_any_are_read(pipeline, folder, component, content):
    (file,) = (folder / component).glob("*.safetensors")
    if content == "pickle":
        torch.save(getattr(pipeline, component).state_dict(), file)
    else:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"
        file.write_bytes({"cut": file.read_bytes()[:-1], "pointer": pointer, "empty": b""}[content])
    with pytest.raises(OSError, match=rf"{component}/{file.name} is no safetensors file.*fetch it again"):
        TextToImagePipeline.from_pretrained(folder)


def test_an_index_of_shards_that_maps_nothing_is_named(folder):
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    for content in ("{}", '{"weight_map": ["conv_in.weight"]}'):
        index.write_text(content)
        with pytest.raises(OSError, match=r"index\.json must map names to shards in `weight_map`"):
            TextToImagePipeline.from_pretrained(folder)


def test_a_component_is_no_path(folder, tmp_path):
    shutil.copytree(folder / "unet", tmp_path / "elsewhere")
    edit(folder / "model_index.json", **{"../elsewhere": ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(OSError, match=r"component '../elsewhere'"):
        TextToImagePipeline.from_pretrained(folder)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"has no model_index\.json\.$"):
        TextToImagePipeline.from_pretrained(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(OSError, match=r"model\.ckpt.*once converted to safetensors"):
        TextToImagePipeline.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="neither a folder nor a name"):
        TextToImagePipeline.from_pretrained("no/such/folder")


def test_pipelines_with_parts_that_ours_has_not_are_refused(stable_diffusion_folder, tmp_path):
    """Of another kind, that is: what Stable Diffusion's own folders have besides, diffusers ignores too."""
    folder = shutil.copytree(stable_diffusion_folder, tmp_path / "model")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    edit(folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])
    TextToImagePipeline.from_pretrained(folder)
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(OSError, match=r"is a StableDiffusionXLPipeline, with text_encoder_2, .*DiffusionPip"):
        TextToImagePipeline.from_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: index[k] for k in index if k != "_class_name"}))
    with pytest.raises(OSError, match="names no pipeline"):
        TextToImagePipeline.from_pretrained(folder)


def test_a_device_map_places_every_component(folder, monkeypatch):
    """`device_map="cuda"`, which diffusers takes, with the one device besides the CPU that is everywhere."""
    places = diffusers.pipelines.pipeline_utils.SUPPORTED_DEVICE_MAP
    monkeypatch.setattr(diffusers.pipelines.pipeline_utils, "SUPPORTED_DEVICE_MAP", [*places, "meta"])
    loaded = TextToImagePipeline.from_pretrained(folder, device_map="meta")
    models = (loaded.unet, loaded.text_encoder)
    assert {parameter.device.type for model in models for parameter in model.parameters()} == {"meta"}
    with pytest.raises(ValueError, match=r"`device_map` must be a device.*enable_model_cpu_offload"):
        TextToImagePipeline.from_pretrained(folder, device_map="balanced")
