"""From diffusers' pipelines and files to our classes, with the same weights."""

import contextlib
import inspect
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError

from .adapters import safetensors_only
from .loading import align_weights, own_class

LINKS = ("https://", "http://", "huggingface.co/", "hf.co/")


@contextlib.contextmanager
def without_false_alarms() -> Iterator[None]:
    """Hides diffusers' warning about modules that a cast should leave in float32 when it lists none, []."""
    logger = logging.getLogger("diffusers.models.modeling_utils")

    def lists_some(record: logging.LogRecord) -> bool:
        return "in float32: []" not in record.getMessage()

    logger.addFilter(lists_some)
    try:
        yield
    finally:
        logger.removeFilter(lists_some)


class ConversionMixin:
    """`from_pipe` and `from_single_file` of a pipeline."""

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As in diffusers, with our U-Net and scheduler instead of theirs; weights are shared, not copied.

        In the other direction, pass our U-Net by name:
        `StableDiffusionPipeline.from_pipe(ours, unet=ours.unet)`. Weights keep their precision unless
        `torch_dtype` is given, because a cast, diffusers' default, would also change the given pipeline.
        """
        if "torch_dtype" not in kwargs and "dtype" not in kwargs:
            kwargs["dtype"] = pipeline.dtype
        parameters = inspect.signature(cls.__init__).parameters
        for name in parameters.keys() & pipeline.components.keys():
            component = kwargs.get(name, pipeline.components[name])
            own = own_class(type(component).__name__)
            # passed by name: diffusers otherwise leaves out components that are not of the annotated class
            kwargs[name] = component if own is None else rebuild(component, own)
        with without_false_alarms():
            return super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Reads a Stable Diffusion 1.x or 2.x .safetensors file in its original layout; diffusers' arguments.

        `config`, a model folder or its name on the Hub, provides what the file lacks: widths, tokenizer and
        scheduler. Without it diffusers guesses a name and downloads it. The weights become float32 unless
        `torch_dtype` says otherwise. Raises ValueError for a pickle, and OSError if the file or its configs
        cannot be found.
        """
        source = str(pretrained_model_link_or_path)
        safetensors_only(source, {})
        ours = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith("default_")}
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or torch.float32
        theirs = read_single_file(StableDiffusionPipeline, source, torch_dtype=dtype, **kwargs)
        pipeline = cls.from_pipe(theirs, torch_dtype=dtype, **ours)
        align_weights(pipeline)
        return pipeline


def rebuild(component: Any, cls: Any) -> Any:
    """`component` as an instance of `cls`, which must read its config and the names of its weights.

    The weights are shared in memory, on any device; a scheduler is rebuilt from its config.
    Raises ValueError for a model with LoRA adapters, whose layers `cls` would not know.
    """
    if type(component) is cls:
        return component
    if not isinstance(component, torch.nn.Module):
        return cls.from_config(component.config)
    adapters: Any = getattr(component, "peft_config", None)
    if adapters:
        raise ValueError(
            f"{type(component).__name__} carries the adapters {list(adapters)}: call "
            "`unload_lora_weights()` (or `fuse_lora()` and then that), and load them again afterwards."
        )
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = cls.from_config(component.config)
    model.load_state_dict(component.state_dict(), assign=True)
    for name, parameter in component.named_parameters():
        model.get_parameter(name).requires_grad_(parameter.requires_grad)
    return model.train(component.training)


def read_single_file(pipeline_class: Any, source: str, **options: Any) -> Any:
    """`pipeline_class.from_single_file(source, **options)`.

    Raises FileNotFoundError if `source` is neither a file nor a link to one, and OSError if the configs that
    go with it were not given and cannot be reached.
    """
    if not os.path.isfile(source) and not source.startswith(LINKS):
        raise FileNotFoundError(f"{source!r} is no file, nor a link to one on the Hub.")
    try:
        return pipeline_class.from_single_file(source, **options)
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{source} holds weights alone, and the configs that go with it are out of reach: pass "
            "`config=`, a model folder of the same kind of Stable Diffusion (its weights are not needed)."
        ) from error
