"""The rest of the golden record: the shipped weights, and two optimizer steps of every recipe."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import yaml
from golden import Record, Section
from golden_cheap import coding_module, run_module
from golden_models import (
    COSINE,
    PROMPT,
    chain,
    picture,
    pixel_pipeline,
    quiet,
    seeded,
    text_encoder,
    tokenizer,
    unet,
    vae,
)
from PIL import Image, ImageDraw

from pipelines import ImageToImagePipeline, InpaintPipeline, SuperResolutionPipeline, TextToImagePipeline

EMOJI64 = Path(__file__).resolve().parent / "data" / "emoji64"
MODEL, GUIDES, UPSAMPLER = (Path("models") / name for name in ("emoji", "emoji-guidance", "emoji-upsampler"))


# ------------------------------------------------------------ the shipped weights


def shipped(cls: Any) -> Any:
    return quiet(cls.from_pretrained(MODEL))


def shipped_text_to_image(record: Record) -> None:
    pipe = shipped(TextToImagePipeline)
    pipe.load_guides(GUIDES)
    record.pictures("defaults", pipe([PROMPT] * 2, generator=[seeded(0), seeded(1)]).images, 8)
    record.pictures("defaults, np", pipe(PROMPT, generator=seeded(2), output_type="np").images, 8)
    pipe.upsampler = quiet(SuperResolutionPipeline.from_pretrained(UPSAMPLER))
    record.pictures("256 pixels", pipe(PROMPT, 256, 256, generator=seeded(0)).images, 8)
    call = {"num_candidates": 3, "classifier_guidance_scale": 5.0, "class_labels": "noto"}
    call |= {"guidance_scale": 3.0, "num_inference_steps": 8, "generator": seeded(0)}
    record.pictures("class and candidates", pipe("rocket", **call).images, 8)


def shipped_editing(record: Record) -> None:
    with Image.open(EMOJI64 / "dog-face-noto.png") as image:
        dog = image.convert("RGB")
    pipe = shipped(ImageToImagePipeline)
    record.pictures("image to image", pipe("cat face", dog, 0.6, generator=seeded(0)).images, 8)
    pipe = shipped(InpaintPipeline)
    mask = Image.new("L", dog.size)
    ImageDraw.Draw(mask).rectangle((0, 0, 63, 30), fill=255)
    record.pictures("inpaint", pipe("dog face, top hat", dog, mask, generator=seeded(0)).images, 8)
    grown = pipe.outpaint("dog face", dog, left=24, bottom=20, generator=seeded(0), num_inference_steps=10)
    record.pictures("outpaint", grown.images, 8)
    large = quiet(SuperResolutionPipeline.from_pretrained(UPSAMPLER))
    record.pictures("upsampling", large(image=dog, generator=seeded(0), noise_level=20).images, 8)


def shipped_command_line(record: Record) -> None:
    out = record.folder
    run_module("pipelines", PROMPT, "--seed", 0, "--num-images", 2, "--steps", 10, "--out", out)
    options = "--seed 5 --size 256 --scheduler dpmpp --steps 6".split()
    run_module("pipelines", "a red heart", *options, "--out", out)
    for path in sorted(out.glob("*.png")):
        record.png(path.name, path, 8)


def shipped_coding(record: Record) -> None:
    out, module = record.folder, coding_module()
    for name, kind in {"progressive": (), "lossless": ("--lossless",)}.items():
        arguments = [EMOJI64 / "dog-face-noto.png", out / "a.bin", "--caption", "dog face", "--steps", 20]
        cost = run_module(module, "encode", *arguments, *kind)
        record.printed(f"cost, {name}", cost)
        record.file(f"{name}.bin", out / "a.bin")
        run_module(module, "decode", out / "a.bin", out / "a.png")
        record.png(f"{name}.png", out / "a.png", 8)


# ------------------------------------------------------------ the recipes


def network(size: int, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"sample_size": size, "in_channels": 3, "out_channels": 3}
    config |= {"patch_size": 4, "layers_per_block": 1}
    config |= {"block_out_channels": [16, 32], "attention_head_dim": 4, "norm_num_groups": 8, "dropout": 0.1}
    config |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "cross_attention_dim": 16}
    return config | {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]} | changes


def python(folder: Path, module: str, *arguments: object) -> str:
    """`python -m MODULE ARGUMENTS` in a process of its own; what it printed."""
    caches = {"HF_DATASETS_CACHE": str(folder / "datasets")}
    call = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | caches)
    if done.returncode:
        raise RuntimeError(f"{module}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
    return done.stdout


def recipe(record: Record, module: str, name: str, *arguments: object, **settings: Any) -> Path:
    """Two steps of a recipe with these settings; the folder of what it saved, recorded weight by weight."""
    folder = record.folder / name
    folder.mkdir()
    out = folder / "run"
    shared = {"output_dir": str(out), "cache_dir": str(record.folder / "cache"), "max_train_steps": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(shared | settings))
    printed = python(record.folder, f"training.{module}", "--config", folder / "config.yaml", *arguments)
    record.printed(f"{name}, printed", printed)
    frozen = [out / "pipeline" / part for part in ("text_encoder", "vae")]
    configs = ("model_index.json", "config.json", "scheduler_config.json")
    for path in sorted(out.rglob("*")):
        title = f"{name}/{path.relative_to(out)}"
        if path.suffix == ".png":
            record.png(title, path)
        elif path.suffix == ".safetensors" and path.parent not in frozen:
            record.file(title, path)
        elif path.name in configs and out / "pipeline" in path.parents:
            record.file(title, path)
    return out


def save_clip(folder: Path) -> str:
    text_encoder().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


DENOISING = {
    "noise_scheduler": COSINE, "prediction_type": "v_prediction", "train_data_dir": str(EMOJI64),
    "train_batch_size": 4, "learning_rate": 1e-3, "lr_warmup_steps": 2, "report_to": "none",
}  # fmt: skip


def train_text_to_image(record: Record) -> None:
    """In pixels, on, with adapters, in latents; and what `training.export` makes of it."""
    start = DENOISING | {"text_encoder": save_clip(record.folder / "clip")}
    new = start | {"unet": network(64)}
    out = recipe(
        record, "text_to_image", "pixels", **new, gradient_accumulation_steps=2, random_flip=True,
        more_ema_decays=[0.3], validation_prompts=["red heart", "a rocket"], noise_offset=0.05, snr_floor=1.0,
    )  # fmt: skip
    saved = DENOISING | {"pretrained_model_name_or_path": str(out / "pipeline")}
    saved = {key: saved[key] for key in saved if key not in ("noise_scheduler", "prediction_type")}
    wider = {"self_conditioning": True, "detail_weight": 0.5, "optimizer": "muon"}
    recipe(record, "text_to_image", "widened", **saved, **wider)
    recipe(record, "text_to_image", "inpainting", **saved, inpainting=True, timestep_shift=2.0)
    lora = recipe(record, "text_to_image", "lora", **saved, rank=2, lora_alpha=4.0, train_text_encoder=True)
    pipe = quiet(TextToImagePipeline.from_pretrained(out / "pipeline"))
    pipe.load_lora_weights(lora / "pipeline" if (lora / "pipeline").is_dir() else lora)
    call = {"num_inference_steps": 3, "output_type": "np", "cross_attention_kwargs": {"scale": 50.0}}
    record.pictures("lora, drawn", pipe(PROMPT, generator=seeded(), **call).images)
    arguments = ["--config", out.parent / "config.yaml", "--checkpoint", out / "checkpoint-2"]
    for name, option in {"export": (), "export, 0.3": ("--ema", "0.3")}.items():
        python(record.folder, "training.export", *arguments, "--to", record.folder / name, *option)
        record.tree(name, record.folder / name)
    vae().save_pretrained(record.folder / "vae")
    latents = {"vae": str(record.folder / "vae"), "unet": network(32, in_channels=4, out_channels=4)}
    recipe(record, "text_to_image", "latents", **start | latents | {"prediction_type": "epsilon"})


def train_losses(record: Record) -> None:
    """Learned variances, self-conditioning from scratch, streaming, and the loss of twenty steps."""
    new = DENOISING | {"text_encoder": save_clip(record.folder / "clip"), "unet": network(64)}
    for loss in ("hybrid", "vlb"):
        schedule = {"beta_schedule": "linear", "variance_type": "learned_range", "num_train_timesteps": 100}
        changes = {"unet": network(64, out_channels=6), "noise_scheduler": schedule, "snr_gamma": None}
        recipe(record, "text_to_image", loss, **new | changes | {"prediction_type": "epsilon", "loss": loss})
    pooled = {"pooled_text_dim": 12, "pooled_text_time_embedding": True, "self_conditioning": True}
    guessing = {"unet": network(64, **pooled), "snr_gamma": None}
    recipe(record, "text_to_image", "self-conditioning", **new | guessing)
    shards = record.folder / "shards"
    shards.mkdir()
    rows = [json.loads(line) for line in (EMOJI64 / "metadata.jsonl").read_text("utf-8").splitlines()]
    for number in range(2):
        with tarfile.open(shards / f"{number:03}.tar", "w") as tar:
            for place, row in enumerate(rows[number::8]):
                text = record.folder / "caption.txt"
                text.write_text(row["text"])
                tar.add(EMOJI64 / row["file_name"], f"{place:03}.png")
                tar.add(text, f"{place:03}.txt")
    stream = {"train_data_dir": str(shards), "streaming": True, "shuffle_buffer": 5, "max_train_steps": 3}
    recipe(record, "text_to_image", "streaming", **new | stream)
    logged = {"report_to": "tensorboard", "max_train_steps": 20, "optimizer": "muon"}
    logged |= {"train_data_dir": None, "dataset_name": data_set(record.folder / "data")}
    out = recipe(record, "text_to_image", "twenty steps", **new | logged | {"prediction_type": "sample"})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(out.rglob("events.out.tfevents*")).parent))
    events.Reload()
    for tag in sorted(events.Tags()["scalars"]):
        record.numbers(f"logged {tag}", [event.value for event in events.Scalars(tag)])


def data_set(folder: Path) -> str:
    """The 64 pictures as `training.emoji` saves a data set, each with two captions."""
    rows = [json.loads(line) for line in (EMOJI64 / "metadata.jsonl").read_text("utf-8").splitlines()]
    columns: dict[str, Any] = {key: [row[key] for row in rows] for key in ("concept", "name", "style")}
    columns["caption"] = [[row["text"], row["name"]] for row in rows]
    columns["image"] = [{"bytes": (EMOJI64 / row["file_name"]).read_bytes(), "path": None} for row in rows]
    texts = dict.fromkeys(("concept", "name", "style"), datasets.Value("string"))
    kinds = texts | {"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    parts = {"train": data.select(range(48)), "validation": data.select(range(48, 64))}
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return str(folder)


def train_others(record: Record) -> None:
    """CLIP, plain and noised, the classifier, the autoencoder, the upsampler; and each exported."""
    home = record.folder
    pixel_pipeline(unet=unet(sample_size=64, patch_size=4)).save_pretrained(home / "model")
    shared = {"dataset": data_set(home / "data"), "train_batch_size": 8, "lr_warmup_steps": 1}
    clip = shared | {"vision_width": 16, "vision_layers": 1, "head_dim": 8, "patch_size": 16}
    text = {"text_width": 16, "text_layers": 1, "projection_dim": 16, "num_merges": 300}
    exported = {"clip": ("--clip", recipe(record, "clip", "clip", **clip, **text) / "clip")}
    noised = shared | {"pretrained_model_name_or_path": str(home / "model")}
    run = recipe(record, "clip", "noised clip", **clip | noised, noised=True)
    exported["noised clip"] = ("--folder", run / "noisy_clip")
    classes = {"label_column": "style", "block_out_channels": [8, 16], "shift": 2, "flip": True}
    runs = [recipe(record, "classifier", f"classifier {i}", **noised, **classes, seed=i) for i in range(2)]
    exported["classifier"] = ("--classifiers", *(run / "noisy_classifier" for run in runs))
    recipe(record, "classifier", "averaged", **noised, **classes, timestep_shift=0.5, ema_decay=0.9)
    images = {
        "dataset": str(EMOJI64),
        "resolution": 32,
        "block_out_channels": [16, 16],
        "train_batch_size": 4,
    }
    recipe(record, "autoencoder", "autoencoder", **images)
    exported["upsampler"] = ("--folder", upsampling(record) / "pipeline")
    for name, source in exported.items():
        python(home, "training.export", *source, "--to", home / f"export {name}")
        record.tree(f"export {name}", home / f"export {name}")


def upsampling(record: Record) -> Path:
    """Two steps of training.super_resolution on twelve random pictures, large and small."""
    kinds = {"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))}
    kinds |= {"hexcode": datasets.Value("string"), "style": datasets.Value("string")}
    for size in (64, 16):
        images = [picture(64, 64, i).reduce(64 // size) for i in range(12)]
        columns = {"image": images, "caption": [[f"box {i}"] for i in range(12)], "style": ["flat"] * 12}
        columns |= {"hexcode": [str(i) for i in range(12)]}
        data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        parts = {"train": data.select(range(8)), "validation": data.select(range(8, 12))}
        datasets.DatasetDict(parts).save_to_disk(str(record.folder / f"pictures{size}"))
    plain = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    plain |= {"mid_block_type": "UNetMidBlock2D", "class_embed_type": "timestep", "in_channels": 6}
    return recipe(
        record, "super_resolution", "super resolution", resolution=64, low_resolution=16, crop=32,
        dataset=str(record.folder / "pictures64"), low_dataset=str(record.folder / "pictures16"),
        unet=network(64, **plain), noise_scheduler=COSINE | {"prediction_type": "sample"},
        low_res_scheduler={"beta_schedule": "squaredcos_cap_v2"}, max_noise_level=50, train_batch_size=4,
        lr_warmup_steps=1,
    )  # fmt: skip


def likelihood(record: Record) -> None:
    """`training.evaluate bits-per-dim`: the terms of the bound."""
    small = unet(sample_size=64, patch_size=4, out_channels=6)
    small.conv_out.weight.data *= 0.1
    schedule = chain(prediction_type="epsilon", variance_type="learned_range")
    pixel_pipeline(unet=small, scheduler=schedule).save_pretrained(record.folder / "model")
    out = record.folder / "figures.json"
    python(
        record.folder, "training.evaluate", "bits-per-dim", "--model", record.folder / "model", "--json", out,
        "--dataset", EMOJI64, "--split", "train", "--num_pictures", 6, "--num_inference_steps", 8,
        "--cache_dir", record.folder / "cache",
    )  # fmt: skip
    numbers: list[float] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                collect(one)
        elif isinstance(value, int | float):
            numbers.append(float(value))

    collect(json.loads(out.read_text()))
    record.numbers("figures", numbers)


SECTIONS = [
    shipped_text_to_image, shipped_editing, shipped_command_line, shipped_coding, train_text_to_image,
    train_losses, train_others, likelihood,
]  # fmt: skip
FULL: dict[str, Section] = {section.__name__: section for section in SECTIONS}
