"""The tab that enlarges a picture by the upsampler."""

from typing import Any

import gradio as gr
from PIL import Image

from pipelines import TextToImagePipeline

from . import common
from .common import MODEL_QUEUE, QUIETLY, Tab, read_picture, told_plainly, user_error

MISSING = (
    "There is no upsampler, so nothing can be enlarged here: set CORGI_UPSAMPLER to the folder of one, or "
    "put it beside the model's folder with “-upsampler” added to its name, and start the page again."
)
MAX_AREA = 512 * 512  # pixels of a picture that is to be enlarged: half a minute on one core


def missing_tab() -> None:
    gr.HTML(f"<p>{MISSING}</p>", elem_id="no_upsampler", elem_classes="note")


def enlarge_tab(pipe: TextToImagePipeline, history: gr.State) -> tuple[Tab, gr.Row]:
    """The widgets and the event of enlarging, and the row that buttons for the result go into."""
    upsampler: Any = pipe.upsampler
    upsampler.set_progress_bar_config(disable=True)
    scale = upsampler.scale

    with gr.Row():
        with gr.Column(min_width=300):
            source = common.upload(
                label="Picture", show_label=False, elem_id="enlarge_source", elem_classes="square"
            )
            prompt = gr.Textbox(
                "",
                label="Prompt",
                info="What the picture shows.",
                visible=upsampler.reads_text,
                elem_id="enlarge_prompt",
            )
            go = gr.Button(
                f"Enlarge {scale} times", variant="primary", elem_id="enlarge_go", elem_classes="go"
            )
        with gr.Column(min_width=300):
            compare = gr.ImageSlider(
                label="Before and after",
                show_label=False,
                type="filepath",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                max_height=600,
                elem_id="enlarge_compare",
                elem_classes="square",
            )
            sending = gr.Row()
    with gr.Row():
        with gr.Column(min_width=300):
            noise_level = gr.Slider(
                0,
                upsampler.config.max_noise_level,
                value=upsampler.config.default_noise_level,
                step=1,
                precision=0,
                label="Noise level",
                info="More makes more up: for pictures that have faults of their own.",
                elem_id="enlarge_noise_level",
            )
            steps = common.steps_widget(common.default_steps(upsampler), "enlarge_")
        with gr.Column(min_width=300):
            seed, new_each_time = common.seed_widgets("enlarge_")
    file = gr.Image(label="Large", type="filepath", format="png", interactive=False, visible=False)
    picture = gr.State(None)

    @common.takes_old_names(steps="num_inference_steps")
    def enlarge(
        image: str | None,
        noise_level: int,
        num_inference_steps: int,
        seed: float | None,
        prompt: str,
        history: list[str],
        progress: gr.Progress = gr.Progress(),
    ) -> tuple[str, int, str, list[str]]:
        """Enlarge a picture, with details of the model's own."""
        original, number = read_picture(image), common.whole_seed(seed)
        if original.width * original.height > MAX_AREA:
            raise user_error(
                f"The picture has {original.width} × {original.height} pixels; at most 512 × 512, or as "
                f"many in another shape, are enlarged here: make it smaller first."
            )
        with told_plainly():
            large = upsampler(
                prompt or None,
                image=original,
                num_inference_steps=num_inference_steps,
                noise_level=noise_level,
                generator=common.generators([number])[0],
                callback_on_step_end=common.callback(progress, num_inference_steps, "Enlarging"),
            ).images[0]
        about = {
            "prompt": prompt,
            "seed": number,
            "num_inference_steps": num_inference_steps,
            "noise_level": noise_level,
            "task": "enlarge",
        }
        path = common.save_picture(large, upsampler, f"enlarged_seed{number}", about)
        return path, number, path, common.remember(history, [path])

    def before_and_after(path: str) -> tuple[Image.Image, str]:
        """The large picture beside the small one, which it shrinks to, with its pixels showing."""
        with Image.open(path) as large:
            small = large.resize([side // scale for side in large.size], Image.Resampling.BOX)
            return small.resize(large.size, Image.Resampling.NEAREST), path

    go.click(common.next_seed, [seed, new_each_time], seed, queue=False, **QUIETLY).then(
        enlarge,
        [source, noise_level, steps, seed, prompt, history, common.old_name(steps)],
        [file, seed, picture, history],
        show_progress_on=compare,
        api_name="enlarge",
        **MODEL_QUEUE,
    ).success(before_and_after, picture, compare, **QUIETLY)

    def show(path: str, about: dict[str, str]) -> dict:
        return {compare: before_and_after(path), picture: path}

    fields = {
        "prompt": prompt,
        "seed": seed,
        "new_each_time": new_each_time,
        "num_inference_steps": steps,
        "noise_level": noise_level,
    }
    return Tab(fields, picture, show, [compare, picture], lambda path: {source: path}, [source]), sending
