"""The report as people read it: charts, one overview picture and a page that needs no other file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipelines.drawing.images import image_grid, to_pil
from pipelines.folders.files import write_file
from training.evaluation.figures import new_figure, save_figure
from training.evaluation.html_tags import document, heading, image_tag, note, pair_tags, table_tag
from training.evaluation.metrics import recall_at
from training.evaluation.report_parts import SPLITS, Measured, Part

COLUMNS = ("generated", "real", "shuffled")
COLOURS = {"generated": "C0", "real": "0.55", "shuffled": "C3"}
NUM_PAIRS = 24  # nearest neighbours shown of each split, in either order
EXPLAINED = {
    "R@1, R@5": "how often the caption's concept is the judge's first, or among its first five, of all",
    "CLIP score": "100 times the cosine between picture and caption in the judge's space",
    "Frechet distance, KID": "in the judge's image space, from half A of the training pictures. Generated: "
    "for the captions of half B. Real: half B itself, the floor. All of the same number",
    "precision, recall": "share of generated pictures on the manifold of the real, and the other way round",
    "density, coverage": "real neighbourhoods that a generated picture lies in; share of them that hold one",
    "shuffled": "the same generated pictures, each under another's caption",
}


def shown(figure: dict[str, Any] | None) -> str:
    """0.412 (0.37 to 0.45), as a cell of a table."""
    if figure is None:
        return ""
    value = figure["value"]
    digits = 1 if abs(value) >= 10 else 3 if abs(value) >= 0.01 else 5
    # + 0.0: what rounds to zero from below is 0.000, not -0.000
    text, *ends = (f"{round(one, digits) + 0.0:.{digits}f}" for one in (value, *figure.get("interval", ())))
    return f"{text} ({ends[0]} to {ends[1]})" if ends else text


def metric_rows(report: dict[str, Any]) -> list[list[str]]:
    """Figure by figure: what it is, of which pictures, generated, real, shuffled."""
    rows = []
    for name, part in report["against captions"].items():
        for metric in part["generated"]:
            rows.append(
                [metric, f"{name}, {part['pictures']}", *(shown(part[c].get(metric)) for c in COLUMNS)]
            )
    halves = report["against half of the training pictures"]
    of = f"seen captions, {halves['pictures']}"
    for metric in halves["generated"]:
        rows.append([metric, of, *(shown(halves[column][metric]) for column in COLUMNS[:2]), ""])
    return rows


# ------------------------------------------------------------ charts


def draw_retrieval(ax: Any, report: dict[str, Any], k: int) -> None:
    """R@k of each split, the three columns side by side, with their intervals."""
    parts = report["against captions"]
    for i, column in enumerate(COLUMNS):
        figures = [part[column][f"R@{k}"] for part in parts.values()]
        values = [figure["value"] for figure in figures]
        errors = [
            [max(0.0, value - figure["interval"][0]) for value, figure in zip(values, figures, strict=True)],
            [max(0.0, figure["interval"][1] - value) for value, figure in zip(values, figures, strict=True)],
        ]
        places = [j + 0.27 * (i - 1) for j in range(len(parts))]
        ax.bar(places, values, 0.25, yerr=errors, capsize=2, color=COLOURS[column], label=column)
    ax.set_xticks(range(len(parts)), [name.replace(" ", "\n", 1) for name in parts])
    ax.set(ylim=(0, 1.02), title=f"R@{k} among {report['concepts']} concepts")
    ax.legend(fontsize=8)


def draw_losses(ax: Any, report: dict[str, Any]) -> None:
    """Loss against the timestep on a logarithmic scale, two standard errors on either side."""
    losses = report["validation loss"]
    places = range(len(losses["timesteps"]))
    for i, name in enumerate(SPLITS):
        errors = [2 * error for error in losses[name]["standard error"]]
        offset = [place + 0.08 * (i - 1) for place in places]  # else error bars hide each other
        ax.errorbar(offset, losses[name]["mean"], yerr=errors, marker=".", capsize=2, label=name)
    ax.set_xticks(places, [span.split(" ")[0] for span in losses["timesteps"]])
    ax.set(yscale="log", xlabel="t, from", title=f"Loss on fixed noise ({losses['target']})")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def draw_neighbours(ax: Any, distances: dict[str, Tensor]) -> None:
    """Share of pictures that are within a distance of some training picture."""
    for name, values in distances.items():
        kind, split = name.split(", ", 1)
        colour = {"training": "C0", **{split: f"C{i}" for i, split in enumerate(SPLITS)}}[split]
        places = [0.0, *values.sort().values.tolist()]
        shares = [i / len(values) for i in range(len(values) + 1)]
        style = "-" if kind == "generated" else ":"
        ax.step(places, shares, where="post", color=colour, ls=style, lw=1.4, label=name)
    ax.set(
        xlim=(0, None),
        ylim=(0, 1),
        xlabel="1 - cos, judge's image space",
        title="Distance to the nearest training picture",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)


def draw_distances(ax: Any, report: dict[str, Any]) -> None:
    """The figures of two distributions as multiples of what the real pictures of half B have."""
    halves = report["against half of the training pictures"]
    names = [name for name in halves["real"] if name != "KID"]  # whose floor is 0
    ratios = [halves["generated"][name]["value"] / max(halves["real"][name]["value"], 1e-9) for name in names]
    ax.barh(names[::-1], ratios[::-1], 0.6, color=COLOURS["generated"])
    for place, ratio, name in zip(range(len(names)), ratios[::-1], names[::-1], strict=True):
        value = halves["generated"][name]["value"]
        ax.text(ratio, place, f" {value:.3f}", va="center", fontsize=8)
    ax.axvline(1, color=COLOURS["real"], ls=":")
    ax.set(xlim=(0, 1.25 * max(1, *ratios)), title="Generated as a multiple of real (half B), against half A")


# ------------------------------------------------------------ pictures


def pair_sheet(first: Tensor, second: Tensor, columns: int) -> Image.Image:
    """Rows of pictures of `first`, (N, 3, H, W), with their partners of `second` below each."""
    rows: list[Image.Image] = []
    for start in range(0, len(first), columns):
        for images in (first, second):
            part = to_pil(images[start : start + columns])
            rows += part + [Image.new("RGB", part[0].size, "#dddddd")] * (columns - len(part))
    return image_grid(rows, columns=columns, background="#dddddd")


def nearest_first(part: Part) -> Tensor:
    """Numbers of the drawn pictures, those nearest to a training picture first."""
    return part.neighbours[0].argsort(stable=True)


def overview(report: dict[str, Any], measured: Measured) -> Any:
    """One figure: pictures of each split, the charts, the pictures that are nearest to a training one."""
    figure, axes = new_figure(16, 14.5, columns=12, rows=4)
    grid = axes[0, 0].get_gridspec()
    for ax in axes.flat:
        ax.remove()
    grid.set_height_ratios([4.6, 3, 3, 2.2])
    train = measured.parts["seen captions"]
    for i, (name, part) in enumerate(measured.parts.items()):
        ax = figure.add_subplot(grid[0, 4 * i : 4 * i + 4])
        count = min(18, len(part.numbers))
        ax.imshow(pair_sheet(part.drawn[:count], part.real()[:count], 6), interpolation="lanczos")
        top = report["against captions"][name]
        ratio = f"R@5 {top['generated']['R@5']['value']:.2f}, real {top['real']['R@5']['value']:.2f}"
        ax.set_title(f"{name}\ndrawn, the real one below; {ratio}", fontsize=10)
        ax.set_anchor("N")
        ax.axis("off")
    draw_retrieval(figure.add_subplot(grid[1, :6]), report, 5)
    draw_distances(figure.add_subplot(grid[1, 6:]), report)
    draw_losses(figure.add_subplot(grid[2, :6]), report)
    draw_neighbours(figure.add_subplot(grid[2, 6:]), measured.distances)
    ax = figure.add_subplot(grid[3, :])
    best = nearest_first(train)[:20]
    ax.imshow(
        pair_sheet(train.drawn[best], train.pictures.images(train.neighbours[1][best]), 20),
        interpolation="lanczos",
    )
    ax.set_title(
        "Nearest to a training picture of all drawn for seen captions; that picture below", fontsize=10
    )
    ax.axis("off")
    drawing = report["drawing"]
    figure.suptitle(
        f"{report['model']}, judged by {report['judge']}: {drawing['drawn']} pictures, {drawing['steps']} "
        f"steps of {drawing['scheduler']}, {describe_guidance(drawing)}; nothing picked"
    )
    return figure


# ------------------------------------------------------------ the page


def chart_tag(paint: Callable[[Any], None], folder: Path, name: str, width: float = 7.5) -> str:
    """The chart as a file of its own, and as an element of the page."""
    figure, ax = new_figure(width, 4)
    paint(ax)
    path = folder / f"{name}.png"
    save_figure(figure, path)
    return f"<p>{image_tag(path.read_bytes(), name, kind='chart')}</p>"


def place(rank: int) -> str:
    return "first" if rank == 0 else f"number {rank + 1}"


def split_section(name: str, part: Part, count: int) -> list[str]:
    """The first pictures of a split in the order drawn, beside the real ones of their captions."""
    count = min(count, len(part.numbers))
    drawn, real = (part.ranks[column][:count].tolist() for column in ("generated", "real"))
    notes = [
        f"{caption}\njudge's {place(a)}; the real one's {place(b)}"
        for caption, a, b in zip(part.captions, drawn, real, strict=False)
    ]
    recall = recall_at(part.ranks["generated"], 5)
    titles = ("drawn", "real")
    return [
        heading(3, name.capitalize()),
        note(
            f"Drawn on the left, the real picture of the caption on the right, the first {count} of "
            f"{len(part.numbers)} in the order drawn. R@5 of all: {recall:.3f}."
        ),
        pair_tags(part.drawn[:count], part.real()[:count], titles, notes),
    ]


def neighbour_section(name: str, part: Part, train: Part) -> list[str]:
    """Drawn pictures beside their nearest training pictures: the nearest of all, then as they were drawn."""
    distances, indices = part.neighbours
    captions = train.pictures.captions
    sections = []
    for title, numbers in (
        ("the nearest of all", nearest_first(part)[:NUM_PAIRS]),
        ("the first that were drawn", torch.arange(min(NUM_PAIRS, len(part.numbers)))),
    ):
        notes = [
            f"{part.captions[i]}\nnearest: {captions[train.pictures.choices[int(indices[i])][0]]}\n"
            f"distance {float(distances[i]):.3f}"
            for i in numbers.tolist()
        ]
        pairs = (part.drawn[numbers], train.pictures.images(indices[numbers]))
        sections += [heading(3, f"{name.capitalize()}: {title}")]
        sections += [pair_tags(*pairs, ("drawn", "nearest training picture"), notes)]
    return sections


def describe_guidance(drawing: dict[str, Any]) -> str:
    """What guided a report's pictures."""
    by_clip = drawing.get("CLIP guidance scale", 0)
    further = f", and {by_clip:g} by the noised CLIP" if by_clip else ""
    return f"guidance {drawing['guidance scale']:g}{further}"


def page(report: dict[str, Any], measured: Measured, folder: Path, num_shown: int) -> str:
    """The whole page, pictures inside."""
    drawing = report["drawing"]
    settings = [
        ["model", f"{report['model']}, {report['parameters'] / 1e6:.1f} million parameters, "
                  f"key {report['model key']}"],
        ["judge", f"{report['judge']}, key {report['judge key']}; took no part in conditioning or guidance"],
        ["drawn", f"{drawing['drawn']} pictures, {drawing['steps']} steps of {drawing['scheduler']}, "
                  + describe_guidance(drawing)],
        ["seeds", drawing["seeds"]],
        ["data", f"{report['data']['name']}: "
                 + ", ".join(f"{split} {n}" for split, n in report["data"]["pictures"].items())],
        ["seconds", ", ".join(f"{stage} {seconds}" for stage, seconds in report["seconds"].items())],
        ["computed with", ", ".join(f"{key} {value}" for key, value in report["computed with"].items())],
        ["Inception", report["Inception"] if isinstance(report["Inception"], str)
                      else ", ".join(f"{key} {value:.3f}" for key, value in report["Inception"].items())],
    ]  # fmt: skip
    neighbours = report["nearest training pictures"]
    near = "nearer than 95 % of unseen real pictures are"
    rows = [
        [name, str(row["pictures"]), *(f"{row['distances'][i]:.3f}" for i in (0, 1, 3)), f"{row[near]:.3f}"]
        for name, row in neighbours.items()
        if name != "quantiles"
    ]
    body = [
        heading(1, report["model"]),
        table_tag(["", ""], settings),
        heading(2, "Figures"),
        table_tag(["", "captions", *COLUMNS], metric_rows(report)),
        note(f"In brackets 95 % intervals of {report['bootstrap replicates']} bootstrap replicates."),
        table_tag(["", ""], [list(row) for row in EXPLAINED.items()]),
        chart_tag(lambda ax: draw_retrieval(ax, report, 1), folder, "recall_at_1"),
        chart_tag(lambda ax: draw_retrieval(ax, report, 5), folder, "recall_at_5"),
        chart_tag(lambda ax: draw_distances(ax, report), folder, "distances"),
        heading(2, "Validation loss"),
        note(
            f"Unweighted, mean over {report['validation loss']['draws of the noise']} fixed draws of the "
            "noise; bars are two standard errors over these."
        ),
        chart_tag(lambda ax: draw_losses(ax, report), folder, "validation_loss"),
        heading(2, "Pictures"),
        *(line for name, part in measured.parts.items() for line in split_section(name, part, num_shown)),
        heading(2, "Nearest training pictures"),
        note(
            "A model that copies draws pictures nearer to its training pictures than unseen real pictures of "
            "the same kind are. Training pictures are compared with the nearest other one."
        ),
        chart_tag(lambda ax: draw_neighbours(ax, measured.distances), folder, "nearest_neighbours"),
        table_tag(["distance to it", "pictures", "smallest", "5 %", "median", near], rows),
    ]
    for name, part in measured.parts.items():
        body += neighbour_section(name, part, measured.parts["seen captions"])
    return document(f"{report['model']}: report", body)


def write_report(folder: Path, report: dict[str, Any], measured: Measured, num_shown: int) -> None:
    """report.json first: the figures stand even where the page could not be drawn."""
    write_file(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    save_figure(overview(report, measured), folder / "overview.png")
    write_file(folder / "index.html", page(report, measured, folder, num_shown))
