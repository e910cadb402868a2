"""Moving averages of the weights (EMA)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.training_utils import EMAModel


def make_ema(decay: float, model: Any, foreach: bool = True) -> EMAModel:
    """The average of a diffusers model: its decay is 1 - (1 + step)^(-3/4) until it reaches `decay`."""
    warm_up = {"use_ema_warmup": True, "power": 0.75}
    kept = {"model_cls": type(model), "model_config": model.config}
    return EMAModel(model.parameters(), decay=decay, foreach=foreach, **warm_up, **kept)


@contextlib.contextmanager
def averaged(models: list[Any], ema: EMAModel | None) -> Iterator[None]:
    """Within the block the models evaluate, the first with its averaged weights if it has an average."""
    for model in models:
        model.eval()
    torch.compiler.set_stance("force_eager")  # other sizes of batch are not worth compiling for
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
