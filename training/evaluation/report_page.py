"""The report for human readers: charts, and a self-contained page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.evaluation.figures import chart, finish
from training.evaluation.html_tags import document, heading, image_tag, note, pair_tags, table_tag
from training.evaluation.metrics import recall_at
from training.evaluation.report_parts import NEAR, SPLITS, Part
from training.evaluation.samples import first_captions

COLUMNS = ("generated", "real", "shuffled")
COLOURS = {"generated": "C0", "real": "0.55", "shuffled": "C3"}
NUM_PAIRS = 24  # pairs of nearest neighbours shown for each split, in each of two orders
EXPLAINED = {
    "R@1, R@5": "how often the caption's concept is the judge's first of all, or among its first five",
    "CLIP score": "100 times the cosine between picture and caption in the judge's space",
    "Frechet distance, KID": "in the judge's image space, from half A of the training pictures. Generated: "
    "for the captions of half B. Real: half B itself, the floor. All of the same number",
    "precision, recall": "share of generated pictures on the manifold of the real ones, and vice versa",
    "density, coverage": "real neighbourhoods that a generated picture lies in; share that contain one",
    "shuffled": "the same generated pictures, each under another's caption",
}


def shown(figure: dict[str, Any] | None) -> str:
    """A figure as a cell of a table, such as "0.412 (0.370 to 0.450)"."""
    if figure is None:
        return ""
    value = figure["value"]
    digits = 1 if abs(value) >= 10 else 3 if abs(value) >= 0.01 else 5
    # + 0.0: a negative value that rounds to zero is shown as 0.000, not -0.000
    text, *ends = (f"{round(one, digits) + 0.0:.{digits}f}" for one in (value, *figure.get("interval", ())))
    return f"{text} ({ends[0]} to {ends[1]})" if ends else text


def metric_rows(report: dict[str, Any]) -> list[list[str]]:
    """A row for each metric and split: metric, split and size, generated, real, shuffled."""
    halves = report["against half of the training pictures"]
    return [
        [metric, f"{name}, {part['pictures']}", *(shown(part.get(c, {}).get(metric)) for c in COLUMNS)]
        for name, part in (*report["against captions"].items(), ("seen captions", halves))
        for metric in part["generated"]
    ]


# ------------------------------------------------------------ charts


def draw_retrieval(ax: Any, report: dict[str, Any], k: int) -> None:
    """Plot R@k of each split, the three columns side by side, with their intervals."""
    parts = report["against captions"]
    for i, column in enumerate(COLUMNS):
        figures = [part[column][f"R@{k}"] for part in parts.values()]
        values = np.array([figure["value"] for figure in figures])
        low, high = np.array([figure["interval"] for figure in figures]).T
        errors = np.maximum(0, [values - low, high - values])
        places = [j + 0.27 * (i - 1) for j in range(len(parts))]
        ax.bar(places, values, 0.25, yerr=errors, capsize=2, color=COLOURS[column], label=column)
    ax.set_xticks(range(len(parts)), [name.replace(" ", "\n", 1) for name in parts])
    ax.set(ylim=(0, 1.02), title=f"R@{k} among {report['concepts']} concepts")
    ax.legend(fontsize=8)


def draw_losses(ax: Any, losses: dict[str, Any]) -> None:
    """Plot the loss against the timestep, on a log scale, with two standard errors on either side."""
    places = range(len(losses["timesteps"]))
    for i, name in enumerate(SPLITS):
        errors = [2 * error for error in losses[name]["standard error"]]
        offset = [place + 0.08 * (i - 1) for place in places]  # so that error bars do not overlap
        ax.errorbar(offset, losses[name]["mean"], yerr=errors, marker=".", capsize=2, label=name)
    ax.set_xticks(places, [span.split(" ")[0] for span in losses["timesteps"]])
    finish(ax, 8, yscale="log", xlabel="t, from", title=f"Loss on fixed noise ({losses['target']})")


def draw_neighbours(ax: Any, distances: dict[str, Tensor]) -> None:
    """Plot the share of pictures that have a training picture within a distance, against the distance."""
    colours = {"training": "C0", **{split: f"C{i}" for i, split in enumerate(SPLITS)}}
    for name, values in distances.items():
        kind, split = name.split(", ", 1)
        places, shares = [0.0, *values.sort().values.tolist()], np.arange(len(values) + 1) / len(values)
        style = "-" if kind == "generated" else ":"
        ax.step(places, shares, where="post", color=colours[split], ls=style, lw=1.4, label=name)
    title = "Distance to the nearest training picture"
    finish(ax, 7, xlim=(0, None), ylim=(0, 1), xlabel="1 - cos, judge's image space", title=title)


def draw_distances(ax: Any, halves: dict[str, Any]) -> None:
    """Plot the generated pictures' distribution metrics as multiples of those of half B's real ones."""
    names = [name for name in halves["real"] if name != "KID"][::-1]  # whose floor is 0
    values, floors = ([halves[c][name]["value"] for name in names] for c in COLUMNS[:2])
    ratios = [value / max(floor, 1e-9) for value, floor in zip(values, floors, strict=True)]
    ax.barh(names, ratios, 0.6, color=COLOURS["generated"])
    for place, (ratio, value) in enumerate(zip(ratios, values, strict=True)):
        ax.text(ratio, place, f" {value:.3f}", va="center", fontsize=8)
    ax.axvline(1, color=COLOURS["real"], ls=":")
    ax.set(xlim=(0, 1.25 * max(1, *ratios)), title="Generated as a multiple of real (half B), against half A")


# ------------------------------------------------------------ the page


def chart_tag(folder: Path, name: str, paint: Callable[..., None], *what: Any) -> str:
    """Save the chart that paint(ax, *what) draws as a file, and return it as an element of the page."""
    path = folder / f"{name}.png"
    with chart(path, 7.5, 4) as ax:
        paint(ax, *what)
    return f"<p>{image_tag(path.read_bytes(), name, kind='chart')}</p>"


def split_section(name: str, part: Part, count: int) -> list[str]:
    """The first pictures of a split in the order drawn, next to the real pictures of their captions."""
    count = min(count, len(part.numbers))
    places = [
        ["first" if rank == 0 else f"number {rank + 1}" for rank in part.ranks[column][:count].tolist()]
        for column in ("generated", "real")
    ]
    notes = [
        f"{caption}\njudge's {drawn}; the real one's {real}"
        for caption, drawn, real in zip(part.captions, *places, strict=False)
    ]
    explained = (
        f"Drawn on the left, the real picture of the caption on the right, the first {count} of "
        f"{len(part.numbers)} in the order drawn. R@5 of all: {recall_at(part.ranks['generated'], 5):.3f}."
    )
    pairs = pair_tags(part.drawn[:count], part.real()[:count], ("drawn", "real"), notes)
    return [heading(3, name.capitalize()), note(explained), pairs]


def neighbour_section(name: str, part: Part, train: Part) -> list[str]:
    """Generated pictures next to their nearest training pictures: the closest pairs, then the first in the
    order drawn."""
    distances, indices = part.neighbours
    nearest = first_captions(train.pictures, indices.tolist())
    sections = []
    for title, numbers in (
        ("the nearest of all", distances.argsort(stable=True)[:NUM_PAIRS]),
        ("the first that were drawn", torch.arange(min(NUM_PAIRS, len(part.numbers)))),
    ):
        notes = [
            f"{part.captions[i]}\nnearest: {nearest[i]}\ndistance {float(distances[i]):.3f}"
            for i in numbers.tolist()
        ]
        pairs = (part.drawn[numbers], train.pictures.images(indices[numbers]))
        sections.append(heading(3, f"{name.capitalize()}: {title}"))
        sections.append(pair_tags(*pairs, ("drawn", "nearest training picture"), notes))
    return sections


def describe_drawing(drawing: dict[str, Any]) -> str:
    """How a report's pictures were drawn, and what guided them."""
    by_clip = drawing.get("CLIP guidance scale", 0)
    further = f", and {by_clip:g} by the noised CLIP" if by_clip else ""
    steps = f"{drawing['drawn']} pictures, {drawing['steps']} steps of {drawing['scheduler']}"
    return f"{steps}, guidance {drawing['guidance scale']:g}{further}"


def listed(values: dict[str, Any] | str, digits: str = "") -> str:
    """The values as "name value, name value, ..."; a string is returned as it is."""
    return values if isinstance(values, str) else ", ".join(f"{k} {v:{digits}}" for k, v in values.items())


def page(
    report: dict[str, Any], parts: dict[str, Part], distances: dict[str, Tensor], folder: Path, num_shown: int
) -> str:
    """The whole page, with the pictures embedded."""
    losses, halves = report["validation loss"], report["against half of the training pictures"]
    millions, data = report["parameters"] / 1e6, report["data"]
    settings = [
        ["model", f"{report['model']}, {millions:.1f} million parameters, key {report['model key']}"],
        ["judge", f"{report['judge']}, key {report['judge key']}; took no part in conditioning or guidance"],
        ["drawn", describe_drawing(report["drawing"])],
        ["seeds", report["drawing"]["seeds"]],
        ["data", f"{data['name']}: {listed(data['pictures'])}"],
        ["seconds", listed(report["seconds"])],
        ["computed with", listed(report["computed with"])],
        ["Inception", listed(report["Inception"], ".3f")],
    ]
    rows = [
        [name, str(row["pictures"]), *(f"{row['distances'][i]:.3f}" for i in (0, 1, 3)), f"{row[NEAR]:.3f}"]
        for name, row in report["nearest training pictures"].items()
        if name != "quantiles"
    ]
    body = [
        heading(1, report["model"]),
        table_tag(["", ""], settings),
        heading(2, "Figures"),
        table_tag(["", "captions", *COLUMNS], metric_rows(report)),
        note(f"In brackets 95 % intervals of {report['bootstrap replicates']} bootstrap replicates."),
        table_tag(["", ""], [list(row) for row in EXPLAINED.items()]),
        chart_tag(folder, "recall_at_1", draw_retrieval, report, 1),
        chart_tag(folder, "recall_at_5", draw_retrieval, report, 5),
        chart_tag(folder, "distances", draw_distances, halves),
        heading(2, "Validation loss"),
        note(
            f"Unweighted, mean over {losses['draws of the noise']} fixed draws of the noise; bars are two "
            "standard errors over these."
        ),
        chart_tag(folder, "validation_loss", draw_losses, losses),
        heading(2, "Pictures"),
        *(line for name, part in parts.items() for line in split_section(name, part, num_shown)),
        heading(2, "Nearest training pictures"),
        note(
            "A model that copies draws pictures nearer to its training pictures than unseen real pictures of "
            "the same kind are. Training pictures are compared with the nearest other one."
        ),
        chart_tag(folder, "nearest_neighbours", draw_neighbours, distances),
        table_tag(["distance to it", "pictures", "smallest", "5 %", "median", NEAR], rows),
    ]
    for name, part in parts.items():
        body += neighbour_section(name, part, parts["seen captions"])
    return document(f"{report['model']}: report", body)
