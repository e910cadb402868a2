"""Stable Diffusion's folders and files, in every shape they come in, against StableDiffusionPipeline."""

import copy
import gc
import json
import logging
import os
import resource
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from original_layout import original_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel

from pipelines import ConditionalUNet, DDPMScheduler, InpaintPipeline, TextToImagePipeline
from training.data.tokenizer import build_clip_tokenizer

PROMPT = "a corgi in a party hat"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# What sets 1.x and 2.x apart
VERSIONS: dict[int, dict[str, Any]] = {
    1: {
        "unet": {"attention_head_dim": 4},
        "text": {"hidden_act": "quick_gelu", "eos_token_id": 2},
        "scheduler": diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    },
    2: {
        "unet": {
            "attention_head_dim": [2, 4, 8, 8],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "text": {"hidden_act": "gelu", "projection_dim": 32},
        "scheduler": diffusers.DDPMScheduler(
            **BETAS, prediction_type="v_prediction", clip_sample=False, steps_offset=1
        ),
    },
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "generator": seeded(), "output_type": "np"} | arguments
    return pipe(PROMPT, **call).images


@pytest.fixture(scope="module")
def make_theirs(tokenizer: Any, make_text_encoder: Any, make_unet: Any) -> Any:
    """make_theirs(version): StableDiffusionPipeline with the real one's blocks at a fraction of its width, of
    32 x 32 pixels; version 1 with a safety checker."""
    made: dict[int, Any] = {}

    def make(version: int) -> Any:
        if version in made:
            return copy.deepcopy(made[version])
        settings = VERSIONS[version]
        unet = make_unet(
            UNet2DConditionModel,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            **settings["unet"],
        )
        torch.manual_seed(3)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
        ).eval()
        checker = extractor = None
        if version == 1:
            vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
            config = CLIPConfig(vision_config=vision, projection_dim=8)
            checker = StableDiffusionSafetyChecker(config).eval()
            extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        made[version] = StableDiffusionPipeline(
            vae=vae,
            text_encoder=make_text_encoder(CLIPTextModel, **settings["text"]),
            tokenizer=copy.deepcopy(tokenizer),
            unet=unet,
            scheduler=copy.deepcopy(settings["scheduler"]),
            safety_checker=checker,
            feature_extractor=extractor,
            requires_safety_checker=version == 1,
        )
        return copy.deepcopy(made[version])

    return make


def rename(folder: Path, names: dict[str, str], prefix: str = "") -> None:
    """Weights of a component under older names: parts replaced, a prefix put before."""
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    for new, old in names.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    save_file({prefix + name: tensor for name, tensor in state.items()}, file, {"format": "pt"})


def save_as(pipe: Any, folder: Path, layout: str) -> dict[str, Any]:
    """Saves in one of the shapes such folders come in; returns what from_pretrained needs to be told."""
    if "fp16" in layout:
        pipe = copy.deepcopy(pipe).to(torch.float16)
    options: dict[str, Any] = {"variant": "fp16"} if "variant" in layout else {}
    pipe.save_pretrained(folder, **options, max_shard_size="40KB" if "sharded" in layout else None)
    if layout == "pickles beside":
        pipe.save_pretrained(folder, safe_serialization=False)
    if layout == "old names":
        rename(folder / "text_encoder", {}, "text_model.")
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        rename(folder / "vae", {f"attentions.0.{new}": f"attentions.0.{name}" for new, name in old.items()})
    return options


LAYOUTS = [
    (1, "plain"),
    (1, "sharded fp16 variant"),
    (1, "pickles beside"),
    (1, "old names"),
    (2, "sharded"),
    (2, "fp16 variant"),
    (2, "fp16"),
]


@pytest.mark.parametrize("version, layout", LAYOUTS)
def test_folder_draws_what_stable_diffusion_draws(make_theirs, tmp_path, version, layout):
    options = save_as(make_theirs(version), tmp_path, layout)
    shards = len(list((tmp_path / "unet").glob("*-of-*.safetensors")))
    assert (shards > 1) == ("sharded" in layout)
    assert bool(list(tmp_path.rglob("*.bin"))) == ("pickles" in layout)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, **options)
    ours = TextToImagePipeline.from_pretrained(tmp_path, **options)

    assert type(theirs.unet) is UNet2DConditionModel and type(ours.unet) is ConditionalUNet
    named = type(theirs.scheduler)
    assert named is type(VERSIONS[version]["scheduler"])
    assert type(ours.scheduler) is (DDPMScheduler if named is diffusers.DDPMScheduler else named)
    assert (ours.safety_checker is not None) == (version == 1)
    assert {p.dtype for p in (*ours.unet.parameters(), *ours.text_encoder.parameters())} == {torch.float32}
    one, other = draw(theirs), draw(ours)
    difference = np.abs(one - other).max()
    print(f"{version}.x, {layout}: {difference:.1e}, a picture's spread {one.std():.2f}")
    assert one.shape == (1, 32, 32, 3) and one.std() > 0.05
    assert difference < 1e-4


# ---------------------------------------------------------------- single files


@pytest.mark.parametrize("version", [1, 2])
def test_single_file_draws_what_its_pipeline_draws(make_theirs, tmp_path, version):
    """`config` is a folder with the configs alone: all weights can only be the file's."""
    theirs = make_theirs(version)
    expected = draw(theirs, negative_prompt="blue")
    state = original_state_dict(theirs, version)
    save_file(state, tmp_path / "model.safetensors")
    theirs.save_pretrained(tmp_path / "config")
    for weights in (tmp_path / "config").rglob("*.safetensors"):
        weights.unlink()
    arguments = {"config": str(tmp_path / "config"), "local_files_only": True}
    ours = TextToImagePipeline.from_single_file(
        tmp_path / "model.safetensors", **arguments, default_num_inference_steps=7
    )
    assert type(ours.unet) is ConditionalUNet and ours.config.default_num_inference_steps == 7
    assert type(ours.scheduler) is (DDPMScheduler if version == 2 else diffusers.PNDMScheduler)
    difference = np.abs(draw(ours, negative_prompt="blue") - expected).max()
    print(f"{version}.x: {difference:.1e}")
    assert difference < 1e-4
    half = TextToImagePipeline.from_single_file(
        str(tmp_path / "model.safetensors"), **arguments, torch_dtype=torch.float16
    )
    assert half.unet.dtype == half.text_encoder.dtype == half.vae.dtype == torch.float16


def test_single_file_that_cannot_be_read_says_why(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    load = TextToImagePipeline.from_single_file
    with pytest.raises(ValueError, match=r"model.ckpt' is a pickle.*save_file"):
        load(tmp_path / "model.ckpt", config=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="absent.safetensors' is no file"):
        load(tmp_path / "absent.safetensors", config=str(tmp_path))
    with pytest.raises(OSError, match="model.safetensors holds weights alone.*pass `config=`"):
        load(tmp_path / "model.safetensors")


# ---------------------------------------------------------------- one pipeline out of another


def test_from_pipe_shares_the_weights_both_ways(make_theirs, caplog, monkeypatch):
    theirs = make_theirs(2)
    theirs.unet.conv_out.requires_grad_(False)
    expected = draw(theirs)
    ours = TextToImagePipeline.from_pipe(theirs, default_guidance_scale=2.5)
    assert type(ours.unet) is ConditionalUNet and type(ours.scheduler) is DDPMScheduler
    assert ours.config.default_guidance_scale == 2.5 and not ours.unet.training
    for name, parameter in theirs.unet.named_parameters():
        own = ours.unet.get_parameter(name)
        assert own.data_ptr() == parameter.data_ptr() and own.requires_grad == parameter.requires_grad
    assert ours.vae is theirs.vae and ours.text_encoder is theirs.text_encoder
    assert np.abs(draw(ours, guidance_scale=7.5) - expected).max() < 1e-4

    back = StableDiffusionPipeline.from_pipe(ours, unet=ours.unet)
    assert back.unet is ours.unet
    assert np.abs(draw(back) - expected).max() < 1e-4
    assert TextToImagePipeline.from_pipe(ours).unet is ours.unet

    ours = TextToImagePipeline.from_pipe(theirs, unet=theirs.unet, scheduler=diffusers.DDIMScheduler())
    assert type(ours.unet) is ConditionalUNet and type(ours.scheduler) is diffusers.DDIMScheduler
    widths = {f"{half}_block_out_channels": (8, 8) for half in ("encoder", "decoder")}
    blocks = {f"num_{half}_blocks": (1, 1) for half in ("encoder", "decoder")}
    ours.vae = diffusers.AutoencoderTiny(**widths, **blocks)
    assert TextToImagePipeline.from_pipe(ours).vae is ours.vae  # a kind of vae that no annotation names

    ours.to(torch.bfloat16)
    caplog.clear()
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    assert InpaintPipeline.from_pipe(ours).unet.dtype == ours.unet.dtype == torch.bfloat16
    assert InpaintPipeline.from_pipe(ours, torch_dtype=torch.float32).unet.dtype == torch.float32
    assert "float32" not in caplog.text


# ---------------------------------------------------------------- full size

SIDE, STEPS = 512, 2


def memory_peak() -> float:
    """GB that this process has held at most since `reset_memory_peak`, or ever where that cannot be."""
    if (status := Path("/proc/self/status")).exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_memory_peak() -> None:
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def randomly_filled(cls: type, *arguments: Any, **config: Any) -> Any:
    """A model in half precision, its matrices uniform as torch draws them, without ever being in single."""
    with torch.device("meta"):
        model = cls(*arguments, **config).half()
    model = model.to_empty(device="cpu").eval()
    for name, parameter in model.named_parameters():
        bound = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.0
        if parameter.ndim > 1:
            parameter.data.uniform_(-bound, bound)
        else:
            parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


@pytest.mark.slow
def test_full_size_folder(tmp_path):
    """Stable Diffusion 1.5's own sizes: U-Net 860M, VAE 84M, text tower 123M, saved in half precision."""
    text = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    text |= {"num_hidden_layers": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu"}
    levels = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    levels |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=randomly_filled(AutoencoderKL, **levels),
        text_encoder=randomly_filled(CLIPTextModel, CLIPTextConfig(**text)),
        tokenizer=build_clip_tokenizer(48894),
        unet=randomly_filled(UNet2DConditionModel, cross_attention_dim=768, sample_size=64),
        scheduler=copy.deepcopy(VERSIONS[1]["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.text_encoder.embeddings.position_ids = torch.arange(77)[None]  # a buffer: `to_empty` left it blank
    pipe.save_pretrained(tmp_path)
    assert sum(p.numel() for p in pipe.unet.parameters()) == 859_520_964
    del pipe
    pictures = []
    for cls in (TextToImagePipeline, StableDiffusionPipeline):
        gc.collect()
        reset_memory_peak()
        start = time.perf_counter()
        pipe = cls.from_pretrained(tmp_path, torch_dtype=torch.float32)
        loaded, work = time.perf_counter(), time.process_time()
        pictures.append(draw(pipe, height=SIDE, width=SIDE, num_inference_steps=STEPS))
        seconds, work = time.perf_counter() - loaded, time.process_time() - work
        print(
            f"{cls.__name__}: loaded in {loaded - start:.0f} s, {STEPS} guided steps at {SIDE} x {SIDE} and "
            f"decoded in {seconds:.0f} s ({work:.0f} s of work), {torch.get_num_threads()} threads, "
            f"{pipe.unet.num_parameters() / 1e6:.0f}M U-Net, peak {memory_peak():.1f} GB"
        )
        del pipe
    difference = np.abs(pictures[0] - pictures[1]).max()
    print(f"largest difference {difference:.1e}, a picture's spread {pictures[0].std():.2f}")
    assert pictures[0].std() > 0.01 and difference < 1e-4
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
