"""The Gradio page: type a few words, get a picture.

    make app                                   # or: python app.py
    CORGI_MODEL=path/or/hub-name python app.py

Widgets and events only; the drawing is `pipelines.TextToImagePipeline`. Host and port come from
Gradio's own GRADIO_SERVER_NAME and GRADIO_SERVER_PORT. The same page is an API:

    gradio_client.Client("http://127.0.0.1:7860").predict("a red heart", seed=7, api_name="/generate")
"""

import os
import secrets
import uuid
from pathlib import Path
from urllib.parse import quote

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read while gradio is imported

import gradio as gr
import torch

from pipelines import TextToImagePipeline
from pipelines.__main__ import save_png, slug

MODEL = os.environ.get("CORGI_MODEL") or str(Path(__file__).parent / "models" / "emoji")

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
EXAMPLES = [
    "a corgi in a party hat",
    "a red heart",
    "a smiling cat with sunglasses",
    "a slice of pizza",
    "a blue rocket",
]

MAX_STEPS, MAX_GUIDANCE, MAX_IMAGES = 250, 15.0, 9  # the model's folder knows the defaults
NEW_SEED, MAX_SEED = -1, 2**32 - 1  # -1 asks for a seed that nobody has to think of,
NEW_SEEDS = 10**6  # one below this, short enough to read out
MAX_WAITING = 20  # people in the queue; the next one is told to come back later
KEEP_FILES = (3600, 24 * 3600)  # every hour, delete pictures older than a day

# ---------------------------------------------------------------------------- what the widgets say


def user_error(message: str) -> gr.Error:
    """An error meant for the person at the page or the API: shown to them, kept out of the log."""
    return gr.Error(message, print_exception=False)


def full_prompt(prompt: str, style: str) -> str:
    """The prompt with the words of its style: ("a red heart", "Noto") -> "a red heart, noto style"."""
    prompt = (prompt or "").strip()
    if not prompt:
        raise user_error("Please describe the picture: the prompt is empty.")
    return f"{prompt.rstrip(',. ')}, {STYLE_PHRASES[style]}" if style in STYLE_PHRASES else prompt


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


# ------------------------------------------------------------------------------------------- looks

FONTS = (
    "ui-rounded",
    "Nunito",
    "Segoe UI",
    "system-ui",
    "-apple-system",
    "Helvetica Neue",
    "Arial",
    "sans-serif",
)
MONO_FONTS = ("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
THEME = gr.themes.Soft(
    primary_hue="orange",
    secondary_hue="amber",
    neutral_hue="stone",
    radius_size="lg",
    font=FONTS,  # those of the visitor's machine: the page fetches nothing from elsewhere
    font_mono=MONO_FONTS,
).set(
    block_title_background_fill="none",
    block_title_background_fill_dark="none",
    block_title_padding="0",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_border_width="1px",
    block_border_width_dark="1px",
    input_border_width="1px",
    input_border_width_dark="1px",
    input_shadow="none",
    checkbox_border_width="1px",
    checkbox_border_color="*neutral_400",
)
LOGO = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" role="img" aria-label="A corgi">'
    '<path d="M8 30 6 6q0-4 4-2l18 14zM56 30 58 6q0-4-4-2L36 18z" fill="#e8893a"/>'
    '<path d="M12 24l-2-14 12 10zM52 24l2-14-12 10z" fill="#f9c9b6"/>'
    '<path d="M32 14c16 0 26 11 26 24 0 14-12 22-26 22S6 52 6 38c0-13 10-24 26-24z" fill="#f19a4b"/>'
    '<path d="M32 14c3 0 4 3 5 9 2 9 15 12 15 22 0 9-9 15-20 15s-20-6-20-15c0-10 13-13 15-22 1-6 2-9 5-9z" '
    'fill="#fff7ee"/>'
    '<circle cx="20" cy="35" r="3.6" fill="#33231a"/><circle cx="44" cy="35" r="3.6" fill="#33231a"/>'
    '<path d="M27 42h10q1 5-5 6-6-1-5-6z" fill="#33231a"/>'
    '<path d="M28 52h8v3a4 4 0 0 1-8 0z" fill="#f0788c"/>'
    '<path d="M24 50q4 4 8-1 4 5 8 1" fill="none" stroke="#33231a" stroke-width="2"/></svg>'
)
HEADER = f'<header id="header">{LOGO}<div><h1>Corgi</h1><p>A few words in, an emoji out.</p></div></header>'
HEAD = f'<link rel="icon" type="image/svg+xml" href="data:image/svg+xml,{quote(LOGO)}">'
CSS = """
.gradio-container > .main { max-width: 1120px !important; margin: 0 auto; }
.gradio-container > .main { padding: 16px clamp(12px, 3vw, 32px) !important; }
#header { display: flex; align-items: center; gap: 14px; }
#header svg { width: 60px; height: 60px; flex: none; }
#header h1 { margin: 0; font-size: 30px; font-weight: 800; letter-spacing: -0.02em; line-height: 1.1; }
#header p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
#prompt textarea { font-size: 20px; line-height: 28px; padding: 15px 18px; min-height: 60px; }
#draw { font-size: 20px; font-weight: 700; min-height: 60px; }
#examples .label, #examples .label-wrap { display: none; }
input[type=range]::-webkit-slider-thumb { box-shadow: 0 0 0 1px #a8a29e, 0 1px 3px rgb(0 0 0 / 0.25); }
input[type=range]::-moz-range-thumb { box-shadow: 0 0 0 1px #a8a29e, 0 1px 3px rgb(0 0 0 / 0.25); }
#seed input, #negative_prompt textarea { border: 1px solid var(--border-color-primary); }
/* One picture, 2 x 2 or 3 x 3 fill the same square, so that nothing jumps when they arrive. */
#gallery { height: auto !important; aspect-ratio: 1; max-height: 600px; }
#gallery .grid-wrap { height: 100% !important; max-height: none; }
#gallery .grid-container { max-width: 586px; margin: 0 auto; }
#gallery .grid-container:has(> :nth-child(5)) { grid-template-columns: repeat(3, minmax(0, 1fr)); }
#gallery .caption-label { opacity: 0; max-width: 95%; font-size: 12px; }
#gallery button:hover .caption-label, #gallery button:focus-visible .caption-label { opacity: 1; }
#gallery .empty::after { content: "Your picture appears here"; color: var(--body-text-color-subdued); }
#gallery .empty { display: flex; flex-direction: column; gap: 8px; }
#hint p { margin: 0; text-align: center; font-size: 13px; color: var(--body-text-color-subdued); }
@media (max-width: 640px) {
  #header svg { width: 46px; height: 46px; }
  #header h1 { font-size: 24px; }
}
"""

# -------------------------------------------------------------------------------------------- page


def text_to_image_tab(pipe: TextToImagePipeline) -> None:
    """The widgets and the one event of text to image; further tasks get a function like this one."""
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
        )
        draw = gr.Button("Draw", variant="primary", scale=1, min_width=140, elem_id="draw")
    gr.Examples(EXAMPLES, prompt, elem_id="examples", label="Try")

    with gr.Row():
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
                elem_id="hint",
            )
        with gr.Column(scale=2, min_width=280):
            style = gr.Dropdown([ANY_STYLE, *STYLE_PHRASES], value=ANY_STYLE, label="Style", elem_id="style")
            num_images = gr.Slider(
                1, MAX_IMAGES, value=1, step=1, precision=0, label="Pictures", elem_id="num_images"
            )
            with gr.Group():
                seed = gr.Number(
                    NEW_SEED,
                    label="Seed",
                    info="The same seed draws the same picture; -1 picks a new one.",
                    elem_id="seed",
                )
                new_each_time = gr.Checkbox(True, label="New seed each time", elem_id="new_each_time")
            with gr.Accordion("More settings", open=False, elem_id="more"):
                negative_prompt = gr.Textbox(
                    "", label="Negative prompt", placeholder="What to keep out", elem_id="negative_prompt"
                )
                steps = gr.Slider(
                    1,
                    MAX_STEPS,
                    value=pipe.config.default_num_inference_steps,
                    step=1,
                    precision=0,
                    label="Steps",
                    info="More are finer and slower.",
                    elem_id="steps",
                )
                guidance = gr.Slider(
                    1,
                    MAX_GUIDANCE,
                    value=pipe.config.default_guidance_scale,
                    step=0.1,
                    label="Guidance",
                    info="More follows the words more closely.",
                    elem_id="guidance",
                )

    def generate(
        prompt: str,
        negative_prompt: str,
        style: str,
        steps: int,
        guidance: float,
        seed: float | None,
        num_images: int,
        progress: gr.Progress = gr.Progress(),
    ) -> tuple[list[tuple[Path, str]], int]:
        """Draw pictures of a prompt. Picture number i (from 0) uses the returned seed + i."""
        words, first_seed = full_prompt(prompt, style), whole_seed(seed)
        progress((0, steps), desc="Drawing")

        def report(_pipe: TextToImagePipeline, step: int, _timestep: int, tensors: dict) -> dict:
            progress((step + 1, steps), desc="Drawing")
            return tensors

        seeds = [(first_seed + i) % (MAX_SEED + 1) for i in range(num_images)]
        try:
            images, _flagged = pipe(
                words,
                negative_prompt=negative_prompt or None,
                num_inference_steps=steps,
                guidance_scale=guidance,
                num_images_per_prompt=num_images,
                generator=[torch.Generator().manual_seed(s) for s in seeds],
                callback_on_step_end=report,
                return_dict=False,
            )
        except ValueError as problem:  # the pipeline's own words about what was asked of it
            raise user_error(str(problem)) from problem

        folder = Path(gallery.GRADIO_CACHE) / uuid.uuid4().hex
        folder.mkdir(parents=True)
        settings = {
            "prompt": words,
            "negative_prompt": negative_prompt,
            "steps": steps,
            "guidance_scale": guidance,
            "scheduler": type(pipe.scheduler).__name__,
            "model": Path(pipe.name_or_path).name,
            "Software": "Corgi",
        }
        pictures = []
        for image, s in zip(images, seeds, strict=True):
            path = save_png(image, folder, f"{slug(words)}_seed{s}", settings | {"seed": s})
            pictures.append((path, f"seed {s}"))
        return pictures, first_seed

    gr.on(
        [draw.click, prompt.submit],
        next_seed,
        [seed, new_each_time],
        seed,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    ).then(
        generate,
        [prompt, negative_prompt, style, steps, guidance, seed, num_images],
        [gallery, seed],
        show_progress_on=gallery,
        concurrency_limit=1,
        concurrency_id="model",  # whatever draws with this model waits its turn
        api_name="generate",
    )


def build_demo(pipe: TextToImagePipeline) -> gr.Blocks:
    """The whole page around a loaded pipeline."""
    with gr.Blocks(title="Corgi", fill_width=True, delete_cache=KEEP_FILES) as demo:
        gr.HTML(HEADER, padding=False)
        text_to_image_tab(pipe)
    return demo.queue(max_size=MAX_WAITING)


def launch(demo: gr.Blocks, **options) -> tuple:
    """Serve the page with its looks; the options are Gradio's."""
    return demo.launch(theme=THEME, css=CSS, head=HEAD, footer_links=["api"], **options)


def main() -> None:
    try:
        pipe = TextToImagePipeline.from_pretrained(MODEL)
    except (OSError, ValueError) as error:
        raise SystemExit(f"app.py: {MODEL!r} cannot be loaded: {error}") from None
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)  # the page has its own
    launch(build_demo(pipe))


if __name__ == "__main__":
    main()
