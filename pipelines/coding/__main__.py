"""Pictures to files and back.

python -m pipelines.coding encode in.png out.bin --caption "a corgi in a party hat"
python -m pipelines.coding decode out.bin out.png
python -m pipelines.coding encode --lossless folder out.bin       # with a metadata.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image

from ..chain.equations import require
from ..drawing.images import save_png
from ..drawing.text import NULL_PROMPT
from ..folders.files import write_file, written_aside
from ..text_to_image import TextToImagePipeline
from .progressive_coding import Decoded, decode, encode


def read_pictures(path: Path, captions: list[str]) -> tuple[list[Image.Image], list[str]]:
    """One picture and its caption, or a folder of pictures with the captions in its metadata.jsonl."""
    if not path.is_dir():
        require(len(captions) < 2, "--caption", captions, "given once for one picture")
        with Image.open(path) as picture:
            return [picture.copy()], captions or [NULL_PROMPT]
    require(not captions, "--caption", captions, "left out with a folder, whose metadata.jsonl has them")
    lines = (path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    pictures = []
    for row in rows:
        with Image.open(path / row["file_name"]) as picture:
            pictures.append(picture.copy())
    return pictures, [str(row.get("text", row.get("caption", NULL_PROMPT))) for row in rows]


def write_pictures(path: Path, decoded: Decoded) -> None:
    """One picture as PNG, or a folder as `read_pictures` reads it, renamed into place once complete."""
    if len(decoded.pictures) == 1:
        save_png(decoded.pictures[0], path)
        return
    require(not path.exists(), "output", str(path), "a folder that is not there yet")
    rows = []
    with written_aside(path) as partial:
        partial.mkdir()
        for number, (picture, caption) in enumerate(zip(decoded.pictures, decoded.captions, strict=True)):
            picture.save(partial / f"{number:05d}.png")
            rows.append(json.dumps({"file_name": f"{number:05d}.png", "text": caption}, ensure_ascii=False))
        (partial / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.coding", description="Code pictures.")
    parser.add_argument("what", choices=("encode", "decode"))
    parser.add_argument("input", type=Path, help="encode: a picture, or a folder; decode: a file")
    parser.add_argument("output", type=Path, help="encode: a file; decode: a PNG, or a new folder")
    parser.add_argument("--model", type=Path, default=Path("models") / "emoji", help="default: models/emoji")
    parser.add_argument("--threads", type=int, default=1, help="the same to encode and to decode; default: 1")
    parser.add_argument("--caption", action="append", default=[], help="of the picture; travels in the file")
    parser.add_argument("--lossless", action="store_true", help="bits back, for many pictures in one file")
    parser.add_argument("--steps", type=int, default=100, help="timesteps of the chain; default: 100")
    parser.add_argument("--end", type=int, metavar="T", help="cleanest timestep; default: found by the bound")
    parser.add_argument("--variance-type", help="fixed_small, fixed_large, ...; default: the model's")
    parser.add_argument("--seed", type=int, default=0, help="of the shared randomness; default: 0")
    parser.add_argument("--prefix", action="store_true", help="decode the beginning of a progressive file")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        require(args.threads >= 1, "--threads", args.threads, "1 or more")
        require(args.model.is_dir(), "--model", str(args.model), "a model folder")
        require(args.output.parent.is_dir(), "output", str(args.output), "in a folder that is there")
        given = read_pictures(args.input, args.caption) if args.what == "encode" else args.input.read_bytes()
        torch.set_num_threads(args.threads)
        pipe = TextToImagePipeline.from_pretrained(args.model)
        if isinstance(given, bytes):
            decoded = decode(pipe, given, args.prefix)
            write_pictures(args.output, decoded)
            exact = "bit for bit" if decoded.whole else "the model's guess of it, from a prefix"
            print(f"{len(decoded.pictures)} picture(s), {decoded.steps} of {decoded.of} latents: {exact}")
        else:
            kind = "lossless" if args.lossless else "progressive"
            pictures, captions = given
            settings = (kind, args.steps, args.end, args.variance_type, args.seed)
            data, cost = encode(pipe, pictures, captions, *settings)
            write_file(args.output, data)
            print(cost)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
