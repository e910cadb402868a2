"""`python -m pipelines draw "a corgi in a party hat"`, and edit, enlarge, classify, train, models.

Pictures are PNG files that say how they were made. Flags are the arguments of `drawing.request.Request`,
checked before torch is imported, so that a mistake is reported at once, in one line, with exit code 2.
"""

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing.request import ARGUMENTS, COUNT, IMAGE, INPAINT, TEXT, UPSCALE, check
from .family import (
    SCHEDULERS,
    check_model,
    default_model,
    find_beside,
    load_guides,
    load_model,
    load_upsampler,
)
from .flags import Parser, add, add_arguments, flag

if TYPE_CHECKING:
    from PIL import Image

BATCH_SIZE = 8  # pictures at a time; a picture depends on its own seed alone, so this changes no picture
SIDES = ("left", "top", "right", "bottom")


def build_parser(command: str, prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=COMMANDS[command][1])
    parser.set_defaults(flags={})
    model = "model folder; default: models/emoji"
    if command == "draw":
        parser.add_argument("prompt", nargs="+", help="what to draw; each prompt's seeds begin at --seed")
        add_arguments(parser, [TEXT])
        add(parser, "size", "--height and --width in one", type=int, metavar="PIXELS")
    elif command == "edit":
        parser.add_argument("file", type=Path, help="the picture")
        parser.add_argument("prompt", nargs=1, help="what the result shows")
        add_arguments(parser, [IMAGE, INPAINT])
        add(parser, "mask", "repaint where this picture is white", type=Path, metavar="FILE")
        for side in SIDES:
            add(parser, side, "extend the canvas by N pixels", type=int, metavar="N")
    elif command == "enlarge":
        parser.add_argument("file", type=Path, help="the picture")
        parser.add_argument("prompt", nargs="?", help="what it shows, for an upsampler that reads text")
        add_arguments(parser, [UPSCALE])
    elif command == "classify":
        parser.add_argument("file", type=Path, nargs="+", help="pictures")
        add(parser, "labels", 'what they may show, such as "a dog, a cat"', required=True, metavar="TEXT")
        add(parser, "template", "a sentence around each label, such as 'a picture of {}'", metavar="TEXT")
    elif command == "train":
        parser.add_argument("folder", type=Path, help="captioned pictures; further flags are training's own")
    if command in ("draw", "edit", "enlarge"):
        add(parser, "seed", "picture i gets N + i; default: a random one", type=int, metavar="N")
        add(parser, "out", "default: outputs", type=Path, metavar="DIR")
        add(
            parser,
            "upsampler",
            "the upsampler's folder; default: the one beside the model",
            type=Path,
            metavar="PATH",
        )
    if command in ("draw", "edit"):
        names = ", ".join(SCHEDULERS)
        add(
            parser,
            "scheduler",
            f"{names}; default: the model's own",
            choices=list(SCHEDULERS),
            metavar="NAME",
        )
        beside = "folder of the noised CLIP and the classifier that guide; default: the one beside the model"
        add(parser, "guides", beside, type=Path, metavar="PATH")
    if command in ("draw", "edit", "classify"):
        clean = "a clean CLIP, for guidance, ranking or classifying: folder, or open_clip's name"
        add(parser, "clip_guidance_model", clean, metavar="NAME")
    if command != "models":
        add(parser, "model", model, type=Path, metavar="PATH")
    return parser


# ---- what can be checked before a model is loaded


def check_request(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """The arguments of the task's call. Raises ValueError for anything that a user can get wrong."""
    if any(not prompt.strip() for prompt in args.prompt or []):
        raise ValueError("the prompt is empty")
    if (size := getattr(args, "size", None)) is not None:
        if hasattr(args, "height") or hasattr(args, "width"):
            raise ValueError("--size takes the place of --height and --width: give one or the others")
        args.height = args.width = size
        args.flags |= {"height": "--size", "width": "--size"}
    call = {name: getattr(args, name) for name in ARGUMENTS if name != "prompt" and hasattr(args, name)}
    for name, value in call.items():
        only, rule = ARGUMENTS[name].metadata["only"], ARGUMENTS[name].metadata["rule"]
        if task not in only:
            raise ValueError(f"`{name}` does not go with this kind of edit")
        check(name, value, rule.good(value), rule.text)
        if name in ("height", "width"):
            check(name, value, COUNT.good(value), COUNT.text)
    scale, label = call.get("classifier_guidance_scale", 0), call.get("class_labels")
    if (scale > 0) != (label is not None):
        given = f"{args.flags['class_labels']} {label}" if label else args.flags["classifier_guidance_scale"]
        rule = "the first names one of the classifier's classes (another name is answered with their list)"
        raise ValueError(
            f"`class_labels` and `classifier_guidance_scale` above 0 go together, got {given} alone; {rule}"
        )
    last = call.get("num_images_per_prompt", 1)
    if args.seed is not None and not 0 <= args.seed <= 2**63 - last:
        raise ValueError(f"--seed must be 0 or more, and the last picture's below 2^63, got {args.seed}")
    return call


def check_places(args: argparse.Namespace) -> None:
    for name in ("upsampler", "guides"):
        folder = getattr(args, name, None)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{name} must be a folder, got {folder}")
    for name in ("file", "mask"):
        path = getattr(args, name, None)
        if path is not None and not path.is_file():
            raise ValueError(f"there is no file {path}")
    if not (hasattr(args, "noise_level") or args.command == "enlarge"):
        check_model(args.model)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to --out {args.out}: {error.strerror}") from None


# ---- the commands


def load(args: argparse.Namespace, call: dict[str, Any]) -> Any:
    """The model, and its guides if the call or the model's defaults need guidance or ranking for which the
    model itself lacks a component."""
    pipe = load_model(args.model, args.scheduler, args.clip_guidance_model)
    scale, own = call.get("clip_guidance_scale"), pipe.config.default_clip_guidance_scale
    by_default = scale is None and "guidance_scale" not in call and args.clip_guidance_model is None
    by_default = bool(by_default and own and args.command == "draw")
    by_clip = scale or call.get("num_candidates", 1) > 1 or by_default
    lacks_clip = by_clip and pipe.noisy_clip is None and pipe.clip_guidance_model is None
    lacks_classifier = call.get("classifier_guidance_scale") and pipe.noisy_classifier is None
    if (lacks_clip or lacks_classifier) and not load_guides(pipe, args.model, args.guides):
        if lacks_clip and by_default:
            print(
                f"Drawn without the CLIP guidance of {own:g} that this model asks for: "
                f"{args.model.resolve().name}-guidance is not beside it. --guides PATH names another folder, "
                "models/emoji-guidance for a model tuned from models/emoji; --clip-guidance-scale 0 "
                "does without.",
                file=sys.stderr,
            )
    if args.clip_guidance_model is not None:
        call.setdefault("clip_guidance", "clean")
    return pipe


def warn_of_size(pipe: Any, height: int | None, width: int | None) -> None:
    """Warns if a pixel model is asked for a size that it was not trained at, where its shapes break."""
    own = pipe.unet.config.sample_size
    if pipe.vae is not None or not isinstance(own, int):
        return
    height, width = height or own, width or own
    factor = 1 if pipe.upsampler is None else pipe.upsampler.scale
    enlarged = factor > 1 and min(height, width) >= factor * own
    allowed = height % pipe.size_unit == width % pipe.size_unit == 0  # else an error follows
    if allowed and (height, width) != ((factor if enlarged else 1) * own,) * 2:
        good = f"{own}" if factor == 1 else f"{own} or {factor * own}"
        print(
            f"{width} x {height}: this model was trained at {own} x {own}; at other sizes its shapes repeat "
            f"or break. {good} is what it draws well.",
            file=sys.stderr,
        )


def write(
    args: argparse.Namespace, pipe: Any, image: "Image.Image", seed: int, name: str, call: dict[str, Any]
) -> None:
    """Writes a picture and prints its path. `call`: all arguments it was drawn with, except pictures."""
    from .drawing.images import settings_of, write_picture

    settings = settings_of(call) | {"seed": seed, "scheduler": type(pipe.scheduler).__name__}
    settings |= {"width": image.width, "height": image.height, "Software": "Corgi"}
    settings["model"] = (
        Path(pipe.name_or_path).resolve().name
    )  # a picture gets shared; the path to it does not
    print(write_picture(image, args.out, f"{name}_seed{seed}", settings), flush=True)


def seeds_of(args: argparse.Namespace, call: dict[str, Any]) -> list[int]:
    first = args.seed if args.seed is not None else secrets.randbelow(2**31)
    return list(range(first, first + call.pop("num_images_per_prompt", 1)))


def said(args: argparse.Namespace, pipe: Any, call: dict[str, Any], prompt: str | None) -> dict[str, Any]:
    """The arguments of a call for its PNG, with those that were left to the model filled in."""
    filled = {"prompt": prompt or "", "negative_prompt": "", "guidance_scale": pipe.guidance_scale} | call
    filled |= {
        "num_inference_steps": call.get("num_inference_steps", pipe.config.default_num_inference_steps)
    }
    filled["clip_guidance_scale"] = pipe.clip_guidance_scale
    if not pipe.clip_guidance_scale:
        filled.pop("clip_guidance", None)
    clip = getattr(args, "clip_guidance_model", None)
    if clip is not None:
        filled["clip_guidance_model"] = Path(clip).resolve().name if Path(clip).exists() else clip
    for name in ("height", "width"):  # the picture's own are added later
        filled.pop(name, None)
    return filled


def draw(args: argparse.Namespace, _rest: list[str]) -> int:
    """Draws pictures of prompts."""
    call = check_request(args, TEXT)
    check_places(args)
    pipe = load(args, call)
    if {"height", "width"} & call.keys():
        pipe.upsampler = load_upsampler(args.model, args.upsampler, pipe.vae is None)
        warn_of_size(pipe, call.get("height"), call.get("width"))
    import torch

    from .drawing.images import slug

    seeds = seeds_of(args, call)
    alone = call.get("num_candidates", 1) > 1  # one generator draws all candidates of a picture
    size = 1 if alone else BATCH_SIZE
    for prompt in args.prompt:
        for start in range(0, len(seeds), size):
            batch = seeds[start : start + size]
            generators = [torch.Generator().manual_seed(seed) for seed in batch]
            images = pipe(
                prompt,
                num_images_per_prompt=len(batch),
                generator=generators[0] if alone else generators,
                **call,
            ).images
            for seed, image in zip(batch, images, strict=True):
                write(args, pipe, image, seed, slug(prompt), said(args, pipe, call, prompt))
    return len(seeds) * len(args.prompt)


def edit(args: argparse.Namespace, _rest: list[str]) -> int:
    """Draws over a picture, repaints where --mask is white, or extends the canvas by --left, ..."""
    sides = {name: getattr(args, name, 0) for name in SIDES}
    mode = "repaint" if args.mask is not None else "extend" if any(sides.values()) else "restyle"
    if args.mask is not None and any(sides.values()):
        raise ValueError("--mask and --left, --top, --right, --bottom are two kinds of edit: give one")
    for name, pixels in sides.items():
        check(name, pixels, pixels >= 0, "0 or more")
    call = check_request(args, IMAGE if mode == "restyle" else INPAINT)
    for name in ("height", "width"):
        if name in call:
            raise ValueError(f"`{name}` is the picture's own in an edit")
    check_places(args)
    pipe = load(args, call)
    import torch

    from . import editing
    from .drawing.images import open_picture, slug, to_grey
    from .image_to_image import ImageToImagePipeline
    from .inpaint import InpaintPipeline

    upsampler = load_upsampler(args.model, args.upsampler, pipe.vae is None)
    own_size, pipe = (
        pipe.sample_size,
        (ImageToImagePipeline if mode == "restyle" else InpaintPipeline).from_pipe(pipe),
    )
    pipe.upsampler = upsampler
    picture, (prompt,) = open_picture(args.file), args.prompt
    seeds, padding = seeds_of(args, call), call.pop("padding_mask_crop", max(picture.size))
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        about = {"task": mode}
        if mode == "repaint":
            mask = open_picture(args.mask, to_grey)
            drawn = editing.repaint(pipe, prompt, picture, mask, padding, generator, **call)
        elif mode == "extend":
            drawn = editing.extend(pipe, prompt, picture, sides, generator, **call)
            about |= {name: str(pixels) for name, pixels in sides.items()}
        else:
            drawn = editing.restyle(pipe, prompt, picture, own_size, generator, **call)
        write(args, pipe, drawn, seed, f"{slug(prompt)}_{mode}", said(args, pipe, call, prompt) | about)
    return len(seeds)


def enlarge(args: argparse.Namespace, _rest: list[str]) -> int:
    """Enlarges a picture."""
    prompt, args.prompt = args.prompt, [args.prompt] if args.prompt else []
    call = check_request(args, UPSCALE)
    check_places(args)
    upsampler = load_upsampler(args.model, args.upsampler)
    if upsampler is None:
        raise ValueError(f"{args.model} has no upsampler beside it: --upsampler PATH names one")
    import torch

    from .drawing.images import open_picture

    picture, seeds = open_picture(args.file), seeds_of(args, call)
    for seed in seeds:
        large = upsampler(
            prompt, image=picture, generator=torch.Generator().manual_seed(seed), **call
        ).images[0]
        about = said(args, upsampler, call, prompt) | {"task": "enlarge"}
        write(args, upsampler, large, seed, f"{args.file.stem}_enlarged", about)
    return len(seeds)


def classify(args: argparse.Namespace, _rest: list[str]) -> None:
    """Prints the softmax over labels of exp(logit_scale) f(picture) . g(label), by a clean CLIP."""
    labels = [label.strip() for label in args.labels.split(",") if label.strip()]
    if not labels:
        raise ValueError("--labels names no label")
    template = getattr(args, "template", "{}")
    if "{}" not in template:
        raise ValueError(f"--template must hold {{}}, where the label goes, got {template!r}")
    for path in args.file:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
    from .components.guidance_clip import GuidanceCLIP
    from .drawing.images import open_picture, read_pictures
    from .family import loading

    name = args.clip_guidance_model or default_model().with_name("judge")
    with loading(name):
        clip = GuidanceCLIP.load(name)
    for path in args.file:
        pictures = read_pictures(open_picture(path), (clip.image_size, clip.image_size))
        logits = clip(pictures, [template.replace("{}", label) for label in labels])
        shares = zip(logits.softmax(dim=-1)[0].tolist(), labels, strict=True)
        print(
            f"{path}: " + ", ".join(f"{label} {share:.1%}" for share, label in sorted(shares, reverse=True))
        )


def train(args: argparse.Namespace, rest: list[str]) -> None:
    """Fine-tunes a model on a folder of captioned pictures; further flags are those of
    training.text_to_image."""
    if not args.folder.is_dir():
        raise ValueError(f"there is no folder {args.folder}")
    check_model(args.model)
    if not any(one.partition("=")[0] in ("--output_dir", "--output-dir") for one in rest):
        rest = ["--output_dir", str(Path("runs") / args.folder.resolve().name), *rest]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    recipe = ["-m", "training.text_to_image", "--pretrained_model_name_or_path", str(args.model)]
    home = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(home)}
    command = [*launch, *recipe, "--train_data_dir", str(args.folder), *rest]
    sys.exit(subprocess.run(command, env=environment).returncode)


def models(_args: argparse.Namespace, _rest: list[str]) -> None:
    """Lists the model folders in models/: kind, size in pixels, weights, and what lies beside each."""
    for folder in sorted(default_model().parent.iterdir()):
        weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder.is_dir() else 0
        if not weights:
            continue
        parts = sorted(path.name for path in folder.iterdir() if path.is_dir())
        kind, size = " and ".join(parts), ""
        if (index := folder / "model_index.json").is_file():
            name = json.loads(index.read_text())["_class_name"]
            kind = name[-1] if isinstance(name, list) else name
            side = json.loads((folder / "unet" / "config.json").read_text()).get("sample_size")
            size = f", {side} pixels" if "vae" not in parts and side else ""
        elif (config := folder / "config.json").is_file():
            about = json.loads(config.read_text())
            kind = about.get("_class_name") or " ".join(about.get("architectures") or ["unknown"])
        beside = [found.name for kind_ in ("upsampler", "guidance") if (found := find_beside(folder, kind_))]
        told = f", beside it {' and '.join(beside)}" if beside else ""
        print(f"{folder.name}: {kind}{size}, {weights / 1e6:.0f} MB{told}")


Command = Callable[[argparse.Namespace, list[str]], int | None]
COMMANDS: dict[str, tuple[Command, str]] = {
    "draw": (draw, "Draws pictures of prompts."),
    "edit": (edit, "Draws over a picture, repaints a part of it (--mask) or extends it (--left, ...)."),
    "enlarge": (enlarge, "Enlarges a picture."),
    "classify": (classify, "Says which of the labels fits each picture best, by a clean CLIP."),
    "train": (train, "Fine-tunes a model; further flags are those of training.text_to_image."),
    "models": (models, "Lists the available models and what lies beside each."),
}


def overview() -> Iterator[str]:
    yield 'usage: python -m pipelines COMMAND ..., or python -m pipelines "a corgi in a party hat" ...\n'
    for name, (_, tell) in COMMANDS.items():
        yield f"  {name:<10}{tell}"
    yield "\nA first word that is not a command is a prompt to draw. --help after a command lists its flags."


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns 0 on success. Errors raise SystemExit with code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print("\n".join(overview()))
        return 0
    named = bool(argv) and argv[0] in COMMANDS
    command = argv[0] if named else "draw"
    parser = build_parser(command, f"python -m pipelines{f' {command}' if named else ''}")
    unset = dict.fromkeys(("seed", "scheduler", "upsampler", "guides", "clip_guidance_model", "mask"))
    start = argparse.Namespace(command=command, model=default_model(), out=Path("outputs"), **unset)
    parse = parser.parse_known_args if command == "train" else parser.parse_args
    parsed: Any = parse(argv[named:], start)
    args, rest = parsed if command == "train" else (parsed, [])
    began = time.perf_counter()
    try:
        count = COMMANDS[command][0](args, rest)
    except (ValueError, OSError) as error:
        text = str(error).replace(
            "pipe.load_guides(folder) takes those beside", "--guides PATH takes those of"
        )
        text = text.replace(", by name or number, or a list of 1, one for each prompt", "")
        parser.error(
            re.sub(
                r"`(\w+)`", lambda m: args.flags.get(m[1], flag(m[1]) if m[1] in ARGUMENTS else m[0]), text
            )
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if count is not None:
        print(f"{count} picture{'s' * (count != 1)} in {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
