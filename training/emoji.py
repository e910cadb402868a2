"""Build the emoji data set, a `datasets` folder, from vector art with names in npm packages.

    python -m training.emoji --output_dir data/emoji --resolution 64

The art comes from Iconify's JSON packages, one for each drawing style, with the licence in its `info.json`.
The names and tags come from `emojibase-data`. npm must be installed; the packages are fetched once into
`--npm_dir`. OpenMoji is share-alike, so it is drawn only with `--include_openmoji` and is never used for
weights that this repository ships.
"""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tqdm import tqdm

from pipelines.drawing.images import png_bytes
from pipelines.folders.files import read_json, written_aside
from training.data.emoji import (
    PACKAGE_VERSIONS,
    SHARE_ALIKE,
    STYLES,
    Emoji,
    caption_variants,
    heldout_compositions,
    install_packages,
    iter_icons,
    names_to_hexcodes,
    read_emoji,
    telling_tags,
    validation_concepts,
)
from training.run.settings import NpmSettings, Rule, parse_config, setting

COLUMNS = ("name", "concept", "hexcode", "style", "group", "subgroup", "licence")


class EmojiConfig(NpmSettings):
    """Settings of `training.emoji`."""

    output_dir: str = setting("Folder to write, or to replace.", "data/emoji")
    resolution: int = setting(
        "Side of the rendered pictures, in pixels.", 64, Rule(lambda value: 8 <= value <= 1024, "in 8..1024")
    )
    include_openmoji: bool = setting("Include OpenMoji, which is share-alike.", False)
    validation_fraction: float = setting(
        "Share of concepts kept out of training.", 0.05, Rule(lambda value: 0 <= value < 0.5, "in [0, 0.5)")
    )


def render(svg: str, resolution: int) -> Image.Image:
    """Draw an SVG on white at resolution x resolution pixels, antialiased (resvg)."""
    import resvg_py

    try:
        size: dict[str, Any] = {"width": resolution, "height": resolution}
        png = resvg_py.svg_to_bytes(svg_string=svg, **size, background="#ffffff", skip_system_fonts=True)
    except BaseException as error:  # a panic (resvg 0.48 has one on one icon at 16 pixels) is no Exception
        if type(error).__name__ != "PanicException" or resolution > 2048:
            raise
        return render(svg, 2 * resolution).reduce(2)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if image.size == (resolution, resolution):
        return image
    canvas = Image.new("RGB", (resolution, resolution), "white")  # a viewBox that is not square is centred
    image.thumbnail((resolution, resolution), Image.Resampling.LANCZOS)
    canvas.paste(image, ((resolution - image.width) // 2, (resolution - image.height) // 2))
    return canvas


def picture_rows(
    config: EmojiConfig, modules: Path, package: str, emoji: dict[str, Emoji], names: dict[str, str]
) -> list[dict[str, Any]]:
    """A row of the data set for each emoji that a package draws."""
    style, telling = STYLES[package], telling_tags(emoji)
    licence = read_json(modules / "@iconify-json" / package / "info.json")["license"]["spdx"]
    icons, rows = list(iter_icons(modules, package, emoji, names)), []
    for hexcode, svg in tqdm(icons, desc=f"drawing {package}", unit="picture"):
        item, image = emoji[hexcode], {"bytes": png_bytes(render(svg, config.resolution)), "path": None}
        captions = caption_variants(item, style, telling)
        values = (item.name, item.concept, hexcode, style, item.group, item.subgroup, licence)
        row = {"image": image, "caption": captions[0], "captions": captions}
        rows.append(row | dict(zip(COLUMNS, values, strict=True)))
    return rows


def build(config: EmojiConfig) -> dict[str, Any]:
    """Render everything and write the data set; return the summary that is also written to `splits.json`.

    Raises:
        ValueError: a setting is out of range; the message names it and what is allowed.
        RuntimeError: npm is missing or failed.
    """
    config.check()
    modules = install_packages(Path(config.npm_dir))
    emoji = read_emoji(modules / "emojibase-data")
    names = names_to_hexcodes(modules, emoji)
    rules = heldout_compositions(emoji)
    heldout = {code for codes in rules.values() for code in codes}
    unseen = set(validation_concepts(emoji, heldout, config.validation_fraction))
    left_out = set() if config.include_openmoji else SHARE_ALIKE
    packages = [name for name in STYLES if name not in left_out]
    everything = [row for name in packages for row in picture_rows(config, modules, name, emoji, names)]
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "heldout_compositions": []}
    for row in everything:
        kept_out = "heldout_compositions" if row["hexcode"] in heldout else "train"
        splits["validation" if row["concept"] in unseen else kept_out].append(row)
    versions = PACKAGE_VERSIONS.items()
    summary = {
        "resolution": config.resolution, "pictures": len(everything),
        "concepts": len({row["concept"] for row in everything}),
        "styles": dict(Counter(row["style"] for row in everything)),
        "splits": {split: len(part) for split, part in splits.items()},
        "packages": {name: version for name, version in versions if name.split("/")[-1] not in left_out},
        "validation_concepts": {c: emoji[c].name if c in emoji else c for c in sorted(unseen)},
        "heldout_compositions": {rule: {c: emoji[c].name for c in codes} for rule, codes in rules.items()},
    }  # fmt: skip
    features = Features(
        {"image": ImageFeature(), "caption": Value("string"), "captions": List(Value("string"))}
        | {column: Value("string") for column in COLUMNS}
    )
    with written_aside(config.output_dir) as partial:
        data = {split: Dataset.from_list(part, features=features) for split, part in splits.items()}
        DatasetDict(data).save_to_disk(str(partial))
        (partial / "splits.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), "utf-8")
    return summary


def main() -> None:
    config = parse_config(EmojiConfig)
    try:
        summary = build(config)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"training.emoji: {error}") from error
    print(f"{summary['pictures']} pictures of {summary['concepts']} concepts in {config.output_dir}")
    for title in ("styles", "splits"):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in summary[title].items()))


if __name__ == "__main__":
    main()
