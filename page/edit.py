"""The tab that repaints a part of a picture, extends its canvas, or redraws it in another style."""

import math
from collections.abc import Mapping
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw

from pipelines import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline
from pipelines.drawing.images import to_grey
from pipelines.drawing.masks import repaint_order

from . import common, larger
from .common import MODEL_QUEUE, QUIETLY, Tab, full_prompt, read_picture, told_plainly, user_error

MODES = [("Repaint a part", "repaint"), ("Extend the canvas", "extend"), ("Restyle", "restyle")]
VERBS = {value: name.split()[0] for name, value in MODES}  # what the button says
SIDES = ("left", "right", "top", "bottom")
CANVAS = 512  # pixels of the longer side of what is painted on, whatever the picture's own size
JUMP_LENGTH = 10  # steps that resampling goes back, the paper's
MAX_GROWTH = 2  # times the picture's longer side, on each side
BRUSH = "rgb(255, 92, 0)"
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


def edit_tab(pipe: TextToImagePipeline, history: gr.State) -> tuple[Tab, gr.Row]:
    """The widgets and events of editing, and the row that buttons for the result go into."""
    paint = InpaintPipeline.from_pipe(pipe)  # the same weights, as they are
    redraw = ImageToImagePipeline.from_pipe(pipe)
    for other in (paint, redraw):
        other.upsampler = pipe.upsampler
        other.set_progress_bar_config(disable=True)

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
            resampling = gr.Slider(
                1,
                10,
                value=1,
                step=1,
                precision=0,
                label="Resampling",
                info="Goes back and forth so often, which fits new and old together; takes as much longer.",
                elem_id="edit_resampling",
            )
    mask = common.upload(label="Mask", visible=False)
    picture = gr.State(None)

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
        steps: int,
        guidance: float,
        seed: float | None,
        context: int,
        resampling: int,
        history: list[str],
        mask: str | None = None,
        progress: gr.Progress = gr.Progress(),
    ) -> tuple[str, int, str, list[str]]:
        """Repaint where the mask is white, extend the canvas by pixels, or restyle the whole picture."""
        original, words, number = read_picture(image), full_prompt(prompt, style), common.whole_seed(seed)
        (generator,) = common.generators([number])
        call: dict[str, Any] = {
            "negative_prompt": negative_prompt or None,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
        }
        about: dict[str, Any] = {
            "prompt": words,
            "negative_prompt": negative_prompt,
            "seed": number,
            "steps": steps,
            "guidance_scale": guidance,
            "task": mode,
        }
        with told_plainly():
            if mode == "restyle":
                report = common.callback(progress, math.ceil(steps * strength))
                about["strength"] = strength
                call |= {"strength": strength, "callback_on_step_end": report}
                drawn = larger.restyle(redraw, words, original, paint.sample_size, generator, **call)
            else:
                passes = len(repaint_order(steps, JUMP_LENGTH, resampling))
                report = common.callback(progress, passes)
                about["resampling"] = resampling
                call |= {"jump_n_sample": resampling, "jump_length": JUMP_LENGTH}
                call["callback_on_step_end"] = report
            if mode == "repaint":
                if mask is None:
                    raise user_error("Nothing is painted over: paint over what is to change.")
                about["context"] = context
                padding = round(context / 100 * max(original.size))
                drawn = larger.repaint(
                    paint, words, original, read_picture(mask, to_grey), padding, generator, **call
                )
            elif mode == "extend":
                added = dict(zip(SIDES, (left, right, top, bottom), strict=True))
                check_growth(original, added)
                about |= added
                drawn = larger.extend(paint, words, original, added, generator, **call)
        path = common.save_picture(drawn, pipe, f"{common.file_name(words, number)}_{mode}", about)
        return path, number, path, common.remember(history, [path])

    def prepare(mode: str, image: str | None, value: dict | None) -> Image.Image | None:
        """The mask that was painted, of the picture's own size."""
        if mode != "repaint" or image is None:
            return None
        mask = painted((value or {}).get("layers") or [], read_picture(image).size)
        if mask.getbbox() is None:
            raise user_error("Nothing is painted over: paint over what is to change.")
        return mask

    gr.on(
        [go.click, prompt.submit], common.next_seed, [seed, new_each_time], seed, queue=False, **QUIETLY
    ).then(prepare, [mode, source, editor], mask, **QUIETLY).success(
        edit,
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
            resampling,
            history,
            mask,
        ],
        [result, seed, picture, history],
        show_progress_on=result,
        api_name="edit",
        **MODEL_QUEUE,
    )

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
            resampling: gr.Slider(visible=mode != "restyle"),
            hint: f"<p>{HINTS[mode]}</p>",
            go: gr.Button(VERBS[mode]),
        }

    arranged = [source, editor, frame, another, growth, strength, context, resampling, hint, go]

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

    def show(path: str, about: dict[str, str]) -> dict:
        return {result: path, picture: path}

    fields = {
        "prompt": prompt,
        "style": style,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "new_each_time": new_each_time,
        "steps": steps,
        "guidance_scale": guidance,
        "task": mode,
        "strength": strength,
        "context": context,
        "resampling": resampling,
        **sides,
    }
    tab = Tab(fields, picture, show, [result, picture], receive, [*arranged, mode])
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
