"""Checkpoints in the models' own formats, written completely or not at all."""

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import ConfigMixin
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipelines.folders.files import read_json

logger = logging.getLogger(__name__)


class ModelFiles(Protocol):
    """How a checkpoint stores its models."""

    def save(self, models: list[Any], folder: Path) -> None:
        """Write the models to the folder."""

    def check(self, models: list[Any], folder: Path) -> None:
        """Raise a ValueError if the folder's content is incomplete or belongs to another model."""

    def load(self, models: list[Any], folder: Path) -> None:
        """Load the models' weights from the folder."""


class ModelFolder:
    """Stores the first model in the folder `name`, in its own format, its average in `name`_ema, and further
    averages in `name`_ema_DECAY."""

    def __init__(self, name: str, *averages: EMAModel):
        self.name = name
        self.averages = {f"{name}_ema": average for average in averages[:1]}
        self.averages |= {f"{name}_ema_{average.decay}": average for average in averages[1:]}

    def save(self, models: list[Any], folder: Path) -> None:
        models[0].save_pretrained(str(folder / self.name))
        for name, average in self.averages.items():
            average.save_pretrained(str(folder / name))

    def check(self, models: list[Any], folder: Path) -> None:
        for part in (self.name, *self.averages):
            path = folder / part / "config.json"
            if not path.is_file():
                raise ValueError(f"{part}/config.json is missing")
            check_shapes(tensor_shapes(folder / part), models[0].state_dict(), part)
            config = dict(models[0].config) if isinstance(models[0], ConfigMixin) else {}
            saved, ours = read_json(path), json.loads(json.dumps(config))
            for key in sorted(key for key in saved.keys() & ours.keys() if key[0] != "_"):
                if saved[key] != ours[key]:
                    raise ValueError(f"it holds another model: {key} is {saved[key]}, not {ours[key]}")

    def load(self, models: list[Any], folder: Path) -> None:
        saved = type(models[0]).from_pretrained(str(folder / self.name))
        models[0].load_state_dict(saved.state_dict())
        for name, average in self.averages.items():
            device = average.shadow_params[0].device
            kept = type(average).from_pretrained(str(folder / name), average.model_cls)
            average.load_state_dict(kept.state_dict())
            average.to(device)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in the folder's safetensors; opening the files checks their lengths."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path.parent.name}/{path.name} is not whole ({error})") from error
    return shapes


def check_shapes(saved: dict[str, tuple[int, ...]], expected: dict[str, Tensor], part: str) -> None:
    """Raise a ValueError unless `saved` has exactly the tensors of `expected`."""
    if not saved:
        raise ValueError(f"{part} has no safetensors")
    for name in sorted(saved.keys() | expected.keys()):
        there = saved.get(name, "missing")
        here = tuple(expected[name].shape) if name in expected else "unknown"
        if there != here:
            raise ValueError(f"it holds another model: {name} is {there} in {part}, and {here} in this one")


class Checkpoints:
    """Saves and resumes `checkpoint-{step}` folders. They hold the models in their own formats, the rest as
    accelerate saves it, and checkpoint.json, which lists every file with its length.

    A checkpoint is written under a temporary name and then renamed, so one with its final name is complete.
    Older ones are removed only after that. `files` stores the models; `settings` are those that a resumed run
    should share with the saved one.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: str | Path, files: ModelFiles,
        limit: int | None = None, settings: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.accelerator, self.folder, self.limit, self.files = accelerator, Path(output_dir), limit, files
        self.settings, self.state = settings or {}, {}  # type: ignore[var-annotated]

        def save(models: list[Any], weights: list[Any], folder: str) -> None:
            if weights:  # with FSDP there are none: accelerate has already saved the shards
                weights.clear()  # saved here, so that accelerate does not save them again
                if accelerator.is_main_process:
                    self.files.save(self._models(), Path(folder))

        def load(models: list[Any], folder: str) -> None:
            if models:
                models.clear()
                self.files.load(self._models(), Path(folder))

        accelerator.register_save_state_pre_hook(save)  # type: ignore[arg-type]
        accelerator.register_load_state_pre_hook(load)  # type: ignore[arg-type]

    def _models(self) -> list[Any]:
        return [self.accelerator.unwrap_model(model) for model in self.accelerator._models]

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of the existing checkpoints, in order."""
        found = (p.name.removeprefix("checkpoint-") for p in self.folder.glob("checkpoint-*") if p.is_dir())
        return sorted(int(step) for step in found if step.isdigit())

    # ---- saving

    def save(self, step: int, required: bool = True, state: dict[str, Any] | None = None) -> Path | None:
        """Write checkpoint-{step}, then remove old checkpoints beyond `limit`.

        Args:
            required: whether a failure ends the run. Otherwise it is logged and None is returned: the older
                checkpoints remain, training continues, and the next save may have enough space again.
            state: what else a resumed run needs, as JSON values; `resume` puts it in `self.state`.

        Raises:
            OSError: the checkpoint could not be written; older ones are untouched.
        """
        final, partial = self.path(step), self.folder / f"checkpoint-{step}.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        failure: Exception | None = None
        for write in (self._write, self._write_list):  # the list comes after all processes have written
            if failure is None:
                try:
                    write(partial, step, state or {})
                # for a full disk, torch's writer raises RuntimeError and safetensors an error of its own
                except (OSError, RuntimeError, SafetensorError) as error:
                    failure = error
            failed = torch.tensor(float(failure is not None), device=self.accelerator.device)
            if float(self.accelerator.reduce(failed, "sum")) and failure is None:  # type: ignore[arg-type]
                failure = OSError("another process could not write")
        if failure is not None:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            message = f"{final} could not be written ({failure}); the checkpoints before it stand"
            if required:
                raise OSError(message) from failure
            logger.warning("%s, and training goes on", message)
            return None
        if self.accelerator.is_main_process:
            replaced = self.folder / f"checkpoint-{step}.replaced"
            if final.is_dir():
                final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            self._remove_old(step)
        self.accelerator.wait_for_everyone()
        return final

    def _write(self, partial: Path, step: int, state: dict[str, Any]) -> None:
        self.accelerator.save_state(str(partial))

    def _write_list(self, partial: Path, step: int, state: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            paths = [path for path in sorted(partial.rglob("*")) if path.is_file()]
            sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in paths}
            record = {"step": step, "settings": self.settings, "state": state, "files": sizes}
            (partial / "checkpoint.json").write_text(json.dumps(record, indent=1) + "\n")
            for path in [*paths, partial / "checkpoint.json"]:  # on the disk before the folder is renamed
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

    def _remove_old(self, just_saved: int) -> None:
        """Keep `limit` checkpoints: the one just saved, which is complete, and the newest complete ones of
        the others. These may be of later steps, if another run left them."""
        others = [step for step in self.steps() if step != just_saved]
        others.sort(key=lambda step: (self._unlisted(self.path(step)) is None, step))
        for old in others[: max(0, len(others) + 1 - self.limit)] if self.limit else []:
            shutil.rmtree(self.path(old))

    # ---- resuming

    def resume(self, which: str | None) -> int:
        """Load a checkpoint and return its step, or 0 if there is none to load.

        Before loading, check that checkpoints can be written at all.

        Args:
            which: "latest", for the newest checkpoint that is complete and of this model; the path of a
                checkpoint; or None, to start from the beginning.

        Raises:
            ValueError: the path is not a checkpoint, or the checkpoint is truncated or of another model;
                "latest" finds only such checkpoints; or `which` is None and the folder already holds
                checkpoints, which this run would replace.
            OSError: output_dir cannot be written, or has too little space for this run's checkpoints.
        """
        self._check_folder()
        chosen = [self._choose(which) if self.accelerator.is_main_process else None]
        path, error = broadcast_object_list(chosen)[0]  # type: ignore[misc]
        if error:
            raise ValueError(error)
        if path is None:
            return 0
        record = path / "checkpoint.json"
        saved = read_json(record) if record.is_file() else {}  # older checkpoints have none
        for name, value in self.settings.items():
            was = saved.get("settings", {}).get(name, value)
            if was != value and self.accelerator.is_main_process:
                logger.warning("%s was saved with %s %s; from here on it is %s", path, name, was, value)
        self.accelerator.load_state(str(path))
        self.state = saved.get("state", {})
        return int(path.name.removeprefix("checkpoint-"))

    def _choose(self, which: str | None) -> tuple[Path | None, str]:
        """(the checkpoint to load or None, the error message or "")."""
        steps = self.steps()
        if not which:
            found = f"output_dir {self.folder} holds checkpoint-{steps[-1]}" if steps else ""
            advice = "pass --resume_from_checkpoint latest to go on from it, or choose another output_dir"
            return None, f"{found}: {advice}" if steps else ""
        if which != "latest":
            path = Path(which) if Path(which).is_dir() else self.folder / which
            if not path.is_dir() or not path.name.removeprefix("checkpoint-").isdigit():
                rule = "'latest' or a checkpoint-STEP folder, also one of output_dir"
                return None, f"resume_from_checkpoint must be {rule}, got {which!r}"
            problem = self.problem(path)
            return path, f"resume_from_checkpoint {which!r} cannot be used: {problem}" if problem else ""
        for step in reversed(steps):
            if (problem := self.problem(self.path(step))) is None:
                return self.path(step), ""
            logger.warning("%s cannot be used: %s; trying the one before it", self.path(step), problem)
        if steps:
            newest = f"checkpoint-{steps[-1]}: {self.problem(self.path(steps[-1]))}"
            return None, f"no checkpoint in {self.folder} can be used; {newest}"
        logger.warning("no checkpoint in %s: starting from the beginning", self.folder)
        return None, ""

    def problem(self, path: Path) -> str | None:
        """Why this checkpoint cannot be resumed, by the lengths and headers of its files; None if it can."""
        try:
            if unlisted := self._unlisted(path):
                return unlisted
            self.files.check(self._models(), path)
            listed = (path / "checkpoint.json").is_file()
            for name in () if listed else ("optimizer.bin", "scheduler.bin"):
                if not zipfile.is_zipfile(path / name):  # torch's format, whose directory is at the end
                    return f"{name} is missing or not whole"
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def _unlisted(self, path: Path) -> str | None:
        """The first difference between the files and the list in checkpoint.json; None if there is no
        difference or no list."""
        if not (path / "checkpoint.json").is_file():
            return None
        try:
            sizes = read_json(path / "checkpoint.json")["files"]
        except (ValueError, KeyError):
            return "checkpoint.json is not whole"
        for name, size in sizes.items():
            file = path / name
            there = file.stat().st_size if file.is_file() else None
            if there != size:
                shown = "is missing" if there is None else f"has {there} bytes"
                return f"{name} {shown}, {size} bytes were written"
        return None

    def _check_folder(self) -> None:
        """Clean up after a killed run, and make sure that this run can write its checkpoints."""
        if self.accelerator.is_main_process:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for path in self.folder.glob("checkpoint-*.replaced"):
                    whole = path.with_suffix("")
                    shutil.rmtree(path) if whole.is_dir() else path.rename(whole)
                for path in self.folder.glob("checkpoint-*.partial"):
                    shutil.rmtree(path)
                probe = self.folder / f".{os.getpid()}.partial"
                probe.write_bytes(b"0" * 4096)
                probe.unlink()
            except OSError as error:
                raise OSError(f"output_dir {self.folder} cannot be written: {error}") from error
            # One more than the limit, as the oldest is removed after the newest is written. Each holds about
            # the trainable weights, their two moments and their averages
            at_once = max(1, (self.limit or 1) + 1 - len(self.steps()))
            learning = [p for model in self._models() for p in model.parameters() if p.requires_grad]
            copies = 3 + len(getattr(self.files, "averages", ()))
            each = copies * sum(p.numel() * p.element_size() for p in learning) / 2**20
            free, need = shutil.disk_usage(self.folder).free / 2**20, at_once * each
            if free < need:
                has = f"has {free:.0f} MB free and its checkpoints need {need:.0f} MB"
                raise OSError(f"output_dir {self.folder} {has} ({at_once} of {each:.0f} MB)")
        self.accelerator.wait_for_everyone()
