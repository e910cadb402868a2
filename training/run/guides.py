"""Training a guide: a component of a pipeline that reads the pipeline's noised pictures."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from pipelines.folders.files import written_aside
from training.run.averages import averaged, make_ema
from training.run.loop import LossFunction, Training
from training.run.optimizers import make_adamw
from training.run.settings import AdamWSettings, GuideSettings, RunSettings
from training.run.start import Run


class TowerSettings(RunSettings, GuideSettings, AdamWSettings):
    """The settings shared by training a guide and training a CLIP."""

    max_train_steps: int = 2000
    checkpointing_steps: int = 200


def train_guide(
    config: TowerSettings, run: Run, model: Any, pictures: Any,
    make_loss: Callable[[Run, torch.nn.Module], LossFunction], name: str, ema_decay: float | None = None,
) -> None:  # fmt: skip
    """Train `model`, a component of a pipeline, and save it as output_dir/name. With `ema_decay`, the moving
    average of its weights is saved instead.

    Args:
        pictures: has a length and `columns`, like NoisedPictures.
        make_loss: (run, prepared model) -> the function that computes the loss of a micro-batch.
    """
    optimizer = make_adamw(model, config.learning_rate, config.adam_weight_decay)
    total, warm_up = config.max_train_steps, config.lr_warmup_steps
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warm_up, num_training_steps=total)
    averages = [make_ema(ema_decay, model, foreach=False)] if ema_decay is not None and run.is_main else []
    training = Training(run, [model], optimizer, schedule, name, total, averages)
    means: dict[str, float] = {}
    batches, loss = run.batches(pictures, training.start), make_loss(run, training.models[0])
    for progress in training.steps(batches, loss, config.max_grad_norm):
        means = progress.means
    if run.is_main:
        folder, trained = run.output / name, run.accelerator.unwrap_model(training.models[0])
        with averaged([trained], averages[0] if averages else None), written_aside(folder) as partial:
            trained.save_pretrained(str(partial))
        size_mb = 2 * sum(p.numel() for p in trained.parameters()) / 1e6
        shown = ", ".join(f"{key} {mean:.3f}" for key, mean in means.items())
        print(f"saved in {folder}: {size_mb:.2f} MB in fp16; {shown}")
    run.accelerator.end_training()
