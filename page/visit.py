"""The pictures of this visit, and restoring settings from a picture."""

import json
import math
from collections.abc import Callable
from typing import Any

import gradio as gr

from pipelines.drawing.images import read_settings

from .requests import split_prompt, told_plainly, user_error
from .widgets import QUIETLY, Tab

TABS = {"repaint": "edit", "extend": "edit", "restyle": "edit", "enlarge": "enlarge"}  # of a picture's task


def field_value(name: str, field: Any, text: str | None) -> Any:
    """What a widget shows for a setting in a PNG; its initial value if the PNG does not have this setting.

    Raises gr.Error for a value to which the widget could not be set by hand.
    """
    if text is None:
        return field.value
    if isinstance(field, gr.Checkbox):
        return text == "True"
    if isinstance(field, gr.Slider | gr.Number):
        try:
            number = float(text)
        except ValueError:
            raise user_error(
                f"The picture's settings do not fit: {name} is {text!r}, not a number."
            ) from None
        low, high = field.minimum, field.maximum
        if (low is not None and number < low) or (high is not None and number > high) or number != number:
            raise user_error(f"The picture's settings do not fit this page: {name} is {text}.")
        return int(number) if number.is_integer() else number
    if isinstance(field, gr.Dropdown | gr.Radio):
        known = {str(value): value for _shown, value in field.choices}
        return known.get(text, field.value)
    return text


def spread(settings: dict[str, str]) -> dict[str, str]:
    """Splits settings that have two widgets each. Raises gr.Error if they cannot be read."""
    try:
        if "guidance_interval" in settings:
            low, high = json.loads(settings["guidance_interval"])
            settings |= {"guidance_from": f"{low:g}", "guidance_to": f"{high if high < math.inf else 0:g}"}
        if "combined_prompts" in settings:
            words, weight = next(iter(json.loads(settings["combined_prompts"]).items()))
            settings |= {"combined_prompt": words, "combined_weight": str(weight)}
    except (ValueError, TypeError, AttributeError, StopIteration):
        raise user_error("The picture's settings do not fit this page.") from None
    return settings


def restore(path: str, tabs: dict[str, Tab], model: str) -> tuple[str, dict]:
    """(the tab that made a picture, updates of that tab's widgets), from the settings in its PNG."""
    with told_plainly():
        settings = spread(read_settings(path, quiet=True))
    settings.setdefault("clip_guidance_scale", "0")  # a PNG leaves it out if it was off
    name = TABS.get(settings.get("task", ""), "create")
    if name not in tabs:
        raise user_error("This picture was enlarged, and there is no upsampler here.")
    tab = tabs[name]
    settings |= {"new_each_time": "False", "size": settings["width"]}
    if "style" in tab.fields:
        settings["prompt"], settings["style"] = split_prompt(settings.get("prompt", ""))
    if name == "create" and settings.get("model", model) != model:
        gr.Warning(f"It was drawn by the model {settings['model']}; {model} draws another picture.")
    updates = {field: field_value(key, field, settings.get(key)) for key, field in tab.fields.items()}
    return name, updates | tab.show(path, settings)


def visit_strip(history: gr.State, tabs: dict[str, Tab], shown: gr.Tabs, model: str) -> None:
    """The pictures of the visit, below the tabs, and a place to drop a PNG."""
    with gr.Row(elem_id="visit"):
        with gr.Column(scale=4, min_width=300):
            gr.HTML("<h2>This visit</h2>", padding=False)
            pictures = gr.Gallery(
                show_label=False, format="png", columns=8, height=108, object_fit="contain",
                allow_preview=False, buttons=[], interactive=False, elem_id="history",
            )  # fmt: skip
        with gr.Column(scale=1, min_width=240):
            gr.HTML("<h2>Reopen a saved picture</h2>", padding=False)
            dropped = gr.File(show_label=False, file_types=["image"], height=128, elem_id="restore")
    history.change(lambda paths: paths, history, pictures, **QUIETLY)

    updated = [one for tab in tabs.values() for one in (*tab.fields.values(), *tab.shown)]
    outputs = list(dict.fromkeys([shown, *updated]))

    def bring_back(path: str) -> dict:
        name, updates = restore(path, tabs, model)
        return {shown: gr.Tabs(selected=name), **updates}

    def choose(history: list[str], chosen: gr.SelectData) -> dict:
        return bring_back(history[chosen.index])

    pictures.select(choose, history, outputs, **QUIETLY)
    path = gr.State(None)
    dropped.upload(lambda path: (path, None), dropped, [path, dropped], **QUIETLY).then(
        bring_back, path, outputs, **QUIETLY
    )


def send_button(text: str, tab: Tab, to: str, target: Tab, shown: gr.Tabs, elem_id: str) -> None:
    """A button that sends the picture of one tab to another, and switches to that tab."""
    receive: Callable[[str], dict] | None = target.receive
    assert receive is not None

    def send(path: str | None) -> dict:
        if path is None:
            raise user_error("There is no picture to send yet.")
        return {shown: gr.Tabs(selected=to), **receive(path)}

    gr.Button(text, size="sm", elem_id=elem_id).click(send, tab.picture, [shown, *target.received], **QUIETLY)
