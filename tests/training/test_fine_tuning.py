"""Training that starts from a saved model: of all its weights, and of low-rank adapters."""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler as DiffusersDDPM
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from pipelines import TextToImagePipeline
from pipelines.drawing.text import encode_text
from training import text_to_image
from training.data.caches import LiveText, cache_latents
from training.data.pictures import PictureCache
from training.objectives.denoising import DenoisingLoss, draw_noise
from training.run.lora import TEXT_LAYERS, UNET_LAYERS, LoraFile, add_lora
from training.text_to_image import TextToImageConfig, resolution_of

LORA = "pytorch_lora_weights.safetensors"


def assert_same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.fixture(scope="module", autouse=True)
def one_machine(tmp_path_factory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
        fresh()


def fresh() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(*arguments: object) -> None:
    """`python -m training.text_to_image` with these arguments, in this process."""
    fresh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["text_to_image", "--report_to", "none", *map(str, arguments)])
        text_to_image.main()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Eight pictures as people have them: no columns but the caption."""
    folder = tmp_path_factory.mktemp("mine") / "my_folder"
    folder.mkdir()
    lines = []
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 40, 30, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(
            json.dumps({"file_name": f"{number}.png", "caption": f"a picture of sks number {number}"})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def model(make_pipeline, tmp_path) -> Path:
    """A small pixel model with settings of its own."""
    make_pipeline(default_guidance_scale=4.5, default_num_inference_steps=7).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_one_command_on_a_folder_of_pictures(model, pictures, tmp_path, capsys):
    """Two epochs of eight pictures by four are four steps; the learning rate counts four times, for as many
    pictures a step; the size is the model's, and what its folder says of guidance and steps stays."""
    train(
        "--pretrained_model_name_or_path", model, "--train_data_dir", pictures,
        "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache",
        "--num_train_epochs", 2, "--train_batch_size", 2, "--gradient_accumulation_steps", 2,
        "--learning_rate", 1e-4, "--scale_lr", "--lr_warmup_steps", 0, "--random_flip",
    )  # fmt: skip
    assert capsys.readouterr().out.splitlines()[-1] == f"step 4; pipeline saved in {tmp_path}/run/pipeline"
    (pixels,) = (tmp_path / "cache").glob("pixels-*.npy")
    assert np.load(pixels).shape == (8, 3, 16, 16)
    state = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.bin", weights_only=True)
    assert state["param_groups"][0]["lr"] == pytest.approx(4e-4)
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    assert (index["default_guidance_scale"], index["default_num_inference_steps"]) == (4.5, 7)
    before, after = (TextToImagePipeline.from_pretrained(f) for f in (model, tmp_path / "run" / "pipeline"))
    assert_same(dict(after.text_encoder.state_dict()), dict(before.text_encoder.state_dict()))
    moved = (after.unet.conv_in.weight - before.unet.conv_in.weight).abs()
    assert 0 < moved.max() < 5 * 4e-4  # AdamW's steps are of the learning rate
    assert not any((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize("vae", [False, True])
def test_a_size_that_the_model_cannot_take_is_named(vae, make_pipeline, make_unet, stable_diffusion_folder):
    """In patches of four, and in a VAE's halves."""
    pipe = TextToImagePipeline.from_pretrained(stable_diffusion_folder) if vae else None
    pipe = pipe or make_pipeline(unet=make_unet(patch_size=4))
    assert resolution_of(TextToImageConfig(output_dir="out"), pipe) == (32 if vae else 16)
    assert resolution_of(TextToImageConfig(output_dir="out", resolution=24), pipe) == 24
    with pytest.raises(ValueError, match=f"resolution must be a multiple of {2 if vae else 4} .*, got 25"):
        resolution_of(TextToImageConfig(output_dir="out", resolution=25), pipe)


# ------------------------------------------------------------ Stable Diffusion folders


def test_the_loss_of_a_stable_diffusion_folder(stable_diffusion_folder, tmp_path):
    """Its VAE's means times its scaling factor, noised by its betas (its own scheduler is PNDM), against eps;
    all of it by diffusers' classes. Mirrored pictures have latents of their own."""
    ours = TextToImagePipeline.from_pretrained(stable_diffusion_folder)
    theirs = StableDiffusionPipeline.from_pretrained(stable_diffusion_folder)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    data = PictureCache(pixels, ["", *"abcdef"], [[i + 1] for i in range(6)], {})
    settings = {
        "random_flip": True,
        "caption_dropout": 0.0,
        "snr_gamma": None,
        "noise_offset": 0.1,
        "seed": 5,
    }
    config = TextToImageConfig(output_dir="", **settings)
    text = LiveText(ours.tokenizer, ours.text_encoder)
    cached = DenoisingLoss(config, ours, ours.unet, cache_latents(data, ours.vae, tmp_path, True), text)
    streamed = DenoisingLoss(config, ours, ours.unet, None, text)
    indices = [4, 0, 5, 2]
    found = cached(indices, 3)[1]["per_sample"]

    draws = torch.rand(4, 4, generator=torch.Generator().manual_seed(text_to_image_seed(5, 3)))
    images = torch.from_numpy(pixels[indices]).float() / 127.5 - 1
    mirrored = draws[:, 3] < 0.5
    assert 0 < mirrored.sum() < 4
    images[mirrored] = images[mirrored].flip(-1)
    scheduler = DiffusersDDPM.from_config(theirs.scheduler.config)
    with torch.no_grad():
        latents = theirs.vae.encode(images).latent_dist.mode() * theirs.vae.config.scaling_factor
        eps, t = draw_noise(5, 3, tuple(latents.shape), 1000, 0, 1, noise_offset=0.1)
        states = theirs.encode_prompt([data.captions[i + 1] for i in indices], "cpu", 1, False)[0]
        output = theirs.unet(scheduler.add_noise(latents, eps, t), t, states).sample
    expected = F.mse_loss(output, eps, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)  # latents are cached in fp16
    batch = PictureCache(pixels[indices], data.captions, [data.choices[i] for i in indices], {})
    torch.testing.assert_close(streamed(batch, 3)[1]["per_sample"], expected, rtol=1e-4, atol=1e-6)


def text_to_image_seed(seed: int, step: int) -> int:
    """The seed of captions and mirroring: SHA-256 of the words, its first 63 bits."""
    import hashlib

    digest = hashlib.sha256(f"{seed}:captions:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def test_a_stable_diffusion_folder_is_fine_tuned(stable_diffusion_folder, pictures, tmp_path):
    """At the size that it was made for; only the U-Net changes, and diffusers draws with the result."""
    train(
        "--pretrained_model_name_or_path", stable_diffusion_folder, "--train_data_dir", pictures,
        "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--max_train_steps", 2,
        "--train_batch_size", 2, "--learning_rate", 1e-4, "--random_flip",
    )  # fmt: skip
    (latents,) = (tmp_path / "cache").glob("latents-*.npy")
    assert np.load(latents).shape == (16, 4, 16, 16)  # eight, and their mirror images
    result = tmp_path / "run" / "pipeline"
    before, after = (
        TextToImagePipeline.from_pretrained(stable_diffusion_folder),
        TextToImagePipeline.from_pretrained(result),
    )
    for name in ("vae", "text_encoder"):
        assert_same(dict(getattr(after, name).state_dict()), dict(getattr(before, name).state_dict()))
    assert type(after.scheduler) is type(before.scheduler) and after.vae_scale_factor == 2
    assert not torch.equal(after.unet.conv_in.weight, before.unet.conv_in.weight)


# ------------------------------------------------------------ adapters


def lora_run(model: Path, pictures: Path, run: Path, steps: int, *more: object) -> None:
    train(
        "--pretrained_model_name_or_path", model, "--train_data_dir", pictures, "--output_dir", run,
        "--cache_dir", run.parent / "cache", "--max_train_steps", steps, "--train_batch_size", 2,
        "--learning_rate", 1e-2, "--lr_warmup_steps", 0, "--rank", 3, "--lora_alpha", 6,
        "--train_text_encoder", "--checkpointing_steps", 2, *more,
    )  # fmt: skip


def merged(pipe: Any, file: Path, layers: tuple[str, ...] = ()) -> Any:
    """W + (alpha / rank) B A by hand, alpha 6 and rank 3, in copies of the U-Net and the text encoder."""
    saved = load_file(file)
    parts = {}
    for part in ("unet", "text_encoder"):
        model = copy.deepcopy(getattr(pipe, part))
        weights = dict(model.named_parameters())
        downs = [name for name in saved if name.startswith(part + ".") and name.endswith(DOWN)]
        endings = tuple(layers) if layers and part == "unet" else LAYERS[part]
        assert len(downs) == sum(f".{name}".endswith(endings) for name, _ in model.named_modules()) > 0
        for down in downs:
            up = next(down.replace(a, b) for a, b in PAIRS if a in down)
            layer = down.removeprefix(part + ".")
            for ending in DOWN:
                layer = layer.removesuffix(ending)
            name = (
                layer + ".weight"
                if layer + ".weight" in weights
                else layer.removeprefix("text_model.") + ".weight"
            )
            change = 2 * saved[up].flatten(1) @ saved[down].flatten(1)  # a convolution's B is 1 x 1
            weights[name].data += change.view_as(weights[name])
        parts[part] = model
    return parts["unet"], parts["text_encoder"]


LAYERS = {"unet": tuple(UNET_LAYERS), "text_encoder": tuple(TEXT_LAYERS)}
PAIRS = [
    (".lora.down.", ".lora.up."),
    (".lora_linear_layer.down.", ".lora_linear_layer.up."),
    (".lora_A.", ".lora_B."),
]
DOWN = tuple(f"{a}weight" for a, _ in PAIRS)


def answers(unet: Any, text_encoder: Any, tokenizer: Any) -> torch.Tensor:
    channels, size = unet.config.in_channels, unet.config.sample_size
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = encode_text(tokenizer, text_encoder, ["a sks cat", "a dog"])[0]
        return unet(x, torch.tensor([10, 700]), states).sample


CONVOLUTIONS = ("conv1", "conv2", "time_emb_proj", "to_v")


def test_adapters_of_named_layers(model, pictures, tmp_path):
    """Convolutions among them: drawn with as the weights merged by hand; a name that no layer has is told."""
    lora_run(model, pictures, tmp_path / "run", 2, "--lora_layers", *CONVOLUTIONS)
    pipe = TextToImagePipeline.from_pretrained(model)
    parts = merged(pipe, tmp_path / "run" / LORA, tuple(f".{name}" for name in CONVOLUTIONS))
    expected = answers(*parts, pipe.tokenizer)
    assert (expected - answers(pipe.unet, pipe.text_encoder, pipe.tokenizer)).abs().max() > 1e-3
    pipe.load_lora_weights(str(tmp_path / "run"))
    found = answers(pipe.unet, pipe.text_encoder, pipe.tokenizer)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="lora_layers must be how names .* end, got 'conv9'"):
        lora_run(model, pictures, tmp_path / "other", 2, "--lora_layers", "conv1", "conv9")


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_adapters_load_where_diffusers_loads_them(
    kind, model, stable_diffusion_folder, pictures, tmp_path, capsys
):
    """Into StableDiffusionPipeline itself, and into ours: both answer as the weights merged by hand do."""
    base = {"pixels": model, "latents": stable_diffusion_folder}[kind]
    lora_run(base, pictures, tmp_path / "run", 2)
    assert capsys.readouterr().out.splitlines()[-1] == f"step 2; adapters saved in {tmp_path}/run/{LORA}"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2", LORA]
    pipe = TextToImagePipeline.from_pretrained(base)
    plain = answers(pipe.unet, pipe.text_encoder, pipe.tokenizer)
    expected = answers(*merged(pipe, tmp_path / "run" / LORA), pipe.tokenizer)
    assert (expected - plain).abs().max() > 1e-3
    for cls in (
        (TextToImagePipeline, StableDiffusionPipeline) if kind == "latents" else (TextToImagePipeline,)
    ):
        loaded = cls.from_pretrained(base)
        loaded.load_lora_weights(str(tmp_path / "run"))
        found = answers(loaded.unet, loaded.text_encoder, loaded.tokenizer)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_fine_tuning_of_a_folder_goes_on(model, pictures, tmp_path):
    """Four steps, and three then one more: the same weights; and a card that bears the run's name."""
    settings = [
        "--pretrained_model_name_or_path", model, "--train_data_dir", pictures, "--cache_dir",
        tmp_path / "cache", "--train_batch_size", 2,
    ]  # fmt: skip
    train(*settings, "--output_dir", tmp_path / "whole", "--max_train_steps", 4)
    train(*settings, "--output_dir", tmp_path / "halves", "--max_train_steps", 3)
    train(
        *settings, "--output_dir", tmp_path / "halves", "--max_train_steps", 4, "--resume_from_checkpoint",
        "latest",
    )  # fmt: skip
    whole, halves = (tensors(tmp_path / run / "pipeline" / "unet") for run in ("whole", "halves"))
    assert_same(halves, whole)
    card = (tmp_path / "halves" / "pipeline" / "README.md").read_text()
    assert "# halves" in card and "partial" not in card and "result" not in card


def test_adapters_stopped_and_resumed_are_the_same(model, pictures, tmp_path):
    """Bit for bit; a checkpoint holds no frozen weights."""
    lora_run(model, pictures, tmp_path / "whole", 4)
    lora_run(model, pictures, tmp_path / "parts", 2)
    lora_run(model, pictures, tmp_path / "parts", 4, "--resume_from_checkpoint", "latest")
    whole, parts = (load_file(tmp_path / name / LORA) for name in ("whole", "parts"))
    assert_same(parts, whole)
    assert any((whole[name] != 0).any() for name in whole if ".up." in name and "text_encoder" in name)
    middle = load_file(tmp_path / "whole" / "checkpoint-2" / LORA)
    assert not torch.equal(middle[min(middle)], whole[min(middle)])
    assert not list((tmp_path / "whole").rglob("diffusion_pytorch_model*"))


def test_only_adapters_of_the_same_kind_are_resumed(model, pictures, tmp_path):
    lora_run(model, pictures, tmp_path / "run", 2)
    with pytest.raises(
        ValueError, match=f"it holds another model: .* is .* in {LORA}, and unknown in this one"
    ):
        lora_run(
            model,
            pictures,
            tmp_path / "run",
            3,
            "--resume_from_checkpoint",
            "latest",
            "--train_text_encoder",
            "no",
        )
    (tmp_path / "run" / "checkpoint-2" / LORA).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-2: {LORA} is missing"):
        lora_run(model, pictures, tmp_path / "run", 3, "--resume_from_checkpoint", "latest")


def test_new_adapters_change_nothing_and_alone_learn(model):
    pipe = TextToImagePipeline.from_pretrained(model)
    before = answers(pipe.unet, pipe.text_encoder, pipe.tokenizer)
    add_lora(pipe.unet, UNET_LAYERS, 3)
    add_lora(pipe.text_encoder, TEXT_LAYERS, 3)
    assert_same(answers(pipe.unet, pipe.text_encoder, pipe.tokenizer), before)
    learning = {n for m in (pipe.unet, pipe.text_encoder) for n, p in m.named_parameters() if p.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    assert len(LoraFile.tensors([pipe.unet, pipe.text_encoder])) == len(learning)
