"""Thirty pictures of a corgi, drawn by this module: something that the emoji art lacks, to fine-tune on.

The corgi has one of three coats, faces left or right, stands or lies, and wears one of four things or
nothing. The pictures are under Apache-2.0, like the code.
"""

import itertools
import json
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, SCALE = 256, 4  # drawn at four times the size, then reduced, so that edges are smooth
COATS = {"red": "#e08a3c", "brown": "#9a6238", "black": "#3c3a40"}
THINGS = ("", "a red collar", "a blue scarf", "a party hat", "a crown")
CREAM, PINK, DARK = "#fff4e2", "#f2a7a0", "#2b2226"


class Canvas:
    """Draws shapes, in units of 1/100 of the picture's side from its upper left corner."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def points(self, *numbers: float) -> list[float]:
        return [number * SIDE * SCALE / 100 for number in numbers]

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: str) -> None:
        self.pen.ellipse(self.points(x - rx, y - ry, x + rx, y + ry), fill=colour)

    def polygon(self, colour: str, *numbers: float) -> None:
        self.pen.polygon(self.points(*numbers), fill=colour)

    def bar(self, x0: float, y0: float, x1: float, y1: float, colour: str, radius: float = 4) -> None:
        self.pen.rounded_rectangle(self.points(x0, y0, x1, y1), self.points(radius)[0], fill=colour)

    def arc(self, x0: float, y0: float, x1: float, y1: float, angles: tuple[int, int], colour: str) -> None:
        self.pen.arc(self.points(x0, y0, x1, y1), *angles, fill=colour, width=int(self.points(1.2)[0]))


def draw_corgi(coat: str, thing: str, lying: bool, faces_right: bool) -> Image.Image:
    """A corgi, 256 x 256 pixels on white: a long body on short legs, white chest and blaze, large ears."""
    c, fur = Canvas(), COATS[coat]
    down = 8 if lying else 0
    if not lying:
        for x in (36, 46, 72, 82):
            c.bar(x - 4, 68, x + 4, 88, fur)
            c.bar(x - 4, 82, x + 4, 88, CREAM, radius=3)
    c.ellipse(90, 56 + down, 6, 5, fur)  # the stump of a tail
    c.bar(26, 48 + down, 92, 76 + down, fur, radius=14)
    c.bar(38, 68 + down, 80, 77 + down, CREAM, radius=4)
    if lying:
        for x in (26, 76):
            c.bar(x - 8, 80, x + 10, 87, CREAM, radius=3.5)
    c.ellipse(32, 60 + down, 11, 15, CREAM)

    y = 40 + down
    for x, tip in ((20, 14), (44, 50)):
        c.polygon(fur, x - 8, y - 8, x + 8, y - 10, tip, y - 34)
        c.polygon(PINK, x - 4, y - 12, x + 4, y - 13, tip, y - 28)
    c.ellipse(32, y, 21, 18, fur)
    c.polygon(CREAM, 30, y - 18, 34, y - 18, 38, y + 2, 26, y + 2)
    c.ellipse(32, y + 8, 13, 10, CREAM)
    for x in (23, 41):
        if lying:
            c.arc(x - 4, y - 6, x + 4, y + 1, (20, 160), CREAM if coat == "black" else DARK)
        else:
            c.ellipse(x, y - 2, 3, 3.6, DARK)
            c.ellipse(x + 0.9, y - 3.2, 1.1, 1.1, "white")
    c.ellipse(32, y + 4, 3.6, 2.6, DARK)
    if not lying:
        c.ellipse(32, y + 13, 3.2, 4.4, PINK)
    c.arc(25, y + 4, 32, y + 12, (0, 150), DARK)
    c.arc(32, y + 4, 39, y + 12, (30, 180), DARK)

    if thing == "a red collar":
        c.bar(17, y + 15, 47, y + 20, "#d7263d", radius=2.5)
        c.ellipse(32, y + 21, 3, 3, "#f5c518")
    elif thing == "a blue scarf":
        c.bar(15, y + 14, 49, y + 22, "#2f6fde", radius=4)
        c.bar(40, y + 18, 48, y + 36, "#2f6fde", radius=2)
    elif thing == "a party hat":
        c.polygon("#8e44ad", 22, y - 15, 42, y - 15, 32, y - 37)
        c.polygon("#f5c518", 25, y - 21, 39, y - 21, 37, y - 26, 27, y - 26)
        c.ellipse(32, y - 37, 3, 3, "#f5c518")
    elif thing == "a crown":
        spikes = (45, y - 29, 38, y - 22, 32, y - 31, 26, y - 22, 19, y - 29)
        c.polygon("#f5c518", 21, y - 14, 43, y - 14, *spikes)
    image = c.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if faces_right else image


def write_pictures(folder: Path) -> list[str]:
    """Write every other one of the 60 combinations, as a folder that training.text_to_image reads; return the
    captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    poses = itertools.product(enumerate(COATS), enumerate(THINGS), (False, True), (False, True))
    for (i, coat), (j, thing), lying, faces_right in poses:
        if (i + j + lying + faces_right) % 2 == 0:
            text = caption_of(coat, thing, lying, faces_right)
            rows.append({"file_name": f"corgi-{len(rows):02d}.png", "text": text})
            draw_corgi(coat, thing, lying, faces_right).save(folder / rows[-1]["file_name"])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return [row["text"] for row in rows]


def caption_of(coat: str, thing: str, lying: bool, faces_right: bool) -> str:
    wearing = f" in {thing}" if thing else ""
    pose, side = "asleep" if lying else "standing", "right" if faces_right else "left"
    return f"a {coat} corgi{wearing}, {pose}, facing {side}"
