"""Write a report's figures into the model card: front matter for the Hub, and one block of the text.

    python -m training.evaluate card --model models/emoji --report report/report.json

Text written by hand is kept: the front matter is merged, and only the text between the two marks is
rewritten. A folder without a card gets the card that saving a pipeline writes, with the block at its end.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from pipelines.folders.files import read_json, write_file
from training.evaluation.report_page import COLUMNS, describe_drawing, listed, metric_rows
from training.evaluation.report_parts import NEAR, SPLITS
from training.evaluation.samples import load_pipeline, pipeline_key
from training.evaluation.settings import ModelSettings
from training.run.settings import require, setting

BEGIN = "<!-- figures: python -m training.evaluate card writes from here -->"
END = "<!-- figures: to here -->"
TYPES = {  # our name of a metric -> its type in the Hub's model-index
    "R@1": "recall_at_1",
    "R@5": "recall_at_5",
    "CLIP score": "clip_score",
    "Frechet distance": "frechet_distance",
    "KID": "kernel_distance",
}


class CardConfig(ModelSettings):
    """Settings of `training.evaluate card`."""

    report: str = setting("The report.json that `report` wrote about the model.", "report/report.json")
    output: str = setting("File to write; the model's README.md by default.", "")
    license: str = setting("Licence of the weights, as the Hub calls it.", "")
    training: str = setting("The training in words: updates, hours and machine.", "")

    def check(self) -> None:
        """Raise a ValueError that names the argument for any error that can be found before work starts."""
        super().check()
        require(Path(self.report).is_file(), "report", self.report, "the report.json of `report`")
        require(Path(self.model).is_dir(), "model", self.model, "a pipeline's folder")


def model_index(report: dict[str, Any]) -> list[EvalResult]:
    """The figures of the generated pictures, for each split of the data set."""
    name = Path(report["data"]["name"]).name
    columns = {split: report["against captions"][split]["generated"] for split in SPLITS}
    halves = report["against half of the training pictures"]["generated"]
    columns["seen captions"] = columns["seen captions"] | halves
    return [
        EvalResult(
            "text-to-image",
            name,
            f"{name}, {title}",
            TYPES.get(metric, metric),
            round(figure["value"], 5),
            dataset_split=SPLITS[title],
            metric_name=metric,
        )  # fmt: skip
        for title, figures in columns.items()
        for metric, figure in figures.items()
    ]


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def measured_limits(report: dict[str, Any]) -> list[str]:
    """Lines on the model's limits according to the figures, and on the limits of the figures themselves."""
    lines = []
    for name, part in report["against captions"].items():
        drawn, real, chance = (part[column]["R@5"]["value"] for column in COLUMNS)
        lines.append(
            f"- {name.capitalize()}: the judge has the right concept among its first five for {drawn:.0%} of "
            f"the pictures, {real:.0%} of real ones, {chance:.0%} under others' captions."
        )
    shares = [
        f"{row[NEAR]:.0%} ({name.removeprefix('generated, ')})"
        for name, row in report["nearest training pictures"].items()
        if name.startswith("generated")
    ]
    halves = report["against half of the training pictures"]
    return [
        *lines,
        f"- Nearer to a training picture than 95 % of unseen real pictures are: {', '.join(shares)}.",
        "- The judge saw every split of this data set in its own training. Its figures compare with those of "
        f"the same judge and of as many pictures ({halves['pictures']}), and with no others.",
    ]


def figures_block(report: dict[str, Any], training: str = "") -> str:
    """The Markdown between the marks: results, how they were measured, data and licences, limits."""
    data, seconds, losses = report["data"], report["seconds"], report["validation loss"]
    names, computed, kept_out = list(report["against captions"]), report["computed with"], data["pictures"]
    spans = [
        [span, *(f"{losses[n]['mean'][i]:.4f} ± {losses[n]['standard error'][i]:.4f}" for n in names)]
        for i, span in enumerate(losses["timesteps"])
    ]
    total = sum(value for stage, value in seconds.items() if stage != "of these, pictures drawn anew")
    anew = seconds["of these, pictures drawn anew"]
    drawn = f"{anew} of the pictures drawn in them" if anew else "the pictures drawn before"
    threads = f"{computed['threads']} thread{'s' if computed['threads'] > 1 else ''}"
    licences = [[name, str(n)] for name, n in data.get("training pictures by licence", {}).items()]
    sources = ", ".join(f"{name} {version}" for name, version in data.get("packages", {}).items())
    paragraphs = [
        BEGIN + "\n## Results",
        markdown_table(["", "captions", *COLUMNS], metric_rows(report)),
        f"In brackets 95 % bootstrap intervals. Retrieval is among {report['concepts']} concepts; real is "
        "what real pictures of the same captions get, for the distances half of the training pictures "
        "against the other.",
        f"Loss on fixed noise ({losses['target']}, unweighted, ± its standard error over draws of noise):",
        markdown_table(["t", *names], spans),
        f"FID and IS of Inception: {listed(report['Inception'], '.3f')}.",
        "## How this was measured",
        f"`python -m training.evaluate report`: {describe_drawing(report['drawing'])}; seeds "
        f"{report['drawing']['seeds']}. Judge: `{report['judge']}` ({report['judge key']}), which took no "
        f"part in conditioning or guidance. Model key {report['model key']}. {total / 60:.0f} minutes on "
        f"{threads}, {drawn}; torch {computed['torch']}.",
        "## Data of training and evaluation",
        f"`{data['name']}`: {kept_out['train']} training pictures of {data['training concepts']} concepts; "
        f"kept out {kept_out['heldout_compositions']} of compositions and {kept_out['validation']} of other "
        "concepts.",
        markdown_table(["licence", "training pictures"], licences) if licences else "",
        f"Sources: {sources}" if "packages" in data else "",
        f"Training: {training}" if training else "",
        "## Limits that the figures show",
        "\n".join([*measured_limits(report), END]),
    ]  # fmt: skip
    return "\n\n".join(filter(None, paragraphs))


def with_block(card: str, block: str) -> str:
    """The card with `block` in place of the text between the marks, or at the end if there are no marks."""
    before, begin, rest = card.partition(BEGIN)
    if not begin:
        return f"{card.rstrip()}\n\n{block}\n"
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the model's README.md has {BEGIN!r} and no {END!r} after it: mend it")
    return before + block + after


def card(config: CardConfig) -> dict[str, Any]:
    """Write the card and return its path.

    Raises:
        ValueError: the report is about other weights than the model's, or the existing card cannot be read.
    """
    report = read_json(Path(config.report))
    pipe = load_pipeline(config.model)
    rule = f"of the weights in {config.model!r}: measure them again"
    require(pipeline_key(pipe) == report.get("model key"), "report", config.report, rule)
    path, name = Path(config.model, "README.md"), Path(config.model).resolve().name
    has_code = any(Path(config.model).rglob("*.py"))
    text = path.read_text(encoding="utf-8") if path.is_file() else pipe.make_card(name, has_code)
    fields: dict[str, Any] = {"eval_results": model_index(report), "model_name": name}
    if config.license:
        fields["license"] = config.license
    text = pipe.make_card(name, has_code, with_block(text, figures_block(report, config.training)), fields)
    output = config.output or str(path)
    write_file(output, text)
    return {"card": output, "figures": len(fields["eval_results"])}
