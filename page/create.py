"""The tab that draws pictures for a prompt."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import gradio as gr
import torch
from PIL import Image

from pipelines import TextToImagePipeline
from pipelines.drawing.attention_maps import AttentionMaps, draw_attention
from pipelines.drawing.images import to_pil
from pipelines.drawing.png import slug
from pipelines.drawing.text import plain_texts

from . import common
from .common import MAX_SEED, MODEL_QUEUE, QUIETLY, Tab, full_prompt, told_plainly, user_error, whole_seed

EXAMPLES = [
    "a corgi in a party hat",
    "a red heart",
    "a smiling cat with sunglasses",
    "a slice of pizza",
    "a blue rocket",
]
MAX_IMAGES = 9
NO_CLIP = (
    "CLIP guidance and best of n need a CLIP, which this model has not: set CORGI_GUIDANCE to a folder "
    "with a noisy_clip in it, or CORGI_CLIP to a CLIP's own folder, and start the page again."
)
NO_CLASSIFIER = (
    "Classifier guidance needs a classifier, which this model has not: set CORGI_GUIDANCE to a folder with a "
    "noisy_classifier in it, and start the page again."
)
NO_UPSAMPLER = (
    "Larger pictures need an upsampler: set CORGI_UPSAMPLER to its folder, and start the page again."
)


def sizes(pipe: TextToImagePipeline) -> list[tuple[str, int]]:
    """(what is shown, width) of the sizes that this model draws, alone and with its upsampler."""
    sample_size = pipe.unet.config.sample_size
    height, width = (sample_size,) * 2 if isinstance(sample_size, int) else sample_size
    factors = [1] if pipe.upsampler is None else [1, pipe.upsampler.scale]
    height, width = height * pipe.vae_scale_factor, width * pipe.vae_scale_factor
    return [(f"{width * factor} × {height * factor}", width * factor) for factor in factors]


RENAMED = {  # fields of the API in 0.1
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "num_images": "num_images_per_prompt",
    "class_label": "class_labels",
    "best_of": "num_candidates",
}


def draw_all(
    pipe: TextToImagePipeline,
    words: str,
    sources: list[Any],
    looked_at: list[str],
    report: Callable[..., dict],
    call: dict[str, Any],
) -> tuple[list[Any], Any]:
    """(pictures as `call` has them put out, the AttentionMaps of `looked_at`), a call for each of `sources`.

    sources: what each call draws its noise from, a list with a generator for each picture, or a generator for
    all candidates of one.
    """
    attention = AttentionMaps(pipe, plain_texts(words)[0], looked_at) if looked_at else nullcontext()
    images: list[Any] = []
    with attention as maps:

        def on_step(*about: Any) -> dict:
            if maps is not None:
                maps(*about)
            return report(*about)

        for source in sources:
            count = len(source) if isinstance(source, list) else 1
            drawn, _flagged = pipe(
                words, num_images_per_prompt=count, generator=source, callback_on_step_end=on_step, **call
            )
            images += list(drawn)
    return images, maps


def enlarge_all(
    pipe: TextToImagePipeline, words: str, sources: list[Any], images: list[torch.Tensor]
) -> list[Image.Image]:
    """Small pictures (3, h, w) in [0, 1] to large ones. Each of `sources` goes on where `draw_all` left it,
    so that they are those of `pipe(words, height, width)` with the same seeds."""
    large, rest = [], images
    for source in sources:
        count = len(source) if isinstance(source, list) else 1
        part, rest = rest[:count], rest[count:]
        prompts = [words] * count if pipe.upsampler.reads_text else None
        large += pipe.upsampler(prompts, image=torch.stack(part), generator=source).images
    return large


def advanced_widgets(pipe: TextToImagePipeline) -> dict[str, gr.components.Component]:
    """The widgets behind "Advanced", by the names of their arguments."""
    with gr.Row(equal_height=True):
        num_inference_steps = common.steps_widget(common.default_steps(pipe))
        guidance_scale = common.guidance_widget(pipe.config.default_guidance_scale)
        guidance_rescale = gr.Slider(
            0,
            1,
            value=0,
            step=0.05,
            label="Guidance rescale",
            info="Against colours that strong guidance overdoes; 0 is off.",
            elem_id="guidance_rescale",
        )
    with gr.Row(equal_height=True):
        negative_prompt = common.negative_widget()
        guidance_from = gr.Number(
            0,
            minimum=0,
            step=0.1,
            label="Guide above noise level",
            info="Guidance rests where there is less noise; 0 is no limit.",
            elem_id="guidance_from",
            elem_classes="bordered",
        )
        guidance_to = gr.Number(
            0,
            minimum=0,
            step=0.1,
            label="Guide up to noise level",
            info="It rests where there is more; 0 is no limit.",
            elem_id="guidance_to",
            elem_classes="bordered",
        )
    with gr.Row(equal_height=True):
        combined_prompt = gr.Textbox(
            "",
            label="Second prompt",
            info="Drawn together with the first.",
            placeholder="a crown",
            elem_id="combined_prompt",
            elem_classes="bordered",
        )
        combined_weight = gr.Slider(
            -2,
            2,
            value=0.7,
            step=0.1,
            label="Weight of the second prompt",
            info="The first prompt's is 1; below 0 keeps away.",
            elem_id="combined_weight",
        )
        attention_words = gr.Textbox(
            "",
            label="Attention to words",
            info="Shows where the picture looks when it reads these.",
            placeholder="corgi, hat",
            elem_id="attention_words",
            elem_classes="bordered",
        )
    return {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "combined_prompt": combined_prompt,
        "combined_weight": combined_weight,
        "guidance_rescale": guidance_rescale,
        "guidance_from": guidance_from,
        "guidance_to": guidance_to,
        **network_widgets(pipe),
        "attention_words": attention_words,
    }


def network_widgets(pipe: TextToImagePipeline) -> dict[str, gr.components.Component]:
    """Guidance and ranking by other networks; hidden if the pipeline has none."""
    clips = [("noised", pipe.noisy_clip), ("clean", pipe.clip_guidance_model)]
    forms = [form for form, clip in clips if clip is not None]
    labels = [] if pipe.noisy_classifier is None else list(pipe.noisy_classifier.config.labels)
    with gr.Row(equal_height=True, visible=bool(forms)):
        clip_guidance_scale = gr.Slider(
            0,
            10,
            value=0 if pipe.noisy_clip is None else pipe.config.default_clip_guidance_scale,
            step=0.5,
            label="CLIP guidance",
            info="Pulls towards what a CLIP finds in the words; 0 is off.",
            elem_id="clip_guidance_scale",
        )
        clip_guidance = gr.Radio(
            forms or ["noised"],
            value=(forms or ["noised"])[0],
            label="By which CLIP",
            info="One trained on noised pictures, or a clean one.",
            visible=len(forms) > 1,
            elem_id="clip_guidance",
        )
        num_candidates = gr.Slider(
            1,
            9,
            value=1,
            step=1,
            precision=0,
            label="Best of",
            info="Draws so many for each picture; CLIP, and a kind, keep the best.",
            min_width=240,  # beside another slider a phone would break its line of help at every word
            elem_id="num_candidates",
        )
    with gr.Row(equal_height=True, visible=bool(labels)):
        classifier_guidance_scale = gr.Slider(
            0,
            300,
            value=0,
            step=1,
            label="Classifier guidance",
            info="Pulls towards a kind of picture, at 2 to 8, or a style, at 300; 0 is off.",
            elem_id="classifier_guidance_scale",
        )
        class_labels = gr.Dropdown(
            labels,
            value=labels[0] if labels else None,
            label="Kind of picture",
            info="What the classifier is to see.",
            elem_id="class_labels",
        )
    for missing in [NO_CLIP] * (not forms) + [NO_CLASSIFIER] * (not labels):
        gr.HTML(f"<p>{missing}</p>", elem_classes="note")
    return {
        "clip_guidance_scale": clip_guidance_scale,
        "clip_guidance": clip_guidance,
        "num_candidates": num_candidates,
        "classifier_guidance_scale": classifier_guidance_scale,
        "class_labels": class_labels,
    }


def generate_event(pipe: TextToImagePipeline) -> Callable[..., Any]:
    """The function behind "Draw" and /generate."""

    @common.takes_old_names(**RENAMED)
    def generate(
        prompt: str,
        negative_prompt: str,
        style: str,
        num_inference_steps: int,
        guidance_scale: float,
        seed: float | None,
        num_images_per_prompt: int,
        size: int,
        guidance_rescale: float,
        guidance_from: float | None,
        guidance_to: float | None,
        combined_prompt: str,
        combined_weight: float,
        clip_guidance_scale: float,
        clip_guidance: str,
        classifier_guidance_scale: float,
        class_labels: str | None,
        num_candidates: int,
        attention_words: str,
        history: list[str],
        progress: gr.Progress = gr.Progress(),
    ) -> Iterator[tuple[list[tuple[str, str]], int, list[str], str, list[str]]]:
        """Draw pictures of a prompt. Picture number i (from 0) uses the returned seed + i."""
        words, first_seed = full_prompt(prompt, style), whole_seed(seed)
        looked_at = [word.strip() for word in attention_words.split(",") if word.strip()]
        if looked_at and num_candidates > 1:
            raise user_error("Attention is shown for what is drawn once: set “Best of” to 1.")
        interval = (guidance_from or 0, guidance_to or math.inf)
        call: dict[str, Any] = {
            "negative_prompt": negative_prompt or None,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "guidance_interval": None if interval == (0, math.inf) else interval,
            "combined_prompts": {combined_prompt: combined_weight} if combined_prompt.strip() else None,
            "clip_guidance_scale": clip_guidance_scale,
            "clip_guidance": clip_guidance if clip_guidance_scale > 0 else "noised",
            "classifier_guidance_scale": classifier_guidance_scale,
            "class_labels": class_labels if classifier_guidance_scale > 0 else None,
            "num_candidates": num_candidates,
        }
        about = call | {"prompt": words, "negative_prompt": negative_prompt}
        about["attention_words"] = ", ".join(looked_at)
        seeds = [(first_seed + i) % (MAX_SEED + 1) for i in range(num_images_per_prompt)]
        sources: list[Any] = [common.generators(seeds)]
        if num_candidates > 1:  # one seed draws all its candidates
            sources = sources[0]
        report = common.callback(progress, num_inference_steps * len(sources))
        enlarged = size > sizes(pipe)[0][1]
        call |= {"output_type": "pt" if enlarged else "pil", "return_dict": False}
        with told_plainly():
            images, maps = draw_all(pipe, words, sources, looked_at, report, call)
            if enlarged:
                small = save_all(pipe, to_pil(2 * torch.stack(images) - 1), words, seeds, about)
                yield small, first_seed, [path for path, _ in small], small[0][0], history
                images = enlarge_all(pipe, words, sources, images)
        pictures = save_all(pipe, images, words, seeds, about, f"_{size}" if enlarged else "")
        paths = [path for path, _ in pictures]
        for word in looked_at:
            heat = [draw_attention(image, one) for image, one in zip(images, maps[word], strict=True)]
            saved = save_all(pipe, heat, words, seeds, about, f"_{slug(word)}")
            pictures += [(path, f"{seed}, {word}") for path, seed in saved]
        everything = [path for path, _ in pictures]
        yield pictures, first_seed, everything, paths[0], common.remember(history, paths)

    return generate


def save_all(
    pipe: Any, images: list[Image.Image], words: str, seeds: list[int], about: dict[str, Any], end: str = ""
) -> list[tuple[str, str]]:
    """(path, caption) of each picture, saved with its settings."""
    return [
        (
            common.save_picture(image, pipe, common.file_name(words, seed) + end, about | {"seed": seed}),
            f"seed {seed}",
        )
        for image, seed in zip(images, seeds, strict=True)
    ]


def result_widgets() -> tuple[gr.Gallery, gr.Row]:
    with gr.Column(scale=3, min_width=320):
        gallery = gr.Gallery(
            label="Pictures",
            show_label=False,
            format="png",
            columns=2,
            object_fit="contain",
            buttons=["download", "fullscreen"],
            interactive=False,
            elem_id="gallery",
        )
        gr.HTML(
            "<p>Click a picture to enlarge or download it. The file remembers its prompt and seed.</p>",
            elem_classes="hint",
        )
        sending = gr.Row()
    return gallery, sending


def choice_widgets(pipe: TextToImagePipeline) -> tuple[Any, ...]:
    """Style, number of pictures, size, seed, and whether each time has a new seed."""
    with gr.Column(scale=2, min_width=280):
        style = common.style_widget()
        count = gr.Slider(
            1, MAX_IMAGES, value=1, step=1, precision=0, label="Pictures", elem_id="num_images_per_prompt"
        )
        choices = sizes(pipe)
        size = gr.Radio(
            choices,
            value=choices[0][1],
            label="Size",
            info=NO_UPSAMPLER if pipe.upsampler is None else "The larger is drawn small, then enlarged.",
            interactive=pipe.upsampler is not None,
            elem_id="size",
        )
        seed, new_each_time = common.seed_widgets()
    return style, count, size, seed, new_each_time


def create_tab(pipe: TextToImagePipeline, history: gr.State) -> tuple[Tab, gr.Row]:
    """The widgets and events of text to image, and the row that buttons for its picture go into."""
    with gr.Row(elem_id="ask", equal_height=True):
        prompt = gr.Textbox(
            label="Prompt",
            show_label=False,
            container=False,
            placeholder="What shall I draw?",
            autofocus=True,
            max_lines=3,
            scale=5,
            min_width=320,
            elem_id="prompt",
            elem_classes="prompt",
        )
        draw = gr.Button("Draw", variant="primary", scale=1, min_width=140, elem_id="draw", elem_classes="go")
    gr.Examples(EXAMPLES, prompt, elem_id="examples", label="Try")

    with gr.Row():
        gallery, sending = result_widgets()
        style, count, size, seed, new_each_time = choice_widgets(pipe)
    with gr.Accordion("Advanced", open=False, elem_id="more"):
        advanced = advanced_widgets(pipe)
    drawn, picture = gr.State([]), gr.State(None)

    settings = {"prompt": prompt, "style": style, "size": size, "seed": seed, **advanced}
    offered = settings | {"num_images_per_prompt": count}
    old = [offered[new] for new in RENAMED.values()]
    names = (
        "prompt negative_prompt style num_inference_steps guidance_scale seed num_images_per_prompt size "
        "guidance_rescale guidance_from guidance_to combined_prompt combined_weight clip_guidance_scale "
        "clip_guidance classifier_guidance_scale class_labels num_candidates attention_words"
    )
    gr.on(
        [draw.click, prompt.submit], common.next_seed, [seed, new_each_time], seed, queue=False, **QUIETLY
    ).then(
        generate_event(pipe),
        [*(offered[name] for name in names.split()), history, *map(common.old_name, old)],
        [gallery, seed, drawn, picture, history],
        show_progress_on=gallery,
        api_name="generate",
        **MODEL_QUEUE,
    )

    def choose(drawn: list[str], chosen: gr.SelectData) -> str:
        return drawn[chosen.index]

    gallery.select(choose, drawn, picture, **QUIETLY)

    def show(path: str, about: dict[str, str]) -> dict:
        return {gallery: [(path, f"seed {about.get('seed', 'unknown')}")], drawn: [path], picture: path}

    fields = settings | {"new_each_time": new_each_time}
    return Tab(fields, picture, show, [gallery, drawn, picture]), sending
