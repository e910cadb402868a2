"""Loading model folders: a `model_index.json`, local or on the Hub, read with our classes, not diffusers'.

What may be read is decided before anything is: safetensors only, nothing outside the folder, and no code
unless `trust_remote_code=True`.

Our components are found by name at run time and never imported here: this module is saved with a pipeline's
code, and in such a folder each component has a file of its own.
"""

import inspect
import os
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from diffusers.utils import logging
from packaging.version import Version
from safetensors import SafetensorError, safe_open

from .files import CARD, INDEX, PICKLES, read_json, read_text
from .hub import download

logger = logging.get_logger("diffusers.pipelines.pipeline_utils")  # the log that lists the other components

# the class that an index names -> the module and class that we load for it
OWN_CLASSES = {
    "UNet2DConditionModel": ("conditional_unet", "ConditionalUNet"),
    "ConditionalUNet": ("conditional_unet", "ConditionalUNet"),
    "DDPMScheduler": ("ddpm_scheduler", "DDPMScheduler"),
    "NoisyCLIP": ("noisy_clip", "NoisyCLIP"),
    "NoisyClassifier": ("noisy_classifier", "NoisyClassifier"),
    "GuidanceCLIP": ("guidance_clip", "GuidanceCLIP"),
}
READ = (".json", ".txt", ".model", ".jinja")  # besides weights: configs and vocabularies
# model.safetensors, model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json, and the older
# orders model-00001-of-00002.fp16.safetensors and model.safetensors.fp16.index.json
WEIGHTS = re.compile(
    r"(diffusion_pytorch_)?model(\.(?P<a>[^.]+?))?(-\d{5}-of-\d{5}(\.(?P<b>[^.]+))?)?\.safetensors"
    r"((\.(?P<c>[^.]+))?\.index(\.(?P<d>[^.]+))?\.json)?"
)


class LoadMixin:
    """`from_pretrained` of a pipeline: weights as safetensors, our components, none of the folder's code."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in diffusers, with our U-Net and scheduler wherever the folder names theirs or ours.

        Weights come from safetensors only, and as float32 unless `torch_dtype` says otherwise, whatever the
        precision on disk. A name that is not a folder is looked up on the Hub. This class and our components
        are used even if the folder has code for them; other custom code runs only with
        `trust_remote_code=True`. `device_map` may be a device. For a model that cannot or should not be
        loaded, it raises an OSError or ValueError that says what to do.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` must be True: other weights are pickles, which can run code.")
        if kwargs.get("device_map") == "balanced":
            raise ValueError(
                "`device_map` must be a device, got 'balanced': for a model that does not fit on one, load "
                "without and call `enable_model_cpu_offload()`."
            )
        name = str(pretrained_model_name_or_path)
        dtype = kwargs.pop("torch_dtype", None) or kwargs.get("dtype") or torch.float32
        kwargs |= {"use_safetensors": True, "dtype": dtype}
        folder = model_folder(name, kwargs, cls)
        own = load_own_components(folder, kwargs, dtype)
        pipeline = super().from_pretrained(str(folder), **(kwargs | own))  # type: ignore[misc]
        align_weights(pipeline)
        follow_stable_diffusion(folder, pipeline)
        pipeline.register_to_config(_name_or_path=name)
        pipeline._model_card = read_text(folder / CARD, "replace")  # for the card of what is saved from here
        pipeline._loaded_name = None if Path(name).is_dir() else name
        return pipeline

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in diffusers, without the code that the index names for this class and for our components."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        if isinstance(loaded, tuple):  # with return_unused_kwargs or return_commit_hash
            return (without_own_code(loaded[0], cls.__name__), *loaded[1:])
        return without_own_code(loaded, cls.__name__)

    def load_guides(self: Any, folder: str | os.PathLike) -> None:
        """Loads the guides, `noisy_clip` and `noisy_classifier`, from the subfolders of `folder` with these
        names, as components of this pipeline. Raises OSError if neither is there."""
        parts = {name: Path(folder) / name for name in ("noisy_clip", "noisy_classifier")}
        found = {name: part for name, part in parts.items() if part.is_dir()}
        if not found:
            raise OSError(f"{folder} has neither a folder noisy_clip nor one noisy_classifier")
        for name, part in found.items():
            guide: Any = own_class(read_config(part / "config.json").get("_class_name", ""))
            if guide is None:
                raise OSError(f"{part} holds no model that guides: its config.json names none")
            model = guide.from_pretrained(str(part), torch_dtype=self.dtype)
            self.register_modules(**{name: model.to(self.device)})


def own_class(class_name: str) -> type | None:
    """Our class for `class_name`; None if we have none, or if this package is not installed."""
    if class_name not in OWN_CLASSES:
        return None
    module, name = OWN_CLASSES[class_name]
    path = f"{__package__.rpartition('.')[0]}.components.{module}"
    try:
        return getattr(import_module(path), name)
    except ModuleNotFoundError as error:
        if error.name and path.startswith(error.name):
            return None
        raise


def without_own_code(index: dict[str, Any], pipeline_class: str) -> dict[str, Any]:
    """`index` with diffusers' base classes in place of our own classes.

    diffusers checks a component that it is given against the class in the index. If that were ours, it would
    fetch it from the folder's code.
    """
    index = dict(index)
    if isinstance(index.get("_class_name"), list):
        index["_class_name"] = pipeline_class
    for name, (_, class_name) in component_entries(index).items():
        if (cls := own_class(class_name)) is not None:
            base = "ModelMixin" if issubclass(cls, torch.nn.Module) else "SchedulerMixin"
            index[name] = ["diffusers", base]
    return index


def component_entries(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """component -> (library, class) of a model index. Raises OSError for a name that is not an identifier."""
    entries = {}
    for name, entry in index.items():
        pair = isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
        if pair and not name.startswith("_"):
            if not name.isidentifier():
                raise OSError(f"{INDEX} names a component {name!r}, which is no plain name; nothing was read")
            entries[name] = (entry[0], entry[1])
    return entries


# ---- which files are read ----


def model_folder(name: str, given: dict[str, Any], pipeline_class: type) -> Path:
    """The folder `name`, or the one to which the Hub's model of that name was downloaded, with all it needs.

    `given` are from_pretrained's keywords; components among them are neither checked nor downloaded.
    Raises OSError, or ValueError if no component has `variant`.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise OSError(f"{name} is no model folder: it has no {INDEX}.{_single_file_hint(folder)}")
        index = read_index(folder, pipeline_class, name)
        parts = [file for part in component_entries(index) for file in folder.glob(f"{part}/*")]
        inside = [folder / INDEX, *parts]
        files = choose_files([file.relative_to(folder).as_posix() for file in inside], index, given, name)
        check_links(folder, inside)
    else:

        def choose(folder: Path, names: list[str]) -> list[str]:
            return choose_files(names, read_index(folder, pipeline_class, name), given, name)

        folder, files = download(name, given, choose)
        index = read_config(folder / INDEX)
    check_contents(folder, files, component_entries(index))
    return folder


def read_index(folder: Path, pipeline_class: type, source: str) -> dict[str, Any]:
    """The folder's model index. Raises OSError for a pipeline with parts that `pipeline_class` lacks.

    Additional parts of Stable Diffusion folders are ignored, as in diffusers. But another kind of model would
    draw nothing, or noise, without its second text encoder, for example.
    """
    index = read_config(folder / INDEX)
    kind = index.get("_class_name")
    kind = kind[-1] if isinstance(kind, list) and kind else kind
    if not isinstance(kind, str):
        raise OSError(f"{INDEX} of {source} names no pipeline: it has no `_class_name`")
    accepted = inspect.signature(pipeline_class.__init__).parameters  # type: ignore[misc]
    strange = [name for name in component_entries(index) if name not in accepted]
    if strange and kind not in ("StableDiffusionPipeline", pipeline_class.__name__):
        raise OSError(
            f"{source} is a {kind}, with {' and '.join(strange)}, for which {pipeline_class.__name__} has no "
            "place: diffusers' DiffusionPipeline.from_pretrained loads it"
        )
    return index


def choose_files(
    names: Iterable[str], index: dict[str, Any], given: dict[str, Any], source: str
) -> list[str]:
    """Those of a model's file `names`, relative and with slashes, that loading reads.

    For each component that is not `given`, these are configs, vocabularies and the weights of `variant`, or
    the plain ones if it has none of that variant. Raises OSError for a name that leads out of the folder and
    for weights that are pickles only, and ValueError if no component has `variant`.
    """
    names, variant = list(names), given.get("variant")
    for name in names:
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise OSError(f"{source} has a file named {name!r}, which leads out of it; nothing was read")
    chosen, with_variant = [INDEX], False
    for component in component_entries(index):
        if component in given:
            continue
        inside = [name.split("/") for name in names if name.startswith(f"{component}/")]
        files = [path[1] for path in inside if len(path) == 2]
        if not files:  # the libraries would look for it beside the folder's index
            raise OSError(f"{source} has no folder {component}, which its {INDEX} names")
        variants: dict[str | None, list[str]] = {}
        for file in files:
            if match := WEIGHTS.fullmatch(file):
                variants.setdefault(next(filter(None, match.group(*"abcd")), None), []).append(file)
        with_variant |= variant in variants
        weights = variants.get(variant) or variants.get(None)
        pickles = [file for file in files if file.endswith(PICKLES)]
        if weights is None and variants:
            others = " or ".join(f"variant={kind!r}" for kind in variants)
            raise OSError(f"{source}: {component} has weights in another precision only; pass {others}")
        if weights is None and pickles:
            raise OSError(
                f"{source}: the weights of {component} are a pickle ({', '.join(pickles)}), which can run "
                "code when it is read; only safetensors are read. If you trust it, convert it: diffusers' "
                "DiffusionPipeline.from_pretrained(..., use_safetensors=False).save_pretrained(NEW_FOLDER)"
            )
        wanted = READ + ((".py",) if given.get("trust_remote_code") else ())
        rest = [file for file in files if file.endswith(wanted) and not WEIGHTS.fullmatch(file)]
        chosen += [f"{component}/{file}" for file in (weights or []) + rest]
    if variant is not None and not with_variant:
        asked = f"the model files of the `variant={variant}`"
        raise ValueError(f"You are trying to load {asked}, but {source} has none.")
    return chosen


def check_links(folder: Path, files: list[Path]) -> None:
    """Raises OSError for a symbolic link out of the folder. The Hub's cache links to blobs beside its
    snapshots, which is allowed."""
    root = folder.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise OSError(
                f"{file} is a link to {file.resolve()}, outside of the model folder: put a copy in its place "
                "or pass the component to from_pretrained"
            )


def check_contents(folder: Path, files: list[str], entries: dict[str, tuple[str, str]]) -> None:
    """Raises OSError for incomplete weights, for an index of shards that names anything but the folder's
    shards, and for a config that names another model or code: transformers' loaders would follow them."""
    for file in files:
        component, _, base = file.partition("/")
        place, kind = folder / file, entries[component][1] if component in entries else ""
        if base.endswith(".safetensors"):
            check_whole(place)
        elif base == "adapter_config.json":
            raise OSError(
                f"{place} says to load adapters, and {component} from where it names: take it away, and load "
                "the adapters with load_lora_weights"
            )
        elif ".safetensors" in base:
            shards = read_config(place).get("weight_map")
            if not isinstance(shards, dict):
                raise OSError(f"{place} must map names to shards in `weight_map`, got {shards!r:.50}")
            for shard in sorted(set(map(str, shards.values()))):
                if f"{component}/{shard}" not in files:
                    raise OSError(f"{place} names the shard {shard!r}, which is not one of that folder's")
        elif base.endswith(".json") and kind.startswith("Auto") and "auto_map" in read_config(place):
            raise OSError(
                f"{place} asks for code through {kind}, which is not run: load {component} yourself and pass "
                "it to from_pretrained"
            )
        if base == "config.json" and (kernels := " and ".join(kernels_of(read_config(place)))):
            raise OSError(
                f"{place} asks for attention code, {kernels}, which is not fetched: take "
                "`attn_implementation` out of it"
            )


def check_whole(file: Path) -> None:
    """Raises OSError if this is not a safetensors file or only the beginning of one; tensors are not read."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{file} is no safetensors file, or not the whole of one ({error}): fetch it again, with "
            "`git lfs pull` where git left a pointer to it"
        ) from error


def kernels_of(config: dict[str, Any]) -> list[str]:
    """The repositories whose attention code a transformers config, or one nested in it, asks for."""
    found = []
    for key, value in config.items():
        if key.endswith("attn_implementation") and "/" in str(value):
            found.append(str(value))
        elif isinstance(value, dict):
            found += kernels_of(value)
    return found


def _single_file_hint(folder: Path) -> str:
    single = [file.name for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", *PICKLES)]
    if not single:
        return ""
    convert = "" if single[0].endswith(".safetensors") else ", once converted to safetensors"
    return f" It has {single[0]}: diffusers' from_single_file reads such checkpoints{convert}."


# ---- components ----


def load_own_components(folder: Path, given: dict[str, Any], dtype: Any = torch.float32) -> dict[str, Any]:
    """Every component of `folder` that `OWN_CLASSES` covers and that is not in `given`, in our class.

    `given` are from_pretrained's keywords, of which `variant` and `device_map` are used here. `dtype` is one
    dtype for all, or diffusers' dict by component, with "default".
    """
    index = read_config(folder / INDEX)
    variant = given.get("variant")
    loaded = {}
    for name, (_, class_name) in component_entries(index).items():
        if name in given or (cls := own_class(class_name)) is None:
            continue
        options: dict[str, Any] = {}
        if issubclass(cls, torch.nn.Module):
            chosen = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
            options = {"torch_dtype": chosen or torch.float32, "use_safetensors": True}
            if variant is not None and any((folder / name).glob(f"*.{variant}*")):
                options["variant"] = variant
        loaded[name] = cls.from_pretrained(str(folder), subfolder=name, **options)  # type: ignore[attr-defined]
        if isinstance(loaded[name], torch.nn.Module) and given.get("device_map") is not None:
            loaded[name].to(given["device_map"])
        logger.info("Loaded %s as %s from `%s` subfolder of %s.", name, cls.__name__, name, folder)
    return loaded


def follow_stable_diffusion(folder: Path, pipeline: Any) -> None:
    """Give the parts of a Stable Diffusion folder the settings that StableDiffusionPipeline forces on them.

    Old folders have clip_sample = true, which would clip latents to [-1, 1], and steps_offset = 0. Folders
    saved by diffusers before 0.9 have sample_size = 32 for models of 64. diffusers overrules all three, even
    for parts passed to it, so without this pictures would differ from everybody else's. Upscaler folders are
    left as they are, as in diffusers.
    """
    saved_as = str(read_config(folder / INDEX).get("_class_name", ""))
    if not saved_as.startswith("StableDiffusion") or "Upscale" in saved_as:
        return
    if (scheduler := pipeline.scheduler) is not None:
        forced = {"clip_sample": False, "steps_offset": 1}
        scheduler.register_to_config(**{key: forced[key] for key in forced if key in scheduler.config})
    if (unet := pipeline.unet) is not None:
        size, saved_by = unet.config.sample_size, unet.config.get("_diffusers_version")
        old = saved_by is not None and Version(saved_by) < Version("0.9.0.dev0")
        if old and isinstance(size, int) and size < 64:
            unet.register_to_config(sample_size=64)


def align_weights(pipeline: Any) -> None:
    """Copy CPU weights that safetensors left at unaligned addresses in the mapped file to aligned memory.

    Rounding in matrix kernels depends on alignment: without this, a reloaded model's pictures differ in the
    seventh digit from those that it drew before it was saved.
    """
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            for tensor in (*component.parameters(), *component.buffers()):
                if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                    tensor.data = tensor.data.clone()


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError that names the file if it holds anything else."""
    try:
        content = read_json(path)
    except ValueError as error:
        raise OSError(str(error)) from error
    if not isinstance(content, dict):
        raise OSError(f"{path} must hold a JSON object, and holds {content!r:.50}")
    return content
