"""Starting a run: processes, precision, seeds, tracker, Hub repository."""

import datetime
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs as ParallelKwargs
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from huggingface_hub import create_repo

from training.data.pictures import StepBatchSampler, concept_weights
from training.run.precision import resolve_precision
from training.run.settings import RunSettings


class Run:
    """A started run: its settings, and this process's place among those that share it.

    Creating one seeds torch's, NumPy's and Python's generators.
    """

    def __init__(
        self, config: RunSettings, report_to: str | None = None, num_processes: int | None = None
    ) -> None:
        self.config, self.output = config, Path(config.output_dir)
        self.accelerator = make_accelerator(self.output, config.mixed_precision, report_to, num_processes)
        set_seed(config.seed)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main, self.device = self.accelerator.is_main_process, self.accelerator.device

    def batches(
        self, data: Any, start: int = 0, concept_power: float = 0.25, style_power: float = 1.0
    ) -> Iterator[list[int]]:
        """Picture numbers of this process's micro-batches, from micro-batch number `start` on. `data` has a
        length and `columns`; if there is a column "concept", pictures are weighted: see `concept_weights`."""
        concepts, styles = data.columns.get("concept"), data.columns.get("style")
        weights = concept_weights(concepts, concept_power, styles, style_power) if concepts else None
        size, seed = self.config.train_batch_size, self.config.seed
        return iter(StepBatchSampler(len(data), size, seed, weights, start, self.rank, self.world))

    def init_tracker(self, project_name: str) -> None:
        """Start the tracker and give it the numeric and string settings, without the Hub token."""
        plain = {k: v for k, v in vars(self.config).items() if isinstance(v, int | float | str)}
        self.accelerator.init_trackers(project_name, plain | {"hub_token": ""})

    def create_repository(self, name: str | None, token: str | None) -> str | None:
        """Create the Hub repository to upload to, by default named after output_dir; None in all but the main
        process."""
        if not self.is_main:
            return None
        return create_repo(name or self.output.name, token=token, exist_ok=True).repo_id


def make_accelerator(
    output_dir: Path | None = None, mixed_precision: str | None = None, log_with: str | None = None,
    num_processes: int | None = None,
) -> Accelerator:  # fmt: skip
    """An Accelerator that runs the requested number of processes; on CPU, they communicate through gloo.

    A launcher can lose processes silently. `accelerate launch --cpu --num_processes 2` starts only one,
    because on CPU it expects mpirun to start them. If several are started on a machine without an
    accelerator, each assumes that it is the only one unless Accelerator is given `cpu=True`.

    The learning-rate schedule is stepped once for each optimizer step, whatever the number of processes
    (split_batches). A checkpoint of one process can therefore be resumed with two, and vice versa.

    Raises:
        ValueError: the number of running processes is not what the launcher, or `num_processes`, requested.
    """
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    started = next((int(os.environ[name]) for name in sizes if name in os.environ), None)
    if started is None and {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= set(os.environ):
        # accelerate sets MASTER_ADDR when asked for several processes; torch's launcher then sets WORLD_SIZE
        raise ValueError(
            "accelerate launch was asked for several processes and started one: on CPU it starts them with "
            "--config_file training/configs/accelerate/cpu_2.yaml, or with --multi_gpu instead of --cpu"
        )
    device = torch.accelerator.current_accelerator(check_available=True)
    accelerator = Accelerator(
        cpu=(started or 1) > 1 and (device is None or device.type == "mps"),
        mixed_precision=resolve_precision(mixed_precision),
        log_with=log_with,
        project_config=output_dir and ProjectConfiguration(str(output_dir), str(output_dir / "logs")),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[
            # gradients are stored in the buckets that are averaged, without a second copy
            ParallelKwargs(gradient_as_bucket_view=True),
            # the others wait while the main process decodes pictures or validates
            InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12)),
        ],
    )
    wanted = num_processes or started or accelerator.num_processes
    if accelerator.num_processes != wanted:
        raise ValueError(
            f"num_processes must be the number of processes that run, {accelerator.num_processes}, "
            f"got {wanted}: see training/configs/accelerate for ways to start several"
        )
    if not accelerator.is_main_process:
        logging.getLogger("training").setLevel(logging.ERROR)  # one warning is enough
    return accelerator
