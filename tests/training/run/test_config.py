"""Settings: what wins over what, and what is refused."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from places import ROOT

from pipelines.components import conditional_unet
from training.autoencoder import AutoencoderConfig
from training.clip import ClipTrainingConfig
from training.emoji import EmojiConfig
from training.evaluation.settings import EvaluationConfig
from training.export import ExportConfig
from training.run.settings import parse_config, require, run_command
from training.text_to_image import TextToImageConfig

CONFIGS = ROOT / "training" / "configs"


@dataclass
class Settings:
    output_dir: str = field(metadata={"help": "Required."})
    rate: float = 1e-3
    steps: int = 10
    flip: bool = False
    average: bool = True
    name: str | None = None
    prompts: list[str] = field(default_factory=list)
    unet: Any = None


def parse(text: str, folder: Path, *arguments: str) -> Settings:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_config(Settings, ["--config", str(path), *arguments])


def test_defaults_then_file_then_command_line(tmp_path):
    text = (
        "output_dir: from/file\nrate: 4e-4\nsteps: 20\nflip: true\naverage: false\nprompts: [a cat, a dog]\n"
    )
    assert parse(text, tmp_path) == Settings("from/file", 4e-4, 20, True, False, None, ["a cat", "a dog"])
    arguments = [
        "--steps",
        "30",
        "--output_dir",
        "typed",
        "--flip",
        "false",
        "--average",
        "--prompts",
        "x",
        "y z",
    ]
    assert parse(text, tmp_path, *arguments) == Settings("typed", 4e-4, 30, False, True, None, ["x", "y z"])
    assert parse_config(Settings, ["--output_dir", "only"]) == Settings("only")


def test_the_command_line_wins_before_the_file_too(tmp_path):
    (tmp_path / "settings.yaml").write_text("output_dir: a\nsteps: 2\n")
    config = parse_config(Settings, ["--steps", "3", "--config", str(tmp_path / "settings.yaml")])
    assert (config.output_dir, config.steps) == ("a", 3)


def test_mappings_stay_mappings_and_nothing_is_nothing(tmp_path):
    config = parse("output_dir: a\nunet:\n  sample_size: 64\n  widths: [1, 2]\nname: null\n", tmp_path)
    assert config.unet == {"sample_size": 64, "widths": [1, 2]} and config.name is None
    assert parse("output_dir: a\nunet: {b: 1}\n", tmp_path, "--unet", '{"c": 2}').unet == '{"c": 2}'


def test_an_unknown_key_is_named(tmp_path):
    with pytest.raises(SystemExit, match="settings.yaml: unknown setting 'learning_rat'; known are .*steps"):
        parse("output_dir: a\nlearning_rat: 1\n", tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("rate", "float"), ("steps", "int"), ("flip", "bool")])
def test_nothing_where_something_is_needed_is_named(name, kind, tmp_path):
    with pytest.raises(SystemExit, match=f"settings.yaml: {name} must be of type {kind}, got null"):
        parse(f"output_dir: a\n{name}: null\n", tmp_path)


def test_an_unknown_argument_is_named():
    with pytest.raises(SystemExit, match="--nonsense"):
        parse_config(Settings, ["--output_dir", "a", "--nonsense", "1"])


def test_the_file_may_follow_an_equals_sign(tmp_path):
    (tmp_path / "a=b.yaml").write_text("output_dir: a\nsteps: 7\n", encoding="utf-8")
    assert parse_config(Settings, [f"--config={tmp_path / 'a=b.yaml'}"]).steps == 7


@pytest.mark.parametrize("further", [["--conf", "b.yaml"], ["--config", "b.yaml"]])
def test_no_file_is_passed_over(further, tmp_path):
    with pytest.raises(SystemExit, match="--config must be written in full and given once, got 'b.yaml'"):
        parse("output_dir: a\n", tmp_path, *further)


@pytest.mark.parametrize("module", [["training.export"], ["training.evaluate", "styles"]])
def test_usage_is_what_one_types(module):
    ran = subprocess.run(
        [sys.executable, "-m", *module, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert " ".join(ran.stdout.split()).startswith(f"usage: python -m {' '.join(module)} [-h]")


def test_a_missing_file_and_a_missing_name(tmp_path):
    with pytest.raises(SystemExit, match="--config: there is no file .*nowhere.yaml"):
        parse_config(Settings, ["--config", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(SystemExit, match="--config needs the path"):
        parse_config(Settings, ["--output_dir", "a", "--config"])


@pytest.mark.parametrize(
    "text, arguments, name",
    [
        ("steps: 3\n", [], "output_dir"),  # still required
        ("output_dir: a\nsteps: many\n", [], "steps"),
        ("output_dir: a\n", ["--rate", "fast"], "rate"),
    ],
)
def test_what_argparse_refuses_names_the_argument(text, arguments, name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(text, tmp_path, *arguments)
    assert stopped.value.code == 2
    assert f"--{name}" in capsys.readouterr().err.splitlines()[-1]


def test_require():
    require(True, "steps", 1, "at least 1")
    with pytest.raises(ValueError, match="^steps must be at least 1, got 0$"):
        require(False, "steps", 0, "at least 1")


@pytest.mark.parametrize(
    "config",
    [AutoencoderConfig, ClipTrainingConfig, EmojiConfig, EvaluationConfig, ExportConfig, TextToImageConfig],
)
def test_every_command_can_show_its_help(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(config, ["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--config" in shown
    for name, setting in config.__dataclass_fields__.items():
        assert f"--{name}" in shown
        assert " ".join(setting.metadata["help"].split())[:12] in shown


@pytest.mark.parametrize(
    "name, config",
    [
        ("autoencoder", AutoencoderConfig),
        ("clip", ClipTrainingConfig),
        ("judge", ClipTrainingConfig),
    ],
)
def test_the_configs_of_the_repository_are_read(name, config):
    assert parse_config(config, ["--config", str(CONFIGS / f"{name}.yaml")]).output_dir == f"runs/{name}"


@pytest.mark.parametrize(
    "name, kind, processes, wraps",
    [
        ("cpu_2", "MULTI_GPU", 2, set()),
        ("gpu_1", "NO", 1, set()),
        ("gpu_ddp", "MULTI_GPU", 2, set()),
        ("gpu_fsdp", "FSDP", 2, {"BasicTransformerBlock", "ResnetBlock2D"}),
    ],
)
def test_accelerate_reads_its_configs(name, kind, processes, wraps):
    """By its own reader, which refuses keys that it does not know; the layers that FSDP wraps are ours."""
    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes, config.use_cpu) == (kind, processes, False)
    named = (config.fsdp_config or {}).get("fsdp_transformer_layer_cls_to_wrap", "")
    assert {layer for layer in named.split(",") if layer} == wraps
    assert all(hasattr(conditional_unet, layer) for layer in wraps)
    assert len(list((CONFIGS / "accelerate").iterdir())) == 4


def test_errors_of_settings_are_one_line_and_all_others_keep_their_traceback():
    with pytest.raises(SystemExit, match=r"^training\.mine: steps must be at least 1, got 0$"):
        run_command(lambda: require(False, "steps", 0, "at least 1"), "training.mine")
    with pytest.raises(ValueError, match="invalid literal"):
        run_command(lambda: print(int("ten")), "training.mine")
    with pytest.raises(ValueError, match="nacceptable pattern"):  # raised in a library that ours called
        run_command(lambda: print(list(Path(".").glob(""))), "training.mine")
    with pytest.raises(KeyError):
        run_command(lambda: print({}["steps"]), "training.mine")
