"""The widgets: a table of those that are settings, and the parts that several tabs build."""

from abc import ABCMeta
from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr

from pipelines import TextToImagePipeline
from pipelines.drawing.request import ARGUMENTS

from .requests import ANY_STYLE, NEW_SEED, STYLE_PHRASES, next_seed

MAX_STEPS, MAX_GUIDANCE, MAX_IMAGES = 250, 15.0, 9  # the defaults are in the model's folder
NO_CLIP = (
    "CLIP guidance and best of n need a CLIP, which this model does not have: set CORGI_GUIDANCE to a folder "
    "with a noisy_clip in it, or CORGI_CLIP to a CLIP's own folder, and restart the page."
)
NO_CLASSIFIER = (
    "Classifier guidance needs a classifier, which this model does not have: set CORGI_GUIDANCE to a folder "
    "with a noisy_classifier in it, and restart the page."
)

# Whatever draws waits its turn: one picture at a time, from whichever tab.
MODEL_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

Fields = dict[str, gr.components.Component]  # widgets by the names of their settings


class Tab(NamedTuple):
    """What the rest of the page needs to know about a tab."""

    fields: Fields  # the widget of each setting, by its name in a PNG
    picture: gr.State  # path of the picture that the tab shows, or None
    show: Callable[[str, dict[str, str]], dict]  # (path, settings of its PNG) -> updates, to show it again
    shown: list  # the widgets that `show` updates
    sending: gr.Row  # holds the buttons that send the picture to other tabs
    receive: Callable[[str], dict] | None = None  # path -> updates, to work on it
    received: list = []  # the widgets that `receive` updates


# ---- settings


class Setting(NamedTuple):
    """A widget: its class, its texts, and its options."""

    kind: type[gr.components.Component]
    label: str
    info: str | None = None
    options: dict[str, Any] = {}


WHOLE = {"step": 1, "precision": 0}
# Sliders take their ends and initial value from the argument's rule and default unless these are given.
SETTINGS = {
    "style": Setting(
        gr.Dropdown, "Style", None, {"choices": [ANY_STYLE, *STYLE_PHRASES], "value": ANY_STYLE}
    ),
    "num_images_per_prompt": Setting(gr.Slider, "Pictures", None, {"maximum": MAX_IMAGES, **WHOLE}),
    "num_inference_steps": Setting(
        gr.Slider, "Steps", "More are finer and slower.", {"maximum": MAX_STEPS, **WHOLE}
    ),
    "guidance_scale": Setting(
        gr.Slider, "Guidance", "More follows the words more closely; 1 is off.",
        {"minimum": 1, "maximum": MAX_GUIDANCE, "step": 0.1},
    ),
    "guidance_rescale": Setting(
        gr.Slider, "Guidance rescale", "Tones down colours that strong guidance overdoes; 0 is off.",
        {"step": 0.05},
    ),
    "negative_prompt": Setting(
        gr.Textbox, "Negative prompt", "What to keep out of the picture.",
        {"value": "", "placeholder": "a hat"},
    ),
    "guidance_from": Setting(
        gr.Number, "Guide above noise level", "Guidance is off where there is less noise; 0 is no limit.",
        {"value": 0, "minimum": 0, "step": 0.1},
    ),
    "guidance_to": Setting(
        gr.Number, "Guide up to noise level", "Guidance is off where there is more; 0 is no limit.",
        {"value": 0, "minimum": 0, "step": 0.1},
    ),
    "combined_prompt": Setting(
        gr.Textbox, "Second prompt", "Drawn together with the first.",
        {"value": "", "placeholder": "a crown"},
    ),
    "combined_weight": Setting(
        gr.Slider, "Weight of the second prompt", "The first prompt's is 1; below 0 steers away.",
        {"minimum": -2, "maximum": 2, "value": 0.7, "step": 0.1},
    ),
    "attention_words": Setting(
        gr.Textbox, "Attention to words", "Shows where the picture looks when it reads these.",
        {"value": "", "placeholder": "corgi, hat"},
    ),
    "clip_guidance_scale": Setting(
        gr.Slider, "CLIP guidance", "Pulls towards what a CLIP finds in the words; 0 is off.",
        {"maximum": 10, "step": 0.5},
    ),
    "clip_guidance": Setting(
        gr.Radio, "By which CLIP", "One trained on noised pictures, or a clean one."
    ),
    "num_candidates": Setting(
        gr.Slider, "Best of", "Draws this many for each picture; keeps the best by CLIP and kind.",
        {"maximum": 9, **WHOLE, "min_width": 240},  # narrower, a phone would break the help at every word
    ),
    "classifier_guidance_scale": Setting(
        gr.Slider, "Classifier guidance",
        "Pulls towards a kind of picture, at 2 to 8, or a style, at 300; 0 is off.",
        {"maximum": 300, "step": 1},
    ),
    "class_labels": Setting(gr.Dropdown, "Kind of picture", "What the classifier should see."),
    "strength": Setting(
        gr.Slider, "Strength", "How far it may go from the picture; 1 keeps almost nothing.",
        {"minimum": 0.05, "value": 0.7, "step": 0.05},
    ),
    "context": Setting(
        gr.Slider, "Surroundings", "How much of the picture is seen around the painted part, in percent.",
        {"minimum": 0, "maximum": 100, "value": 100, "step": 5},
    ),
    "jump_n_sample": Setting(
        gr.Slider, "Resampling",
        "Repeats steps this often to fit new and old together; takes that much longer.",
        {"maximum": 10, **WHOLE},
    ),
    "noise_level": Setting(
        gr.Slider, "Noise level", "More invents more: for pictures that have faults of their own.", WHOLE
    ),
}  # fmt: skip
ADVANCED = (
    "num_inference_steps guidance_scale guidance_rescale",
    "negative_prompt guidance_from guidance_to",
    "combined_prompt combined_weight",
    "clip_guidance_scale clip_guidance num_candidates",
    "classifier_guidance_scale class_labels",
)


def widget(name: str, prefix: str = "", **options: Any) -> Any:
    """The widget of a setting, with further options; its elem_id is `prefix` and the name."""
    kind, label, info, known = SETTINGS[name]
    if kind is gr.Slider and name in ARGUMENTS:
        rule, default = ARGUMENTS[name].metadata["rule"], ARGUMENTS[name].default
        known = {"minimum": rule.low, "maximum": rule.high, "value": default} | known
    if kind in (gr.Textbox, gr.Number):
        known = {"elem_classes": "bordered"} | known
    return kind(label=label, info=info, elem_id=f"{prefix}{name}", **known | options)


def default_steps(pipe: Any) -> dict[str, Any]:
    return {"value": pipe.config.default_num_inference_steps}


def advanced_widgets(pipe: TextToImagePipeline, last: str, prefix: str = "") -> Fields:
    """The widgets under "Advanced" in a tab, with one setting, `last`, that only this tab has.

    Guidance and ranking by other networks are hidden if the pipeline has no such networks.
    """
    clips = [("noised", pipe.noisy_clip), ("clean", pipe.clip_guidance_model)]
    forms = [form for form, clip in clips if clip is not None]
    labels = [] if pipe.noisy_classifier is None else list(pipe.noisy_classifier.config.labels)
    by_default = not prefix and pipe.noisy_clip is not None  # a model's own is for text to image
    own: dict[str, dict[str, Any]] = {
        "num_inference_steps": default_steps(pipe),
        "guidance_scale": {"value": pipe.config.default_guidance_scale},
        "clip_guidance_scale": {"value": pipe.config.default_clip_guidance_scale if by_default else 0},
        "clip_guidance": {
            "choices": forms or ["noised"],
            "value": [*forms, "noised"][0],
            "visible": len(forms) > 1,
        },
        "class_labels": {"choices": labels, "value": labels[0] if labels else None},
    }
    fields: Fields = {}
    with gr.Accordion("Advanced", open=False, elem_id=f"{prefix}more"):
        for row in ADVANCED:
            names = [*row.split(), *([last] if "combined_prompt" in row else [])]
            there = forms if "clip_guidance" in names else labels if "class_labels" in names else True
            with gr.Row(equal_height=True, visible=bool(there)):
                fields |= {name: widget(name, prefix, **own.get(name, {})) for name in names}
        for missing in [NO_CLIP] * (not forms) + [NO_CLASSIFIER] * (not labels):
            gr.HTML(f"<p>{missing}</p>", elem_classes="note")
    return fields


def seed_widgets(prefix: str = "") -> Fields:
    info = "The same seed draws the same picture; -1 picks a new one."
    with gr.Group():
        seed = gr.Number(NEW_SEED, label="Seed", info=info, elem_id=f"{prefix}seed", elem_classes="seed")
        new_each_time = gr.Checkbox(True, label="New seed each time", elem_id=f"{prefix}new_each_time")
    return {"seed": seed, "new_each_time": new_each_time}


def prompt_row(
    placeholder: str, button: str, prefix: str = "", **options: Any
) -> tuple[gr.Textbox, gr.Button]:
    """The large field for the prompt, and the button beside it."""
    looks = {"show_label": False, "container": False, "max_lines": 3, "scale": 5, "min_width": 320}
    where = {"elem_id": f"{prefix}prompt", "elem_classes": "prompt"}
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(label="Prompt", placeholder=placeholder, **looks, **where, **options)
        go = gr.Button(
            button, variant="primary", scale=1, min_width=140, elem_id=f"{prefix}go", elem_classes="go"
        )
    return prompt, go


def first_the_seed(triggers: list[Any], fields: Fields) -> Any:
    """An event after which the field holds the seed to draw with."""
    inputs = [fields["seed"], fields["new_each_time"]]
    return gr.on(triggers, next_seed, inputs, fields["seed"], queue=False, **QUIETLY)


# ---- pictures


class NoStubs(type(gr.Image)):  # type: ignore[misc]
    """Gradio's own metaclass writes a .pyi beside the source of every component; this one writes nothing."""

    def __new__(cls, *parts: Any) -> Any:
        return ABCMeta.__new__(cls, *parts)


class Upload(gr.Image, metaclass=NoStubs):
    """gr.Image that passes the file on as it is, so that `read_picture` can say what is wrong with it."""

    is_template = True  # for Gradio: drawn as gr.Image, not a component with code of its own

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path


def upload(label: str, **options: Any) -> Upload:
    options = {"sources": ["upload", "clipboard"], "buttons": [], "image_mode": None} | options
    return Upload(label=label, type="filepath", format="png", **options)


def square(label: str, elem_id: str, kind: Any = gr.Image, **options: Any) -> Any:
    """A large picture without a label; `kind` is gr.Image or one like it."""
    return kind(label=label, show_label=False, elem_id=elem_id, elem_classes="square", **options)


# ---- fields for the names that the API had in 0.1


def old_field(new: gr.components.Component) -> gr.components.Component:
    """A hidden, empty field with the limits of `new`."""
    hidden: dict[str, Any] = {"label": f"Old name of: {new.label}", "visible": False}
    if isinstance(new, Upload):
        return upload(**hidden)
    if isinstance(new, gr.Dropdown):
        return gr.Dropdown(new.choices, value=None, **hidden)
    return gr.Number(None, minimum=new.minimum, maximum=new.maximum, precision=new.precision, **hidden)


def old_fields(fields: Fields, renamed: dict[str, str]) -> list[gr.components.Component]:
    return [old_field(fields[new]) for new in renamed.values()]
