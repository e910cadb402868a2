"""The tab that draws pictures for a prompt."""

import gradio as gr

from pipelines import TextToImagePipeline

from .requests import event, generate
from .widgets import (
    MODEL_QUEUE,
    QUIETLY,
    Tab,
    advanced_widgets,
    first_the_seed,
    old_fields,
    prompt_row,
    seed_widgets,
    widget,
)

EXAMPLES = [
    "a corgi in a party hat", "a red heart", "a smiling cat with sunglasses", "a slice of pizza",
    "a blue rocket",
]  # fmt: skip
NO_UPSAMPLER = (
    "Larger pictures need an upsampler: set CORGI_UPSAMPLER to the folder of one and restart the page."
)
# Fields of the API, in the order of 0.1, and the old names of some
ORDER = (
    "prompt negative_prompt style num_inference_steps guidance_scale seed num_images_per_prompt size "
    "guidance_rescale guidance_from guidance_to combined_prompt combined_weight clip_guidance_scale "
    "clip_guidance classifier_guidance_scale class_labels num_candidates attention_words"
)
RENAMED = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "num_images": "num_images_per_prompt",
    "class_label": "class_labels",
    "best_of": "num_candidates",
}


def size_widget(pipe: TextToImagePipeline) -> gr.Radio:
    """The sizes that the model draws, alone and with its upsampler; the values are widths."""
    width, height = pipe.sample_size
    factors = [1] if pipe.upsampler is None else [1, pipe.upsampler.scale]
    choices = [(f"{width * factor} × {height * factor}", width * factor) for factor in factors]
    info = NO_UPSAMPLER if pipe.upsampler is None else "The larger is drawn small, then enlarged."
    there = pipe.upsampler is not None
    return gr.Radio(choices, value=width, label="Size", info=info, interactive=there, elem_id="size")


def gallery_widget() -> gr.Gallery:
    gallery = gr.Gallery(
        label="Pictures", show_label=False, format="png", columns=2, object_fit="contain",
        buttons=["download", "fullscreen"], interactive=False, elem_id="gallery",
    )  # fmt: skip
    hint = "Click a picture to enlarge or download it. The file remembers its prompt and seed."
    gr.HTML(f"<p>{hint}</p>", elem_classes="hint")
    return gallery


def create_tab(pipe: TextToImagePipeline, history: gr.State) -> Tab:
    """The widgets and events of text to image."""
    prompt, go = prompt_row("What shall I draw?", "Draw", autofocus=True)
    gr.Examples(EXAMPLES, prompt, elem_id="examples", label="Try")
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            gallery = gallery_widget()
            sending = gr.Row()
        with gr.Column(scale=2, min_width=280):
            style, count, size = widget("style"), widget("num_images_per_prompt"), size_widget(pipe)
            seed = seed_widgets()
    advanced = advanced_widgets(pipe, "attention_words")
    drawn, picture = gr.State([]), gr.State(None)

    fields = {"prompt": prompt, "style": style, "size": size, **seed, **advanced}
    every = fields | {"num_images_per_prompt": count}
    asked = {name: every[name] for name in ORDER.split()}
    first_the_seed([go.click, prompt.submit], fields).then(
        event(generate, pipe, asked, RENAMED),
        [*asked.values(), history, *old_fields(asked, RENAMED)],
        [gallery, fields["seed"], drawn, picture, history],
        show_progress_on=gallery,
        api_name="generate",
        **MODEL_QUEUE,
    )

    def choose(drawn: list[str], chosen: gr.SelectData) -> str:
        return drawn[chosen.index]

    gallery.select(choose, drawn, picture, **QUIETLY)

    def show(path: str, about: dict[str, str]) -> dict:
        return {gallery: [(path, f"seed {about.get('seed', 'unknown')}")], drawn: [path], picture: path}

    return Tab(fields, picture, show, [gallery, drawn, picture], sending)
