"""Measure trained models. Each command prints its figures and, with --json FILE, writes them to a file.

    python -m training.evaluate zero-shot --clip models/judge
    python -m training.evaluate retrieval --model models/emoji --judge models/judge
    python -m training.evaluate sheet --model models/emoji
    python -m training.evaluate bits-per-dim --model models/emoji
    python -m training.evaluate text-information --model models/emoji
    python -m training.evaluate sampling-steps --models runs/a/pipeline runs/b/pipeline:fixed_large
    python -m training.evaluate words --clip runs/clip/clip --teacher
    python -m training.evaluate report --model models/emoji --output report
    python -m training.evaluate card --model models/emoji --report report/report.json
    python -m training.evaluate frontier --model models/emoji --clip_guidance_model runs/clip-words/clip
    python -m training.evaluate styles --model models/emoji --output styles
    python -m training.evaluate noised-accuracy --model models/emoji --output accuracy.png
    python -m training.evaluate upscaling --model models/emoji-upsampler --output upscaling.png
    python -m training.evaluate editing --models models/emoji models/emoji:10 --output editing.png

The judge is a CLIP that took no part in conditioning or guidance. Its seed and size differ from those of the
CLIP whose text tower the model reads, and it was trained on every split.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

from pipelines.folders.files import write_file
from training.evaluation.bits_per_dim import bits_per_dim, text_information
from training.evaluation.card import card
from training.evaluation.editing import editing
from training.evaluation.frontier import frontier
from training.evaluation.noised_accuracy import noised_accuracy
from training.evaluation.report import report
from training.evaluation.retrieval import retrieval, sheet, zero_shot
from training.evaluation.sampling_steps import sampling_steps
from training.evaluation.styles import styles
from training.evaluation.upscaling import upscaling
from training.evaluation.words import words
from training.run.settings import parse_config

COMMANDS: dict[str, Callable[[Any], dict[str, Any]]] = {  # each one's settings are its argument's class
    measure.__name__.replace("_", "-"): measure
    for measure in (
        zero_shot, retrieval, sheet, words, bits_per_dim, text_information, sampling_steps, report, card,
        frontier, editing, noised_accuracy, upscaling, styles,
    )
}  # fmt: skip


def show(figures: dict[str, Any], indent: str = "") -> None:
    """Print the figures; of a long list of numbers, print only the length."""
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            show(value, indent + "  ")
        elif isinstance(value, list) and len(value) > 20:
            print(f"{indent}{name}: {len(value)} numbers, see --json")
        elif isinstance(value, float):
            print(f"{indent}{name}: {value:.3f}" if abs(value) >= 0.1 else f"{indent}{name}: {value:.3g}")
        else:
            print(f"{indent}{name}: {value}")


def main() -> None:
    argv = sys.argv[1:]
    name = "python -m training.evaluate"
    usage = f"usage: {name} {{{','.join(COMMANDS)}}} [--help | settings]"
    if argv[:1] in (["-h"], ["--help"]):
        print(usage)
        return
    if not argv or argv[0] not in COMMANDS:
        raise SystemExit(usage)
    measure = COMMANDS[argv[0]]
    config: Any = parse_config(get_type_hints(measure)["config"], argv[1:], f"{name} {argv[0]}")
    try:
        config.check()
        figures = measure(config)
    except ValueError as error:
        raise SystemExit(f"training.evaluate {argv[0]}: {error}") from error
    show(figures)
    if getattr(config, "json", ""):  # report and card write their own files
        write_file(config.json, json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
