"""Measure what was trained. Each command prints its figures and, with --json FILE, writes them.

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

The judge is a CLIP that took no part in conditioning or guidance, of another seed and size than the one
whose text tower the model reads, and trained on every split.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor

from pipelines.coding.likelihood import chain_of
from pipelines.drawing.images import image_grid, to_pil
from pipelines.folders.files import save_png, write_file
from training.data.emoji import STYLES
from training.data.pictures import PictureCache, cache_pictures, load_pictures
from training.evaluation.bits_per_dim import BitsPerDimConfig, bits_per_dim, text_information
from training.evaluation.card import CardConfig, card
from training.evaluation.editing import EditingConfig, editing
from training.evaluation.frontier import FrontierConfig, frontier
from training.evaluation.judge import Judge, embed_concepts
from training.evaluation.metrics import recall_at
from training.evaluation.noised_accuracy import NoisedAccuracyConfig, noised_accuracy
from training.evaluation.report import ReportConfig, report
from training.evaluation.samples import draw, with_guides
from training.evaluation.sampling_steps import SamplingStepsConfig, sampling_steps
from training.evaluation.settings import EvaluationConfig
from training.evaluation.styles import StylesConfig, styles
from training.evaluation.upscaling import UpscalingConfig, upscaling
from training.evaluation.words import measure
from training.run.settings import parse_config


def recall(ranks: Tensor) -> dict[str, float]:
    """Share of pictures whose concept is the first, or among the first five."""
    return {f"R@{k}": recall_at(ranks, k) for k in (1, 5)}


def pictures_of(config: EvaluationConfig, split: str, resolution: int) -> PictureCache:
    return cache_pictures(
        load_pictures(config.dataset, split), resolution, config.cache_dir, "image", "caption"
    )


def zero_shot(config: EvaluationConfig) -> dict[str, Any]:
    """Classify pictures among all concepts by prompt templates alone (Radford 2021, section 3.1)."""
    judge = Judge(config.clip or config.judge)
    concepts = embed_concepts(judge, config.dataset)
    figures: dict[str, Any] = {"concepts": len(concepts.ids)}
    splits = [config.split] if config.split else ["train", "validation", "heldout_compositions"]
    for split in splits:
        pictures = pictures_of(config, split, judge.image_size)
        chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(config.seed))[:1000]
        ranks = concepts.rank(
            judge.embed_images(pictures.images(chosen)), [pictures.columns["concept"][i] for i in chosen]
        )
        figures[split] = {"pictures": len(chosen), **recall(ranks)}
    return figures


def draw_captions(config: EvaluationConfig, captions: list[str]) -> Tensor:
    """What the model of `config` draws for them, by its settings."""
    pipe = with_guides(config.model)
    if config.eta is not None:
        pipe.scheduler = chain_of(pipe.scheduler, eta=config.eta)
    names = ("seed", "num_inference_steps", "guidance_scale", "clip_guidance_scale", "batch_size")
    return draw(pipe, captions, **{name: getattr(config, name) for name in names})


def retrieval(config: EvaluationConfig) -> dict[str, Any]:
    """Draw random captions of a split and let the judge find the concept of each picture among all; real
    pictures of the same captions beside them, and a shuffled control that knows nothing of the text."""
    judge = Judge(config.judge)
    concepts = embed_concepts(judge, config.dataset)
    pictures = pictures_of(config, config.split or "train", judge.image_size)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(pictures), generator=generator)[: config.num_pictures].tolist()
    captions, truth = ([pictures.columns[c][i] for i in chosen] for c in ("caption", "concept"))
    drawn = draw_captions(config, captions)
    embeds = judge.embed_images(drawn)
    figures: dict[str, Any] = {
        "split": config.split or "train",
        "pictures": len(chosen),
        "concepts": len(concepts.ids),
        "steps": config.num_inference_steps,
        "generated": recall(concepts.rank(embeds, truth)),
        "real": recall(concepts.rank(judge.embed_images(pictures.images(chosen)), truth)),
        "shuffled": recall(concepts.rank(embeds.roll(1, dims=0), truth)),
    }
    if config.output:
        save_png(image_grid(to_pil(drawn[:100]), columns=10), config.output)
    return figures


SHEET_PROMPTS = (
    "red heart", "dog face", "pizza", "rocket", "grinning face",
    "sunflower", "house", "red apple", "cat face", "crown",
)  # fmt: skip


def sheet(config: EvaluationConfig) -> dict[str, Any]:
    """Ten prompts down, ten across: the six styles and four without one. No picking: seeds in a row."""
    styles = [*list(STYLES.values())[:6], "", "", "", ""]
    captions = [
        f"{name}, {style} style" if style else f"a {name}" for name in SHEET_PROMPTS for style in styles
    ]
    images = draw_captions(config, captions)
    path = config.output or "sheet.png"
    save_png(image_grid(to_pil(images), columns=10), path)
    return {"sheet": path, "pictures": len(captions)}


def words(config: EvaluationConfig) -> dict[str, Any]:
    """How many words that no caption holds the text tower of --clip understands."""
    return measure(config)


COMMANDS: dict[str, Any] = {
    "zero-shot": zero_shot,
    "retrieval": retrieval,
    "sheet": sheet,
    "words": words,
    "bits-per-dim": bits_per_dim,
    "text-information": text_information,
    "sampling-steps": sampling_steps,
    "report": report,
    "card": card,
    "frontier": frontier,
    "editing": editing,
    "noised-accuracy": noised_accuracy,
    "upscaling": upscaling,
    "styles": styles,
}
CONFIGS: dict[str, Any] = {  # of the commands that do not share EvaluationConfig
    "bits-per-dim": BitsPerDimConfig,
    "text-information": BitsPerDimConfig,
    "sampling-steps": SamplingStepsConfig,
    "report": ReportConfig,
    "card": CardConfig,
    "frontier": FrontierConfig,
    "editing": EditingConfig,
    "noised-accuracy": NoisedAccuracyConfig,
    "upscaling": UpscalingConfig,
    "styles": StylesConfig,
}


def show(figures: dict[str, Any], indent: str = "") -> None:
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
    kind = CONFIGS.get(argv[0], EvaluationConfig)
    config: Any = parse_config(kind, argv[1:], f"{name} {argv[0]}")
    try:
        config.check()
        figures = COMMANDS[argv[0]](config)
    except ValueError as error:
        raise SystemExit(f"training.evaluate {argv[0]}: {error}") from error
    show(figures)
    if getattr(config, "json", ""):  # report and card write their own files
        write_file(config.json, json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
