"""Model folders: reading a `model_index.json` with our classes in place of diffusers', and writing one.

The classes are found by name at run time and never imported here: a pipeline file that travels with a model
to the Hub brings this helper along, and there the components come as files of their own, or not at all.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

logger = logging.get_logger("diffusers.pipelines.pipeline_utils")  # whose log lists the other components

INDEX = "model_index.json"
_PACKAGE = ".".join(("pipelines", "components"))
# the class an index names -> the module and class that we load for it
OWN_CLASSES = {
    "UNet2DConditionModel": ("conditional_unet", "ConditionalUNet"),
    "ConditionalUNet": ("conditional_unet", "ConditionalUNet"),
    "DDPMScheduler": ("ddpm_scheduler", "DDPMScheduler"),
}


def own_class(class_name: str) -> type | None:
    """Our class for the one named `class_name`, or None when there is none, or no such package."""
    if class_name not in OWN_CLASSES:
        return None
    module, name = OWN_CLASSES[class_name]
    try:
        return getattr(import_module(f"{_PACKAGE}.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name in (_PACKAGE, f"{_PACKAGE}.{module}", _PACKAGE.split(".")[0]):
            return None
        raise


def local_folder(name_or_path: str, **options: Any) -> Path:
    """The folder, or where the Hub's model of that name was downloaded to: weights and configs, no code.

    `options` are huggingface_hub's: revision, token, cache_dir, local_files_only, force_download.
    Raises OSError when there is neither, or when a local folder has no model_index.json.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        from huggingface_hub import hf_hub_download, snapshot_download

        index = json.loads(Path(hf_hub_download(name_or_path, INDEX, **options)).read_text())
        components = [f"{name}/*" for name, entry in index.items() if isinstance(entry, list) and entry[0]]
        options["allow_patterns"] = [INDEX, *components]
        options["ignore_patterns"] = ["*.py", "*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.h5", "*.onnx*"]
        path = Path(snapshot_download(name_or_path, **options))
    if not (path / INDEX).is_file():
        raise OSError(f"{name_or_path} is no model folder: it has no {INDEX}")
    return path


def load_own_components(folder: Path, given: dict[str, Any], dtype: Any = torch.float32) -> dict[str, Any]:
    """Every component of `folder` that `OWN_CLASSES` covers and `given` has not, in our class.

    `given` are from_pretrained's keywords; of them `variant` and `use_safetensors` count here. `dtype` is one
    for all, or diffusers' dict by component, with "default". Raises ValueError when nothing has `variant`.
    """
    index = json.loads((folder / INDEX).read_text())
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    variant = given.get("variant")
    in_variant = [name for name in entries if any((folder / name).glob(f"*.{variant}*"))]
    if variant is not None and not in_variant:
        raise ValueError(
            f"You are trying to load the model files of the `variant={variant}`, but {folder} has none."
        )
    loaded = {}
    for name, (library, class_name) in entries.items():
        if name in given or (cls := own_class(class_name)) is None:
            continue
        if library.split(".")[-1] == OWN_CLASSES[class_name][0]:
            # diffusers checks a passed component against the module the index names, found among the imported
            sys.modules.setdefault(library, sys.modules[cls.__module__])
        options: dict[str, Any] = {}
        if issubclass(cls, torch.nn.Module):
            chosen = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
            options = {
                "torch_dtype": chosen or torch.float32,
                "use_safetensors": given.get("use_safetensors"),
            }
            if name in in_variant and variant is not None:
                options["variant"] = variant
        loaded[name] = cls.from_pretrained(folder, subfolder=name, **options)  # type: ignore[attr-defined]
        logger.info("Loaded %s as %s from `%s` subfolder of %s.", name, cls.__name__, name, folder)
    return loaded


def prepare_loading(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """(folder, keywords) for diffusers' own from_pretrained, our components among the keywords.

    Safetensors only, and float32 whatever the precision on disk, unless `kwargs` says otherwise.
    """
    kwargs = {"use_safetensors": True} | kwargs
    dtype = kwargs.pop("torch_dtype", None) or kwargs.get("dtype") or torch.float32
    options = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    download = {key: kwargs[key] for key in options if kwargs.get(key) is not None}
    folder = local_folder(str(name_or_path), **download)
    own = load_own_components(folder, kwargs, dtype)
    return folder, kwargs | own | {"dtype": dtype}


def follow_stable_diffusion(folder: Path, scheduler: Any) -> None:
    """Give the scheduler of a Stable Diffusion folder the settings StableDiffusionPipeline forces on it.

    Old folders say clip_sample = true, which would clip latents to [-1, 1], and steps_offset = 0; diffusers
    overrules both on loading, so pictures would differ from everybody else's without this.
    """
    if str(json.loads((folder / INDEX).read_text()).get("_class_name", "")).startswith("StableDiffusion"):
        forced = {"clip_sample": False, "steps_offset": 1}
        known = {key: value for key, value in forced.items() if key in scheduler.config}
        scheduler.register_to_config(**known)


def align_weights(pipeline: Any) -> None:
    """Copy weights that safetensors left at odd addresses in the mapped file to aligned memory, on the CPU.

    Matrix kernels round differently by alignment: without this, a reloaded model's pictures differ in the
    seventh digit from those it drew before it was saved.
    """
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            for tensor in (*component.parameters(), *component.buffers()):
                if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                    tensor.data = tensor.data.clone()


def finish_saved_folder(folder: Path) -> None:
    """Put right what `save_pretrained` wrote: our components' modules, and the text tower's dtype.

    transformers would load a tower saved in fp16 as fp16 beside a U-Net that diffusers loads as fp32, and the
    first call would fail; "dtype": "float32" makes it load as fp32 (weights on disk stay as they are).
    """
    index = json.loads((folder / INDEX).read_text())
    for name, entry in index.items():
        if isinstance(entry, list) and entry[1] in OWN_CLASSES and not entry[0].startswith("diffusers"):
            index[name] = [OWN_CLASSES[entry[1]][0], entry[1]]
    _write_json(folder / INDEX, index)
    tower = folder / "text_encoder" / "config.json"
    if tower.is_file():
        _write_json(tower, json.loads(tower.read_text()) | {"dtype": "float32"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
