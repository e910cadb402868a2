"""Settings: dataclasses, filled from a YAML file and then from the command line.

A setting that several commands share is defined here once, in a group, with its help and its range. A
command's own dataclass inherits the groups that it needs and restates only the defaults that differ:

    class MySettings(RunSettings, AdamWSettings):
        train_batch_size: int = 256
        patch_size: int = setting("Side of a patch, in pixels.", 8, "at least 1")
"""

import dataclasses
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from training.run.optimizers import OPTIMIZERS
from training.run.precision import PRECISIONS

Config = TypeVar("Config")

# ------------------------------------------------------------ what a setting is


class Rule(NamedTuple):
    """The values that a setting may have; `allowed` completes "NAME must be ..."."""

    holds: Callable[[Any], bool]
    allowed: str


RULES = {  # rules shared by many settings, by their text
    "at least 1": lambda value: value >= 1,
    "0 or more": lambda value: value >= 0,
    "above 0": lambda value: value > 0,
    "in [0, 1]": lambda value: 0 <= value <= 1,
}


def setting(
    help: str, default: Any = dataclasses.MISSING, rule: Rule | str | Sequence[Any] | None = None
) -> Any:
    """A field of a settings class.

    Args:
        help: its --help text.
        default: its default (a list is copied); without one, the setting must be given.
        rule: its range: a Rule, the text of one of RULES, or the values to choose from.
    """
    if isinstance(rule, str):
        rule = Rule(RULES[rule], rule)
    elif rule is not None and not isinstance(rule, Rule):
        rule = Rule(rule.__contains__, f"one of {', '.join(map(str, rule))}")
    metadata: dict[str, Any] = {"help": help, "rule": rule}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise a ValueError unless `condition` holds. All errors in settings have this form: the argument, what
    is allowed, the value."""
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@dataclass_transform(kw_only_default=True)
class Settings:
    """The base of every settings class. Subclasses become keyword-only dataclasses; a field that restates an
    inherited one with a plain default keeps its help and its range."""

    rules: ClassVar[dict[str, Rule]] = {}

    def __init_subclass__(cls) -> None:
        inherited: dict[str, dataclasses.Field] = {}
        rules: dict[str, Rule] = {}
        for base in reversed(cls.__mro__[1:]):
            inherited |= getattr(base, "__dataclass_fields__", {})
            rules |= getattr(base, "rules", {})
        for name in inspect.get_annotations(cls):
            own = cls.__dict__.get(name, dataclasses.MISSING)
            if not isinstance(own, dataclasses.Field):
                own = setting(inherited[name].metadata["help"], own, rules.get(name))
            rules[name] = own.metadata["rule"]  # kept apart: the parser hands all metadata to argparse
            own.metadata = MappingProxyType({"help": own.metadata["help"]})
            setattr(cls, name, own)
        cls.rules = {name: rule for name, rule in rules.items() if rule is not None}
        dataclasses.dataclass(kw_only=True)(cls)

    def check(self) -> None:
        """Raise a ValueError that names the argument for any error that can be found before work starts. The
        base class checks each setting's own range; a subclass adds checks that involve several settings."""
        kinds = get_type_hints(type(self))
        for name, rule in self.rules.items():
            value, optional = getattr(self, name), type(None) in get_args(kinds[name])
            fits = (optional and value is None) or rule.holds(value)
            require(fits, name, value, rule.allowed + (", or none" if optional else ""))


# ------------------------------------------------------------ groups


class CacheSettings(Settings):
    cache_dir: str = setting("Where decoded pictures and embeddings, computed once, are kept.", "data/cache")


class DataSettings(CacheSettings):
    dataset: str = setting("Saved data set, picture folder or Hub name.", "data/emoji")


class SeedSettings(Settings):
    seed: int = setting("Seed of weights, batches, captions and noise.", 0)


class PictureSettings(DataSettings):
    resolution: int = setting("Side of the pictures, in pixels.", 64, "at least 1")


class ColumnSettings(Settings):
    caption_column: str | None = setting("Column of the captions; default caption or text.", None)


class PairSettings(PictureSettings):
    """The same pictures at two sizes."""

    dataset: str = "data/emoji-256"
    resolution: int = 256
    low_dataset: str = setting("Data set of the same pictures at the small size.", "data/emoji")
    low_resolution: int = setting("Side of the small pictures; divides resolution.", 64, "at least 1")


class NpmSettings(Settings):
    npm_dir: str = setting("Where training.emoji keeps its npm packages.", "data/npm")


class WordSettings(NpmSettings):
    wordnet_dir: str = setting("Folder of WordNet's own files.", "/usr/share/wordnet")


class RunSettings(CacheSettings, SeedSettings):
    """The settings of every training run."""

    output_dir: str = setting("Checkpoints, logs and the trained model go here.")
    train_batch_size: int = setting("Pictures for each process and micro-batch.", 32, "at least 1")
    max_train_steps: int | None = setting("Optimizer steps.", None, "at least 1")
    learning_rate: float = setting("Peak learning rate.", 1e-3, "above 0")
    mixed_precision: str | None = setting(
        "no, fp16, bf16, or auto: bf16 if fast here; default accelerate's.",
        None,
        Rule(PRECISIONS.__contains__, f"one of {PRECISIONS}"),
    )
    checkpointing_steps: int = setting("Steps between checkpoints.", 500, "at least 1")
    resume_from_checkpoint: str | None = setting("'latest' or a checkpoint folder.", None)


class TimeSettings(Settings):
    max_train_minutes: float | None = setting(
        "Stop after this many minutes of the main process's CPU time.", None
    )


class WarmUpSettings(Settings):
    lr_warmup_steps: int = setting("Steps of linear warm-up.", 100, "0 or more")


class AdamWSettings(WarmUpSettings):
    adam_weight_decay: float = setting("AdamW's weight decay.", 0.01, "0 or more")
    max_grad_norm: float = setting("Gradients are scaled down to this norm.", 1.0, "above 0")


class MuonSettings(WarmUpSettings):
    optimizer: str = setting(
        "adamw, or muon: Muon for the hidden matrices, AdamW for the rest.", "muon", OPTIMIZERS
    )
    muon_learning_rate: float = setting("Muon's peak learning rate, where it is used.", 1e-3, "above 0")
    lr_decay_steps: int = setting(
        "Steps at the end in which the learning rate falls linearly to 0.", 0, "0 or more"
    )


class AverageSettings(Settings):
    ema_decay: float | None = setting(
        "Decay of the weights' moving average once warm: 1 - (1 + step)^(-3/4) until then.", None, "in [0, 1]"
    )


class UNetSettings(Settings):
    unet: Any = setting("ConditionalUNet's config: a mapping (YAML), JSON or a JSON file.", None)
    noise_scheduler: Any = setting("DDPMScheduler's config, in the same forms.", None)
    compile: bool = setting("torch.compile the U-Net: slower for a minute or two, then faster.", False)


class InpaintingSettings(Settings):
    inpainting: bool = setting(
        "The U-Net also sees a mask and the masked picture; a saved U-Net is widened.", False
    )


class CaptionSettings(SeedSettings):
    canonical_caption: float = setting(
        "How often the first of a picture's captions is used.", 0.5, "in [0, 1]"
    )


class TimestepSettings(SeedSettings):
    timestep_shift: float = setting(
        "Above 1 draws noisier t more often, below 1 cleaner ones (Esser 2024, eq. 23).", 1.0, "above 0"
    )


class GuideSettings(DataSettings):
    """Settings for training a model on a pipeline's pictures, to guide the pipeline."""

    pretrained_model_name_or_path: str = setting(
        "The pipeline whose text tower, schedule and space are used.", "models/emoji"
    )
    splits: str = setting("Splits to train on, joined by +.", "train")
    patch_size: int = setting("Side of the patches, in pixels.", 4, "at least 1")
    shift: int = setting("Augmentation: shift by up to this many pixels.", 5, "0 or more")
    noised: bool = setting("Train on the pipeline's noised pictures.", True)


# ------------------------------------------------------------ parsing


def command_line() -> str:
    """How the running command was called: `python -m training.export`, or the name of the script's file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def parse_config(
    config_class: type[Config], argv: list[str] | None = None, command: str | None = None
) -> Config:
    """Read `--config FILE.yaml`, if given, then the other arguments, which override the file.

    A class that has its own field called `config` takes no such file. `command` is the name in the usage
    line, by default `command_line()`.

    Raises:
        SystemExit: an argument or a key of the file is wrong; one line names it, its value and what is
            allowed.
    """
    given = sys.argv[1:] if argv is None else argv
    argv = [part for one in given for part in (one.split("=", 1) if one.startswith("--config=") else [one])]
    known = {f.name for f in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    from_file: dict[str, Any] = {}
    if "--config" in argv and "config" not in known:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise SystemExit("--config needs the path of a YAML file")
        path = Path(argv[at + 1])
        del argv[at : at + 2]
        if not path.is_file():
            raise SystemExit(f"--config: there is no file {path}")
        from_file = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        unknown = sorted(set(from_file) - known)
        if unknown:
            raise SystemExit(f"{path}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
        kinds = get_type_hints(config_class)
        for name, value in from_file.items():
            if value is None and kinds[name] in (bool, int, float, str):
                raise SystemExit(f"{path}: {name} must be of type {kinds[name].__name__}, got null")
    parser = HfArgumentParser(config_class, prog=command or command_line())  # type: ignore[arg-type]
    if "config" not in known:  # already read above; added here for --help
        parser.add_argument(
            "--config", metavar="FILE.yaml", help="Settings file; arguments given with it override it."
        )
    for action in parser._actions:  # a setting in the file is no longer required, and is the new default
        if action.dest in from_file:
            action.required = False
        if action.type is Any:  # a mapping in the file, JSON on the command line
            action.type = str
    parser.set_defaults(**from_file)
    try:
        config, *others = parser.parse_args_into_dataclasses(args=argv)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    for left in (other.config for other in others if other.config is not None):  # argparse takes --conf too
        raise SystemExit(f"--config must be written in full and given once, got {left!r} beside that")
    return config


def run_command(main: Callable[[], None], name: str) -> None:
    """Call main() and show a ValueError raised by our own code as one line, `name: what is wrong`.

    Errors raised in other libraries keep their traceback.
    """
    root = Path(__file__).resolve().parents[2]
    try:
        main()
    except ValueError as error:
        raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if any(root / package in raised.parents for package in ("pipelines", "training")):
            raise SystemExit(f"{name}: {error}") from error
        raise
