"""HTML for self-contained pages: pictures are embedded, text is escaped."""

import base64
import html

from torch import Tensor

from pipelines.drawing.images import png_bytes, to_pil

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em;
  color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .9em .2em 0; text-align: left;
  border-bottom: 1px solid #e4e4e4; vertical-align: top } th { font-weight: 600 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(172px, 1fr)); gap: 14px 10px }
figure { margin: 0; font-size: 12px; line-height: 1.3; color: #444 }
figure img { width: 80px; height: 80px; border: 1px solid #ddd; image-rendering: auto }
.chart { max-width: 100%; height: auto } .note { color: #666 }
"""


def document(title: str, body: list[str]) -> str:
    """A complete page with these elements, one per line."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    lines = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{lines}\n</body></html>\n'


def heading(level: int, text: str) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def image_tag(png: bytes, title: str, kind: str = "") -> str:
    """An embedded picture; `kind` is a CSS class in STYLE."""
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    chosen = f'class="{kind}" ' if kind else ""
    return f'<img {chosen}src="{source}" alt="{html.escape(title, quote=True)}">'


def table_tag(head: list[str], rows: list[list[str]]) -> str:
    cells = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def pair_tags(first: Tensor, second: Tensor, titles: tuple[str, str], notes: list[str]) -> str:
    """Pairs of pictures side by side, from two tensors (N, 3, H, W) in [-1, 1]. Each pair has a note, which
    may have several lines."""
    figures = []
    for a, b, text in zip(to_pil(first), to_pil(second), notes, strict=True):
        images = f"{image_tag(png_bytes(a), titles[0])} {image_tag(png_bytes(b), titles[1])}"
        lines = "<br>".join(html.escape(line) for line in text.split("\n"))
        figures.append(f"<figure>{images}<figcaption>{lines}</figcaption></figure>")
    return f'<div class="grid">{"".join(figures)}</div>'
