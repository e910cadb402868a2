"""The tab that enlarges a picture with the upsampler."""

from typing import Any

import gradio as gr
from PIL import Image

from .requests import enlarge, event
from .widgets import (
    MODEL_QUEUE,
    QUIETLY,
    Tab,
    default_steps,
    first_the_seed,
    old_fields,
    seed_widgets,
    square,
    upload,
    widget,
)

MISSING = (
    "There is no upsampler, so nothing can be enlarged here: set CORGI_UPSAMPLER to the folder of one, or "
    "put it beside the model's folder with “-upsampler” added to its name, and restart the page."
)
RENAMED = {"steps": "num_inference_steps"}  # a field of the API in 0.1


def missing_tab() -> None:
    gr.HTML(f"<p>{MISSING}</p>", elem_id="no_upsampler", elem_classes="note")


def enlarge_tab(upsampler: Any, history: gr.State) -> Tab:
    """The widgets and the event of enlarging."""
    upsampler.set_progress_bar_config(disable=True)
    scale, prefix = upsampler.scale, "enlarge_"
    with gr.Row():
        with gr.Column(min_width=300):
            source = square("Picture", "enlarge_source", upload)
            prompt = gr.Textbox(
                "", label="Prompt", info="What the picture shows.", visible=upsampler.reads_text,
                elem_id="enlarge_prompt",
            )  # fmt: skip
            go = gr.Button(
                f"Enlarge {scale} times", variant="primary", elem_id="enlarge_go", elem_classes="go"
            )
        with gr.Column(min_width=300):
            compare = square(
                "Before and after", "enlarge_compare", gr.ImageSlider, type="filepath", format="png",
                interactive=False, buttons=["download", "fullscreen"], max_height=600,
            )  # fmt: skip
            sending = gr.Row()
    with gr.Row():
        with gr.Column(min_width=300):
            config = upsampler.config
            levels = {"maximum": config.max_noise_level, "value": config.default_noise_level}
            noise_level = widget("noise_level", prefix, **levels)
            steps = widget("num_inference_steps", prefix, **default_steps(upsampler))
        with gr.Column(min_width=300):
            seed = seed_widgets(prefix)
    file = gr.Image(label="Large", type="filepath", format="png", interactive=False, visible=False)
    picture = gr.State(None)

    def before_and_after(path: str) -> tuple[Image.Image, str]:
        """The small picture, to which the large one shrinks, with its pixels showing; and the large one."""
        with Image.open(path) as large:
            small = large.resize([side // scale for side in large.size], Image.Resampling.BOX)
            return small.resize(large.size, Image.Resampling.NEAREST), path

    settings = {
        "noise_level": noise_level,
        "num_inference_steps": steps,
        "seed": seed["seed"],
        "prompt": prompt,
    }
    asked = {"image": source, **settings}
    first_the_seed([go.click], seed).then(
        event(enlarge, upsampler, asked, RENAMED),
        [*asked.values(), history, *old_fields(asked, RENAMED)],
        [file, seed["seed"], picture, history],
        show_progress_on=compare,
        api_name="enlarge",
        **MODEL_QUEUE,
    ).success(before_and_after, picture, compare, **QUIETLY)

    def show(path: str, about: dict[str, str]) -> dict:
        return {compare: before_and_after(path), picture: path}

    def receive(path: str) -> dict:
        return {source: path}

    return Tab(settings | seed, picture, show, [compare, picture], sending, receive, [source])
