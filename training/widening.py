"""Widen the emoji data set with more captions and compositions; models/emoji was last trained on the result.

    python -m training.widening                       # data/emoji -> data/emoji-wide

A text tower that knows a word is of no use to a U-Net that has never seen the word in training. The data set
therefore gets captions with more words, and new pictures composed from its own:

- words: WordNet's nouns that mean a concept or a kind of it, unless another concept is closer ("corgi" for
  dog); and any other word that the sentence encoder places close enough to a concept. None of them occurs in
  a caption or is kept out by `training.evaluate words`.
- hats: heads (dog face, fox, robot, ...) wearing the hats of their own style's set, or a party hat, which no
  set has by itself and which is drawn here.
- kinds: every word for a head becomes a concept of its own, bareheaded and in hats; otherwise training would
  see each word about once. Only "a corgi in a party hat" is left out, so that it remains a test.
- hats alone: each hat a few more times in each style; otherwise the model would draw "a crown" on a head,
  since thirty heads wear one.

The held-out splits are copied from data/emoji unchanged.
"""

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw

from pipelines.drawing.images import png_bytes
from pipelines.folders.files import written_aside
from training.data.emoji import TONES, unit_hash, with_article
from training.data.pictures import load_pictures, open_picture
from training.data.words import (
    SPLITS,
    Phrases,
    WordNet,
    concept_names,
    read_wordnet,
    word_lists,
    zipf_frequency,
)
from training.objectives.distillation import Teacher, distillation_texts
from training.run.settings import CacheSettings, WordSettings, parse_config, setting

LEVELS = 3  # how many levels of kinds below a concept count as words for it
NEAR = 0.7  # least cosine between a word's and its nearest concept's embeddings, for words not from WordNet
UNSEEN = "corgi"  # never shown in a party hat
HATS_ALONE = 4  # how often a picture of a hat is repeated, each time as a concept of its own
HATS_EACH = 2  # hats for each word in each style, besides the party hat
WORDS_EACH = 10  # for one picture; other pictures of the concept get other words
COMMON = 2.7  # least Zipf frequency; training would see each rarer word only once or twice
TEMPLATES = ("{0}, {2} style", "{0}", "{1}", "{1} in {2} style")  # the same as in training.emoji
HEADS = (
    "dog face", "cat face", "mouse face", "rabbit face", "cow face", "pig face", "tiger face", "horse face",
    "monkey face", "dragon face", "hamster", "fox", "bear", "panda", "koala", "lion", "polar bear", "frog",
    "wolf", "unicorn", "gorilla", "raccoon", "grinning face", "smiling face with smiling eyes", "robot",
    "alien", "ghost", "skull", "jack-o-lantern", "snowman without snow",
)  # fmt: skip
HATS = (
    "party hat", "top hat", "crown", "graduation cap", "woman's hat", "billed cap", "military helmet",
    "rescue worker's helmet",
)  # fmt: skip
PARTY_COLOURS = ("#e0245e", "#f4b400", "#1da1f2", "#17bf63", "#794bc4", "#f45d22", "#ff7eb6", "#ffffff")


class WideningConfig(WordSettings, CacheSettings):
    """Settings of `training.widening`."""

    dataset: str = setting("The data set that training.emoji wrote.", "data/emoji")
    output_dir: str = setting("Folder to write.", "data/emoji-wide")


# Words


def kinds(names: dict[str, set[str]], wordnet: WordNet, levels: int = LEVELS) -> dict[str, set[str]]:
    """Concept -> the words whose first sense is the concept or a kind of it, up to `levels` levels below.

    The search stops at a synset that is itself a concept: "poodle" is not a word for dog if the data set has
    a poodle. A name that is not a noun is looked up without " face": "dog face" as "dog".
    """
    concepts_of = wordnet.concepts_by_sense(names, " face")
    found: dict[str, set[str]] = defaultdict(set)
    for root, concepts in concepts_of.items():
        reached, seen = [root], {root}
        for _ in range(levels):
            reached = [key for parent in reached for key in wordnet.hyponyms[parent]]
            reached = sorted(set(reached) - seen - concepts_of.keys())
            seen.update(reached)
        words = {word for key in seen for word in wordnet.own_words(key)}
        for concept in concepts if words else ():
            found[concept] |= words
    return dict(found)


def nearest(words: list[str], names: dict[str, set[str]], teacher: Any) -> dict[str, set[str]]:
    """Concept -> the words whose nearest concept it is, by the teacher, with a cosine of at least NEAR."""
    owners = [concept for concept, own in names.items() for _ in own]
    own_names = [name for own in names.values() for name in sorted(own)]
    targets = teacher.embed_texts(own_names)
    found: dict[str, set[str]] = defaultdict(set)
    for start in range(0, len(words), 4096):
        part = words[start : start + 4096]
        values, places = (teacher.embed_texts(part) @ targets.T).max(1)
        for word, value, place in zip(part, values.tolist(), places.tolist(), strict=True):
            if value >= NEAR:
                found[owners[place]].add(word)
    return dict(found)


def more_words(config: WideningConfig, names: dict[str, set[str]]) -> dict[str, list[str]]:
    """Concept -> single words for it that occur in no caption and that `training.evaluate words` does not
    keep out."""
    wordnet = read_wordnet(config.wordnet_dir)
    _, kept_out, _ = word_lists(config.dataset, config.npm_dir, wordnet)
    captions = concept_names(config.dataset)[1]
    seen = Phrases([*captions, *(word.text + end for word in kept_out for end in ("", "s", "es"))])

    def allowed(word: str) -> bool:
        return word.isalpha() and word not in seen and zipf_frequency(word) >= COMMON

    found = {concept: set(filter(allowed, own)) for concept, own in kinds(names, wordnet).items()}
    texts = distillation_texts("words", [], wordnet, [word.text for word in kept_out])
    taken = set().union(*found.values())
    others = [w for w in sorted({*texts["things"], *texts["words"]} - taken) if allowed(w)]
    for concept, own in nearest(others, names, Teacher(cache_dir=config.cache_dir)).items():
        found.setdefault(concept, set()).update(own)
    return {concept: sorted(own) for concept, own in found.items() if own}


def captions_of(words: Iterable[str], row: dict[str, Any]) -> list[str]:
    """Captions for a picture: up to WORDS_EACH of the words, chosen by the picture's hash, each in one of the
    templates."""
    key = f"{row['hexcode']} {row['style']}"
    chosen = sorted(words, key=lambda word: unit_hash(f"{key} {word}", "words"))[:WORDS_EACH]
    forms = (TEMPLATES[int(unit_hash(f"{key} {word}", "template") * len(TEMPLATES))] for word in chosen)
    return [
        form.format(word, with_article(word), row["style"]) for form, word in zip(forms, chosen, strict=True)
    ]


# Hats


def cut_out(image: Image.Image) -> Image.Image:
    """The picture with the surrounding white made transparent, RGBA, cropped to what remains."""
    rgb = image.convert("RGB")
    light = Image.fromarray((np.asarray(rgb).min(2) >= 248).astype(np.uint8) * 255)
    framed = Image.new("L", (rgb.width + 2, rgb.height + 2), 255)
    framed.paste(light, (1, 1))
    ImageDraw.floodfill(framed, (0, 0), 128)
    around = np.asarray(framed)[1:-1, 1:-1] == 128
    result = rgb.convert("RGBA")
    result.putalpha(Image.fromarray(np.where(around, 0, 255).astype(np.uint8)))
    return result.crop(result.getchannel("A").getbbox())


def party_hat(chance: random.Random, size: int = 256) -> Image.Image:
    """A striped cone with a ball on top, RGBA, in three random colours."""
    cone, stripes, ball = chance.sample(PARTY_COLOURS, 3)
    if cone == "#ffffff":
        cone, stripes = stripes, cone
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    mask = Image.new("L", (size, size), 0)
    corners = [size * x for x in (0.5, 0.14, 0.16, 0.97, 0.84, 0.97)]  # top, left, right
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    ImageDraw.Draw(mask).ellipse([size * x for x in (0.16, 0.9, 0.84, 1.0)], fill=255)
    painted = Image.new("RGBA", (size, size), cone)
    pen, slant = ImageDraw.Draw(painted), chance.choice((-0.2, 0.0, 0.2))
    for row in range(4):
        y = size * (0.22 + 0.22 * row)
        pen.line([0, y - slant * size, size, y + slant * size], fill=stripes, width=size // 11)
    image.paste(painted, (0, 0), mask)
    ball_box = [size * x for x in (0.39, 0.0, 0.61, 0.22)]
    ImageDraw.Draw(image).ellipse(ball_box, fill=ball, outline=cone, width=4)
    return image


def put_on(head: Image.Image, hat: Image.Image, chance: random.Random, size: int) -> Image.Image:
    """The head at the bottom of a white square, wearing the hat at a random tilt of up to 12 degrees."""

    def scaled(image: Image.Image, scale: float) -> Image.Image:
        side = (round(image.width * scale), round(image.height * scale))
        return image.resize(side, Image.Resampling.LANCZOS)

    canvas = Image.new("RGBA", (size, size), "white")
    head = scaled(head, min(0.78 * size / head.width, 0.66 * size / head.height))
    top = size - head.height - round(0.02 * size)
    canvas.alpha_composite(head, ((size - head.width) // 2, top))
    width = chance.uniform(0.52, 0.66) * head.width
    hat = scaled(hat, min(width / hat.width, (top + 0.2 * head.height) / hat.height))
    hat = hat.rotate(chance.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
    low = max(round(top + 0.2 * head.height) - hat.height, 0)
    canvas.alpha_composite(hat, ((size - hat.width) // 2, low))
    return canvas.convert("RGB")


def dressed(
    pictures: dict[tuple[str, str], dict[str, Any]], style: str, name: str, hat: str, number: int
) -> Image.Image | None:
    """The head in a hat of its own style, or in a party hat; None if the style has no such head or hat."""
    head, other = pictures.get((style, name)), pictures.get((style, hat))
    if head is None or (other is None and hat != "party hat"):
        return None
    chance = random.Random(f"{style} {name} {hat} {number}")
    face = open_picture(head["image"])
    thing = party_hat(chance) if other is None else cut_out(open_picture(other["image"]))
    return put_on(cut_out(face), thing, chance, face.width)


def worn(rows: list[dict[str, Any]], words: dict[str, list[str]]) -> Iterable[dict[str, Any]]:
    """A row for every combination of a head and a hat in each style, and three for each party hat. Except
    with the party hat, some captions use further words for the head's concept."""
    pictures = {(row["style"], row["name"]): row for row in rows}
    for style, name, hat in itertools.product(sorted({row["style"] for row in rows}), HEADS, HATS):
        for number in range(3 if hat == "party hat" else 1):
            picture = dressed(pictures, style, name, hat, number)
            if picture is not None:
                head = pictures[style, name]
                own = () if hat == "party hat" else words.get(head["concept"], ())
                yield head | worn_row(head, hat, picture, number, own)


def kinds_of_heads(rows: list[dict[str, Any]], words: dict[str, list[str]]) -> Iterable[dict[str, Any]]:
    """For each word for a head, in each style: the head bareheaded, in a party hat, and in HATS_EACH other
    hats. Each word is a concept of its own, and so is each word with each hat; otherwise training would see
    the word only a few times."""
    pictures = {(row["style"], row["name"]): row for row in rows}
    for (style, name), head in sorted(pictures.items()):
        for word in words.get(head["concept"], ()) if name in HEADS else ():
            concept, text = f"{head['concept']} {word}", with_article(word)
            captions = [form.format(word, text, style) for form in TEMPLATES]
            changes = {"caption": captions[0], "captions": captions, "name": word, "concept": concept}
            yield head | changes
            there = [hat for hat in HATS if hat != "party hat" and (style, hat) in pictures]
            there.sort(key=lambda hat: unit_hash(f"{word} {hat} {style}", "kind"))
            for number, hat in enumerate(("party hat", *there[:HATS_EACH])):
                picture = dressed(pictures, style, name, hat, 3 + number)
                if picture is not None and (word, hat) != (UNSEEN, "party hat"):
                    row = worn_row(head | {"name": word}, hat, picture, 3 + number, ())
                    yield head | row | {"concept": f"{concept} {hat}"}


def hats_alone(rows: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Each picture of a hat, repeated HATS_ALONE times."""
    for row in rows:
        for number in range(HATS_ALONE if row["name"] in HATS else 0):
            yield row | {"concept": f"{row['concept']} {row['style']} {number}"}


def worn_row(
    head: dict[str, Any], hat: str, picture: Image.Image, number: int, words: Iterable[str]
) -> dict[str, Any]:
    name, style, the_hat = head["name"], head["style"], with_article(hat)
    short = name.removesuffix(" face") if head["group"] == "animals-nature" else name
    captions = [f"{name} in {the_hat}, {style} style"]
    for one in dict.fromkeys((short, name)):
        text = with_article(one)
        captions += [
            f"{text} in {the_hat}",
            f"{text} wearing {the_hat}",
            f"{one} with {the_hat}, {style} style",
        ]
    chosen = sorted(words, key=lambda word: unit_hash(f"{word} {hat} {style}", "hat"))[:3]
    captions += [f"{with_article(word)} in {the_hat}" for word in chosen]
    return {
        "image": {"bytes": png_bytes(picture), "path": None}, "caption": captions[0], "captions": captions,
        "name": f"{name} in {the_hat}", "concept": f"{head['concept']} {hat}",
        "hexcode": f"{head['hexcode']} {hat} {number}",
    }  # fmt: skip


def widened(rows: list[dict[str, Any]], words: dict[str, list[str]]) -> list[dict[str, Any]]:
    """The rows of a data set with the concepts' words added to their captions, followed by the heads in hats,
    the kinds of heads and the hats alone. Pictures with a skin tone get no further words: with six tones,
    there are many of them already."""
    result = []
    for row in rows:
        own = words.get(row["concept"], ()) if TONES.isdisjoint(row["hexcode"].split("-")) else ()
        result.append(row | {"captions": [*row["captions"], *captions_of(own, row)]})
    return [*result, *worn(rows, words), *kinds_of_heads(rows, words), *hats_alone(rows)]


def build(config: WideningConfig) -> dict[str, Any]:
    """Write the data set; return the summary that is also written to `widening.json`.

    Raises:
        ValueError: the data set, WordNet's files, wordfreq or the sentence encoder is missing.
    """
    splits = {name: load_pictures(config.dataset, name) for name in SPLITS}
    train = splits["train"].cast_column("image", datasets.Image(decode=False))
    names: dict[str, set[str]] = defaultdict(set)
    for concept, name, group in zip(train["concept"], train["name"], train["group"], strict=True):
        if group != "flags":
            names[concept].add(name)
    words = more_words(config, dict(names))
    rows = widened(list(train), words)
    wide = datasets.Dataset.from_list(rows, features=splits["train"].features)
    summary = {
        "pictures": len(train), "words": len(set().union(*words.values())), "concepts with words": len(words),
        "heads and hats": len(rows) - len(train), "words of": words,
    }  # fmt: skip
    with written_aside(config.output_dir) as partial:
        datasets.DatasetDict(splits | {"train": wide}).save_to_disk(str(partial))
        (partial / "widening.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), "utf-8")
    return summary


def main() -> None:
    config = parse_config(WideningConfig)
    try:
        summary = build(config)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"training.widening: {error}") from error
    print(f"{summary['words']} words for {summary['concepts with words']} concepts")
    added, pictures = summary["heads and hats"], summary["pictures"]
    print(f"{added} heads and hats beside {pictures} pictures, {config.output_dir}")


if __name__ == "__main__":
    main()
