"""Settings: dataclasses, filled from a YAML file and then from the command line."""

import dataclasses
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from transformers import HfArgumentParser

Config = TypeVar("Config")


def command_line() -> str:
    """How the running command was called: `python -m training.export`, or the file's name for a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def parse_config(
    config_class: type[Config], argv: list[str] | None = None, command: str | None = None
) -> Config:
    """Read `--config FILE.yaml`, if given, then the other arguments, which win over the file.

    A class with a field `config` has an argument of its own by that name, and no such file. `command` is what
    the usage line calls it; default `command_line()`.

    Raises:
        SystemExit: with one line that names the argument or key, its value and what is allowed.
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
    if "config" not in known:  # read above: here for --help
        parser.add_argument("--config", metavar="FILE.yaml", help="Settings; those given beside it win.")
    for action in parser._actions:  # what the file sets is no longer required, and is the new default
        if action.dest in from_file:
            action.required = False
        if action.type is Any:  # a mapping in the file, its JSON on the command line
            action.type = str
    parser.set_defaults(**from_file)
    try:
        config, *others = parser.parse_args_into_dataclasses(args=argv)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    for left in (other.config for other in others if other.config is not None):  # argparse takes --conf too
        raise SystemExit(f"--config must be written in full and given once, got {left!r} beside that")
    return config


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """The one kind of error that settings cause: it names the argument, the value and what is allowed."""
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def run(main: Callable[[], None], name: str) -> None:
    """main(), with the ValueErrors that this package raises as one line, `name: what is wrong`.

    Those that other libraries raise keep their traceback: they are no setting's fault that we know of.
    """
    home = Path(__file__).resolve().parents[1]
    try:
        main()
    except ValueError as error:
        raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if raised.parent.name in ("pipelines", "training", "components") and home in raised.parents:
            raise SystemExit(f"{name}: {error}") from error
        raise
