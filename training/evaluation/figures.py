"""Matplotlib figures that need no display and are written completely or not at all."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.folders.files import write_file


@contextmanager
def chart(path: str | Path, width: float, height: float, columns: int = 1, rows: int = 1) -> Iterator[Any]:
    """Yield one Axes, or an array of them, of a figure of `width` x `height` inches, and write the figure as
    a PNG when the block ends."""
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure.subplots(rows, columns)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    write_file(path, stream.getvalue())


def finish(ax: Any, legend: int = 0, **labels: Any) -> None:
    """Set the properties in `labels` on an Axes, and add a faint grid and, unless `legend` is 0, a legend of
    that font size."""
    ax.set(**labels)
    ax.grid(alpha=0.3)
    if legend:
        ax.legend(fontsize=legend)
