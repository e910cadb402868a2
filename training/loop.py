"""The accelerate training loop as a generator, and checkpoints that are whole or absent.

`fit` does what every recipe shares: batches, backward, clipping, optimizer, schedule, EMA. It yields after
each step, so the recipe owns what differs: logs, validation, when to save.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from training.data import seed_for

logger = logging.getLogger(__name__)


@dataclass
class StepResult:
    """What one optimizer step did; `details` is what the loss function returned beside its last loss."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    details: dict[str, Any] = field(default_factory=dict)


def fit(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: Any,
    batches: Iterator[Any],
    compute_loss: Callable[[Any, int], tuple[Tensor, dict[str, Any]]],
    *,
    max_train_steps: int,
    start_step: int = 0,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    ema: Any = None,
) -> Iterator[StepResult]:
    """Train from `start_step` to `max_train_steps`, yielding after each optimizer step.

    Args:
        batches: micro-batches, beginning with number start_step * gradient_accumulation_steps.
        compute_loss: (batch, micro_step) -> scalar loss of this process's slice, and details to pass on.
            Whatever it draws at random must depend on (seed, micro_step) alone; torch's global generators,
            which dropout uses, are seeded so before each call.
        ema: diffusers' EMAModel, stepped after each optimizer step, or None.
    """
    model.train()
    for step in range(start_step, max_train_steps):
        total = torch.zeros((), device=accelerator.device)
        details: dict[str, Any] = {}
        for part in range(gradient_accumulation_steps):
            micro_step = step * gradient_accumulation_steps + part
            batch = next(batches)
            torch.manual_seed(seed_for(seed, "step", micro_step, accelerator.process_index))
            last = part == gradient_accumulation_steps - 1
            with _nothing() if last else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss, details = compute_loss(batch, micro_step)
                accelerator.backward(loss / gradient_accumulation_steps)
            total += loss.detach() / gradient_accumulation_steps
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        learning_rate = lr_scheduler.get_last_lr()[0]
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.step(accelerator.unwrap_model(model).parameters())
        mean_loss = float(accelerator.reduce(total, "mean"))
        yield StepResult(step + 1, mean_loss, float(grad_norm or 0.0), float(learning_rate), details)


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class Checkpoints:
    """`checkpoint-{step}` folders: model and EMA in their own formats, the rest as accelerate saves it.

    A checkpoint is written to a temporary name and renamed, so the newest one is always whole; older ones
    go only after a newer one stands.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | Path,
        name: str,
        ema: Any = None,
        limit: int | None = None,
    ):
        self.accelerator, self.folder, self.limit = accelerator, Path(output_dir), limit

        def save(models: list[Any], weights: list[Any], folder: str) -> None:
            for model in models:
                if accelerator.is_main_process:
                    accelerator.unwrap_model(model).save_pretrained(str(Path(folder) / name))
                weights.pop()  # saved above, so accelerate need not
            if ema is not None and accelerator.is_main_process:
                ema.save_pretrained(str(Path(folder) / f"{name}_ema"))

        def load(models: list[Any], folder: str) -> None:
            while models:
                model = accelerator.unwrap_model(models.pop())
                saved = type(model).from_pretrained(str(Path(folder) / name))
                model.load_state_dict(saved.state_dict())
            if ema is not None:
                kept = type(ema).from_pretrained(str(Path(folder) / f"{name}_ema"), ema.model_cls)
                ema.load_state_dict(kept.state_dict())
                ema.to(accelerator.device)

        accelerator.register_save_state_pre_hook(save)  # type: ignore[arg-type]
        accelerator.register_load_state_pre_hook(load)  # type: ignore[arg-type]

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order."""
        found = (p.name.removeprefix("checkpoint-") for p in self.folder.glob("checkpoint-*") if p.is_dir())
        return sorted(int(step) for step in found if step.isdigit())

    def save(self, step: int) -> Path:
        final = self.folder / f"checkpoint-{step}"
        partial = self.folder / f"checkpoint-{step}.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            others = [
                other for other in self.steps() if other != step
            ]  # later ones too, if another run left them
            for old in others[: max(0, len(others) + 1 - self.limit)] if self.limit else []:
                shutil.rmtree(self.folder / f"checkpoint-{old}")
        return final

    def resume(self, which: str | None) -> int:
        """Load "latest", or the checkpoint of that path; returns its step, 0 when there is none to load.

        Raises:
            ValueError: the path is no checkpoint.
        """
        if not which:
            return 0
        if which == "latest":
            steps = self.steps()
            if not steps:
                logger.info("no checkpoint in %s: starting from the beginning", self.folder)
                return 0
            path = self.folder / f"checkpoint-{steps[-1]}"
        else:
            path = Path(which)
        step = path.name.removeprefix("checkpoint-")
        if not path.is_dir() or not step.isdigit():
            raise ValueError(
                f"resume_from_checkpoint must be 'latest' or a checkpoint-STEP folder, got {which!r}"
            )
        self.accelerator.load_state(str(path))
        return int(step)
