"""Groups of settings: what a subclass inherits, which ranges hold, and that no setting of before is gone."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from places import ROOT
from safetensors.torch import load_file

from training import text_to_image
from training.run.settings import RunSettings, Settings, parse_config, setting

DATA = ROOT / "tests" / "data"
RECORD = json.loads((DATA / "settings.json").read_text(encoding="utf-8"))  # of version 0, by class


class Base(Settings):
    steps: int | None = setting("How many steps.", None, "at least 1")
    share: float = setting("How often.", 0.5, "in [0, 1]")
    names: list[str] = setting("What is drawn.", ["cat"])


class Narrow(Base):
    steps: int = 10
    rate: float = setting("How fast.", 0.1, "above 0")

    def check(self) -> None:
        super().check()
        if self.rate > self.share:
            raise ValueError("rate above share")


def test_a_restated_default_keeps_its_help_and_its_range() -> None:
    own = {field.name: field for field in dataclasses.fields(Narrow)}  # type: ignore[arg-type]
    assert own["steps"].metadata["help"] == "How many steps." and own["steps"].default == 10
    Narrow().check()
    with pytest.raises(ValueError, match="^steps must be at least 1, got 0$"):
        Narrow(steps=0).check()
    with pytest.raises(ValueError, match="^steps must be at least 1, or none, got 0$"):
        Base(steps=0).check()
    Base(steps=None).check()
    with pytest.raises(ValueError, match="rate above share"):
        Narrow(rate=0.6).check()


def test_lists_are_not_shared() -> None:
    first, second = Base(), Base()
    first.names.append("dog")
    assert second.names == ["cat"] and Base().names == ["cat"]


def test_groups_are_parsed() -> None:
    found = parse_config(Narrow, ["--steps", "3", "--names", "a", "b"])
    assert (found.steps, found.share, found.names, found.rate) == (3, 0.5, ["a", "b"], 0.1)
    with pytest.raises(SystemExit):
        parse_config(RunSettings, [])  # output_dir must be given


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        ("at least 1", [1, 7], [0, -1]),
        ("0 or more", [0, 0.5], [-0.1]),
        ("above 0", [1e-9], [0, -1]),
        ("in [0, 1]", [0, 0.3, 1], [-0.1, 1.1]),
        (("a", "b"), ["a", "b"], ["c", None]),
    ],
)
def test_ranges(rule: Any, inside: list[Any], outside: list[Any]) -> None:
    holds = setting("", None, rule).metadata["rule"].holds
    assert all(map(holds, inside)) and not any(map(holds, outside))


@pytest.mark.parametrize("place", RECORD)
def test_every_setting_of_before_is_there_with_its_default(place: str) -> None:
    module, name = place.split(":")
    config = getattr(importlib.import_module(module), name)
    own = {field.name: field for field in dataclasses.fields(config)}
    for setting_name, default in RECORD[place].items():
        field = own[setting_name]
        if default == "REQUIRED":
            assert field.default is field.default_factory is dataclasses.MISSING, setting_name
        elif isinstance(default, list):
            assert field.default_factory() == default, setting_name
        else:
            assert field.default == default, setting_name


def test_a_checkpoint_of_before_goes_on(make_pipeline: Any, tmp_path: Path) -> None:
    """Version 0 trained adapters to step 3, and to step 5; from the first, this one reaches the second."""
    make_pipeline().save_pretrained(tmp_path / "model")
    shutil.copytree(DATA / "lora_checkpoint" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = {
        "pretrained_model_name_or_path": tmp_path / "model", "train_data_dir": DATA / "emoji64",
        "output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache", "rank": 1, "lora_layers": "to_k",
        "train_batch_size": 2, "max_train_steps": 5, "report_to": "none", "learning_rate": 0.01,
        "lr_warmup_steps": 0, "resume_from_checkpoint": "latest",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["text_to_image", *(f"--{key}={value}" for key, value in arguments.items())]
        )
        text_to_image.main()
    found = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    expected = load_file(DATA / "lora_checkpoint" / "step_5.safetensors")
    began = load_file(DATA / "lora_checkpoint" / "checkpoint-3" / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert max(float((expected[key] - began[key]).abs().max()) for key in expected) > 0.01


def test_the_demonstration_of_text_concat_channels_trains(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    file = DATA.parent.parent / "training" / "configs" / "text_concat.yaml"
    argv = ["text_to_image", "--config", str(file), "--output_dir", str(tmp_path / "run")]
    argv += ["--cache_dir", str(tmp_path / "cache"), "--max_train_steps", "2", "--train_batch_size", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*argv, "--train_data_dir", str(DATA / "emoji64"), "--report_to", "none"])
        text_to_image.main()
    weights = load_file(tmp_path / "run/checkpoint-2/unet/diffusion_pytorch_model.safetensors")
    average = load_file(tmp_path / "run/checkpoint-2/unet_ema/diffusion_pytorch_model.safetensors")
    key = "pooled_text_concat_proj.weight"
    assert weights[key].shape == (8, 256) and not torch.equal(weights[key], average[key])
