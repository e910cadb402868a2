"""Requests to the page: from the values of its widgets to picture files that carry their settings."""

import functools
import inspect
import math
import secrets
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image

from pipelines import TextToImagePipeline, editing
from pipelines.drawing import images as png
from pipelines.drawing.attention_maps import AttentionMaps, draw_attention
from pipelines.drawing.images import to_grey, to_pil, to_rgb
from pipelines.drawing.masks import repaint_order
from pipelines.drawing.request import Request
from pipelines.drawing.text import plain_texts

# What each drawing style adds to the prompt; the words are those of the training captions.
STYLE_PHRASES = {
    name: f"{name.lower()} style" for name in ("3D", "Flat", "Noto", "Twemoji", "EmojiOne", "FxEmoji")
}
ANY_STYLE = "Any"

NEW_SEED, MAX_SEED = -1, 2**32 - 1  # -1 asks for a random seed
NEW_SEEDS = 10**6  # random seeds are below this, short enough to read out
MAX_VISIT = 60  # how many pictures of a visit are kept
SIDES = ("left", "right", "top", "bottom")
JUMP_LENGTH: int = Request.jump_length  # steps that resampling goes back
MAX_GROWTH = 2  # times the picture's longer side, on each side
MAX_AREA = 512 * 512  # pixels of a picture to be enlarged: half a minute on one core

Event = Callable[[Any, dict[str, Any], list[str], gr.Progress], Iterator[Any]]

# ---- words and seeds


def user_error(message: str) -> gr.Error:
    """An error for the person at the page or the API: shown to them, kept out of the log."""
    return gr.Error(message, print_exception=False)


@contextmanager
def told_plainly() -> Iterator[None]:
    """Shows a pipeline's ValueError to the person who asked."""
    try:
        yield
    except ValueError as problem:
        raise user_error(str(problem)) from problem


def full_prompt(prompt: str, style: str) -> str:
    """The prompt with the words of its style: ("a red heart", "Noto") -> "a red heart, noto style"."""
    prompt = (prompt or "").strip()
    if not prompt:
        raise user_error("Please describe the picture: the prompt is empty.")
    return f"{prompt.rstrip(',. ')}, {STYLE_PHRASES[style]}" if style in STYLE_PHRASES else prompt


def split_prompt(words: str) -> tuple[str, str]:
    """(prompt, style) from which `full_prompt` makes these words."""
    for style, phrase in STYLE_PHRASES.items():
        if words.endswith(f", {phrase}"):
            return words.removesuffix(f", {phrase}"), style
    return words, ANY_STYLE


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
    """What the seed field shows from now on: its own value, or a new seed if the box is ticked."""
    return secrets.randbelow(NEW_SEEDS) if new_each_time else seed


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- what all requests share


def event(
    function: Event, pipe: Any, fields: Iterable[str], renamed: dict[str, str], required: int = 1
) -> Callable[..., Iterator[Any]]:
    """`function(pipe, asked, history, progress)` as Gradio calls it and as the API describes it.

    Its parameters are the names of `fields`, whose values become `asked`, then the history, then the names
    from 0.1 in `renamed`, old: new. Only the first `required` fields must be given. Values under old names
    are passed on under the new ones, with a warning to the caller.
    """

    @functools.wraps(function)
    def run(*values: Any, **given: Any) -> Iterator[Any]:
        bound = signature.bind(*values, **given)
        bound.apply_defaults()
        asked = dict(bound.arguments)
        old = {name: asked.pop(name) for name in renamed}
        used = {renamed[name]: name for name, value in old.items() if value is not None}
        asked |= {new: old[name] for new, name in used.items()}
        if used:
            gr.Warning("; ".join(f"`{name}` is now `{new}`" for new, name in used.items()) + ".")
        history, progress = asked.pop("history"), asked.pop("progress")
        yield from function(pipe, asked, history, progress)

    names = [*fields, "history", *renamed, "progress"]
    empty = inspect.Parameter.empty
    defaults = [empty] * required + [None] * (len(names) - required - 1) + [gr.Progress()]
    signature = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
            for name, default in zip(names, defaults, strict=True)
        ]
    )
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def arguments_of(asked: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call, from the widgets under "Advanced"."""
    names = (
        "num_inference_steps guidance_scale guidance_rescale clip_guidance_scale clip_guidance "
        "classifier_guidance_scale class_labels num_candidates"
    )
    call = {name: asked[name] for name in names.split()}
    call["negative_prompt"] = asked["negative_prompt"] or None
    interval = (asked["guidance_from"] or 0, asked["guidance_to"] or math.inf)
    call["guidance_interval"] = None if interval == (0, math.inf) else interval
    words = asked["combined_prompt"].strip()
    call["combined_prompts"] = {words: asked["combined_weight"]} if words else None
    if not call["clip_guidance_scale"]:
        call["clip_guidance"] = "noised"
    if not call["classifier_guidance_scale"]:
        call["class_labels"] = None
    return call


def callback(progress: gr.Progress, total: int, desc: str = "Drawing") -> Callable[..., dict]:
    """A pipeline's `callback_on_step_end` that counts up to `total` steps, then starts over."""
    done = 0
    progress((0, total), desc=desc)

    def report(_pipe: Any, _step: int, _timestep: Any, _tensors: dict) -> dict:
        nonlocal done
        done = done % total + 1
        progress((done, total), desc=desc)
        return {}

    return report


def read_picture(path: str | None, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """An uploaded picture of any mode, in RGB or as `convert` returns it; see `png.open_picture`."""
    if path is None:
        raise user_error("There is no picture yet: choose one first, or send one here from another tab.")
    with told_plainly():
        return png.open_picture(path, convert)


def save_picture(image: Image.Image, pipe: Any, name: str, settings: dict[str, Any]) -> str:
    """Writes a PNG that carries its settings into a folder that Gradio serves. Returns its path."""
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    model, scheduler = Path(pipe.name_or_path or "").name, type(pipe.scheduler).__name__
    about = {"scheduler": scheduler, "model": model, "Software": "Corgi"}
    return str(png.write_picture(image, folder, name, png.settings_of(settings) | about))


def remember(history: list[str], paths: list[str]) -> list[str]:
    """The history with new paths added, newest first."""
    return [*reversed(paths), *history][:MAX_VISIT]


# ---- text to image


def generate(
    pipe: TextToImagePipeline, asked: dict[str, Any], history: list[str], progress: gr.Progress
) -> Iterator[tuple[list[tuple[str, str]], int, list[str], str, list[str]]]:
    """Draw pictures of a prompt. Picture i, counted from 0, uses the returned seed + i."""
    words, first_seed = full_prompt(asked["prompt"], asked["style"]), whole_seed(asked["seed"])
    looked_at = [word.strip() for word in asked["attention_words"].split(",") if word.strip()]
    if looked_at and asked["num_candidates"] > 1:
        raise user_error("Attention is shown for what is drawn once: set “Best of” to 1.")
    call = arguments_of(asked)
    about = call | {"prompt": words, "negative_prompt": asked["negative_prompt"]}
    about["attention_words"] = ", ".join(looked_at)
    seeds = [(first_seed + i) % (MAX_SEED + 1) for i in range(asked["num_images_per_prompt"])]
    sources: list[Any] = [generators(seeds)]
    if asked["num_candidates"] > 1:  # one seed draws all its candidates
        sources = sources[0]
    report = callback(progress, asked["num_inference_steps"] * len(sources))
    enlarged = asked["size"] > pipe.sample_size[0]
    call |= {"output_type": "pt" if enlarged else "pil", "return_dict": False}

    def save(images: list[Image.Image], end: str = "") -> list[tuple[str, str]]:
        """(path, caption) of each picture."""
        names = [f"{png.slug(words)}_seed{seed}{end}" for seed in seeds]
        return [
            (save_picture(image, pipe, name, about | {"seed": seed}), f"seed {seed}")
            for image, name, seed in zip(images, names, seeds, strict=True)
        ]

    with told_plainly():
        images, maps = draw_all(pipe, words, sources, looked_at, report, call)
        if enlarged:
            small = save(to_pil(2 * torch.stack(images) - 1))
            yield small, first_seed, [path for path, _ in small], small[0][0], history
            images = enlarge_all(pipe, words, sources, images)
    pictures = save(images, f"_{asked['size']}" if enlarged else "")
    paths = [path for path, _ in pictures]
    for word in looked_at:
        heat = [draw_attention(image, one) for image, one in zip(images, maps[word], strict=True)]
        pictures += [(path, f"{seed}, {word}") for path, seed in save(heat, f"_{png.slug(word)}")]
    yield pictures, first_seed, [path for path, _ in pictures], paths[0], remember(history, paths)


def draw_all(
    pipe: TextToImagePipeline,
    words: str,
    sources: list[Any],
    looked_at: list[str],
    report: Callable[..., dict],
    call: dict[str, Any],
) -> tuple[list[Any], Any]:
    """(pictures of `call`'s output type, the AttentionMaps of `looked_at`), by a call for each of `sources`.

    sources: what each call draws its noise from: a list with a generator for each picture, or one generator
    for all candidates of a picture.
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
            options = {"num_images_per_prompt": count, "generator": source, "callback_on_step_end": on_step}
            images += list(pipe(words, **options, **call)[0])
    return images, maps


def enlarge_all(
    pipe: TextToImagePipeline, words: str, sources: list[Any], images: list[torch.Tensor]
) -> list[Image.Image]:
    """Small pictures (3, h, w) in [0, 1] -> large ones. Each of `sources` continues where `draw_all` left it,
    so that the results are those of `pipe(words, height, width)` with the same seeds."""
    large, rest = [], images
    for source in sources:
        count = len(source) if isinstance(source, list) else 1
        part, rest = rest[:count], rest[count:]
        prompts = [words] * count if pipe.upsampler.reads_text else None
        large += pipe.upsampler(prompts, image=torch.stack(part), generator=source).images
    return large


# ---- editing


def edit(
    pipes: dict[str, Any], asked: dict[str, Any], history: list[str], progress: gr.Progress
) -> Iterator[tuple[str, int, str, list[str]]]:
    """Repaint where the mask is white, extend the canvas, or restyle the whole picture."""
    original, mode = read_picture(asked["image"]), asked["mode"]
    words, seed = full_prompt(asked["prompt"], asked["style"]), whole_seed(asked["seed"])
    pipe, steps, call = pipes[mode], asked["num_inference_steps"], arguments_of(asked)
    about: dict[str, Any] = {"task": mode}
    if mode == "restyle":
        call["strength"] = asked["strength"]
        steps = math.ceil(steps * asked["strength"])
    else:
        call |= {"jump_n_sample": asked["jump_n_sample"], "jump_length": JUMP_LENGTH}
        steps = len(repaint_order(steps, JUMP_LENGTH, asked["jump_n_sample"]))
    options = call | {"callback_on_step_end": callback(progress, steps)}
    (generator,) = generators([seed])
    with told_plainly():
        if mode == "restyle":
            drawn = editing.restyle(pipe, words, original, pipe.sample_size, generator, **options)
        elif mode == "repaint":
            if asked["mask_image"] is None:
                raise user_error("Nothing is painted over: paint over what is to change.")
            about["context"] = asked["context"]
            padding = round(asked["context"] / 100 * max(original.size))
            mask = read_picture(asked["mask_image"], to_grey)
            drawn = editing.repaint(pipe, words, original, mask, padding, generator, **options)
        else:
            added = {name: asked[name] for name in SIDES}
            check_growth(original, added)
            about |= added
            drawn = editing.extend(pipe, words, original, added, generator, **options)
    about |= call | {"prompt": words, "negative_prompt": asked["negative_prompt"], "seed": seed}
    path = save_picture(drawn, pipe, f"{png.slug(words)}_seed{seed}_{mode}", about)
    yield path, seed, path, remember(history, [path])


def check_growth(picture: Image.Image, sides: dict[str, int]) -> None:
    """Raises gr.Error unless the picture can grow by this many pixels on each side."""
    limit = MAX_GROWTH * max(picture.size)
    for name, pixels in sides.items():
        if pixels is None or not 0 <= pixels <= limit:
            raise user_error(
                f"“{name.capitalize()}” must be 0 to {limit} pixels for this picture of "
                f"{picture.width} × {picture.height}; it is {'empty' if pixels is None else pixels}."
            )
    if not any(sides.values()):
        raise user_error("The canvas does not grow: set at least one side above 0.")


# ---- enlarging


def enlarge(
    upsampler: Any, asked: dict[str, Any], history: list[str], progress: gr.Progress
) -> Iterator[tuple[str, int, str, list[str]]]:
    """Enlarge a picture; the model adds details."""
    original, seed = read_picture(asked["image"]), whole_seed(asked["seed"])
    if original.width * original.height > MAX_AREA:
        raise user_error(
            f"The picture has {original.width} × {original.height} pixels; at most 512 × 512, or as "
            f"many in another shape, are enlarged here: make it smaller first."
        )
    call = {name: asked[name] for name in ("num_inference_steps", "noise_level")}
    report = callback(progress, asked["num_inference_steps"], "Enlarging")
    options = call | {"generator": generators([seed])[0], "callback_on_step_end": report}
    with told_plainly():
        large = upsampler(asked["prompt"] or None, image=original, **options).images[0]
    about = call | {"prompt": asked["prompt"], "seed": seed, "task": "enlarge"}
    path = save_picture(large, upsampler, f"enlarged_seed{seed}", about)
    yield path, seed, path, remember(history, [path])
