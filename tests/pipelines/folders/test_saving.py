"""Model folders: what saving writes, what loading makes of it, and what neither does."""

import contextlib
import copy
import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from pipelines import ConditionalUNet, DDPMScheduler, TextToImagePipeline
from pipelines.folders import saving
from pipelines.folders.files import write_json

PROMPT = "a corgi in a party hat"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe, **call) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"} | call
    return pipe(PROMPT, generator=seeded(), **call).images


def read(path: Path):
    return json.loads(path.read_text())


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(read(path) | changes))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()


@pytest.fixture
def make_latent(make_pipeline, make_unet, vae):
    """make_latent(scheduler={}, unet={}, **parts): a pipeline in latents that diffusers' classes can read."""

    def make(scheduler=None, unet=None, **parts):
        scheduler = {"clip_sample": False, "timestep_spacing": "trailing"} | (scheduler or {})
        unet = {"in_channels": 4, "out_channels": 4} | (unet or {})
        return make_pipeline(
            **{"unet": make_unet(**unet), "scheduler": DDPMScheduler(**scheduler), "vae": vae} | parts
        )

    return make


# ---- Stable Diffusion folders in ours ----


def test_stable_diffusion_folder_loads_into_our_classes(both):
    theirs, ours = both
    assert type(theirs.unet) is UNet2DConditionModel and type(ours.unet) is ConditionalUNet
    assert ours.unet.state_dict().keys() == theirs.unet.state_dict().keys()


def test_old_scheduler_configs_are_read_as_stable_diffusion_reads_them(stable_diffusion_folder, tmp_path):
    """clip_sample and steps_offset of the first checkpoints, which StableDiffusionPipeline overrules, also in
    a scheduler that it is handed."""
    for name in ("DDIMScheduler", "DDPMScheduler"):
        folder = shutil.copytree(stable_diffusion_folder, tmp_path / name)
        scheduler = getattr(diffusers, name)(clip_sample=True, steps_offset=0)
        scheduler.save_pretrained(folder / "scheduler")
        edit(folder / "model_index.json", scheduler=["diffusers", name])
        theirs, ours = (cls.from_pretrained(folder) for cls in (StableDiffusionPipeline, TextToImagePipeline))
        assert (type(ours.scheduler) is DDPMScheduler) == (name == "DDPMScheduler")
        handed = TextToImagePipeline.from_pretrained(folder, scheduler=scheduler)
        assert handed.scheduler is scheduler
        expected = draw(theirs)
        for pipe in (ours, handed):
            assert np.abs(draw(pipe) - expected).max() < 1e-4


@pytest.mark.parametrize("saved_by, side", [("0.8.1", 128), ("0.9.0", 32), (None, 32)])
def test_old_sample_sizes_are_read_as_stable_diffusion_reads_them(
    stable_diffusion_folder, tmp_path, saved_by, side
):
    """Checkpoints from before 0.9 say 32 or less where they mean 64 latents, of 2 pixels here."""
    folder = shutil.copytree(stable_diffusion_folder, tmp_path / "model")
    config = {key: value for key, value in read(folder / "unet/config.json").items() if key[0] != "_"}
    config |= {} if saved_by is None else {"_diffusers_version": saved_by}
    (folder / "unet/config.json").write_text(json.dumps(config))
    handed = {"unet": ConditionalUNet.from_pretrained(folder, subfolder="unet")}
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    expected = draw(theirs, num_inference_steps=1)
    assert expected.shape == (1, side, side, 3)
    for options in ({}, handed):
        ours = TextToImagePipeline.from_pretrained(folder, **options)
        assert ours.unet.config.sample_size == theirs.unet.config.sample_size == side // 2
        drawn = draw(ours, num_inference_steps=1)
        assert drawn.shape == expected.shape and np.abs(drawn - expected).max() < 1e-4


def test_stable_diffusion_survives_our_saving(both, tmp_path):
    theirs, ours = both
    ours.save_pretrained(tmp_path)
    drawn = draw(ours)
    assert np.array_equal(drawn, draw(TextToImagePipeline.from_pretrained(tmp_path)))
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is UNet2DConditionModel and np.abs(draw(again) - draw(theirs)).max() < 1e-4


# ---- our folders: code and class names ----


def test_round_trip_gives_identical_pictures(make_pipeline, make_unet, tmp_path):
    pipe = make_pipeline(unet=make_unet(pooled_text_time_embedding=True, pooled_text_dim=24, patch_size=2))
    drawn = draw(pipe)
    pipe.save_pretrained(tmp_path)
    weights = [
        path.suffix for path in tmp_path.rglob("*") if path.stat().st_size > 50_000 and path.suffix != ".json"
    ]
    assert set(weights) == {".safetensors"}
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is ConditionalUNet and type(loaded.scheduler) is DDPMScheduler
    assert not loaded.unet.training and not loaded.text_encoder.training
    assert loaded.config.default_guidance_scale == 3.0 and loaded.config.default_num_inference_steps == 5
    assert all(
        p.data_ptr() % 64 == 0 for model in (loaded.unet, loaded.text_encoder) for p in model.parameters()
    )
    assert np.array_equal(draw(loaded), drawn)
    replaced = TextToImagePipeline.from_pretrained(tmp_path, scheduler=DDIMScheduler(), unet=pipe.unet)
    assert type(replaced.scheduler) is DDIMScheduler and replaced.unet is pipe.unet


def test_code_is_written_where_diffusers_looks_for_it(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = read(tmp_path / "model_index.json")
    assert index["_class_name"] == ["pipeline", "TextToImagePipeline"]
    assert index["unet"] == ["conditional_unet", "ConditionalUNet"]
    assert index["scheduler"] == ["ddpm_scheduler", "DDPMScheduler"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    code = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")}
    assert {"pipeline.py", "unet/conditional_unet.py", "scheduler/ddpm_scheduler.py"} <= code
    assert {"guidance.py", "saving.py", "travel.py"} <= code and "text_to_image.py" not in code


def test_classes_of_a_script_are_saved_without_code(make_pipeline, make_unet, tmp_path, caplog):
    class Scripted(ConditionalUNet):
        pass

    Scripted.__module__ = "__main__"
    make_pipeline(unet=make_unet(Scripted)).save_pretrained(tmp_path)
    assert "code of unet is not in a file" in caplog.text
    assert read(tmp_path / "model_index.json")["unet"] == ["__main__", "Scripted"]
    assert (tmp_path / WEIGHTS).is_file() and not list((tmp_path / "unet").glob("*.py"))


# ---- our folders in diffusers ----


@pytest.mark.parametrize("tower", [CLIPTextModel, CLIPTextModelWithProjection])
def test_a_model_without_features_of_ours_loads_in_diffusers(make_latent, make_text_encoder, tmp_path, tower):
    pipe = make_latent(text_encoder=make_text_encoder(tower, eos_token_id=2))
    drawn = draw(pipe)
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.py"))
    assert "patch_size" not in read(tmp_path / "unet/config.json")
    for cls in (StableDiffusionPipeline, DiffusionPipeline):
        theirs = cls.from_pretrained(tmp_path)
        assert type(theirs) is StableDiffusionPipeline and type(theirs.unet) is UNet2DConditionModel
        assert (
            type(theirs.scheduler) is diffusers.DDPMScheduler and type(theirs.text_encoder) is CLIPTextModel
        )
        assert np.abs(draw(theirs) - drawn).max() < 1e-4
    ours = TextToImagePipeline.from_pretrained(tmp_path)
    assert type(ours.unet) is ConditionalUNet and type(ours.scheduler) is DDPMScheduler
    assert ours.config.default_guidance_scale == 3.0 and ours.config.default_num_inference_steps == 5
    assert np.array_equal(draw(ours), drawn)
    theirs.save_pretrained(tmp_path / "theirs")
    assert np.abs(draw(TextToImagePipeline.from_pretrained(tmp_path / "theirs")) - drawn).max() < 1e-4


def test_our_format_can_be_asked_for(make_latent, tmp_path):
    pipe = make_latent()
    drawn = draw(pipe)
    pipe.save_pretrained(tmp_path, diffusers_format=False)
    assert read(tmp_path / "model_index.json")["unet"] == ["conditional_unet", "ConditionalUNet"]
    assert np.array_equal(draw(TextToImagePipeline.from_pretrained(tmp_path)), drawn)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"unet": {"patch_size": 2}}, "unet.patch_size=2"),
        ({"unet": {"self_conditioning": True}}, "unet.self_conditioning=True"),
        ({"unet": {"text_concat_channels": 8, "pooled_text_dim": 24}}, "unet.text_concat_channels=8"),
        ({"unet": {"pooled_text_time_embedding": True, "pooled_text_dim": 24}}, "pooled_text_time_embedding"),
        ({"unet": {"out_channels": 8}}, "unet.out_channels=8"),
        ({"scheduler": {"clip_sample": True}}, "scheduler.clip_sample=True"),
        ({"scheduler": {"timestep_spacing": "leading"}}, "scheduler.steps_offset=0"),
        ({"scheduler": {"variance_type": "fixed_large"}}, "scheduler.variance_type='fixed_large'"),
        ({"scheduler": {"eta": 0.0}}, "scheduler.eta=0.0"),
        ({"scheduler": {"rescale_betas_zero_snr": True}}, "rescale_betas_zero_snr"),
        ({"vae": None}, "vae=None"),
    ],
)
def test_features_of_ours_keep_our_class_names(make_latent, tmp_path, parts, named):
    """Each is one without which diffusers' classes would draw something else, or nothing."""
    pipe = make_latent(**parts)
    with pytest.raises(ValueError, match="diffusers_format=True") as error:
        pipe.save_pretrained(tmp_path / "theirs", diffusers_format=True)
    assert named in str(error.value) and not (tmp_path / "theirs").exists()
    pipe.save_pretrained(tmp_path / "ours")
    assert read(tmp_path / "ours/model_index.json")["_class_name"] == ["pipeline", "TextToImagePipeline"]
    assert (tmp_path / "ours/unet/conditional_unet.py").is_file()


# ---- what other versions and machines read ----


def test_older_transformers_find_their_names(make_latent, make_text_encoder, tokenizer, tmp_path):
    """The prefix of the tower's weights and the tokenizer's two files, as every version before 5 has them."""
    tower = make_text_encoder(CLIPTextModel)
    pipe = make_latent(text_encoder=tower, tokenizer=copy.deepcopy(tokenizer))
    pipe.tokenizer.add_tokens(["<corgi>"])
    pipe.save_pretrained(tmp_path)
    written = load_file(tmp_path / "text_encoder/model.safetensors")
    assert {f"text_model.{name}" for name in tower.state_dict()} == set(written)
    alone = tmp_path / "tokenizer_alone"
    alone.mkdir()
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "tokenizer" / name, alone)
    words = [PROMPT, "", "it's a <corgi>, painting in the 3d style!"]  # "in" is the first merge
    for folder in (alone, tmp_path / "tokenizer"):
        assert CLIPTokenizer.from_pretrained(folder)(words).input_ids == pipe.tokenizer(words).input_ids
    loaded = TextToImagePipeline.from_pretrained(tmp_path).text_encoder
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), tower.state_dict().values(), strict=True)
    )


def test_older_safety_checkers_find_their_names(make_latent, tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision | {"image_size": 32, "patch_size": 8})
    )
    parts = {"safety_checker": checker, "feature_extractor": CLIPImageProcessor(size=32, crop_size=32)}
    make_latent(**parts).save_pretrained(tmp_path)
    tower = {
        name for name in load_file(tmp_path / "safety_checker/model.safetensors") if "vision_model" in name
    }
    assert tower and all(name.startswith("vision_model.vision_model.") for name in tower)
    loaded = TextToImagePipeline.from_pretrained(tmp_path).safety_checker.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in checker.state_dict().items())


def test_sharded_towers_get_the_older_names_too(make_latent, make_text_encoder, tmp_path):
    pipe = make_latent(text_encoder=make_text_encoder(CLIPTextModel))
    drawn = draw(pipe)
    pipe.save_pretrained(tmp_path, max_shard_size="100KB")
    index = read(tmp_path / "text_encoder/model.safetensors.index.json")["weight_map"]
    assert len(set(index.values())) > 1 and all(name.startswith("text_model.") for name in index)
    for cls in (TextToImagePipeline, StableDiffusionPipeline):
        assert np.abs(draw(cls.from_pretrained(tmp_path)) - drawn).max() < 1e-4


def test_half_precision_on_disk_loads_as_single(make_pipeline, make_unet, make_text_encoder, tmp_path):
    pipe = make_pipeline(unet=make_unet(), text_encoder=make_text_encoder()).to(torch.float16)
    pipe.save_pretrained(tmp_path)
    assert read(tmp_path / "text_encoder/config.json")["dtype"] == "float32"
    pipe.to(torch.float32)  # what single precision makes of the rounded weights
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert {p.dtype for model in (loaded.unet, loaded.text_encoder) for p in model.parameters()} == {
        torch.float32
    }
    assert np.array_equal(draw(pipe), draw(loaded))
    half = TextToImagePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert {p.dtype for model in (half.unet, half.text_encoder) for p in model.parameters()} == {
        torch.float16
    }


def test_no_path_of_this_machine_is_saved(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "first")
    TextToImagePipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for path in (tmp_path / "second").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path


def test_configs_lose_a_machines_paths_and_nothing_else(tmp_path):
    """Those of libraries that write more than the installed ones do, too; transformers' are told float32."""
    paths = dict.fromkeys(("_name_or_path", "name_or_path", "special_tokens_map_file"), "/home/me/model")
    for own in ({"pad": 1, "_class_name": "A"}, {"dtype": "float16", "transformers_version": "4"}):
        write_json(tmp_path / "config.json", own | paths)
        saving.clean_config(tmp_path / "config.json")
        expected = own | ({"dtype": "float32"} if "transformers_version" in own else {})
        assert read(tmp_path / "config.json") == expected


# ---- variants, shards and saving over what is there ----


def test_variants_lie_beside_each_other(make_pipeline, make_unet, make_text_encoder, tmp_path, caplog):
    pipe = make_pipeline(unet=make_unet(), text_encoder=make_text_encoder())
    single = draw(pipe)
    pipe.save_pretrained(tmp_path)
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    half = draw(pipe.to(torch.float32))
    assert not np.array_equal(single, half)
    assert np.array_equal(draw(TextToImagePipeline.from_pretrained(tmp_path)), single)
    assert np.array_equal(draw(TextToImagePipeline.from_pretrained(tmp_path, variant="fp16")), half)
    assert "only names the files" not in caplog.text
    with pytest.raises(ValueError, match="variant=bf16"):
        TextToImagePipeline.from_pretrained(tmp_path, variant="bf16")
    pipe.save_pretrained(tmp_path / "single", variant="fp16")
    assert "only names the files: unet is in torch.float32" in caplog.text
    with pytest.raises(OSError, match="pass variant='fp16'"):
        TextToImagePipeline.from_pretrained(tmp_path / "single")


def test_saving_over_shards_leaves_none_of_the_old_weights(make_pipeline, make_unet, tmp_path):
    """A left-over index of shards would win over the single file that is new."""
    pipe = make_pipeline(unet=make_unet())
    pipe.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "notes.txt").write_text("mine")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    pipe.unet.conv_in.weight.data += 1
    for size in (None, "150KB", None):
        pipe.save_pretrained(tmp_path, max_shard_size=size)
        assert np.array_equal(draw(TextToImagePipeline.from_pretrained(tmp_path)), draw(pipe))
    assert len(list((tmp_path / "unet").glob("*.safetensors*"))) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_index_is_renamed_into_place_last(tmp_path, monkeypatch):
    """Wherever a save is killed, a folder with an index has all that it names."""
    places = ["README.md", "a.py", "model_index.json", "unet/config.json", "vae/model.safetensors", "z.txt"]
    replace, left = os.replace, 0

    def killed(*paths):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(saving.os, "replace", killed)
    for count in range(len(places) + 1):
        staging, folder = tmp_path / f"from{count}", tmp_path / f"to{count}"
        for place in places:
            (staging / place).parent.mkdir(parents=True, exist_ok=True)
            (staging / place).write_text(place)
        left = count
        with pytest.raises(KeyboardInterrupt) if count < len(places) else contextlib.nullcontext():
            saving.move_into(staging, folder, None)
        there = [place for place in places if (folder / place).is_file()]
        assert len(there) == count and ("model_index.json" in there) == (count == len(places))


def test_a_model_can_be_saved_over_the_files_it_is_mapped_from(make_pipeline, make_unet, tmp_path):
    make_pipeline(unet=make_unet()).save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.unet.conv_out.bias.add_(0.5)
    drawn = draw(loaded)
    loaded.save_pretrained(tmp_path)
    assert np.array_equal(draw(loaded), drawn)
    assert np.array_equal(draw(TextToImagePipeline.from_pretrained(tmp_path)), drawn)


def test_a_compiled_unet_is_saved_as_what_it_was_compiled_from(make_pipeline, make_unet, tmp_path):
    pipe = make_pipeline(unet=make_unet(patch_size=2))
    drawn = draw(pipe)
    pipe.unet = torch.compile(pipe.unet)
    pipe.save_pretrained(tmp_path)
    assert read(tmp_path / "model_index.json")["unet"] == ["conditional_unet", "ConditionalUNet"]
    assert np.array_equal(draw(TextToImagePipeline.from_pretrained(tmp_path)), drawn)


def test_a_save_that_fails_changes_nothing(make_pipeline, make_unet, tmp_path, monkeypatch):
    pipe = make_pipeline(unet=make_unet())
    pipe.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pipe.unet.conv_in.weight.data += 1

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(DDPMScheduler, "save_pretrained", full)  # the last of the components
    with pytest.raises(OSError, match="no space"):
        pipe.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_cannot_be_saved_is_refused_before_work(make_pipeline, make_unet, tmp_path):
    from peft import LoraConfig

    pipe = make_pipeline(unet=make_unet())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory"):
        pipe.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match=r"model_card.*nowhere\.md"):
        pipe.save_pretrained(tmp_path / "new", model_card="nowhere.md")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"unet has LoRA adapters.*unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
