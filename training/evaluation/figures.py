"""Matplotlib figures that need no display and are written whole or not at all."""

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.folders.files import write_file


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """(figure, axes) of `width` x `height` inches; one Axes, or an array of them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    write_file(path, stream.getvalue())
