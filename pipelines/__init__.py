"""Everything needed to draw a picture; nothing here imports `training`.

The names load on first use, so that `python -m pipelines --help` and argument errors appear at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .components.conditional_unet import ConditionalUNet
    from .components.ddpm_scheduler import DDPMScheduler
    from .components.noisy_classifier import NoisyClassifier
    from .components.noisy_clip import NoisyCLIP
    from .image_to_image import ImageToImagePipeline
    from .inpaint import InpaintPipeline
    from .super_resolution import SuperResolutionPipeline
    from .text_to_image import TextToImagePipeline

__version__ = "0.2.0"  # the only place; CHANGELOG.md lists the changes in each version

__all__ = [
    "ConditionalUNet",
    "DDPMScheduler",
    "ImageToImagePipeline",
    "InpaintPipeline",
    "NoisyCLIP",
    "NoisyClassifier",
    "SuperResolutionPipeline",
    "TextToImagePipeline",
]

_HOMES = {
    "ConditionalUNet": ".components.conditional_unet",
    "DDPMScheduler": ".components.ddpm_scheduler",
    "ImageToImagePipeline": ".image_to_image",
    "InpaintPipeline": ".inpaint",
    "NoisyCLIP": ".components.noisy_clip",
    "NoisyClassifier": ".components.noisy_classifier",
    "SuperResolutionPipeline": ".super_resolution",
    "TextToImagePipeline": ".text_to_image",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
