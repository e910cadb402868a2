"""The Gradio page: type a few words and get a picture, edit it, enlarge it.

    make app                                   # or: python app.py
    CORGI_MODEL=path/or/hub-name python app.py

CORGI_UPSAMPLER and CORGI_GUIDANCE name the folders of the upsampler and of the guides. By default these are
the model's folder with -upsampler and -guidance added to its name, if they exist. CORGI_CLIP is a clean CLIP,
by folder or by open_clip's name. Host and port come from Gradio's own GRADIO_SERVER_NAME and
GRADIO_SERVER_PORT. The page is also an API:

    gradio_client.Client("http://127.0.0.1:7860").predict("a red heart", seed=7, api_name="/generate")

Widgets and events are in `page/` and the drawing is in `pipelines/`; this file puts them together.
"""

import os
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read while gradio is imported

import gradio as gr

from page.create import create_tab
from page.edit import edit_tab
from page.enlarge import enlarge_tab, missing_tab
from page.looks import CSS, HEAD, HEADER, THEME
from page.visit import send_button, visit_strip
from page.widgets import Tab
from pipelines import TextToImagePipeline
from pipelines.family import default_model, load_guides, load_model, load_upsampler

MODEL = os.environ.get("CORGI_MODEL") or str(default_model())
UPSAMPLER = os.environ.get("CORGI_UPSAMPLER")
GUIDANCE = os.environ.get("CORGI_GUIDANCE")
CLIP = os.environ.get("CORGI_CLIP")

MAX_WAITING = 20  # requests in the queue; the next one is told to come back later
KEEP_FILES = (3600, 24 * 3600)  # every hour, delete pictures older than a day


def build_demo(pipe: TextToImagePipeline) -> gr.Blocks:
    """The whole page around a loaded pipeline, with its `upsampler` and guides, if it has them."""
    with gr.Blocks(title="Corgi", fill_width=True, delete_cache=KEEP_FILES) as demo:
        gr.HTML(HEADER, padding=False)
        history = gr.State([])
        tabs: dict[str, Tab] = {}
        with gr.Tabs(elem_id="tabs") as shown:
            with gr.Tab("Create", id="create"):
                tabs["create"] = create_tab(pipe, history)
            with gr.Tab("Edit", id="edit"):
                tabs["edit"] = edit_tab(pipe, history)
            with gr.Tab("Enlarge", id="enlarge"):
                if pipe.upsampler is None:
                    missing_tab()
                else:
                    tabs["enlarge"] = enlarge_tab(pipe.upsampler, history)
        for name, tab in tabs.items():
            with tab.sending:
                send_button("Edit this picture", tab, "edit", tabs["edit"], shown, f"{name}_to_edit")
                if "enlarge" in tabs:
                    send_button("Enlarge it", tab, "enlarge", tabs["enlarge"], shown, f"{name}_to_enlarge")
        visit_strip(history, tabs, shown, Path(pipe.name_or_path).name)
    return demo.queue(max_size=MAX_WAITING)


def launch(demo: gr.Blocks, **options) -> tuple:
    """Serve the page with its looks; the options are Gradio's. A requested port that is not free is an error:
    Gradio alone would try the next one."""
    if port := os.environ.get("GRADIO_SERVER_PORT"):
        if not port.isdecimal() or not 0 < int(port) < 2**16:
            raise SystemExit(f"app.py: GRADIO_SERVER_PORT must be 1 to 65535, got {port!r}")
        options = {"server_port": int(port)} | options
    return demo.launch(theme=THEME, css=CSS, head=HEAD, footer_links=["api"], **options)


def load() -> TextToImagePipeline:
    """The model with its upsampler and guides. Raises OSError or ValueError if anything cannot be loaded."""
    for name, folder in (("CORGI_GUIDANCE", GUIDANCE), ("CORGI_UPSAMPLER", UPSAMPLER)):
        if folder and not Path(folder).is_dir():
            raise ValueError(f"{name} must be a folder, got {folder}")
    pipe = load_model(MODEL, clip_guidance_model=CLIP)
    load_guides(pipe, MODEL, GUIDANCE)
    pipe.upsampler = load_upsampler(MODEL, UPSAMPLER, pipe.vae is None)
    return pipe


def main() -> None:
    try:
        pipe = load()
    except (OSError, ValueError) as error:
        raise SystemExit(f"app.py: {MODEL!r} cannot be loaded: {error}") from None
    pipe.set_progress_bar_config(disable=True)  # the page has its own
    launch(build_demo(pipe))


if __name__ == "__main__":
    main()
