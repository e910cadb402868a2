"""LoRA, textual inversion, FreeU: what diffusers' mixins add to a pipeline.

The mixins do the work. What differs here: weights come from safetensors only, and features that our U-Net
lacks raise an error that names them.
"""

import os
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin

from .files import PICKLES


class AdapterMixin(StableDiffusionMixin, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin):
    """LoRAs (`load_lora_weights`, `set_adapters`, `fuse_lora`, `unload_lora_weights`, ...) for U-Net and text
    encoder, in the formats of diffusers, peft and kohya; textual inversion; FreeU."""

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """As in diffusers, from safetensors only. Raises ValueError for a pickle, and OSError for a name that
        is neither a local file or folder nor on the Hub."""
        source = pretrained_model_name_or_path_or_dict
        kwargs = safetensors_only(source, kwargs)
        try:
            return super().lora_state_dict(source, **kwargs)
        except Exception as error:
            if isinstance(source, (str, os.PathLike)) and not Path(source).exists():
                where = f"{str(source)!r} is no folder or file here, and the Hub does not give it"
                raise OSError(f"{where}: {error}") from error
            raise

    def load_textual_inversion(self, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, from safetensors only. Raises ValueError for a pickle."""
        kwargs = safetensors_only(pretrained_model_name_or_path, kwargs)
        super().load_textual_inversion(pretrained_model_name_or_path, *args, **kwargs)

    def load_ip_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always raises NotImplementedError."""
        raise NotImplementedError(
            "`load_ip_adapter` is not supported: IP-Adapter needs attention layers for images, which "
            "ConditionalUNet does not have. Use diffusers' StableDiffusionPipeline instead."
        )

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """As in diffusers, but our U-Net has none to fuse: raises NotImplementedError unless unet=False."""
        if unet and not hasattr(self.unet, "fuse_qkv_projections"):
            raise NotImplementedError(
                f"`unet` must be False: {type(self.unet).__name__} has no fused projections. "
                "`fuse_qkv_projections(unet=False)` fuses those of the vae."
            )
        super().fuse_qkv_projections(unet, vae)


def safetensors_only(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """A loader's `options` with use_safetensors=True. Raises ValueError if they or `source` ask for a pickle.

    `source` is a file, a folder, a name on the Hub, loaded tensors, or a list of these.
    """
    if options.get("use_safetensors") is False:
        raise ValueError("`use_safetensors` must be True: other weights are pickles, which can run code.")
    sources = source if isinstance(source, list) else [source]
    for name in (options.get("weight_name"), *sources):
        if isinstance(name, (str, os.PathLike)):
            folder = Path(name) / (options.get("subfolder") or "")
            files = [path.name for path in folder.iterdir()] if folder.is_dir() else [str(name)]
            pickles = [file for file in files if Path(file).suffix.lower() in PICKLES]
            if pickles and not any(file.endswith(".safetensors") for file in files):
                raise ValueError(
                    f"{pickles[0]!r} is a pickle, which can run code when it is read: only .safetensors is. "
                    "If you trust it, convert it once: `safetensors.torch.save_file(torch.load(file, "
                    "weights_only=True), 'converted.safetensors')`."
                )
    return options | {"use_safetensors": True}
