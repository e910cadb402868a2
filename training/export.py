"""Turn a training run into a folder to ship: averaged weights, fp16 on disk, defaults and a model card.

    python -m training.export --config training/configs/emoji.yaml \\
        --checkpoint runs/emoji/checkpoint-9000 --to models/emoji
    python -m training.export --config training/configs/emoji_wide.yaml \\
        --unets runs/a/unet runs/b/unet --to models/emoji
    python -m training.export --clip runs/judge/clip --to models/judge
    python -m training.export --folder runs/upsampler/pipeline --to models/emoji-upsampler
    python -m training.export --classifiers runs/a/noisy_classifier runs/b/noisy_classifier \\
        --to models/style-classifier
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from pipelines import ConditionalUNet, NoisyClassifier, NoisyCLIP, SuperResolutionPipeline
from training.run.settings import parse_config, require
from training.text_to_image import TextToImageConfig, build_pipeline


@dataclass
class ExportConfig:
    """Settings of `training.export`."""

    to: str = field(metadata={"help": "Folder to write; replaced when it exists."})
    checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint-STEP folder of training.text_to_image."}
    )
    config: str | None = field(
        default=None, metadata={"help": "The YAML file of the run that wrote the checkpoint."}
    )
    ema: float | None = field(
        default=None, metadata={"help": "Decay of the average to take, one of more_ema_decays."}
    )
    unets: list[str] = field(
        default_factory=list,
        metadata={"help": "Or folders of U-Nets of one shape: the mean of their weights is taken."},
    )
    clip: str | None = field(default=None, metadata={"help": "Or a CLIP that training.clip saved."})
    folder: str | None = field(
        default=None,
        metadata={"help": "Or what training.super_resolution, .classifier or .clip --noised saved."},
    )
    classifiers: list[str] = field(
        default_factory=list,
        metadata={"help": "Or what training.classifier saved, of several seeds: one ensemble of them."},
    )
    guidance_scale: float = field(default=3.0, metadata={"help": "Guidance of a call that does not say."})
    clip_guidance_scale: float = field(
        default=0.0, metadata={"help": "The same by a noised CLIP, where the model is given one."}
    )
    num_inference_steps: int = field(default=25, metadata={"help": "Steps of a call that does not say."})
    card: str | None = field(
        default=None, metadata={"help": "Markdown file that becomes the folder's model card."}
    )


def export_pipeline(training: TextToImageConfig, config: ExportConfig, folder: Path) -> None:
    """The run's frozen parts with the U-Net of the checkpoint, its average where there is one; or with the
    mean of several."""
    pipe = build_pipeline(training)
    checkpoint = Path(config.checkpoint or "")
    weights = checkpoint / ("unet_ema" if (checkpoint / "unet_ema").is_dir() else "unet")
    if config.ema is not None:
        weights = checkpoint / f"unet_ema_{config.ema}"
        there = [path.name.removeprefix("unet_ema_") for path in sorted(checkpoint.glob("unet_ema_*"))]
        require(weights.is_dir(), "ema", config.ema, f"one that the checkpoint has, of {there}")
    pipe.unet = mean_unet(config.unets or [str(weights)])
    pipe.register_to_config(
        default_guidance_scale=config.guidance_scale,
        default_clip_guidance_scale=config.clip_guidance_scale,
        default_num_inference_steps=config.num_inference_steps,
    )
    pipe.to(torch.float16)
    pipe.save_pretrained(str(folder))
    drop_ema_keys(folder / "unet" / "config.json")
    drop_code(folder)


def mean_unet(folders: list[str]) -> ConditionalUNet:
    """One U-Net with the mean of the weights, good where all were trained on from one and the same ("soups",
    Wortsman 2022, https://arxiv.org/abs/2203.05482). Raises ValueError where they differ in shape."""
    mean = ConditionalUNet.from_pretrained(folders[0])
    own = mean.state_dict()
    for number, folder in enumerate(folders[1:], start=2):
        other = ConditionalUNet.from_pretrained(folder).state_dict()
        shapes, others = ({k: v.shape for k, v in state.items()} for state in (own, other))
        require(shapes == others, "unets", folder, f"of the shape of {folders[0]}")
        for name, weight in own.items():  # the running mean, in place
            weight += (other[name] - weight) / number
    return mean


def drop_code(folder: Path) -> None:
    """Leave out the copies of `pipelines/` that saving adds: in this repository they would only grow old.
    `save_pretrained` and `push_to_hub` of the shipped model write today's."""
    for path in folder.rglob("*.py"):
        path.unlink()
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = index["_class_name"][1]  # without the file of it
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def compact_tokenizers(folder: Path) -> None:
    """The same tokenizer.json without indents: more than half of it is spaces."""
    for path in folder.rglob("tokenizer.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(settings, ensure_ascii=False, separators=(",", ":"))
        path.write_text(text + "\n", encoding="utf-8")


def drop_ema_keys(path: Path) -> None:
    """EMAModel keeps its own state in the config of what it saves; the shipped config is the U-Net's."""
    state = {
        "decay",
        "min_decay",
        "optimization_step",
        "update_after_step",
        "use_ema_warmup",
        "inv_gamma",
        "power",
    }
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in state and key != "_name_or_path"}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def export_clip(source: str, folder: Path) -> None:
    """The whole CLIP in fp16; it loads as float32."""
    CLIPModel.from_pretrained(source).save_pretrained(str(folder))
    CLIPTokenizer.from_pretrained(source).save_pretrained(str(folder))
    path = folder / "model.safetensors"
    save_file(
        {name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"}
    )


def export_folder(source: Path, folder: Path) -> None:
    """An upsampler's pipeline, or a model that guides, as its training saved it."""
    kinds = {cls.__name__: cls for cls in (SuperResolutionPipeline, NoisyClassifier, NoisyCLIP)}
    index, config = source / "model_index.json", source / "config.json"
    rule = "one with a model_index.json or config.json"
    require(index.is_file() or config.is_file(), "folder", str(source), rule)
    settings = json.loads((index if index.is_file() else config).read_text(encoding="utf-8"))
    kind = settings["_class_name"][1] if index.is_file() else settings["_class_name"]
    require(kind in kinds, "folder", str(source), f"one of {sorted(kinds)}, and it is {kind}")
    kinds[kind].from_pretrained(str(source)).to(torch.float16).save_pretrained(str(folder))
    drop_ema_keys(folder / ("unet/config.json" if index.is_file() else "config.json"))
    if index.is_file():
        drop_code(folder)


def export_ensemble(sources: list[str], folder: Path) -> None:
    """One NoisyClassifier of several that differ in their weights alone, in fp16.

    Raises ValueError where one is of another configuration."""
    members = [NoisyClassifier.from_pretrained(source) for source in sources]
    own, *others = ({k: v for k, v in member.config.items() if k[0] != "_"} for member in members)
    for source, other in zip(sources[1:], others, strict=True):
        require(other == own, "classifiers", source, f"of the configuration of {sources[0]}")
    require(own["ensemble"] == 1, "classifiers", sources[0], "a single network, no ensemble")
    joined = NoisyClassifier(**{**own, "ensemble": len(members)})
    joined.load_state_dict(members[0].state_dict(), strict=False)
    for place, member in zip(joined.others, members[1:], strict=True):
        place.load_state_dict(member.state_dict())
    joined.to(torch.float16).save_pretrained(str(folder))


def main() -> None:
    config = parse_config(ExportConfig)
    target = Path(config.to)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        sources = {name: getattr(config, name) for name in ("checkpoint", "clip", "folder")}
        given = [(name, source) for name, source in sources.items() if source]
        several = [(name, source) for name in ("unets", "classifiers") for source in getattr(config, name)]
        kinds = len(given) + bool(config.unets) + bool(config.classifiers)
        rule = "given, or unets, classifiers, clip or folder instead"
        require(kinds == 1, "checkpoint", config.checkpoint, rule)
        for name, source in [*given, *several]:
            require(Path(source).is_dir(), name, source, "a folder")
        if config.clip:
            export_clip(config.clip, partial)
        elif config.folder:
            export_folder(Path(config.folder), partial)
        elif config.classifiers:
            export_ensemble(config.classifiers, partial)
        else:
            run = config.config or ""
            require(bool(run), "config", None, "the YAML file of the run that wrote the checkpoint")
            export_pipeline(parse_config(TextToImageConfig, ["--config", run]), config, partial)
    except ValueError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SystemExit(f"training.export: {error}") from error
    compact_tokenizers(partial)
    if config.card:
        shutil.copy(config.card, partial / "README.md")
    for kept in (target / name for name in ("README.md", "samples.png")):  # a card and its picture
        if kept.is_file() and not (config.card and kept.name == "README.md"):
            shutil.copy(kept, partial / kept.name)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    size = sum(f.stat().st_size for f in target.rglob("*.safetensors")) / 2**20
    print(f"{target}: {size:.1f} MB of weights")


if __name__ == "__main__":
    main()
