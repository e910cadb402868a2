"""The training loop against one written by hand, bit for bit; checkpoints whole or absent; resume."""

import copy
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from disks import small_disk

from pipelines import ConditionalUNet
from training.run.checkpoints import Checkpoints, ModelFolder
from training.run.loop import StepResult, fit
from training.run.precision import resolve_precision
from training.run.start import make_accelerator

STEPS, PARTS, BATCH = 6, 2, 4


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state for the whole process; each test here starts anew."""
    yield
    fresh()


def fresh() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """Everything that a recipe hands to `fit`, small: by default a perceptron, with momentum and a cosine."""

    def __init__(self, model: torch.nn.Module, **ema: Any):
        self.accelerator = Accelerator(cpu=True)
        self.ema = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, power=0.75, **ema)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)

    def fit(self, compute_loss: Any, batches: list[Any], **settings: Any) -> list[StepResult]:
        settings = {
            "max_train_steps": STEPS,
            "gradient_accumulation_steps": PARTS,
            "ema": self.ema,
        } | settings
        steps = fit(
            self.accelerator,
            self.model,
            self.optimizer,
            self.schedule,
            iter(batches),
            compute_loss,
            **settings,
        )
        return list(steps)


def perceptron(seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(5, 16), torch.nn.SiLU(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 3)]
    return torch.nn.Sequential(*layers)


def micro_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(torch.randn(BATCH, 5, generator=generator), torch.randn(BATCH, 3, generator=generator))]
    for _ in range(STEPS * PARTS - 1):
        shapes.append(
            (torch.randn(BATCH, 5, generator=generator), torch.randn(BATCH, 3, generator=generator))
        )
    return shapes


def regression(model: torch.nn.Module) -> Any:
    def compute_loss(batch: tuple[torch.Tensor, torch.Tensor], micro_step: int) -> tuple[torch.Tensor, dict]:
        return F.mse_loss(model(batch[0]), batch[1]), {"micro_step": micro_step}

    return compute_loss


def assert_same(first: Any, second: Any) -> None:
    """Every tensor and number of two state dicts, bit for bit."""
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
def test_fit_is_the_loop_one_would_write(max_grad_norm):
    """Accumulation, clipping (0.05 always bites), AdamW, schedule and EMA."""
    run = Run(perceptron())
    results = run.fit(regression(run.model), micro_batches(), max_grad_norm=max_grad_norm)

    model = perceptron()
    ema = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    batches = iter(micro_batches())
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [F.mse_loss(model(x), y) for x, y in (next(batches) for _ in range(PARTS))]
        for loss in losses:
            (loss / PARTS).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
        assert (norm > max_grad_norm) == (max_grad_norm < 1)
        result = results[step]
        assert result.step == step + 1
        assert result.loss == pytest.approx(sum(losses).item() / PARTS, rel=1e-6)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-6)
        assert result.learning_rate == rate
        assert result.details == {"micro_step": step * PARTS + PARTS - 1}
    assert len(results) == STEPS
    assert_same(dict(run.model.state_dict()), dict(model.state_dict()))
    assert_same(run.ema.shadow_params, ema.shadow_params)
    assert not torch.equal(ema.shadow_params[0], model[0].weight)


def test_fit_yields_after_each_step_and_goes_no_further():
    run = Run(perceptron())
    before = copy.deepcopy(run.model.state_dict())
    steps = fit(
        run.accelerator,
        run.model.eval(),
        run.optimizer,
        run.schedule,
        iter(micro_batches()),
        regression(run.model),
        max_train_steps=3,
    )
    assert [next(steps).step for _ in range(2)] == [1, 2]
    assert run.model.training and all(p.grad is None for p in run.model.parameters())
    assert not torch.equal(before["0.weight"], run.model.state_dict()["0.weight"])
    after_two = copy.deepcopy(run.model.state_dict())
    assert [result.step for result in steps] == [3]
    assert not torch.equal(after_two["0.weight"], run.model.state_dict()["0.weight"])
    assert run.fit(regression(run.model), micro_batches(), start_step=STEPS) == []


def test_dropout_depends_on_seed_and_step_alone():
    """Whatever was drawn between the steps, and wherever the run began."""

    def masks(start: int, seed: int, disturb: bool) -> list[torch.Tensor]:
        drawn = []
        run = Run(perceptron(dropout=0.5))

        def compute_loss(batch: Any, micro_step: int) -> tuple[torch.Tensor, dict]:
            drawn.append(F.dropout(torch.ones(64), 0.5))
            if disturb:
                torch.rand(micro_step + 1)
            return regression(run.model)(batch, micro_step)

        run.fit(compute_loss, micro_batches()[start * PARTS :], start_step=start, seed=seed)
        return drawn

    whole = masks(0, 3, False)
    assert_same(masks(2, 3, True), whole[2 * PARTS :])
    assert len({tuple(mask.tolist()) for mask in whole}) == STEPS * PARTS
    assert not torch.equal(masks(0, 4, False)[0], whole[0])


# ------------------------------------------------------------ checkpoints


class UNetRun(Run):
    """A real U-Net with dropout, its checkpoints in `folder`."""

    def __init__(self, make_unet: Any, folder: Path, seed: int = 0, limit: int | None = None):
        unet = make_unet(block_out_channels=(8, 16), norm_num_groups=4, dropout=0.2)
        generator = torch.Generator().manual_seed(seed)
        for parameter in unet.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
        super().__init__(unet, model_cls=ConditionalUNet, model_config=unet.config)
        self.checkpoints = Checkpoints(self.accelerator, folder, ModelFolder("unet", self.ema), limit)

    def train(self, start: int, stop: int) -> None:
        def compute_loss(batch: int, micro_step: int) -> tuple[torch.Tensor, dict]:
            generator = torch.Generator().manual_seed(batch)
            x = torch.randn(2, 3, 8, 8, generator=generator)
            states = torch.randn(2, 4, 32, generator=generator)
            output = self.model(x, torch.tensor([batch, 500]), states).sample
            return F.mse_loss(output, x.flip(-1)), {}

        self.fit(compute_loss, list(range(start, stop)), start_step=start, max_train_steps=stop,
                 gradient_accumulation_steps=1)  # fmt: skip

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        ema = {key: value for key, value in self.ema.state_dict().items() if key != "shadow_params"}
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict()["state"],
            "rate": self.schedule.get_last_lr(),
            "average": self.ema.shadow_params,
            "ema": {key: float(value) for key, value in ema.items()},
        }


@pytest.fixture
def make_run(make_unet, tmp_path) -> Any:
    def make(seed: int = 0, limit: int | None = None, folder: str = "run") -> UNetRun:
        fresh()
        return UNetRun(make_unet, tmp_path / folder, seed, limit)

    return make


def test_three_steps_and_three_more_are_six(make_run):
    """Bit for bit: weights, AdamW's moments, learning rate, average; from other weights, in another run."""
    whole = make_run(folder="whole")
    whole.train(0, 6)

    first = make_run()
    first.train(0, 3)
    path = first.checkpoints.save(3)
    at_three = copy.deepcopy(first.state())

    second = make_run(seed=9)
    assert second.checkpoints.resume("latest") == 3
    assert_same(second.state(), at_three)
    second.train(3, 6)
    assert_same(second.state(), whole.state())
    assert second.state()["ema"]["optimization_step"] == 6

    third = make_run(seed=5)  # the averaged weights, as a model of their own
    assert third.checkpoints.resume(str(path)) == 3
    average = ConditionalUNet.from_pretrained(str(path / "unet_ema"))
    assert_same([p.data for p in average.parameters()], at_three["average"])
    assert_same(dict(ConditionalUNet.from_pretrained(str(path / "unet")).state_dict()), at_three["model"])
    assert not torch.equal(at_three["average"][0], next(iter(at_three["model"].values())))


def names(run: UNetRun) -> list[str]:
    folder = run.checkpoints.folder
    return sorted(path.name for path in folder.glob("checkpoint-*")) if folder.is_dir() else []


def test_an_interrupted_save_leaves_no_checkpoint(make_run, monkeypatch):
    run = make_run()
    run.checkpoints.save(1)
    weights = copy.deepcopy(dict(run.model.state_dict()))
    run.train(0, 1)
    with monkeypatch.context() as broken:

        def full(*_: Any, **__: Any) -> None:
            raise OSError("No space left on device")

        broken.setattr(torch, "save", full)  # after the weights, before the random states
        with pytest.raises(OSError, match="No space left"):
            run.checkpoints.save(2)
    assert run.checkpoints.steps() == [1] and "checkpoint-2" not in names(run)
    assert make_run(seed=3).checkpoints.resume("latest") == 1

    run = make_run()  # and the next run writes over what was left
    assert run.checkpoints.resume("latest") == 1
    assert_same(dict(run.model.state_dict()), weights)
    run.train(0, 1)
    run.checkpoints.save(2)
    assert names(run) == ["checkpoint-1", "checkpoint-2"]
    again = make_run(seed=4)
    assert again.checkpoints.resume("latest") == 2
    assert_same(again.state(), run.state())


def test_the_limit_keeps_the_newest(make_run):
    run = make_run(limit=2)
    for step in (8, 9, 10, 11):
        run.checkpoints.save(step)
    assert names(run) == ["checkpoint-10", "checkpoint-11"]
    unlimited = make_run(folder="all")
    for step in (1, 2, 3):
        unlimited.checkpoints.save(step)
    unlimited.checkpoints.save(3)  # over itself
    assert unlimited.checkpoints.steps() == [1, 2, 3]


def test_the_limit_never_takes_the_checkpoint_just_saved(make_run):
    """A run that begins anew, or from an older checkpoint, in a folder that holds later ones."""
    run = make_run(limit=1)
    for step in (200, 3):
        run.checkpoints.save(step)
        assert (run.checkpoints.folder / f"checkpoint-{step}" / "unet").is_dir()
    assert names(run) == ["checkpoint-3"]


def test_a_checkpoint_of_the_output_folder_goes_by_its_name(make_run):
    run = make_run()
    for step in (2, 4):
        run.checkpoints.save(step)
    assert run.checkpoints.resume("checkpoint-2") == 2
    assert run.checkpoints.resume(str(run.checkpoints.path(4))) == 4


def test_what_cannot_be_resumed(make_run, caplog):
    run = make_run()
    assert run.checkpoints.resume(None) == 0
    assert not caplog.records
    assert run.checkpoints.resume("latest") == 0  # nothing there yet
    assert caplog.messages == [f"no checkpoint in {run.checkpoints.folder}: starting from the beginning"]
    before = copy.deepcopy(run.state())
    (run.checkpoints.folder / "elsewhere").mkdir(parents=True)
    (run.checkpoints.folder / "checkpoint-7.partial").mkdir()
    for which in ("nowhere", "checkpoint-5", run.checkpoints.folder / "elsewhere",
                  run.checkpoints.folder / "checkpoint-7.partial"):  # fmt: skip
        with pytest.raises(
            ValueError, match="resume_from_checkpoint must be 'latest' or a checkpoint-STEP folder"
        ):
            run.checkpoints.resume(str(which))
    assert run.checkpoints.resume("latest") == 0
    assert_same(run.state(), before)


def test_a_loss_that_is_no_number_stops_before_the_weights_change(make_run):
    run = Run(perceptron())
    before = copy.deepcopy(dict(run.model.state_dict()))

    def compute_loss(batch: Any, micro_step: int) -> tuple[torch.Tensor, dict]:
        loss = regression(run.model)(batch, micro_step)[0]
        return (loss * float("nan") if micro_step == 1 else loss), {}

    with pytest.raises(FloatingPointError, match="step 1: the loss is nan"):
        run.fit(compute_loss, micro_batches())
    assert_same(dict(run.model.state_dict()), before)


# ------------------------------------------------------------ checkpoints that are not whole, or not ours


def cut(path: Path, keep: float = 0.7) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


DAMAGES = {
    "no weights": ("unet/diffusion_pytorch_model.safetensors", Path.unlink),
    "short weights": ("unet/diffusion_pytorch_model.safetensors", cut),
    "short average": ("unet_ema/diffusion_pytorch_model.safetensors", cut),
    "no config": ("unet/config.json", Path.unlink),
    "short optimizer": ("optimizer.bin", cut),
    "no schedule": ("scheduler.bin", Path.unlink),
}


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "older"])
def test_a_damaged_checkpoint_is_refused_and_latest_takes_the_one_before(listed, make_run, caplog):
    """Listed in a checkpoint.json, or as they were written before there was one."""
    run = make_run()
    run.checkpoints.save(1)
    whole = copy.deepcopy(run.state())
    run.train(0, 2)
    run.checkpoints.save(2)
    if not listed:
        for step in (1, 2):
            (run.checkpoints.path(step) / "checkpoint.json").unlink()
    newest = run.checkpoints.path(2)
    kept = newest.with_name("kept")
    newest.rename(kept)
    for name, damage in DAMAGES.values():
        shutil.copytree(kept, newest)
        damage(newest / name)
        again = make_run(seed=3)
        with pytest.raises(
            ValueError, match=f"checkpoint-2' cannot be used: .*({name}|unet has no safetensors)"
        ):
            again.checkpoints.resume(str(newest))
        caplog.clear()
        assert again.checkpoints.resume("latest") == 1
        assert_same(again.state(), whole)
        assert "checkpoint-2 cannot be used" in caplog.text and "trying the one before" in caplog.text
        shutil.rmtree(newest)
    kept.rename(newest)
    assert make_run(seed=3).checkpoints.resume("latest") == 2


def test_only_damaged_checkpoints_are_an_error_and_stay(make_run):
    run = make_run()
    run.checkpoints.save(1)
    (run.checkpoints.path(1) / "optimizer.bin").unlink()
    with pytest.raises(
        ValueError, match="no checkpoint in .* can be used; checkpoint-1: optimizer.bin is missing"
    ):
        make_run().checkpoints.resume("latest")
    assert names(run) == ["checkpoint-1"]


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"block_out_channels": (8, 24)},
            r"it holds another model: .* is \(.*\) in unet, and \(.*\) in this one",
        ),
        ({"attention_head_dim": 2}, "it holds another model: attention_head_dim is 4, not 2"),  # same shapes
    ],
)
def test_another_models_checkpoint_is_refused(config, message, make_run, make_unet, tmp_path):
    run = make_run()
    run.checkpoints.save(1)
    fresh()
    settings = {"block_out_channels": (8, 16), "norm_num_groups": 4} | config
    unet = make_unet(**settings)
    other = Run(unet, model_cls=ConditionalUNet, model_config=unet.config)
    checkpoints = Checkpoints(other.accelerator, tmp_path / "run", ModelFolder("unet", other.ema))
    before = copy.deepcopy(dict(unet.state_dict()))
    for which in ("latest", str(run.checkpoints.path(1))):
        with pytest.raises(ValueError, match=message):
            checkpoints.resume(which)
    assert_same(dict(unet.state_dict()), before)


def test_a_run_that_begins_anew_among_checkpoints_is_refused(make_run):
    run = make_run()
    run.checkpoints.save(7)
    with pytest.raises(ValueError, match="holds checkpoint-7: pass --resume_from_checkpoint latest"):
        make_run().checkpoints.resume(None)
    assert names(run) == ["checkpoint-7"]


def test_the_limit_takes_damaged_checkpoints_first(make_run):
    """And so never the last whole one."""
    run = make_run(limit=2)
    for step in (1, 2):
        run.checkpoints.save(step)
    cut(run.checkpoints.path(2) / "optimizer.bin")
    run.checkpoints.save(3)
    assert names(run) == ["checkpoint-1", "checkpoint-3"]


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(make_run):
    """Between its two renames the old one bears another name."""
    run = make_run()
    run.checkpoints.save(1)
    run.checkpoints.path(1).rename(run.checkpoints.folder / "checkpoint-1.replaced")
    (run.checkpoints.folder / "checkpoint-1.partial").mkdir()
    again = make_run(seed=3)
    assert again.checkpoints.resume("latest") == 1
    assert_same(again.state(), run.state())
    shutil.copytree(run.checkpoints.path(1), run.checkpoints.folder / "checkpoint-1.replaced")
    assert make_run().checkpoints.resume("latest") == 1  # and after both
    assert names(run) == ["checkpoint-1"]


def test_an_interrupt_while_a_checkpoint_is_replaced_loses_nothing(make_run, monkeypatch):
    """Wherever among its renames it comes."""
    for renames in (0, 1):
        run = make_run(folder=f"run-{renames}")
        run.checkpoints.save(1)
        before, made = copy.deepcopy(run.state()), []
        run.train(0, 1)

        def interrupted(path: Path, target: Path, allowed: int = renames, made: list = made) -> None:
            made.append(target)
            if len(made) > allowed:
                raise KeyboardInterrupt
            path.replace(target)

        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(Path, "rename", interrupted)
            run.checkpoints.save(1)
        again = make_run(seed=3, folder=f"run-{renames}")
        assert again.checkpoints.resume("latest") == 1
        assert_same(again.state(), before)


def test_changed_settings_are_told(make_run, caplog):
    run = make_run()
    run.checkpoints.settings = {"seed": 0, "pictures_a_step": 8}
    run.checkpoints.save(1, state={"place": 3})
    again = make_run()
    again.checkpoints.settings = {"seed": 0, "pictures_a_step": 4}
    assert again.checkpoints.resume("latest") == 1
    assert (
        "was saved with pictures_a_step 8; from here on it is 4" in caplog.text and "seed" not in caplog.text
    )
    assert again.checkpoints.state == {"place": 3}


# ------------------------------------------------------------ full disks, folders that cannot be written


@pytest.mark.parametrize("folder", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_an_error_before_training(folder, make_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"^output_dir {tmp_path / folder} cannot be written: "):
        make_run(folder=folder).checkpoints.resume(None)


def test_a_checkpoint_that_finds_no_room_costs_no_other(make_run, caplog):
    """Files of at most 20 kB: the weights do not fit."""
    run = make_run(limit=1)
    run.checkpoints.save(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert run.checkpoints.save(2, required=False) is None
        assert "checkpoint-2 could not be written" in caplog.text and "training goes on" in caplog.text
        with pytest.raises(
            OSError, match="checkpoint-3 could not be written .*; the checkpoints before it stand"
        ):
            run.checkpoints.save(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(run) == ["checkpoint-1"]
    assert make_run(seed=2).checkpoints.resume("latest") == 1
    assert run.checkpoints.save(4) is not None and names(run) == ["checkpoint-4"]


def test_a_full_disk(make_run, tmp_path):
    """Told before training where it is too small; where it fills up later, nothing written is lost."""
    with small_disk(tmp_path / "disk", megabytes=4) as disk:
        run = make_run(folder="disk/run", limit=1)
        assert run.checkpoints.resume(None) == 0
        run.checkpoints.save(1)
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
        with pytest.raises(OSError, match="checkpoint-2 could not be written"):
            run.checkpoints.save(2)
        again = make_run(folder="disk/run", limit=1)
        with pytest.raises(OSError, match=r"has \d+ MB free and its checkpoints need \d+ MB"):
            again.checkpoints.resume("latest")
        (disk / "other").unlink()
        assert again.checkpoints.resume("latest") == 1
        assert_same(again.state(), run.state())
        assert again.checkpoints.save(2) is not None


# ------------------------------------------------------------ processes


def test_auto_is_bf16_only_on_hardware_that_multiplies_in_it():
    """By what the kernel says of the CPU."""
    flags = set(Path("/proc/cpuinfo").read_text().split())  # of Linux; Features on Arm
    native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}) or torch.accelerator.is_available()
    assert resolve_precision("auto") == ("bf16" if native else "no")
    assert [resolve_precision(name) for name in (None, "no", "fp16", "bf16")] == [None, "no", "fp16", "bf16"]


@pytest.mark.parametrize("path", sorted(Path("training/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_recipe_asks_every_cpu_for_bf16(path):
    assert yaml.safe_load(path.read_text()).get("mixed_precision", "no") in ("no", "auto")


def test_a_run_in_fewer_processes_than_asked_for_is_an_error(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="num_processes must be the number of processes that run, 1, got 2"):
        make_accelerator(num_processes=2)
    fresh()
    assert make_accelerator(num_processes=1).num_processes == 1
    fresh()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # as accelerate's launcher leaves it for one of several
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ValueError, match="asked for several processes and started one: .*/cpu_2.yaml"):
        make_accelerator()
