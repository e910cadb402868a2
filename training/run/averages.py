"""Moving averages of the weights (EMA)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.training_utils import EMAModel


def make_ema(decay: float, model: Any, foreach: bool = True) -> EMAModel:
    """A moving average of a diffusers model's weights; its decay is min(decay, 1 - (1 + step)^(-3/4))."""
    warm_up = {"use_ema_warmup": True, "power": 0.75}
    kept = {"model_cls": type(model), "model_config": model.config}
    return EMAModel(model.parameters(), decay=decay, foreach=foreach, **warm_up, **kept)


@contextlib.contextmanager
def averaged(models: list[Any], ema: EMAModel | None) -> Iterator[None]:
    """Within the block, put the models in evaluation mode; if `ema` is given, the first model has its
    averaged weights. Afterwards all models are back in training mode with their own weights."""
    for model in models:
        model.eval()
    torch.compiler.set_stance("force_eager")  # recompiling for other batch sizes is not worthwhile
    if ema is not None:
        ema.store(models[0].parameters())
        ema.copy_to(models[0].parameters())
    try:
        yield
    finally:
        if ema is not None:
            ema.restore(models[0].parameters())
        torch.compiler.set_stance("default")
        for model in models:
            model.train()
