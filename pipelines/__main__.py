"""`python -m pipelines "a corgi in a party hat"`: draws pictures, as PNG files that say how they were made.

Arguments are checked before torch is imported, so that a mistake is answered at once: one line, exit code 2.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

DEFAULT_MODEL = Path("models") / "emoji"
SCHEDULERS = {  # what --scheduler takes: classes of diffusers, but for DDPM, which is ours
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
# settings that a picture's text has only where they are on, and what they are otherwise
EXTRAS = {"clip_guidance": 0, "clip_model": None, "classifier_guidance": 0, "class_label": None, "best_of": 1}
OPTIONS = {  # what the pipeline's arguments are called here
    "height": "--height",
    "width": "--width",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "clip_guidance_scale": "--clip-guidance",
    "clip_guidance": "--clip-guidance",
    "classifier_guidance_scale": "--classifier-guidance",
    "class_labels": "--class",
    "num_candidates": "--best-of",
}
BATCH_SIZE = 8  # pictures at a time; a picture depends on its own seed alone, so this changes no picture


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m pipelines", description="Draw pictures for a prompt.")
    own = "default: the model's own"
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to draw")
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    parser.add_argument("--num-images", type=int, default=1, metavar="K", help="default: 1")
    parser.add_argument("--seed", type=int, metavar="N", help="picture i gets N + i; default: a random one")
    parser.add_argument("--steps", type=int, metavar="N", help=f"denoising steps; {own}")
    parser.add_argument("--guidance", type=float, metavar="G", help=f"how closely to follow, 1 is off; {own}")
    clip_scale = "CLIP guidance, 0 is off; default: the model's own, or 0 with --guidance"
    parser.add_argument("--clip-guidance", type=float, metavar="S", help=clip_scale)
    clip_help = (
        "a clean CLIP for --clip-guidance and --best-of: folder or open_clip's name; default: the model's own"
    )
    parser.add_argument("--clip-model", metavar="NAME", help=clip_help)
    beside = "the noised CLIP and the classifier that guide; default: the model's with -guidance added"
    parser.add_argument("--guides", type=Path, metavar="PATH", help=beside)
    class_help = "classifier guidance to --class; 0 is off"
    parser.add_argument("--classifier-guidance", type=float, default=0, metavar="S", help=class_help)
    class_help = "for --classifier-guidance; of models/emoji-guidance: flat, 3d, food-drink, ..."
    parser.add_argument("--class", dest="class_label", metavar="NAME", help=class_help)
    best_help = "draw N for each picture and keep the best, by CLIP and by --class; default: 1"
    parser.add_argument("--best-of", type=int, default=1, metavar="N", help=best_help)
    parser.add_argument("--size", type=int, metavar="PIXELS", help="--height and --width in one")
    parser.add_argument("--height", type=int, metavar="PIXELS", help=own)
    parser.add_argument("--width", type=int, metavar="PIXELS", help=own)
    names = ", ".join(SCHEDULERS)
    parser.add_argument("--scheduler", choices=list(SCHEDULERS), metavar="NAME", help=f"{names}; {own}")
    parser.add_argument("--model", type=Path, metavar="PATH", help=f"model folder; default: {DEFAULT_MODEL}")
    larger = "enlarges what is drawn, where the size asks for it; default: the model's with -upsampler added"
    parser.add_argument("--upsampler", type=Path, metavar="PATH", help=larger)
    return parser


def default_model() -> Path:
    """models/emoji beside this package, or under the current folder where the package is elsewhere."""
    beside = Path(__file__).resolve().parent.parent / DEFAULT_MODEL
    return beside if beside.is_dir() else DEFAULT_MODEL


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError with one line of text for whatever a user can get wrong before a model is loaded."""
    if not args.prompt.strip():
        raise ValueError("the prompt is empty")
    for name in ("num_images", "steps", "best_of", "size", "height", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    for name in ("guidance", "clip_guidance", "classifier_guidance"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, got {value}")
    if (args.classifier_guidance > 0) != (args.class_label is not None):
        given = f"--class {args.class_label}" if args.class_label else "--classifier-guidance"
        rule = "--class names one of the classifier's classes (another name is answered with their list)"
        both = "--classifier-guidance above 0 and --class go together"
        raise ValueError(f"{both}, got {given} alone; {rule}")
    if args.seed is not None and not 0 <= args.seed <= 2**63 - args.num_images:
        raise ValueError(f"--seed must be 0 or more, and the last picture's below 2^63, got {args.seed}")
    if args.size is not None:
        if args.height is not None or args.width is not None:
            raise ValueError("--size takes the place of --height and --width: give one or the others")
        args.height = args.width = args.size
    for name in ("upsampler", "guides"):
        folder = getattr(args, name)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{name} must be a folder, got {folder}")
    if not args.model.is_dir():
        raise ValueError(f"there is no model folder {args.model}")
    index = args.model / "model_index.json"
    try:
        if not isinstance(json.loads(index.read_text()), dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError:
        hint = ""
        if (args.model / "pipeline" / "model_index.json").is_file():
            hint = f"; {args.model / 'pipeline'} has one"
        elif (args.model / "pytorch_lora_weights.safetensors").is_file():
            hint = ", but adapters, which pipe.load_lora_weights loads into the model they were trained on"
        raise ValueError(f"{args.model} is no model folder: it has no model_index.json{hint}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {index}: {error}") from None
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to --out {args.out}: {error.strerror}") from None


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """No bars of files loaded, for which nobody waits, and one ValueError for whatever goes wrong."""
    import diffusers
    import transformers

    bars = diffusers.utils.logging, transformers.utils.logging
    for library in bars:
        library.disable_progress_bar()
    try:
        yield
    except Exception as error:  # missing weights, unknown classes, broken files: each raises what it likes
        raise ValueError(f"cannot load {folder}: {type(error).__name__}: {error}") from error
    finally:
        for library in bars:
            library.enable_progress_bar()


def load_pipeline(folder: Path, scheduler: str | None, clip_model: str | None = None) -> Any:
    """The folder's pipeline, with its scheduler's settings in another class where one is asked for, and with
    another clean CLIP."""
    import diffusers
    import torch

    import pipelines

    parts: dict[str, Any] = {} if clip_model is None else {"clip_guidance_model": clip_model}
    with loading(folder):
        pipe = pipelines.TextToImagePipeline.from_pretrained(folder, **parts)
    if scheduler is not None:
        cls = pipelines.DDPMScheduler if scheduler == "ddpm" else getattr(diffusers, SCHEDULERS[scheduler])
        pipe.scheduler = convert_scheduler(pipe.scheduler, cls)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def load_upsampler(pipe: Any, model: Path, given: Path | None) -> Any:
    """The pipeline in `given`; or in the model's folder with -upsampler added; or, for a model of pixels, the
    shipped one, so that a fine-tuned model has it too. None where there is none."""
    folder = given or model.resolve().with_name(f"{model.resolve().name}-upsampler")
    if not folder.is_dir() and pipe.vae is None:
        folder = default_model().with_name(f"{default_model().name}-upsampler")
    if not folder.is_dir():
        return None
    import torch

    from pipelines.super_resolution import SuperResolutionPipeline

    with loading(folder):
        pipe = SuperResolutionPipeline.from_pretrained(folder)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def load_guides(pipe: Any, args: argparse.Namespace) -> None:
    """Where the call asks for guidance or a ranking that the model has no part for, or the model does by its
    defaults: --guides, or the folder beside the model, with -guidance added to its name."""
    folder = args.guides or args.model.resolve().with_name(f"{args.model.resolve().name}-guidance")
    by_default = args.clip_guidance is None and args.guidance is None and args.clip_model is None
    by_clip = args.clip_guidance or args.best_of > 1 or by_default and pipe.config.default_clip_guidance_scale
    lacks_clip = by_clip and pipe.noisy_clip is None and pipe.clip_guidance_model is None
    lacks_classifier = args.classifier_guidance and pipe.noisy_classifier is None
    if (lacks_clip or lacks_classifier) and folder.is_dir():
        with loading(folder):
            pipe.load_guides(folder)
    elif lacks_clip and by_default and pipe.config.default_clip_guidance_scale:
        scale = pipe.config.default_clip_guidance_scale
        print(
            f"Drawn without the CLIP guidance of {scale:g} that this model asks for: {folder.name} is not "
            "beside it. --guides PATH names another folder, models/emoji-guidance for a model tuned from "
            "models/emoji; --clip-guidance 0 does without.",
            file=sys.stderr,
        )


def warn_of_size(pipe: Any, height: int | None, width: int | None) -> None:
    """A model of pixels draws sensible shapes at the size it was trained at: say so where it will not."""
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


def convert_scheduler(scheduler: Any, cls: type) -> Any:
    """`cls.from_config(scheduler.config)`, with clip_sample kept where `cls` has only thresholding, and DDPM
    with all its noise.

    Thresholding with a sample_max_value of 1 is clipping to [-1, 1]. Without it a pixel model that predicts
    eps divides by a tiny sqrt(abar) at its noisiest steps, and nothing brings the picture back.
    """
    config, known = scheduler.config, inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    clips = config.get("clip_sample") and config.get("clip_sample_range", 1.0) == 1.0
    changes: dict[str, Any] = {"eta": 1.0} if "eta" in known else {}
    if clips and "clip_sample" not in known and "thresholding" in known:
        changes |= {"thresholding": True, "sample_max_value": 1.0}
    return cls.from_config(config, **changes)  # type: ignore[attr-defined]


def slug(prompt: str) -> str:
    """The prompt's words as a file name: letters and digits of any script, at most 80 bytes."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return words.encode()[:80].decode(errors="ignore").strip("-") or "picture"


def save_png(image: Any, folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """Writes folder/name.png, or name-1.png and so on where that exists, with `settings` as PNG text.

    The file gets its name only when it is whole, and never another file's: an interrupted run leaves no half
    picture and two runs at once do not overwrite each other.
    """
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    for key, value in settings.items():
        text.add_text(key, str(value))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG", pnginfo=text)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it readable to its owner alone
        for number in range(10**6):
            path = folder / (f"{name}-{number}.png" if number else f"{name}.png")
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # takes the name, or fails if it is taken
            except FileExistsError:
                continue
            os.replace(temporary, path)
            return path
        raise FileExistsError(f"every name like {name}.png is taken")
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def draw(args: argparse.Namespace) -> list[Path]:
    """Draws what checked arguments ask for, printing each path as soon as it is written."""
    pipe = load_pipeline(args.model, args.scheduler, args.clip_model)
    if args.height is not None or args.width is not None:
        pipe.upsampler = load_upsampler(pipe, args.model, args.upsampler)
        warn_of_size(pipe, args.height, args.width)
    load_guides(pipe, args)
    import torch

    first = args.seed if args.seed is not None else secrets.randbelow(2**31)
    seeds = list(range(first, first + args.num_images))
    steps = pipe.config.default_num_inference_steps if args.steps is None else args.steps
    extra = {name: getattr(args, name) for name in EXTRAS}
    if args.clip_model is not None and Path(args.clip_model).exists():
        extra["clip_model"] = Path(args.clip_model).resolve().name
    paths, size = [], BATCH_SIZE if args.best_of == 1 else 1
    for start in range(0, len(seeds), size):
        batch = seeds[start : start + size]
        generators = [torch.Generator().manual_seed(seed) for seed in batch]
        images = pipe(
            args.prompt,
            height=args.height,
            width=args.width,
            num_inference_steps=steps,
            guidance_scale=args.guidance,
            negative_prompt=args.negative_prompt,
            num_images_per_prompt=len(batch),
            generator=generators if args.best_of == 1 else generators[0],  # one draws all its candidates
            clip_guidance_scale=args.clip_guidance,
            clip_guidance="noised" if args.clip_model is None else "clean",
            classifier_guidance_scale=args.classifier_guidance,
            class_labels=args.class_label,
            num_candidates=args.best_of,
        ).images
        extra["clip_guidance"] = pipe.clip_guidance_scale  # the model's own, where none was asked for
        for seed, image in zip(batch, images, strict=True):
            settings = {
                "prompt": args.prompt,
                "negative_prompt": args.negative_prompt or "",
                "seed": seed,
                "steps": steps,
                "guidance_scale": pipe.guidance_scale,
                **{name: value for name, value in extra.items() if value != EXTRAS[name]},
                "scheduler": type(pipe.scheduler).__name__,
                "width": image.width,
                "height": image.height,
                "model": args.model.resolve().name,  # a picture gets shared; the path to the model does not
                "Software": "Corgi",
            }
            paths.append(save_png(image, args.out, f"{slug(args.prompt)}_seed{seed}", settings))
            print(paths[-1], flush=True)
    return paths


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; 0 when every picture was written. Errors exit with 2 by SystemExit."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.model = default_model() if args.model is None else args.model
    start = time.perf_counter()
    try:
        check_arguments(args)
        paths = draw(args)
    except (ValueError, OSError) as error:
        sides = {"height": "--size", "width": "--size"} if args.size is not None else {}
        options = {**OPTIONS, **sides}
        message = str(error).replace(
            "pipe.load_guides(folder) takes those beside", "--guides PATH takes those of"
        )
        message = message.replace(", by name or number, or a list of 1, one for each prompt", "")
        parser.error(re.sub(r"`(\w+)`", lambda name: options.get(name[1], name[0]), message))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"{len(paths)} picture{'s' * (len(paths) != 1)} in {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
