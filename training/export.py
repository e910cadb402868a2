"""Turn a training run into a folder to ship: averaged weights in fp16, defaults and a model card.

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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from pipelines import ConditionalUNet, NoisyClassifier, NoisyCLIP, SuperResolutionPipeline
from pipelines.folders.files import read_json, write_file, write_json, written_aside
from training.run.building import build_pipeline
from training.run.settings import Settings, parse_config, require, setting
from training.text_to_image import TextToImageConfig


class ExportConfig(Settings):
    """Settings of `training.export`."""

    to: str = setting("Folder to write; replaced if it exists.")
    checkpoint: str | None = setting("A checkpoint-STEP folder of training.text_to_image.", None)
    config: str | None = setting("The YAML file of the run that wrote the checkpoint.", None)
    ema: float | None = setting("Decay of the average to take, one of more_ema_decays.", None)
    unets: list[str] = setting("Or folders of U-Nets of one shape: the mean of their weights is taken.", [])
    clip: str | None = setting("Or a CLIP that training.clip saved.", None)
    folder: str | None = setting(
        "Or a folder that training.super_resolution, .classifier or .clip --noised saved.", None
    )
    classifiers: list[str] = setting(
        "Or classifiers of several seeds that training.classifier saved, to join in one ensemble.", []
    )
    guidance_scale: float = setting("Default guidance scale of calls.", 3.0)
    clip_guidance_scale: float = setting(
        "Default scale of guidance by the noised CLIP, if the model has one.", 0.0
    )
    num_inference_steps: int = setting("Default number of steps of calls.", 25)
    card: str | None = setting("Markdown file that becomes the folder's model card.", None)

    def check(self) -> None:
        """Raise a ValueError unless exactly one source is given and it exists."""
        super().check()
        sources = ("checkpoint", "clip", "folder", "unets", "classifiers")
        given = {name: getattr(self, name) for name in sources if getattr(self, name)}
        rule = "given, or unets, classifiers, clip or folder instead"
        require(len(given) == 1, "checkpoint", self.checkpoint, rule)
        for name, value in given.items():
            for source in [value] if isinstance(value, str) else value:
                require(Path(source).is_dir(), name, source, "a folder")


def export_pipeline(training: TextToImageConfig, config: ExportConfig, folder: Path) -> None:
    """Save a pipeline of the run's frozen parts and a U-Net, in fp16 and with the default settings of calls.

    The U-Net is the mean of `unets` or the checkpoint's: the average with decay `ema` if that is given,
    otherwise the main average if there is one, otherwise the trained weights.
    """
    pipe = build_pipeline(training)
    checkpoint = Path(config.checkpoint or "")
    weights = checkpoint / ("unet_ema" if (checkpoint / "unet_ema").is_dir() else "unet")
    if config.ema is not None:
        weights = checkpoint / f"unet_ema_{config.ema}"
        there = [path.name.removeprefix("unet_ema_") for path in sorted(checkpoint.glob("unet_ema_*"))]
        require(weights.is_dir(), "ema", config.ema, f"one that the checkpoint has, of {there}")
    pipe.unet = mean_unet(config.unets or [str(weights)])
    own = ("guidance_scale", "clip_guidance_scale", "num_inference_steps")
    pipe.register_to_config(**{f"default_{name}": getattr(config, name) for name in own})
    pipe.to(torch.float16)
    pipe.save_pretrained(str(folder))
    drop_ema_keys(folder / "unet" / "config.json")
    drop_code(folder)


def mean_unet(folders: list[str]) -> ConditionalUNet:
    """One U-Net with the mean of the weights, which works well if all were fine-tuned from the same model
    ("model soups", Wortsman 2022, https://arxiv.org/abs/2203.05482). Raises ValueError if their shapes
    differ."""
    mean = ConditionalUNet.from_pretrained(folders[0])
    own = mean.state_dict()
    for number, folder in enumerate(folders[1:], start=2):
        other = ConditionalUNet.from_pretrained(folder).state_dict()
        shapes, others = ({k: v.shape for k, v in state.items()} for state in (own, other))
        require(shapes == others, "unets", folder, f"of the shape of {folders[0]}")
        for name, weight in own.items():  # the running mean, in place
            weight += (other[name] - weight) / number
    return mean


def class_name(settings: dict[str, Any]) -> str:
    """The class name in a saved config, without the file that defines the class if its code is saved with the
    weights."""
    name = settings["_class_name"]
    return name if isinstance(name, str) else name[1]


def drop_code(folder: Path) -> None:
    """Remove the copies of `pipelines/` that saving adds: in this repository they would only become outdated.
    `save_pretrained` and `push_to_hub` of the shipped model write current ones."""
    for path in folder.rglob("*.py"):
        path.unlink()
    index = read_json(folder / "model_index.json")
    index["_class_name"] = class_name(index)
    write_json(folder / "model_index.json", index)


def compact_tokenizers(folder: Path) -> None:
    """Rewrite each tokenizer.json without indentation, which is more than half of the file."""
    for path in folder.rglob("tokenizer.json"):
        text = json.dumps(read_json(path), ensure_ascii=False, separators=(",", ":"))
        write_file(path, text + "\n")


EMA_KEYS = {
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power",
}  # fmt: skip


def drop_ema_keys(path: Path) -> None:
    """Remove EMAModel's state from a saved config, so that the shipped config is the model's alone."""
    left_out = EMA_KEYS | {"_name_or_path"}
    write_json(path, {key: value for key, value in read_json(path).items() if key not in left_out})


def export_clip(source: str, folder: Path) -> None:
    """Save the whole CLIP in fp16; it loads as float32."""
    CLIPModel.from_pretrained(source).save_pretrained(str(folder))
    CLIPTokenizer.from_pretrained(source).save_pretrained(str(folder))
    path = folder / "model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(halves, path, metadata={"format": "pt"})


def export_folder(source: Path, folder: Path) -> None:
    """Save an upsampler's pipeline or a guide, as its training saved it, in fp16."""
    kinds = {cls.__name__: cls for cls in (SuperResolutionPipeline, NoisyClassifier, NoisyCLIP)}
    index, config = source / "model_index.json", source / "config.json"
    rule = "one with a model_index.json or config.json"
    require(index.is_file() or config.is_file(), "folder", str(source), rule)
    settings = read_json(index if index.is_file() else config)
    kind = class_name(settings)
    require(kind in kinds, "folder", str(source), f"one of {sorted(kinds)}, and it is {kind}")
    kinds[kind].from_pretrained(str(source)).to(torch.float16).save_pretrained(str(folder))
    drop_ema_keys(folder / ("unet/config.json" if index.is_file() else "config.json"))
    if index.is_file():
        drop_code(folder)


def export_ensemble(sources: list[str], folder: Path) -> None:
    """Join several NoisyClassifiers that differ only in their weights into one ensemble, in fp16.

    Raises ValueError if their configurations differ or the first is already an ensemble."""
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


def write_export(config: ExportConfig, folder: Path) -> None:
    if config.clip:
        export_clip(config.clip, folder)
    elif config.folder:
        export_folder(Path(config.folder), folder)
    elif config.classifiers:
        export_ensemble(config.classifiers, folder)
    else:
        require(bool(config.config), "config", None, "the YAML file of the run that wrote the checkpoint")
        training = parse_config(TextToImageConfig, ["--config", config.config or ""])
        export_pipeline(training, config, folder)
    compact_tokenizers(folder)


def main() -> None:
    config = parse_config(ExportConfig)
    target = Path(config.to)
    try:
        config.check()
        with written_aside(target) as partial:
            write_export(config, partial)
            if config.card:
                shutil.copy(config.card, partial / "README.md")
            for kept in (target / name for name in ("README.md", "samples.png")):  # the card and its picture
                if kept.is_file() and not (config.card and kept.name == "README.md"):
                    shutil.copy(kept, partial / kept.name)
    except ValueError as error:
        raise SystemExit(f"training.export: {error}") from error
    size = sum(f.stat().st_size for f in target.rglob("*.safetensors")) / 2**20
    print(f"{target}: {size:.1f} MB of weights")


if __name__ == "__main__":
    main()
