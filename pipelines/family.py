"""A model and the folders beside it: NAME-upsampler, and NAME-guidance with the models that guide."""

import contextlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .super_resolution import SuperResolutionPipeline
    from .text_to_image import TextToImagePipeline

DEFAULT_MODEL = Path("models") / "emoji"
SCHEDULERS = {  # short names; all are diffusers' classes except DDPM, which is ours
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}


def default_model() -> Path:
    """models/emoji next to this package, or in the current folder if this package is installed elsewhere."""
    beside = Path(__file__).resolve().parent.parent / DEFAULT_MODEL
    return beside if beside.is_dir() else DEFAULT_MODEL


def find_beside(model: str | Path, kind: Literal["upsampler", "guidance"]) -> Path | None:
    """The folder with the model's name and -upsampler or -guidance added, if there is one."""
    folder = Path(model).resolve()
    folder = folder.with_name(f"{folder.name}-{kind}")
    return folder if folder.is_dir() else None


def check_model(folder: Path) -> None:
    """Raises ValueError if `folder` is not a model folder; needs no torch."""
    if not folder.is_dir():
        raise ValueError(f"there is no model folder {folder}")
    index = folder / "model_index.json"
    try:
        if not isinstance(json.loads(index.read_text()), dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        hint = ""
        if (folder / "pipeline" / "model_index.json").is_file():
            hint = f"; {folder / 'pipeline'} has one"
        elif (folder / "pytorch_lora_weights.safetensors").is_file():
            hint = ", but adapters, which pipe.load_lora_weights loads into the model they were trained on"
        raise ValueError(f"{folder} is no model folder: it has no model_index.json{hint}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {index}: {error}") from None


@contextlib.contextmanager
def loading(folder: str | Path) -> Iterator[None]:
    """Hides progress bars while loading, and turns whatever goes wrong into one ValueError."""
    import diffusers
    import transformers

    bars = diffusers.utils.logging, transformers.utils.logging
    for library in bars:
        library.disable_progress_bar()
    try:
        yield
    except Exception as error:  # missing weights, unknown classes, broken files: each raises another kind
        raise ValueError(f"cannot load {folder}: {type(error).__name__}: {error}") from error
    finally:
        for library in bars:
            library.enable_progress_bar()


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    model: str | Path, scheduler: str | None = None, clip_guidance_model: str | None = None
) -> "TextToImagePipeline":
    """The pipeline of a folder or a Hub name, on the GPU if there is one.

    scheduler: a key of SCHEDULERS; it takes over the settings of the model's own scheduler.
    Raises ValueError if anything cannot be loaded.
    """
    import diffusers

    from .components.ddpm_scheduler import DDPMScheduler
    from .text_to_image import TextToImagePipeline

    parts = {"clip_guidance_model": clip_guidance_model} if clip_guidance_model else {}
    with loading(model):
        pipe = TextToImagePipeline.from_pretrained(str(model), **parts)
    if scheduler is not None:
        cls = DDPMScheduler if scheduler == "ddpm" else getattr(diffusers, SCHEDULERS[scheduler])
        pipe.scheduler = convert_scheduler(pipe.scheduler, cls)
    return pipe.to(best_device())


def load_upsampler(
    model: str | Path, given: str | Path | None = None, in_pixels: bool = True
) -> "SuperResolutionPipeline | None":
    """The pipeline in `given`, or else the one beside the model. A pixel model without one gets that of the
    default model, so that fine-tuned models have one too. None if there is none."""
    folder = Path(given) if given else find_beside(model, "upsampler")
    if folder is None and in_pixels:
        folder = find_beside(default_model(), "upsampler")
    if folder is None:
        return None
    from .super_resolution import SuperResolutionPipeline

    with loading(folder):
        pipe = SuperResolutionPipeline.from_pretrained(str(folder))
    return pipe.to(best_device())


def load_guides(pipe: Any, model: str | Path, given: str | Path | None = None) -> bool:
    """Loads noisy_clip and noisy_classifier into `pipe`, from `given` or else from beside the model. Returns
    False if there is no such folder."""
    folder = Path(given) if given else find_beside(model, "guidance")
    if folder is None:
        return False
    with loading(folder):
        pipe.load_guides(folder)
    return True


def convert_scheduler(scheduler: Any, cls: type) -> Any:
    """`cls.from_config(scheduler.config)`, but clip_sample becomes thresholding if `cls` has only that, and
    our DDPM gets eta = 1.

    Thresholding with a sample_max_value of 1 clips to [-1, 1]. Without it, a pixel model that predicts eps
    divides by a tiny sqrt(abar) at its noisiest steps, and the picture never recovers.
    """
    config, known = scheduler.config, inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    clips = config.get("clip_sample") and config.get("clip_sample_range", 1.0) == 1.0
    changes: dict[str, Any] = {"eta": 1.0} if "eta" in known else {}
    if clips and "clip_sample" not in known and "thresholding" in known:
        changes |= {"thresholding": True, "sample_max_value": 1.0}
    return cls.from_config(config, **changes)  # type: ignore[attr-defined]
