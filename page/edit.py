"""The tab that repaints a part of a picture, extends its canvas, or redraws it in another style."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image, ImageDraw

from pipelines import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline, editing
from pipelines.drawing.images import to_grey
from pipelines.drawing.masks import repaint_order
from pipelines.drawing.request import Request

from . import common
from .common import MODEL_QUEUE, QUIETLY, Tab, full_prompt, read_picture, told_plainly, user_error

MODES = [("Repaint a part", "repaint"), ("Extend the canvas", "extend"), ("Restyle", "restyle")]
VERBS = {value: name.split()[0] for name, value in MODES}  # what the button says
SIDES = ("left", "right", "top", "bottom")
CANVAS = 512  # pixels of the longer side of what is painted on, whatever the picture's own size
JUMP_LENGTH: int = Request.jump_length  # steps that resampling goes back
MAX_GROWTH = 2  # times the picture's longer side, on each side
BRUSH = "rgb(255, 92, 0)"
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
    """The picture at the size that it is painted on: of small ones one sees the pixels."""
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
    """What the extended canvas will look like: the picture in its place, hatched what is to be drawn."""
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


class Widgets(NamedTuple):
    """The widgets of the tab that its events change or read."""

    mode: gr.Radio
    prompt: gr.Textbox
    go: gr.Button
    source: common.Upload
    editor: gr.ImageEditor
    frame: gr.Image
    another: gr.Button
    hint: gr.HTML
    result: gr.Image
    sending: gr.Row


class Settings(NamedTuple):
    """Of an edit."""

    context: gr.Slider
    growth: gr.Row
    sides: dict[str, gr.Number]
    strength: gr.Slider
    style: gr.Dropdown
    seed: gr.Number
    new_each_time: gr.Checkbox
    steps: gr.Slider
    guidance: gr.Slider
    negative_prompt: gr.Textbox
    jump_n_sample: gr.Slider


def picture_widgets() -> Widgets:
    mode = gr.Radio(MODES, value="repaint", show_label=False, container=False, elem_id="mode")
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(
            label="Prompt",
            show_label=False,
            container=False,
            placeholder="What shall the finished picture show?",
            max_lines=3,
            scale=5,
            min_width=320,
            elem_id="edit_prompt",
            elem_classes="prompt",
        )
        go = gr.Button(
            "Repaint", variant="primary", scale=1, min_width=140, elem_id="edit_go", elem_classes="go"
        )
    with gr.Row():
        with gr.Column(min_width=300):
            source = common.upload(
                label="Picture", show_label=False, elem_id="edit_source", elem_classes="square"
            )
            editor = gr.ImageEditor(
                label="Paint over what is to change",
                show_label=False,
                type="pil",
                image_mode="RGBA",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=48, colors=[BRUSH], color_mode="fixed"),
                eraser=gr.Eraser(default_size=48),
                canvas_size=(CANVAS, CANVAS),
                buttons=[],
                visible=False,
                elem_id="edit_mask",
                elem_classes="square",
            )
            frame = gr.Image(
                label="The new canvas",
                show_label=False,
                format="png",
                interactive=False,
                buttons=[],
                visible=False,
                elem_id="edit_frame",
                elem_classes="square",
            )
            another = gr.Button("Another picture", size="sm", interactive=False, elem_id="edit_another")
            hint = gr.HTML(f"<p>{HINTS['repaint']}</p>", elem_classes="hint")
        with gr.Column(min_width=300):
            result = gr.Image(
                label="Result",
                show_label=False,
                type="filepath",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="edit_result",
                elem_classes="square",
            )
            sending = gr.Row()
    return Widgets(mode, prompt, go, source, editor, frame, another, hint, result, sending)


def setting_widgets(pipe: TextToImagePipeline) -> Settings:
    with gr.Row():
        with gr.Column(min_width=300):
            context = gr.Slider(
                0,
                100,
                value=100,
                step=5,
                label="Surroundings",
                info="How much of the picture is seen around the painted part, in percent.",
                elem_id="edit_context",
            )
            with gr.Row(visible=False, elem_id="edit_sides") as growth:
                sides = {
                    name: gr.Number(
                        16,
                        minimum=0,
                        step=8,
                        precision=0,
                        label=name.capitalize(),
                        min_width=64,
                        elem_id=f"edit_{name}",
                        elem_classes="bordered",
                    )
                    for name in SIDES
                }
            strength = gr.Slider(
                0.05,
                1,
                value=0.7,
                step=0.05,
                label="Strength",
                info="How far it may go from the picture; 1 keeps almost nothing.",
                visible=False,
                elem_id="edit_strength",
            )
            style = common.style_widget("edit_")
        with gr.Column(min_width=300):
            seed, new_each_time = common.seed_widgets("edit_")
    with gr.Accordion("Advanced", open=False, elem_id="edit_more"):
        with gr.Row():
            steps = common.steps_widget(common.default_steps(pipe), "edit_")
            guidance = common.guidance_widget(pipe.config.default_guidance_scale, "edit_")
        with gr.Row(equal_height=True):
            negative_prompt = common.negative_widget("edit_")
            jump_n_sample = gr.Slider(
                1,
                10,
                value=1,
                step=1,
                precision=0,
                label="Resampling",
                info="Goes back and forth so often, which fits new and old together; takes as much longer.",
                elem_id="edit_jump_n_sample",
            )
    about = style, seed, new_each_time, steps, guidance, negative_prompt, jump_n_sample
    return Settings(context, growth, sides, strength, *about)


def edit_event(pipe: TextToImagePipeline) -> Callable[..., Any]:
    """The function behind the button and /edit."""
    paint = InpaintPipeline.from_pipe(pipe)  # the same weights, as they are
    redraw = ImageToImagePipeline.from_pipe(pipe)
    for other in (paint, redraw):
        other.upsampler = pipe.upsampler
        other.set_progress_bar_config(disable=True)

    @common.takes_old_names(**RENAMED)
    def edit(
        image: str | None,
        prompt: str,
        mode: str,
        left: int,
        right: int,
        top: int,
        bottom: int,
        strength: float,
        style: str,
        negative_prompt: str,
        num_inference_steps: int,
        guidance_scale: float,
        seed: float | None,
        context: int,
        jump_n_sample: int,
        history: list[str],
        mask_image: str | None = None,
        progress: gr.Progress = gr.Progress(),
    ) -> tuple[str, int, str, list[str]]:
        """Repaint where the mask is white, extend the canvas by pixels, or restyle the whole picture."""
        original, words, number = read_picture(image), full_prompt(prompt, style), common.whole_seed(seed)
        (generator,) = common.generators([number])
        call: dict[str, Any] = {
            "negative_prompt": negative_prompt or None,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
        }
        about: dict[str, Any] = {"task": mode}
        if mode == "restyle":
            call["strength"] = strength
            steps = math.ceil(num_inference_steps * strength)
        else:
            call |= {"jump_n_sample": jump_n_sample, "jump_length": JUMP_LENGTH}
            steps = len(repaint_order(num_inference_steps, JUMP_LENGTH, jump_n_sample))
        asked = call | {"callback_on_step_end": common.callback(progress, steps)}
        with told_plainly():
            if mode == "restyle":
                drawn = editing.restyle(redraw, words, original, paint.sample_size, generator, **asked)
            elif mode == "repaint":
                if mask_image is None:
                    raise user_error("Nothing is painted over: paint over what is to change.")
                about["context"] = context
                padding, mask = round(context / 100 * max(original.size)), read_picture(mask_image, to_grey)
                drawn = editing.repaint(paint, words, original, mask, padding, generator, **asked)
            else:
                added = dict(zip(SIDES, (left, right, top, bottom), strict=True))
                check_growth(original, added)
                about |= added
                drawn = editing.extend(paint, words, original, added, generator, **asked)
        about |= call | {"prompt": words, "negative_prompt": negative_prompt, "seed": number}
        path = common.save_picture(drawn, pipe, f"{common.file_name(words, number)}_{mode}", about)
        return path, number, path, common.remember(history, [path])

    return edit


def prepare(mode: str, image: str | None, value: dict | None) -> Image.Image | None:
    """The mask that was painted, of the picture's own size."""
    if mode != "repaint" or image is None:
        return None
    mask = painted((value or {}).get("layers") or [], read_picture(image).size)
    if mask.getbbox() is None:
        raise user_error("Nothing is painted over: paint over what is to change.")
    return mask


def arrange_events(widgets: Widgets, settings: Settings) -> tuple[Callable[[str], dict], list]:
    """Each mode shows its own widgets. Returns (path -> updates, to work on it; the widgets updated)."""
    mode, _, go, source, editor, frame, another, hint, *_ = widgets
    context, growth, sides, strength, jump_n_sample = *settings[:4], settings.jump_n_sample

    def arrange(mode: str, image: str | None) -> dict:
        """Which of the widgets this mode has."""
        there = image is not None
        return {
            source: gr.Image(visible=not there or mode == "restyle"),
            editor: gr.ImageEditor(visible=there and mode == "repaint"),
            frame: gr.Image(visible=there and mode == "extend"),
            another: gr.Button(interactive=there),
            growth: gr.Row(visible=mode == "extend"),
            strength: gr.Slider(visible=mode == "restyle"),
            context: gr.Slider(visible=mode == "repaint"),
            jump_n_sample: gr.Slider(visible=mode != "restyle"),
            hint: f"<p>{HINTS[mode]}</p>",
            go: gr.Button(VERBS[mode]),
        }

    arranged = [source, editor, frame, another, growth, strength, context, jump_n_sample, hint, go]

    def take(path: str | None, mode: str, *added: int) -> dict:
        """A new picture, ready to be worked on; None takes the old one away."""
        updates = arrange(mode, path)
        if path is None:
            return updates | {source: gr.Image(None, visible=True), editor: None, frame: None}
        original = read_picture(path)
        background = {"background": canvas_of(original), "layers": [], "composite": None}
        updates[editor] = gr.ImageEditor(background, visible=mode == "repaint")
        updates[frame] = gr.Image(frame_around(original, *whole(added)), visible=mode == "extend")
        return updates

    placed = [mode, *sides.values()]
    mode.change(arrange, [mode, source], arranged, **QUIETLY)
    source.upload(take, [source, *placed], arranged, **QUIETLY)
    source.clear(take, [source, *placed], arranged, **QUIETLY)
    another.click(lambda *rest: take(None, *rest), placed, arranged, **QUIETLY)

    def preview(image: str | None, *added: int) -> Image.Image | None:
        if image is None:
            return None
        original = read_picture(image)
        growing = dict(zip(SIDES, whole(added), strict=True))
        check_growth(original, growing)
        return frame_around(original, *growing.values())

    gr.on([number.change for number in sides.values()], preview, [source, *sides.values()], frame, **QUIETLY)

    def receive(path: str) -> dict:
        updates = take(path, "repaint", *(number.value for number in sides.values()))
        updates[source] = gr.Image(path, visible=False)
        return updates | {mode: "repaint"}

    return receive, [*arranged, mode]


def edit_tab(pipe: TextToImagePipeline, history: gr.State) -> tuple[Tab, gr.Row]:
    """The widgets and events of editing, and the row that buttons for the result go into."""
    widgets, settings = picture_widgets(), setting_widgets(pipe)
    mode, prompt, go, source, editor, frame, another, hint, result, sending = widgets
    context, growth, sides, strength, style, seed, new_each_time, steps, guidance, *rest = settings
    negative_prompt, jump_n_sample = rest
    mask = common.upload(label="Mask", visible=False)
    picture = gr.State(None)
    receive, received = arrange_events(widgets, settings)

    gr.on(
        [go.click, prompt.submit], common.next_seed, [seed, new_each_time], seed, queue=False, **QUIETLY
    ).then(prepare, [mode, source, editor], mask, **QUIETLY).success(
        edit_event(pipe),
        [
            source,
            prompt,
            mode,
            *sides.values(),
            strength,
            style,
            negative_prompt,
            steps,
            guidance,
            seed,
            context,
            jump_n_sample,
            history,
            mask,
            *map(common.old_name, (steps, guidance, jump_n_sample, mask)),
        ],
        [result, seed, picture, history],
        show_progress_on=result,
        api_name="edit",
        **MODEL_QUEUE,
    )

    def show(path: str, about: dict[str, str]) -> dict:
        return {result: path, picture: path}

    fields = {
        "prompt": prompt,
        "style": style,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "new_each_time": new_each_time,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "task": mode,
        "strength": strength,
        "context": context,
        "jump_n_sample": jump_n_sample,
        **sides,
    }
    tab = Tab(fields, picture, show, [result, picture], receive, received)
    return tab, sending


def whole(numbers: tuple[int | None, ...]) -> list[int]:
    """Fields that were cleared count as 0."""
    return [max(0, number or 0) for number in numbers]


def check_growth(picture: Image.Image, sides: Mapping[str, int | None]) -> None:
    limit = MAX_GROWTH * max(picture.size)
    for name, pixels in sides.items():
        if pixels is None or not 0 <= pixels <= limit:
            raise user_error(
                f"“{name.capitalize()}” must be 0 to {limit} pixels for this picture of "
                f"{picture.width} × {picture.height}; it is {'empty' if pixels is None else pixels}."
            )
    if not any(sides.values()):
        raise user_error("The canvas does not grow: set at least one side above 0.")
