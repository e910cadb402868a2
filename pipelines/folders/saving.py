"""Saving model folders, complete, so that they load by name on a machine without this package.

A folder holds weights in safetensors, configs, a model card and, unless diffusers' own classes can read it,
our code (see `travel`). `model_index.json` names the classes where diffusers looks for them.

Files are first written into a temporary folder and then renamed into place, so that no existing file is ever
half overwritten, not even the file from which the weights being saved are mapped.
"""

import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

from .files import CARD, INDEX, read_json, read_text, write_file, write_json
from .hub import create_repository, fetch_card, upload
from .travel import CODE, LIBRARIES, code_files, source_file

logger = logging.get_logger(__name__)

# our class -> diffusers' class, which reads the same folder if none of our own features is on
DIFFUSERS_CLASSES = {
    "TextToImagePipeline": "StableDiffusionPipeline",
    "ConditionalUNet": "UNet2DConditionModel",
    "DDPMScheduler": "DDPMScheduler",
}
MACHINE_KEYS = ("_name_or_path", "name_or_path", "special_tokens_map_file")  # paths of the saving machine
# class -> what transformers before version 5 puts before the names of its weights, and where
OLDER_PREFIX = {
    "CLIPTextModel": ("text_model.", r"^(?!text_model\.)"),
    "StableDiffusionSafetyChecker": ("vision_model.", r"^(?=vision_model\.(?!vision_model\.))"),
}


Card = dict[str, Any] | str | os.PathLike | None  # front matter, or the file of a whole card


class SaveMixin:
    """`save_pretrained`, `save_config` and `push_to_hub` of a pipeline."""

    components: dict[str, Any]
    make_card: Callable[..., str]  # of `ModelCardMixin`

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, variant: str | None = None,
        max_shard_size: int | str | None = None, push_to_hub: bool = False,
        diffusers_format: bool | None = None, model_card: Card = None, repo_id: str | None = None,
        commit_message: str | None = None, private: bool | None = None, token: str | bool | None = None,
        create_pr: bool = False,
    ) -> None:  # fmt: skip
        """As in diffusers, always in safetensors, with everything that the folder needs to load elsewhere.

        Args:
            variant: becomes part of the weights' file names, so that they can lie beside other variants. The
                weights keep their precision: for "fp16" call `to(torch.float16)` first.
            diffusers_format: True writes diffusers' class names, so that StableDiffusionPipeline and
                DiffusionPipeline load the folder without our code; a ValueError names any features that
                prevent it. False writes our class names and code. None means True if possible, else False.
            model_card: front matter (license, base_model, datasets, widget, eval_results and whatever else
                huggingface_hub's ModelCardData takes), or a Markdown file to use as the whole card. An
                existing card keeps its text, and all front matter that this does not name.
            push_to_hub: upload the folder too, to `repo_id` or else the folder's name; see `push_to_hub`.
        """
        folder = Path(save_directory)
        name = folder.resolve().name.removesuffix(".partial")  # recipes drop that when all is written
        settings = safe_serialization, variant, max_shard_size, diffusers_format, model_card
        self._save(
            folder, name, repo_id or name if push_to_hub else None, None, *settings,
            commit_message, private, token, create_pr,
        )  # fmt: skip

    def push_to_hub(
        self, repo_id: str, commit_message: str | None = None, private: bool | None = None,
        token: str | bool | None = None, create_pr: bool = False, safe_serialization: bool = True,
        variant: str | None = None, subfolder: str | None = None, max_shard_size: int | str | None = None,
        diffusers_format: bool | None = None, model_card: Card = None,
    ) -> Any:  # fmt: skip
        """As in diffusers, for what `save_pretrained` would write. Returns huggingface_hub's CommitInfo.

        Everything is one commit: an interrupted upload leaves the repository unchanged. An existing card is
        kept, as by `save_pretrained`. Raises OSError if the Hub refuses or does not answer.
        """
        with tempfile.TemporaryDirectory() as temporary:
            settings = safe_serialization, variant, max_shard_size, diffusers_format, model_card
            hub = commit_message, private, token, create_pr
            return self._save(Path(temporary), repo_id, repo_id, subfolder, *settings, *hub)

    def save_config(self, save_directory: str | os.PathLike) -> None:
        """Writes model_index.json and the code of the classes that it names; to upload, use `push_to_hub`."""
        super().save_config(str(save_directory))  # type: ignore[misc]
        write_code(self, Path(save_directory))

    def _save(
        self, folder: Path, name: str, repo_id: str | None, subfolder: str | None, safe_serialization: bool,
        variant: str | None, max_shard_size: int | str | None, diffusers_format: bool | None,
        model_card: Card, commit_message: str | None, private: bool | None, token: str | bool | None,
        create_pr: bool,
    ) -> Any:  # fmt: skip
        """Writes the folder and, unless `repo_id` is None, uploads it; the card calls the model `name`."""
        in_diffusers_format = check_saving(
            self, folder, safe_serialization, variant, diffusers_format, model_card
        )
        card = read_text(folder / CARD)
        if repo_id is not None:
            name = create_repository(repo_id, private, token)
            if card is None and not subfolder:
                card = fetch_card(name, token)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            staging = Path(temporary)
            options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            super().save_pretrained(str(staging), variant=variant, **options)  # type: ignore[misc]
            if in_diffusers_format:
                name_diffusers_classes(self, staging)
            for component in self.components:
                finish_component(staging / component)
            clean_config(staging / INDEX)
            text = self.make_card(name, not in_diffusers_format, card, model_card)
            if text != read_text(folder / CARD):  # else it stays as it is, byte for byte
                (staging / CARD).write_bytes(text.encode("utf-8", "surrogateescape"))
            move_into(staging, folder, variant)
        if repo_id is None:
            return None
        message = commit_message or f"Upload {type(self).__name__}"
        stale = [pattern for part in self.components for pattern in weight_patterns(part, variant)]
        return upload(folder, name, token, message, stale, create_pr, subfolder)


# ---- what is checked before any work ----


def check_saving(
    pipeline: Any, folder: Path, safe_serialization: bool, variant: str | None,
    diffusers_format: bool | None, card: Card,
) -> bool:  # fmt: skip
    """Whether the folder gets diffusers' class names. Raises ValueError for anything that cannot be saved."""
    if not safe_serialization:
        logger.warning("safe_serialization=False is ignored: weights are saved as safetensors only.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`save_directory` must be a folder, and {folder} is a file")
    file = isinstance(card, (str, os.PathLike)) and Path(card).is_file()
    if not (card is None or isinstance(card, dict) or file):
        raise ValueError(f"`model_card` must be a dict of front matter or a Markdown file, got {card!r}")
    pipeline.make_card(folder.name, has_code=True, given=card)  # raises if it cannot be a card
    for name, component in modules_of(pipeline).items():
        if any(".lora_A." in key for key in component.state_dict()):
            raise ValueError(
                f"{name} has LoRA adapters loaded. Call fuse_lora() and then unload_lora_weights() to save "
                "it with them merged in, unload_lora_weights() to save it without"
            )
        precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(variant or "")
        if precision is not None and component.dtype != precision:
            logger.warning(
                "variant=%r only names the files: %s is in %s, and stays so.", variant, name, component.dtype
            )
    found = [] if diffusers_format is False else obstacles(pipeline)
    if diffusers_format and found:
        raise ValueError(f"`diffusers_format=True` is not possible with {'; '.join(found)}")
    return diffusers_format is not False and not found


def modules_of(pipeline: Any) -> dict[str, Any]:
    """component -> its torch module, without the wrapper of torch.compile."""
    components = {name: getattr(part, "_orig_mod", part) for name, part in pipeline.components.items()}
    return {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}


def obstacles(pipeline: Any) -> list[str]:
    """What keeps diffusers' own classes from reading this pipeline's folder and drawing the same pictures."""
    found: list[str] = []
    if type(pipeline).__name__ not in DIFFUSERS_CLASSES:
        return [f"{type(pipeline).__name__}, a pipeline that diffusers does not have"]
    if pipeline.unet is None or pipeline.scheduler is None:
        return ["no unet or no scheduler"]
    for name, part in (pipeline.components | modules_of(pipeline)).items():
        ours = type(part)
        if part is None or ours.__module__.split(".")[0] in LIBRARIES:
            continue
        if ours.__name__ not in DIFFUSERS_CLASSES:
            found.append(f"{name} of class {ours.__name__}, which diffusers does not have")
            continue
        given = {key: part.config[key] for key, off in own_keys(ours).items() if part.config[key] != off}
        found += [f"{name}.{key}={value!r}" for key, value in given.items()]
    vae, unet, scheduler = pipeline.vae, pipeline.unet.config, pipeline.scheduler.config
    if vae is None:
        found.append("vae=None (it draws pixels)")
    elif type(vae).__name__ not in ("AutoencoderKL", "AutoencoderTiny") or vae.config.get("shift_factor"):
        found.append(f"a vae of class {type(vae).__name__}, shift_factor={vae.config.get('shift_factor')}")
    if unet.out_channels != unet.in_channels:
        channels = f"unet.out_channels={unet.out_channels} for {unet.in_channels} channels"
        found.append(f"{channels} (a learned variance)")
    tokenizer, tower = pipeline.tokenizer, pipeline.text_encoder
    if None not in (tokenizer, tower) and tokenizer.model_max_length > tower.config.max_position_embeddings:
        found.append(f"tokenizer.model_max_length={tokenizer.model_max_length}, more than the tower takes")
    # StableDiffusionPipeline turns clip_sample off and sets steps_offset = 1 when it loads a scheduler
    if scheduler.get("clip_sample"):
        found.append("scheduler.clip_sample=True")
    if scheduler.get("timestep_spacing", "leading") == "leading" and scheduler.get("steps_offset", 1) != 1:
        found.append(f"scheduler.steps_offset={scheduler['steps_offset']}")
    # cases in which diffusers' class of that name is wrong; see our class
    ours = type(pipeline.scheduler)
    if ours.__name__ == "DDPMScheduler" and ours.__module__.split(".")[0] not in LIBRARIES:
        if scheduler.variance_type not in (None, "fixed_small", "fixed_small_log"):
            found.append(f"scheduler.variance_type={scheduler.variance_type!r}")
        if scheduler.rescale_betas_zero_snr and scheduler.prediction_type == "epsilon":
            found.append("scheduler.rescale_betas_zero_snr=True with epsilon")
    return found


def own_keys(cls: type) -> dict[str, Any]:
    """Config keys of our class that diffusers' lacks -> their defaults, which turn the feature off."""
    theirs = inspect.signature(getattr(diffusers, DIFFUSERS_CLASSES[cls.__name__]).__init__).parameters
    ours = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {key: parameter.default for key, parameter in ours.items() if key not in theirs}


# ---- code and class names ----


def write_code(pipeline: Any, folder: Path) -> None:
    """Write the code of all classes that are not in the libraries, and name it in the model index."""
    index = read_json(folder / INDEX)
    components: dict[str, Path] = {}
    for name, part in (pipeline.components | modules_of(pipeline)).items():
        if (source := source_file(type(part))) is not None:
            index[name] = [source.stem, type(part).__name__]
            components[name] = source
        elif type(part).__module__.split(".")[0] not in (*LIBRARIES, "builtins"):
            logger.warning(
                "The code of %s is not in a file of its own; load it with that class imported.", name
            )
    if (code := source_file(type(pipeline))) is not None:
        index["_class_name"] = [Path(CODE).stem, type(pipeline).__name__]
    for place, text in code_files(code, components).items():
        write_file(folder / place, text)
    write_json(folder / INDEX, index, sort_keys=True)


def name_diffusers_classes(pipeline: Any, folder: Path) -> None:
    """Turn our freshly written folder into diffusers': with its class names, without our code and keys."""
    for code in (*folder.glob("*.py"), *folder.glob("*/*.py")):
        code.unlink()
    index = read_json(folder / INDEX)
    index["_class_name"] = DIFFUSERS_CLASSES[type(pipeline).__name__]
    for key, default in own_keys(type(pipeline)).items():
        if index.get(key) in (default, [None, None]):
            del index[key]  # diffusers warns of keys that it does not know
    for name, part in (pipeline.components | modules_of(pipeline)).items():
        ours = type(part)
        if ours.__name__ in DIFFUSERS_CLASSES:
            index[name] = ["diffusers", DIFFUSERS_CLASSES[ours.__name__]]
            for path in folder.glob(f"{name}/*config.json"):
                config = {key: value for key, value in read_json(path).items() if key not in own_keys(ours)}
                config["_class_name"] = DIFFUSERS_CLASSES[ours.__name__]
                if "steps_offset" in config:  # see `obstacles`; another value makes diffusers warn
                    config["steps_offset"] = 1
                write_json(path, config, sort_keys=True)
    if type(pipeline.text_encoder).__name__ == "CLIPTextModelWithProjection":
        index["text_encoder"] = ["transformers", "CLIPTextModel"]  # only features of ours read the projection
    write_json(folder / INDEX, index, sort_keys=True)


# ---- the components' files ----


def finish_component(folder: Path) -> None:
    """Correct what the libraries wrote (see `clean_config`), and add what transformers before 5 reads.

    That is: weights' names get the prefixes of `OLDER_PREFIX`, which version 5 accepts as well, and a
    tokenizer gets vocab.json and merges.txt.
    """
    for path in folder.glob("*config.json"):
        clean_config(path)
    config = folder / "config.json"
    architectures = read_json(config).get("architectures") or [] if config.is_file() else []
    for prefix, place in (OLDER_PREFIX[name] for name in architectures if name in OLDER_PREFIX):
        for path in folder.glob("*.safetensors"):
            renamed = {re.sub(place, prefix, key): tensor for key, tensor in load_file(path).items()}
            save_file(renamed, path, metadata={"format": "pt"})
        for path in folder.glob("*.safetensors.index*.json"):
            index = read_json(path)
            places = index["weight_map"].items()
            index["weight_map"] = {re.sub(place, prefix, key): file for key, file in places}
            write_json(path, index, sort_keys=True)
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json(folder / "tokenizer.json")
        model, vocabulary = tokenizer["model"], tokenizer["model"].get("vocab")
        if model.get("type") == "BPE" and not (folder / "vocab.json").exists():
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            write_file(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
            write_file(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
            added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
            if added := {content: number for content, number in added.items() if content not in vocabulary}:
                write_file(folder / "added_tokens.json", json.dumps(added, ensure_ascii=False))


def clean_config(path: Path) -> None:
    """Take this machine's paths out of a config, and have transformers load float32 whatever is on disk.

    Otherwise a tower saved in fp16 would load as fp16 beside a U-Net that diffusers loads as float32, and the
    first call would fail.
    """
    config = {key: value for key, value in read_json(path).items() if key not in MACHINE_KEYS}
    dtype = {"dtype": "float32"} if "transformers_version" in config else {}
    write_json(path, config | dtype, sort_keys=True)


def move_into(staging: Path, folder: Path, variant: str | None) -> None:
    """Rename each file into place, the model index last. Then delete weights of an earlier save that are not
    among the new ones, because a left-over index of shards would take precedence over a new single file."""
    files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: str(file) == INDEX):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / file, folder / file)
    for component in {file.parts[0] for file in files if len(file.parts) > 1}:
        for pattern in weight_patterns(component, variant):
            for path in folder.glob(pattern):
                if path.relative_to(folder) not in files:
                    path.unlink()


def weight_patterns(component: str, variant: str | None) -> list[str]:
    """Glob patterns for all files that may hold a component's weights."""
    kind = "" if variant is None else f".{variant}"
    ends = f"{kind}.safetensors", f"{kind}-?????-of-?????.safetensors", f".safetensors.index{kind}.json"
    stems = ("model", "diffusion_pytorch_model")
    return [f"{component}/{stem}{end}" for stem in stems for end in ends]
