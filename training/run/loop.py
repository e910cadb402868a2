"""The training loop: `fit` takes the optimizer steps, and `Training` does what every recipe does between
them.

`fit` is a generator: batches, backward pass, clipping, optimizer, schedule, EMA. `Training.steps` adds a
progress bar, logs and checkpoints. It too yields after each step, so that a recipe's own code can run there.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from training.data.pictures import seed_for
from training.run.checkpoints import Checkpoints, ModelFiles, ModelFolder
from training.run.precision import attention_of
from training.run.start import Run

LossFunction = Callable[[Any, int], tuple[Tensor, dict[str, Any]]]
LOG_STEPS = 20


@dataclass
class StepResult:
    """The result of one optimizer step; `details` is what the loss function returned with its last loss."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    details: dict[str, Any] = field(default_factory=dict)


def fit(
    accelerator: Accelerator, model: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: torch.optim.Optimizer, lr_scheduler: Any, batches: Iterator[Any], compute_loss: LossFunction,
    *, max_train_steps: int, start_step: int = 0, gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 1.0, seed: int = 0, ema: Any = None,
) -> Iterator[StepResult]:  # fmt: skip
    """Train from `start_step` to `max_train_steps`, yielding after each optimizer step.

    Args:
        model: what `accelerator.prepare` returned, or a sequence of models; the EMA is of the first.
        batches: micro-batches, starting at number start_step * gradient_accumulation_steps.
        compute_loss: (batch, micro_step) -> (scalar loss of this process's slice, details to pass on). Its
            random draws must depend on (seed, micro_step) alone. Torch's global generators, which dropout
            uses, are seeded before each call from these and the process's number: dropout masks are the only
            draws that depend on how many processes share a batch.
        ema: diffusers' EMAModel, or a list of them, updated after each optimizer step.

    Raises:
        FloatingPointError: the loss or its gradient is no longer finite. The weights are those before the
            step.
    """
    models = [model] if isinstance(model, torch.nn.Module) else list(model)
    parameters = [parameter for one in models for parameter in one.parameters()]
    averages = ema if isinstance(ema, list) else [ema] if ema is not None else []
    attention = attention_of(accelerator)
    for one in models:
        one.train()
    for step in range(start_step, max_train_steps):
        total = torch.zeros((), device=accelerator.device)
        details: dict[str, Any] = {}
        for part in range(gradient_accumulation_steps):
            micro_step = step * gradient_accumulation_steps + part
            batch = next(batches)
            torch.manual_seed(seed_for(seed, "step", micro_step, accelerator.process_index))
            with contextlib.ExitStack() as unsynchronised:
                if part < gradient_accumulation_steps - 1:  # gradients are exchanged once, at the last part
                    for one in models:
                        unsynchronised.enter_context(accelerator.no_sync(one))
                with accelerator.autocast(), attention():
                    loss, details = compute_loss(batch, micro_step)
                accelerator.backward(loss / gradient_accumulation_steps)
            total += loss.detach() / gradient_accumulation_steps
        grad_norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm) or 0.0)
        mean_loss = float(accelerator.reduce(total, "mean"))  # type: ignore[arg-type]
        # under fp16, the gradient scaler handles infinite gradients by skipping the step
        if not math.isfinite(mean_loss) or not (accelerator.scaler or math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"step {step + 1}: the loss is {mean_loss} and its gradient's norm {grad_norm}; a lower "
                "learning_rate may help, or leaving out --compile. No checkpoint was written of it."
            )
        learning_rate = lr_scheduler.get_last_lr()[0]
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        for average in averages:
            average.step(accelerator.unwrap_model(models[0]).parameters())
        yield StepResult(step + 1, mean_loss, grad_norm, float(learning_rate), details)


@dataclass
class Progress:
    """The state of a run after a step."""

    step: int
    done: bool  # this was the last step
    saved: bool  # a checkpoint was due
    minutes: float  # CPU time of this process
    means: dict[str, float]  # of the loss and its scalar details, over about 50 steps


class Training:
    """Trains models up to step `total`, from the first step or from a checkpoint.

    Args:
        models: the models to train; `self.models` holds them as `accelerator.prepare` returns them.
        name: the first model's name in a checkpoint.
        averages: moving averages of the first model; empty in all but the main process.
        limit: how many checkpoints to keep.
        files: how a checkpoint stores the models, by default ModelFolder(name, *averages).
        settings: those that a resumed run should share with the saved one.
        also_saved: further objects with a state_dict, saved and restored as well.
    """

    def __init__(
        self, run: Run, models: Sequence[torch.nn.Module], optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler, name: str, total: int,
        averages: Sequence[EMAModel] = (), limit: int | None = 1, files: ModelFiles | None = None,
        settings: dict[str, Any] | None = None, also_saved: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        self.run, self.total, self.averages = run, total, list(averages)
        self.models: list[torch.nn.Module]
        *self.models, self.optimizer, self.schedule = run.accelerator.prepare(*models, optimizer, schedule)
        files = files or ModelFolder(name, *averages)
        self.checkpoints = Checkpoints(run.accelerator, run.output, files, limit, settings)
        for one in also_saved:
            run.accelerator.register_for_checkpointing(one)
        self.start = self.checkpoints.resume(run.config.resume_from_checkpoint)

    def steps(
        self, batches: Iterator[Any], compute_loss: LossFunction, max_grad_norm: float = 1.0,
        gradient_accumulation_steps: int = 1, max_train_minutes: float | None = None,
        state: Callable[[], dict[str, Any]] | None = None,
    ) -> Iterator[Progress]:  # fmt: skip
        """Train to the last step, or until the main process has used `max_train_minutes` of CPU time.

        A checkpoint that is due is written before the yield, with `state()`. A failed write ends the run only
        for the last checkpoint.
        """
        accelerator, config = self.run.accelerator, self.run.config
        steps = fit(
            accelerator, self.models, self.optimizer, self.schedule, batches, compute_loss,
            max_train_steps=self.total, start_step=self.start, seed=config.seed, ema=self.averages,
            gradient_accumulation_steps=gradient_accumulation_steps, max_grad_norm=max_grad_norm,
        )  # fmt: skip
        quiet = not self.run.is_main
        bar = tqdm(total=self.total, initial=self.start, disable=quiet, unit="step", mininterval=10)
        began = time.process_time()
        means: dict[str, float] = {}
        for result in steps:
            for key, value in {"loss": result.loss, **result.details}.items():
                if isinstance(value, float):
                    means[key] = 0.98 * means.get(key, value) + 0.02 * value
            bar.update()
            bar.set_postfix({key: f"{mean:.4f}" for key, mean in means.items()}, refresh=False)
            minutes = (time.process_time() - began) / 60
            done = result.step == self.total
            if max_train_minutes is not None:  # the main process's time counts for all
                spent = broadcast(torch.tensor(minutes, device=accelerator.device))
                done = done or float(spent) > max_train_minutes
            if result.step % LOG_STEPS == 0:
                log = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.learning_rate}
                accelerator.log(log, result.step)
            saved = done or result.step % config.checkpointing_steps == 0
            if saved:
                self.checkpoints.save(result.step, required=done, state=state() if state else None)
            yield Progress(result.step, done, saved, minutes, means)
            if done:
                break
        bar.close()
        accelerator.wait_for_everyone()
