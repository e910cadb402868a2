"""Low-rank adapters (LoRA, Hu 2021) through peft, in the file format of diffusers.

W x becomes W x + (alpha / rank) B A x, with A (rank, in) and B (out, rank) learned and W frozen, in the
projections of every attention or in layers given by name. In a convolution, A is a convolution of the same
kernel size and B is 1 x 1. `pytorch_lora_weights.safetensors` holds all A and B: load it with
`pipe.load_lora_weights(folder)`.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Conv2d, Linear

from pipelines import ConditionalUNet
from training.run.checkpoints import check_shapes, tensor_shapes
from training.run.settings import require

FILE = "pytorch_lora_weights.safetensors"
MODELS = ("unet", "text_encoder")
UNET_LAYERS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def add_lora(model: torch.nn.Module, layers: list[str], rank: int, alpha: float | None = None) -> None:
    """Freeze the model and add an adapter to each layer whose name ends in one of `layers`. The adapters
    start with B = 0, so they change nothing yet. `alpha` defaults to the rank. Raises ValueError if no
    layer's name has one of the endings."""
    names = [name for name, module in model.named_modules() if isinstance(module, (Linear, Conv2d))]
    for layer in layers:
        known = any(f".{name}".endswith(f".{layer}") for name in names)
        require(known, "lora_layers", layer, "how names of the U-Net's linear or convolution layers end")
    model.requires_grad_(False)
    alpha = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=layers)
    model.add_adapter(config)  # type: ignore[operator]


class LoraFile:
    """Stores adapters in a checkpoint, in diffusers' file format and without the frozen weights. The models
    are the U-Net and, if it is trained too, the text encoder."""

    def save(self, models: list[Any], folder: Path) -> None:
        parts: dict[str, Any] = {}
        for name, model in zip(MODELS, models, strict=False):
            parts[f"{name}_lora_layers"] = adapter_weights(model)
            # Without this, readers of the file assume that alpha is the rank
            parts[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
        StableDiffusionLoraLoaderMixin.save_lora_weights(str(folder), **parts)

    def check(self, models: list[Any], folder: Path) -> None:
        if not (folder / FILE).is_file():
            raise ValueError(f"{FILE} is missing")
        check_shapes(tensor_shapes(folder), self.tensors(models), FILE)

    @torch.no_grad()
    def load(self, models: list[Any], folder: Path) -> None:
        saved = load_file(folder / FILE)
        for name, tensor in self.tensors(models).items():
            tensor.copy_(saved[name])

    @staticmethod
    def tensors(models: list[Any]) -> dict[str, Tensor]:
        """The adapters' own tensors (not copies) by their names in the file."""
        weights = zip(MODELS, map(adapter_weights, models), strict=False)
        return {f"{prefix}.{name}": tensor for prefix, own in weights for name, tensor in own.items()}


def adapter_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted layer, under diffusers' names. For a U-Net these are peft's names: diffusers'
    older names cover only attention layers, and a file that mixes the two is only partly read."""
    weights = get_peft_model_state_dict(model)
    return weights if isinstance(model, ConditionalUNet) else convert_state_dict_to_diffusers(weights)


class Behind:
    """A model behind the wrapper that averages gradients over processes. Calls go through the wrapper,
    everything else to the model itself: the wrapper hides `config` and the layers, which `encode_text`
    reads."""

    def __init__(self, wrapper: torch.nn.Module, model: torch.nn.Module):
        self._wrapper, self._model = wrapper, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
