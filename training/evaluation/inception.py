"""The standard FID and Inception score, by torch-fidelity, if it and Inception's weights are available."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity and torchmetrics store them


def to_bytes(images: Tensor) -> Dataset:
    """Pictures in [-1, 1] as a data set that torch-fidelity can read: (3, H, W) uint8 each."""
    return Subset(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), range(len(images)))  # type: ignore[arg-type]


def find_weights(path: str) -> Path | None:
    """`path` or, if it is empty, the file in torch's hub cache; None if there is none. Raises ValueError if
    `path` is given but is not a file."""
    if path and not Path(path).is_file():
        raise ValueError(f"inception_weights must be a file, got {path!r}")
    found = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS)
    return found if found.is_file() else None


def inception_figures(weights: Path | None, drawn: Tensor, real: Tensor) -> dict[str, float] | str:
    """The FID between `drawn` and `real`, both (N, 3, H, W) in [-1, 1], and the Inception score of `drawn`;
    or a line that says why they were not measured.

    Nothing is downloaded. The FID of a few hundred pictures is far too large: its 2048 features need tens of
    thousands of pictures.
    """
    if weights is None:
        return f"not measured: {WEIGHTS} is neither given (--inception_weights) nor in torch's hub cache"
    if importlib.util.find_spec("torch_fidelity") is None:
        return "not measured: torch-fidelity is not installed (pip install torch-fidelity)"
    import torch_fidelity

    torch.load(weights, weights_only=True, map_location="cpu")  # refuses a pickle that would run code
    settings: Any = {"batch_size": 32, "isc_splits": min(10, len(drawn)), "cuda": torch.cuda.is_available()}
    settings |= {"feature_extractor_weights_path": str(weights), "cache": False, "verbose": False}
    figures = torch_fidelity.calculate_metrics(
        input1=to_bytes(drawn), input2=to_bytes(real), fid=True, isc=True, **settings
    )
    return {
        "FID": float(figures["frechet_inception_distance"]),
        "Inception score": float(figures["inception_score_mean"]),
        "Inception score, deviation over splits": float(figures["inception_score_std"]),
    }
