"""The tab that repaints a part of a picture, extends its canvas, or redraws it in another style."""

from collections.abc import Callable
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw

from pipelines import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline

from .requests import SIDES, check_growth, edit, event, read_picture, user_error
from .widgets import (
    MODEL_QUEUE,
    QUIETLY,
    Fields,
    Tab,
    advanced_widgets,
    first_the_seed,
    old_fields,
    prompt_row,
    seed_widgets,
    square,
    upload,
    widget,
)

MODES = [("Repaint a part", "repaint"), ("Extend the canvas", "extend"), ("Restyle", "restyle")]
VERBS = {value: name.split()[0] for name, value in MODES}  # what the button says
CANVAS = 512  # pixels of the longer side of what is painted on, whatever the picture's own size
BRUSH = "rgb(255, 92, 0)"
# Fields of the API, in the order of 0.1; newer ones follow
ORDER = (
    "image prompt mode left right top bottom strength style negative_prompt num_inference_steps "
    "guidance_scale seed context jump_n_sample mask_image"
)
RENAMED = {  # fields of the API in 0.1
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "resampling": "jump_n_sample",
    "mask": "mask_image",
}
HINTS = {
    "repaint": "Paint over what is to change. Everything else stays as it is, to the last bit.",
    "extend": "The canvas grows around the picture, which stays as it is, to the last bit.",
    "restyle": "Draws over the whole picture: say what it shows, and choose a style.",
}


def canvas_of(picture: Image.Image) -> Image.Image:
    """The picture at the size at which it is painted on; a small one shows its pixels."""
    scale = CANVAS / max(picture.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return picture.resize([max(1, round(side * scale)) for side in picture.size], how)


def painted(layers: list[Image.Image], size: tuple[int, int]) -> Image.Image:
    """Layers of a canvas -> the mask of a picture of `size`: white where half a pixel or more is painted."""
    mask = Image.new("L", size)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").point(lambda level: 255 * (level >= 128))
        covered = alpha.resize(size, Image.Resampling.BOX).point(lambda level: 255 * (level >= 128))
        mask.paste(255, mask=covered)
    return mask


def frame_around(picture: Image.Image, left: int, right: int, top: int, bottom: int) -> Image.Image:
    """What the extended canvas will look like: the picture in its place, the part to be drawn hatched."""
    width, height = picture.width + left + right, picture.height + top + bottom
    scale = CANVAS / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    frame = Image.new("RGB", size, "#fde5d0")
    ruler = ImageDraw.Draw(frame)
    for offset in range(-size[1], size[0], 16):  # hatched
        ruler.line([(offset, size[1]), (offset + size[1], 0)], fill="#f7cfae", width=2)
    inner = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    frame.paste(inner, (round(left * scale), round(top * scale)))
    return frame


def prepare(mode: str, image: str | None, value: dict | None) -> Image.Image | None:
    """The painted mask, at the picture's own size."""
    if mode != "repaint" or image is None:
        return None
    mask = painted((value or {}).get("layers") or [], read_picture(image).size)
    if mask.getbbox() is None:
        raise user_error("Nothing is painted over: paint over what is to change.")
    return mask


def growth(values: tuple[int | None, ...]) -> dict[str, int]:
    """The values of the fields for the sides; a cleared field counts as 0."""
    return dict(zip(SIDES, (max(0, value or 0) for value in values), strict=True))


# ---- widgets


def picture_widgets() -> Fields:
    """What is worked on, depending on the mode: the picture, the editor to paint in, or the new canvas."""
    source = square("Picture", "edit_source", upload)
    editor = square(
        "Paint over what is to change", "edit_mask", gr.ImageEditor, type="pil", image_mode="RGBA",
        sources=(), transforms=(), layers=False, eraser=gr.Eraser(default_size=48),
        brush=gr.Brush(default_size=48, colors=[BRUSH], color_mode="fixed"),
        canvas_size=(CANVAS, CANVAS), buttons=[], visible=False,
    )  # fmt: skip
    frame = square("The new canvas", "edit_frame", format="png", interactive=False, buttons=[], visible=False)
    another = gr.Button("Another picture", size="sm", interactive=False, elem_id="edit_another")
    hint = gr.HTML(f"<p>{HINTS['repaint']}</p>", elem_classes="hint")
    return {"image": source, "editor": editor, "frame": frame, "another": another, "hint": hint}


def side_widgets() -> tuple[gr.Row, dict[str, gr.Number]]:
    options: dict[str, Any] = {"minimum": 0, "step": 8, "precision": 0, "min_width": 64}
    with gr.Row(visible=False, elem_id="edit_sides") as row:
        sides = {
            name: gr.Number(
                16, label=name.capitalize(), elem_id=f"edit_{name}", elem_classes="bordered", **options
            )
            for name in SIDES
        }
    return row, sides


def arrange_events(by: dict[str, Any], sides: dict[str, gr.Number]) -> tuple[Callable[[str], dict], list]:
    """Makes each mode show its own widgets. Returns a function, path -> updates that load this picture, and
    the widgets that it updates."""
    source, editor, frame = by["image"], by["editor"], by["frame"]

    def arrange(mode: str, image: str | None) -> dict:
        """Show the widgets that this mode has."""
        there = image is not None
        shown = {
            "image": not there or mode == "restyle",
            "editor": there and mode == "repaint",
            "frame": there and mode == "extend",
            "sides": mode == "extend",
            "strength": mode == "restyle",
            "context": mode == "repaint",
            "jump_n_sample": mode != "restyle",
        }
        updates: dict = {by[name]: gr.update(visible=visible) for name, visible in shown.items()}
        updates |= {by["another"]: gr.Button(interactive=there), by["hint"]: f"<p>{HINTS[mode]}</p>"}
        return updates | {by["go"]: gr.Button(VERBS[mode])}

    def take(path: str | None, mode: str, *added: int) -> dict:
        """Load a new picture to work on; None removes the old one."""
        updates = arrange(mode, path)
        if path is None:
            return updates | {source: gr.Image(None, visible=True), editor: None, frame: None}
        original = read_picture(path)
        background = {"background": canvas_of(original), "layers": [], "composite": None}
        updates[editor] = gr.ImageEditor(background, visible=mode == "repaint")
        updates[frame] = gr.Image(frame_around(original, **growth(added)), visible=mode == "extend")
        return updates

    def preview(image: str | None, *added: int) -> Image.Image | None:
        if image is None:
            return None
        original, growing = read_picture(image), growth(added)
        check_growth(original, growing)
        return frame_around(original, **growing)

    names = "image editor frame another sides strength context jump_n_sample hint go"
    arranged, mode = [by[name] for name in names.split()], by["mode"]
    placed = [mode, *sides.values()]
    mode.change(arrange, [mode, source], arranged, **QUIETLY)
    source.upload(take, [source, *placed], arranged, **QUIETLY)
    source.clear(take, [source, *placed], arranged, **QUIETLY)
    by["another"].click(lambda *rest: take(None, *rest), placed, arranged, **QUIETLY)
    gr.on([number.change for number in sides.values()], preview, [source, *sides.values()], frame, **QUIETLY)

    def receive(path: str) -> dict:
        updates = take(path, "repaint", *(number.value for number in sides.values()))
        return updates | {source: gr.Image(path, visible=False), mode: "repaint"}

    return receive, [*arranged, mode]


def edit_tab(pipe: TextToImagePipeline, history: gr.State) -> Tab:
    """The widgets and events of editing."""
    paint, redraw = InpaintPipeline.from_pipe(pipe), ImageToImagePipeline.from_pipe(pipe)  # the same weights
    for other in (paint, redraw):
        other.upsampler = pipe.upsampler
        other.set_progress_bar_config(disable=True)

    mode = gr.Radio(MODES, value="repaint", show_label=False, container=False, elem_id="mode")
    prompt, go = prompt_row("What shall the finished picture show?", "Repaint", "edit_")
    with gr.Row():
        with gr.Column(min_width=300):
            widgets = picture_widgets()
        with gr.Column(min_width=300):
            result = square(
                "Result", "edit_result", type="filepath", format="png", interactive=False,
                buttons=["download", "fullscreen"],
            )  # fmt: skip
            sending = gr.Row()
    with gr.Row():
        with gr.Column(min_width=300):
            context = widget("context", "edit_")
            row, sides = side_widgets()
            strength, style = widget("strength", "edit_", visible=False), widget("style", "edit_")
        with gr.Column(min_width=300):
            seed = seed_widgets("edit_")
    advanced = advanced_widgets(pipe, "jump_n_sample", "edit_")
    mask, picture = upload("Mask", visible=False), gr.State(None)

    settings = {"prompt": prompt, "style": style, "strength": strength, "context": context}
    settings |= {**seed, **sides, **advanced}
    every = settings | widgets | {"mode": mode, "go": go, "sides": row, "mask_image": mask}
    receive, received = arrange_events(every, sides)
    asked = {name: every[name] for name in (*ORDER.split(), *advanced)}
    first_the_seed([go.click, prompt.submit], seed).then(
        prepare, [mode, widgets["image"], widgets["editor"]], mask, **QUIETLY
    ).success(
        event(edit, {"repaint": paint, "extend": paint, "restyle": redraw}, asked, RENAMED, required=2),
        [*asked.values(), history, *old_fields(asked, RENAMED)],
        [result, seed["seed"], picture, history],
        show_progress_on=result,
        api_name="edit",
        **MODEL_QUEUE,
    )

    def show(path: str, about: dict[str, str]) -> dict:
        return {result: path, picture: path}

    return Tab(settings | {"task": mode}, picture, show, [result, picture], sending, receive, received)
