"""The training loop against one written by hand, bit for bit; checkpoints whole or absent; resume."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from pipelines import ConditionalUNet
from training.loop import Checkpoints, StepResult, fit

STEPS, PARTS, BATCH = 6, 2, 4


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state for the whole process; each test here starts anew."""
    yield
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
        self.checkpoints = Checkpoints(self.accelerator, folder, "unet", self.ema, limit)

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
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
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


def test_what_cannot_be_resumed(make_run):
    run = make_run()
    assert run.checkpoints.resume(None) == 0
    assert run.checkpoints.resume("latest") == 0  # nothing there yet
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
