"""What the tabs share: the words of prompts and errors, seeds, files that carry their settings."""

import functools
import inspect
import secrets
import uuid
from abc import ABCMeta
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image

from pipelines.drawing import png
from pipelines.drawing.images import to_rgb
from pipelines.drawing.request import ARGUMENTS

# What each drawing style adds to the prompt; the words are those of the training captions.
STYLE_PHRASES = {
    "3D": "3d style",
    "Flat": "flat style",
    "Noto": "noto style",
    "Twemoji": "twemoji style",
    "EmojiOne": "emojione style",
    "FxEmoji": "fxemoji style",
}
ANY_STYLE = "Any"

MAX_STEPS, MAX_GUIDANCE = 250, 15.0  # the model's folder knows the defaults
NEW_SEED, MAX_SEED = -1, 2**32 - 1  # -1 asks for a seed that nobody has to think of,
NEW_SEEDS = 10**6  # one below this, short enough to read out
MAX_VISIT = 60  # pictures of a visit that are kept to be seen again

# Whatever draws waits its turn: one picture at a time, from whichever tab.
MODEL_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class Tab(NamedTuple):
    """What the rest of the page needs to know of a tab."""

    fields: dict[str, gr.components.Component]  # the widget of each setting, by its name in a PNG
    picture: gr.State  # path of the picture that it shows, or None
    show: Callable[[str, dict[str, str]], dict]  # (path, settings of its PNG) -> updates, to show it again
    shown: list  # the widgets that `show` updates
    receive: Callable[[str], dict] | None = None  # path -> updates, to work on it
    received: list = []  # the widgets that `receive` updates


# ---------------------------------------------------------------------------------------------- words


def user_error(message: str) -> gr.Error:
    """An error meant for the person at the page or the API: shown to them, kept out of the log."""
    return gr.Error(message, print_exception=False)


@contextmanager
def told_plainly() -> Iterator[None]:
    """A pipeline's own words about what was asked of it reach the person who asked."""
    try:
        yield
    except ValueError as problem:
        raise user_error(str(problem)) from problem


def full_prompt(prompt: str, style: str) -> str:
    """The prompt with the words of its style: ("a red heart", "Noto") -> "a red heart, noto style"."""
    prompt = (prompt or "").strip()
    if not prompt:
        raise user_error("Please describe the picture: the prompt is empty.")
    return f"{prompt.rstrip(',. ')}, {STYLE_PHRASES[style]}" if style in STYLE_PHRASES else prompt


def split_prompt(words: str) -> tuple[str, str]:
    """(prompt, style) of which `full_prompt` makes these words."""
    for style, phrase in STYLE_PHRASES.items():
        if words.endswith(f", {phrase}"):
            return words.removesuffix(f", {phrase}"), style
    return words, ANY_STYLE


def whole_seed(seed: float | None) -> int:
    """The seed as an integer; a cleared field or -1 gets a new one."""
    if seed is None or seed == NEW_SEED:
        return secrets.randbelow(NEW_SEEDS)
    try:
        number = float(seed)
    except ValueError:
        number = float("nan")
    if not number.is_integer() or not 0 <= number <= MAX_SEED:
        raise user_error(
            f"The seed must be a whole number from 0 to {MAX_SEED}, or -1 for a new one; it is {seed}."
        )
    return int(number)


def next_seed(seed: float | None, new_each_time: bool) -> float | None:
    """What the seed field shows from now on: its own value, or a new seed when the box is ticked."""
    return secrets.randbelow(NEW_SEEDS) if new_each_time else seed


# -------------------------------------------------------------------------------------------- widgets


class NoStubs(type(gr.Image)):  # type: ignore[misc]
    """Gradio's own metaclass writes a .pyi beside the source of every component; this one writes nothing."""

    def __new__(cls, *parts: Any) -> Any:
        return ABCMeta.__new__(cls, *parts)


class Upload(gr.Image, metaclass=NoStubs):
    """gr.Image that hands over the file as it came, for `read_picture` to say what is wrong with it."""

    is_template = True  # for Gradio: drawn as gr.Image, not a component with code of its own

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path


def upload(**options: Any) -> Upload:
    options = {"sources": ["upload", "clipboard"], "buttons": [], "image_mode": None} | options
    return Upload(type="filepath", format="png", **options)


def seed_widgets(prefix: str = "") -> tuple[gr.Number, gr.Checkbox]:
    with gr.Group():
        seed = gr.Number(
            NEW_SEED,
            label="Seed",
            info="The same seed draws the same picture; -1 picks a new one.",
            elem_id=f"{prefix}seed",
            elem_classes="seed",
        )
        new_each_time = gr.Checkbox(True, label="New seed each time", elem_id=f"{prefix}new_each_time")
    return seed, new_each_time


def style_widget(prefix: str = "") -> gr.Dropdown:
    return gr.Dropdown([ANY_STYLE, *STYLE_PHRASES], value=ANY_STYLE, label="Style", elem_id=f"{prefix}style")


def negative_widget(prefix: str = "") -> gr.Textbox:
    return gr.Textbox(
        "",
        label="Negative prompt",
        info="What to keep out of the picture.",
        placeholder="a hat",
        elem_id=f"{prefix}negative_prompt",
        elem_classes="bordered",
    )


def steps_widget(default: int, prefix: str = "") -> gr.Slider:
    return gr.Slider(
        ARGUMENTS["num_inference_steps"].metadata["rule"].low,
        MAX_STEPS,
        value=default,
        step=1,
        precision=0,
        label="Steps",
        info="More are finer and slower.",
        elem_id=f"{prefix}num_inference_steps",
    )


def guidance_widget(default: float, prefix: str = "") -> gr.Slider:
    return gr.Slider(
        1,
        MAX_GUIDANCE,
        value=default,
        step=0.1,
        label="Guidance",
        info="More follows the words more closely; 1 is off.",
        elem_id=f"{prefix}guidance_scale",
    )


# ---------------------------------------------------------------------------------------- names of before


def old_name(widget: gr.components.Component) -> gr.components.Component:
    """A hidden, empty field with the limits of `widget`, for the name that its argument had in 0.1."""
    hidden: dict[str, Any] = {"label": f"Old name of: {widget.label}", "visible": False}
    if isinstance(widget, Upload):
        return upload(**hidden)
    if isinstance(widget, gr.Dropdown):
        return gr.Dropdown(widget.choices, value=None, **hidden)
    limits = {"minimum": widget.minimum, "maximum": widget.maximum, "precision": widget.precision}
    return gr.Number(None, **limits, **hidden)


def takes_old_names(**renamed: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes an event take further optional parameters, the names that some had in 0.1: old="new". Such a
    value goes to the new name, with a warning to the caller."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        names = [*signature.parameters, *renamed]

        def settle(values: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
            call = dict(zip(names, values, strict=False)) | given
            for old, new in renamed.items():
                value = call.pop(old, None)
                if value is not None:
                    gr.Warning(f"`{old}` is now `{new}`.")
                    call[new] = value
            return call

        def events(*values: Any, **given: Any) -> Iterator[Any]:
            yield from function(**settle(values, given))

        def event(*values: Any, **given: Any) -> Any:
            return function(**settle(values, given))

        made: Any = functools.wraps(function)(events if inspect.isgeneratorfunction(function) else event)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        added = [inspect.Parameter(old, kind, default=None) for old in renamed]
        made.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])
        return made

    return decorate


def callback(progress: gr.Progress, total: int, desc: str = "Drawing") -> Callable[..., dict]:
    """A pipeline's `callback_on_step_end` that counts up to `total` steps, and then from the start again."""
    done = 0
    progress((0, total), desc=desc)

    def report(_pipe: Any, _step: int, _timestep: Any, _tensors: dict) -> dict:
        nonlocal done
        done = done % total + 1
        progress((done, total), desc=desc)
        return {}

    return report


# ----------------------------------------------------------------------------------------------- files


def read_picture(path: str | None, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """An uploaded picture of any mode, in RGB or as `convert` returns it; see `png.open_picture`."""
    if path is None:
        raise user_error("There is no picture yet: choose one first, or send one here from another tab.")
    with told_plainly():
        return png.open_picture(path, convert)


def save_picture(image: Image.Image, pipe: Any, name: str, settings: dict[str, Any]) -> str:
    """Writes a PNG that carries its settings, where Gradio serves it from; its path."""
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    about = {
        "scheduler": type(pipe.scheduler).__name__,
        "model": Path(pipe.name_or_path).name,
        "Software": "Corgi",
    }
    return str(png.write_picture(image, folder, name, png.settings_of(settings) | about))


def file_name(words: str, seed: int) -> str:
    return f"{png.slug(words)}_seed{seed}"


def remember(history: list[str], paths: list[str]) -> list[str]:
    """The visit's pictures, newest first."""
    return [*reversed(paths), *history][:MAX_VISIT]


def default_steps(pipe: Any) -> int:
    return pipe.config.default_num_inference_steps


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
