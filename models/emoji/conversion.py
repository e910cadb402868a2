"""From diffusers' pipelines and files to our classes, on the same weights."""

import os
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError

LINKS = ("https://", "http://", "huggingface.co/", "hf.co/")


def rebuild(component: Any, cls: Any) -> Any:
    """`component` as an instance of `cls`, which reads its config and the names of its weights.

    The weights stay the very same ones in memory, on any device; a scheduler is made anew from its config.
    Raises ValueError for a model that carries LoRA adapters, whose layers `cls` would not know.
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

    Raises FileNotFoundError when `source` is neither a file nor a link to one, and OSError when the configs
    that go with it were not given and are out of reach.
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
