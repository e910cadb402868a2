"""Flags of the command line: the arguments of `drawing.request.Request`, and what they were called in 0.1."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .drawing.request import ARGUMENTS

RENAMED = {  # flags of 0.1
    "--num-images": "num_images_per_prompt",
    "--steps": "num_inference_steps",
    "--guidance": "guidance_scale",
    "--classifier-guidance": "classifier_guidance_scale",
    "--class": "class_labels",
    "--best-of": "num_candidates",
    "--clip-model": "clip_guidance_model",
}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class Store(argparse.Action):
    """Stores a value and, in `flags`, the flag that gave it, for errors. Old flags print their new name."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        name, given = self.dest, option or ""
        if name == "clip_guidance" and re.fullmatch(r"[-+]?[\d.].*|[-+]?(inf|nan).*", value, re.IGNORECASE):
            name = "clip_guidance_scale"  # a number: what the flag meant in 0.1
            try:
                value = float(value)
            except ValueError:
                parser.error(f"argument {given}: invalid float value: {value!r}")
        if given in RENAMED or name != self.dest:
            print(f"{given} is now {flag(name)}", file=sys.stderr)
        namespace.flags[name] = given
        setattr(namespace, name, value)


def add_arguments(parser: argparse.ArgumentParser, tasks: Sequence[str]) -> None:
    """Adds a flag for each argument of these tasks, and for the old names of some."""
    for name, known in ARGUMENTS.items():
        kind, only = known.metadata["kind"], known.metadata["only"]
        if kind is None or not set(only) & set(tasks):
            continue
        options: dict[str, Any] = {
            "type": json.loads if kind is dict else kind,
            "metavar": kind.__name__.upper(),
        }
        if kind is bool:
            options = {"nargs": "?", "const": True, "type": lambda text: text.lower() in ("1", "true", "yes")}
        elif kind is tuple:
            options = {"nargs": 2, "type": float, "metavar": ("LO", "HI")}
        elif kind is dict:
            options["metavar"] = "JSON"
        tell = known.metadata["help"] + ("" if known.default is None else f" Default: {known.default}.")
        add(parser, name, tell.replace("%", "%%"), **options)


def add(parser: argparse.ArgumentParser, name: str, tell: str, **options: Any) -> None:
    settings: dict[str, Any] = {"dest": name, "action": Store, "default": argparse.SUPPRESS} | options
    spellings = dict.fromkeys([flag(name), f"--{name}"])
    parser.add_argument(next(iter(spellings)), help=tell, **settings)
    for other in [*list(spellings)[1:], *(old for old, new in RENAMED.items() if new == name)]:
        parser.add_argument(other, help=argparse.SUPPRESS, **settings)
