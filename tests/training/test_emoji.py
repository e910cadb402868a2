"""The emoji data set: names and codes by hand, SVG against closed-form pixels, a build from hand-written
packages, and (marked npm) the real build from the real packages."""

import json
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pytest

from training.data.emoji import (
    PACKAGE_VERSIONS,
    STYLES,
    Emoji,
    caption_variants,
    concept_of,
    gender_of,
    heldout_compositions,
    install_packages,
    iter_icons,
    name_in_words,
    names_to_hexcodes,
    normalise_hexcode,
    read_emoji,
    slug,
    telling_tags,
    unit_hash,
    validation_concepts,
    with_article,
)
from training.emoji import EmojiConfig, build, render

# ------------------------------------------------------------ codes and names


@pytest.mark.parametrize(
    "given, expected",
    [
        ("1f469-200d-1f692", "1F469-1F692"),
        ("2764-fe0f", "2764"),
        ("1F468-1F3FD-200D-2695-FE0F", "1F468-1F3FD-2695"),
        ("0023-FE0F-20E3", "0023-20E3"),
        ("1F600", "1F600"),
    ],
)
def test_normalise_hexcode(given, expected):
    assert normalise_hexcode(given) == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        ("1F600", "1F600"),
        ("1F469-1F3FD-200D-1F692", "1F9D1-1F692"),  # woman firefighter, medium: firefighter
        ("1F468-200D-1F692", "1F9D1-1F692"),
        ("1F3C3-1F3FF-200D-2640-FE0F", "1F3C3"),  # woman running, dark: running
        ("1F475-1F3FB", "1F9D3"),  # old woman: older person
        ("1F467", "1F9D2"),  # girl: child
        ("1f408-200d-2b1b", "1F408-2B1B"),  # black cat stays one
        ("1F46B", "1F9D1-1F91D-1F9D1"),  # woman and man holding hands, plain and spelled out
        ("1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF", "1F9D1-1F91D-1F9D1"),
        ("1F468-200D-2764-FE0F-200D-1F48B-200D-1F468", "1F48F"),  # kiss
        ("1FAF1-1F3FB-200D-1FAF2-1F3FF", "1F91D"),  # handshake in two tones
    ],
)
def test_concept_of(given, expected):
    assert concept_of(given) == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        ("1F469-1F3FD-1F692", "woman"),
        ("1F468-1F692", "man"),
        ("1F9D1-1F692", "person"),
        ("1F3C3-2640", "woman"),
        ("1F3C3-1F3FF-2642", "man"),
        ("1F475", "woman"),
        ("1F466", "man"),
        ("1F600", "person"),
    ],
)
def test_gender_of(given, expected):
    assert gender_of(given) == expected


@pytest.mark.parametrize(
    "label, expected",
    [
        ("flag: Peru", "flag of peru"),
        ("keycap: 7", "keycap 7"),
        ("woman firefighter: dark skin tone", "woman firefighter, dark skin tone"),
        ("handshake: light skin tone, dark skin tone", "handshake, light skin tone, dark skin tone"),
        ("Japanese “acceptable” button", "japanese acceptable button"),
        ("woman’s hat", "woman's hat"),
    ],
)  # fmt: skip
def test_name_in_words(label, expected):
    assert name_in_words(label) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Woman’s hat", "womans-hat"),
        ("flag: Côte d'Ivoire", "flag-cote-divoire"),
        ("piñata", "pinata"),
        ("UP! button", "up-button"),
        ("  1st place   medal ", "1st-place-medal"),
    ],
)
def test_slug(name, expected):
    assert slug(name) == expected


def emoji(name: str, code: str, subgroup: str = "other", **rest) -> Emoji:
    settings = {"tags": [], "group": "objects", "concept": concept_of(code), "gender": gender_of(code)}
    return Emoji(hexcode=code, name=name, subgroup=subgroup, **(settings | rest))


def by_code(*items: Emoji) -> dict[str, Emoji]:
    return {item.hexcode: item for item in items}


def test_captions_of_a_picture():
    dog = emoji("dog face", "1F436", tags=["face", "Puppy", "pet", "pup", "hound", "mutt"])
    telling = {"Puppy", "pet", "pup", "hound", "mutt"}
    assert caption_variants(dog, "noto", telling) == [
        "dog face, noto style",
        "dog face",
        "a dog face",
        "a dog face in noto style",
        *("puppy, noto style", "a puppy", "pet, noto style", "a pet", "pup, noto style", "a pup"),
        *("hound, noto style", "a hound"),
        "dog face, puppy, pet, noto style",
    ]
    assert caption_variants(dog, "noto", {"pet"})[4:] == ["pet, noto style", "a pet"]
    orange = emoji("orange heart", "1F9E1")
    assert caption_variants(orange, "3d", set()) == [
        *("orange heart, 3d style", "orange heart", "an orange heart", "an orange heart in 3d style")
    ]
    toned = emoji("cook, dark skin tone", "1F9D1-1F3FF-1F373", tags=["chef"], tones=(5,))
    assert len(caption_variants(toned, "flat", {"chef"})) == 4


def test_telling_tags():
    """Not a word of any name, not shared by 40 concepts, not a single letter; toned twins do not count."""
    items = [
        emoji("tiger", "1F405", tags=["cat", "zoo", "x", "big cat"]),
        emoji("cat face", "1F431", tags=["kitten", "pet"]),
        emoji("dog face", "1F436", tags=["pet", "!?", "red-hot"]),
        emoji("waving hand", "1F44B", tags=["bye"]),
        emoji("waving hand, dark skin tone", "1F44B-1F3FF", tags=["bye"], tones=(5,)),
    ]
    items += [emoji(f"thing{i}", f"A{i:03d}", tags=["common", *(["rare"] if i else [])]) for i in range(40)]
    assert telling_tags(by_code(*items)) == {"zoo", "kitten", "pet", "red-hot", "bye", "rare"}


# ------------------------------------------------------------ splits


@pytest.mark.parametrize(
    "salt, text, digits",  # printf %s salt:text | sha256sum | cut -c1-16
    [
        ("composition", "1F9D1-1F692", "800cc5b718dfd16e"),
        ("validation", "1F436", "1f7dc8fe5f6cc3cf"),
        ("validation", "1F355", "0ac46f2a5fe4cc8c"),
    ],
)
def test_hashes_are_the_same_on_every_machine(salt, text, digits):
    assert unit_hash(text, salt) == int(digits, 16) / 2**64


def test_heldout_colours_and_shapes():
    """(colour index + shape index) mod 4 is 2, by red orange yellow green blue purple brown black white and
    heart circle square book apple diamond."""
    held = [
        "yellow heart",
        "brown heart",
        "orange circle",
        "purple circle",
        "red square",
        "blue square",
        "green book",
    ]
    held += ["large orange diamond", "white square"]
    kept = [
        "red heart",
        "orange heart",
        "white heart",
        "red circle",
        "green circle",
        "white apple",
        "orange book",
    ]
    kept += ["red apple", "pink heart", "hearts", "yellow heart ball", "large blue diamond", "heart"]
    items = [emoji(name, f"F{i:03d}") for i, name in enumerate(held + kept)]
    items.append(emoji("yellow heart", "F999", tones=(1,)))  # toned: not plain
    rules = heldout_compositions(by_code(*items))
    assert rules["colour x shape"] == [f"F{i:03d}" for i in range(len(held))]
    assert rules["animal x expression"] == rules["profession x gender x tone"] == []


def test_heldout_cats():
    """Of the alphabet's order the fourth, the eighth, ..."""
    names = ["weary cat", "cat face", "crying cat", "pouting cat", "grinning cat", "kissing cat"]
    items = [emoji(name, f"C{i}", "cat-face") for i, name in enumerate(names)]
    rules = heldout_compositions(by_code(*items, emoji("alley cat", "C9", "animal-mammal")))
    assert rules["animal x expression"] == ["C5"]  # kissing


def test_heldout_professions():
    """sha256 of firefighter starts with 0x80, of cook with 0xbb: of the 15 pairs in the order man, person,
    woman and light to dark, number int(15 * 0x80 / 256) = 7 and int(15 * 0xbb / 256) = 10."""
    items = []
    for what, code in (("firefighter", "1F692"), ("cook", "1F373")):
        for who in ("1F9D1", "1F468", "1F469"):
            items.append(emoji(what, f"{who}-{code}", "person-role"))
            for tone in range(1, 6):
                toned = f"{who}-1F3F{'BCDEF'[tone - 1]}-{code}"
                items.append(emoji(f"{what}, tone {tone}", toned, "person-role", tones=(tone,)))
    for tone in range(1, 6):  # without genders to compose: never held out
        items.append(emoji(f"ninja {tone}", f"1F977-1F3F{'BCDEF'[tone - 1]}", "person-role", tones=(tone,)))
    rules = heldout_compositions(by_code(*items))
    assert rules["profession x gender x tone"] == ["1F469-1F3FB-1F373", "1F9D1-1F3FD-1F692"]


def test_validation_concepts():
    items = [
        emoji("dog face", "1F436", "animal-mammal"),  # its hash is 0x1f7d.. / 2^64 = 0.123
        emoji("pizza", "1F355", "food"),  # 0.042
        emoji("rocket", "1F680", "transport"),  # 0.795
        emoji("sunflower", "1F33B", "plant"),  # 0.930
        emoji("flag of peru", "1F1F5-1F1EA", "country-flag", group="flags"),
        emoji("keycap 7", "0037-20E3", "keycap", group="symbols"),
        emoji("letter a", "1F1E6", "alphanum", group="symbols"),
        emoji("red heart", "2764", "heart"),  # a part of held-out hearts
        emoji("grinning cat", "1F63A", "cat-face"),
        emoji("cook", "1F9D1-1F373", "person-role"),
        emoji("woman cook", "1F469-1F373", "person-role"),
    ]
    known = by_code(*items)

    def chosen(fraction: float, heldout: tuple[str, ...] = ("1F469-1F373",)) -> list[str]:
        return validation_concepts(known, set(heldout), fraction)

    assert chosen(1.0) == ["1F33B", "1F355", "1F436", "1F680"]
    assert chosen(1.0, ("1F680",)) == ["1F33B", "1F355", "1F436", "1F9D1-1F373"]
    assert [chosen(f) for f in (0.0, 0.04, 0.05, 0.124, 0.8)] == [
        *([], [], ["1F355"], ["1F355", "1F436"], ["1F355", "1F436", "1F680"])
    ]


# ------------------------------------------------------------ drawing


def draw(body: str, resolution: int = 16, view: str = "0 0 16 16") -> np.ndarray:
    """(H, W, 3) integers."""
    image = render(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}">{body}</svg>', resolution)
    assert image.mode == "RGB" and image.size == (resolution, resolution)
    return np.asarray(image).astype(int)


def test_a_gradient():
    """At the middle of pixel i of n: (i + 1/2)/n of the way, to a level; the user's units do not matter."""
    stops = '<stop offset="0" stop-color="#ff0000"/><stop offset="1" stop-color="#0000ff"/>'
    shape = '<rect width="16" height="16" fill="url(#g)"/>'
    body = f'<defs><linearGradient id="g">{stops}</linearGradient></defs>{shape}'
    for resolution in (16, 40):
        ramp = 255 * (np.arange(resolution) + 0.5) / resolution
        expected = np.stack([255 - ramp, 0 * ramp, ramp], axis=-1)[None].repeat(resolution, 0)
        assert np.abs(draw(body, resolution) - expected).max() <= 1.01


def test_a_mask():
    """White shows, grey 102 shows 0.4 of it over the white ground, black and outside nothing."""
    shades = "".join(
        f'<rect x="{4 * i}" width="4" height="16" fill="{fill}"/>'
        for i, fill in enumerate(("#fff", "#666", "#000"))
    )
    pixels = draw(f'<mask id="m">{shades}</mask><rect width="16" height="16" fill="#f00" mask="url(#m)"/>')
    for column, level in ((0, 0), (4, 153), (8, 255), (12, 255)):
        expected = np.full((16, 4, 3), level)
        expected[..., 0] = 255
        assert np.abs(pixels[:, column : column + 4] - expected).max() <= 1


def test_antialiasing_and_opacity():
    """A pixel covered to a quarter is a quarter black; opacity 0.2 leaves 0.8 of the white."""
    pixels = draw('<rect width="4.25" height="16"/><rect x="8" width="8" height="16" opacity="0.2"/>')
    for columns, level in ((slice(0, 4), 0), (4, 191.25), (slice(5, 8), 255), (slice(8, 16), 204)):
        assert np.abs(pixels[:, columns] - level).max() <= 2


@pytest.mark.parametrize(
    "view, first, last",
    [
        ("0 0 32 16", 4, 12),
        ("-8 4 32 16", 4, 12),
        ("0 0 16 32", 4, 12),
        ("10 10 12 16", 2, 14),
        ("0 0 16 16", 0, 16),
    ],
)
def test_a_view_box_that_is_not_square_is_centred(view, first, last):
    x, y, width, height = map(int, view.split())
    pixels = draw(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="#00f"/>', view=view)
    expected = np.full((16, 16, 3), 255)
    band = expected[first:last] if width >= height else expected[:, first:last]
    band[..., :2] = 0
    np.testing.assert_array_equal(pixels, expected)


# ------------------------------------------------------------ a build from hand-written packages


def entry(label: str, code: str, group: int, subgroup: int, tags: list[str] | None = None, **rest) -> dict:
    return {"label": label, "hexcode": code, "group": group, "subgroup": subgroup, "tags": tags or [], **rest}


COOK_TONES = [
    {"label": f"cook: tone {tone}", "hexcode": f"1F9D1-1F3F{'BCDEF'[tone - 1]}-200D-1F373", "tone": tone}
    for tone in range(1, 6)
]
EMOJIBASE = [
    entry("red heart", "2764-FE0F", 0, 0),
    entry("yellow heart", "1F49B", 0, 0),
    entry("pizza", "1F355", 1, 1, ["Slice", "heart"]),
    entry("rocket", "1F680", 1, 1),
    entry("flag: Peru", "1F1F5-1F1EA", 2, 2),
    entry("cook", "1F9D1-200D-1F373", 3, 3, ["chef"], skins=COOK_TONES),
    {"label": "copyright", "hexcode": "00A9-FE0F"},  # without a group, as emojibase has some
]
GROUPS = {
    "groups": {"0": "smileys", "1": "food", "2": "flags", "3": "people"},
    "subgroups": {"0": "heart", "1": "food-prepared", "2": "country-flag", "3": "person-role"},
}
NOTO = {
    "icons": {
        "red-heart": {"body": '<path fill="#f00" d="M0 0h16v16H0z"/>'},
        "left-half": {"body": '<path fill="#00f" d="M0 0h8v16H0z"/>'},
        "pizza": {
            "body": '<path fill="#0f0" d="M8 4h16v16H8z"/>',
            "left": 8,
            "top": 4,
            "width": 16,
            "height": 16,
        },
        "rocket": {"body": "<g/>"},
        "unheard-of": {"body": "<g/>"},
        "cook": {"body": "<g/>"},
        "cook-dark": {"body": "<g/>"},
        "yellow-heart": {"body": "<g/>"},
        "heart-again": {"body": "<g/>"},
    },
    "aliases": {"flag-for-peru": {"parent": "left-half", "hFlip": True}, "spaceship": {"parent": "rocket"}},
    "width": 16,
    "height": 16,
}
NOTO_CHARS = {
    "2764": "red-heart",
    "2764-fe0f": "heart-again",
    "1f9d1-200d-1f373": "cook",
    "1f9d1-1f3ff-200d-1f373": "cook-dark",
}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def npm_dir(tmp_path) -> Path:
    """The packages as npm leaves them, small and written by hand."""
    modules = tmp_path / "npm" / "node_modules"
    base = modules / "emojibase-data"
    for package in PACKAGE_VERSIONS:
        write_json(modules / package / "package.json", {})
    write_json(base / "en" / "data.json", EMOJIBASE)
    write_json(base / "meta" / "groups.json", GROUPS)
    write_json(base / "meta" / "unicode-names.json", {"1F49B": "YELLOW HEART"})
    write_json(
        base / "en" / "shortcodes" / "github.json", {"1F680": ["launch", "rocket_ship"], "1F355": "pizza"}
    )
    for package in STYLES:
        art = modules / "@iconify-json" / package
        licence = "CC-BY-SA-4.0" if package == "openmoji" else "MIT"
        write_json(art / "info.json", {"license": {"spdx": licence}})
        icons = {"icons": {"launch": {"body": '<path d="M0 0h512v512H0z"/>'}}, "width": 512, "height": 512}
        write_json(art / "icons.json", NOTO if package == "noto" else icons)
        write_json(art / "chars.json", NOTO_CHARS if package == "noto" else {})
    return tmp_path / "npm"


def test_names_from_emojibase(npm_dir):
    known = read_emoji(npm_dir / "node_modules" / "emojibase-data")
    assert len(known) == len(EMOJIBASE) + 5
    dark = known["1F9D1-1F3FF-1F373"]
    assert dark == Emoji(
        "1F9D1-1F3FF-1F373", "1F9D1-1F373", "cook, tone 5", ["chef"], "people", "person-role", (5,), "person"
    )
    assert (known["00A9"].group, known["00A9"].subgroup) == ("symbols", "alphanum")
    names = names_to_hexcodes(npm_dir / "node_modules", known)
    assert names["red-heart"] == names["redheart"] == "2764"
    assert names["flag-for-peru"] == names["flag-peru"] == "1F1F5-1F1EA"
    assert names["launch"] == names["rocket-ship"] == names["rocket"] == "1F680"
    assert names["cook-dark"] == "1F9D1-1F3FF-1F373"


def test_icons_of_a_package(npm_dir):
    modules = npm_dir / "node_modules"
    known = read_emoji(modules / "emojibase-data")
    icons = list(iter_icons(modules, "noto", known, names_to_hexcodes(modules, known)))
    codes = [code for code, _ in icons]
    assert codes == [
        "2764", "1F355", "1F680", "1F9D1-1F373", "1F9D1-1F3FF-1F373", "1F49B", "1F1F5-1F1EA"
    ]  # fmt: skip
    # each once (not heart-again), none unknown, no plain alias
    pictures = {code: np.asarray(render(svg, 16)) for code, svg in icons}
    assert (pictures["2764"] == (255, 0, 0)).all()
    assert (pictures["1F355"] == (0, 255, 0)).all()  # its own corner and size
    flag = pictures["1F1F5-1F1EA"]  # mirrored
    assert (flag[:, :8] == 255).all() and (flag[:, 8:] == (0, 0, 255)).all()


def test_a_small_build(npm_dir, tmp_path):
    config = EmojiConfig(
        output_dir=str(tmp_path / "out"), resolution=8, npm_dir=str(npm_dir), validation_fraction=0.05
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").write_text("")
    summary = build(config)
    assert not (tmp_path / "out" / "stale").exists()
    data = datasets.load_from_disk(str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "splits.json").read_text("utf-8"))
    assert written == summary
    assert PACKAGE_VERSIONS.keys() - summary["packages"].keys() == {"@iconify-json/openmoji"}
    assert summary["pictures"] == 12 and summary["concepts"] == 6
    assert summary["splits"] == {"train": 8, "validation": 3, "heldout_compositions": 1}
    assert summary["styles"] == {"3d": 1, "flat": 1, "noto": 7, "twemoji": 1, "emojione": 1, "fxemoji": 1}
    # 1F9D1-1F373: 0x0ad3.. / 2^64 = 0.042
    assert summary["validation_concepts"] == {"1F355": "pizza", "1F9D1-1F373": "cook"}
    assert summary["heldout_compositions"]["colour x shape"] == {"1F49B": "yellow heart"}
    assert data["heldout_compositions"]["name"][:] == ["yellow heart"]
    (pizza,) = [row for row in data["validation"] if row["name"] == "pizza"]
    image = pizza.pop("image")
    assert image.size == (8, 8) and (np.asarray(image) == (0, 255, 0)).all()
    captions = [
        "pizza, noto style",
        "pizza",
        "a pizza",
        "a pizza in noto style",
        "slice, noto style",
        "a slice",
    ]
    assert pizza == {
        "caption": "pizza, noto style",
        "captions": captions,  # not "heart": that is a word of other names
        "name": "pizza",
        "concept": "1F355",
        "hexcode": "1F355",
        "style": "noto",
        "group": "food",
        "subgroup": "food-prepared",
        "licence": "MIT",
    }
    assert set(data["train"]["licence"]) == {"MIT"}


def test_share_alike_art_comes_only_when_asked_for(npm_dir, tmp_path):
    summary = build(
        EmojiConfig(
            output_dir=str(tmp_path / "out"), resolution=8, include_openmoji=True, npm_dir=str(npm_dir)
        )
    )
    assert summary["styles"]["openmoji"] == 1
    train = datasets.load_from_disk(str(tmp_path / "out"))["train"]
    shared = [
        style for style, licence in zip(train["style"], train["licence"], strict=True) if "SA" in licence
    ]
    assert shared == ["openmoji"]
    assert summary["packages"] == PACKAGE_VERSIONS


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"resolution": 7}, r"resolution must be in 8..1024, got 7"),
        ({"resolution": 1025}, r"resolution must be in 8..1024, got 1025"),
        ({"validation_fraction": 0.5}, r"validation_fraction must be in \[0, 0.5\), got 0.5"),
        ({"validation_fraction": -0.1}, r"validation_fraction must be in \[0, 0.5\), got -0.1"),
    ],
)
def test_settings_out_of_range(setting, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(EmojiConfig(output_dir=str(tmp_path / "out"), npm_dir=str(tmp_path / "npm"), **setting))
    assert not list(tmp_path.iterdir())


def test_a_machine_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is not on this machine. Install Node.js"):
        build(EmojiConfig(output_dir=str(tmp_path / "out"), npm_dir=str(tmp_path / "npm")))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------ the real thing


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A real `npm install` of all packages."""
    folder = tmp_path_factory.mktemp("npm")
    install_packages(folder)
    return folder


@pytest.fixture(scope="module")
def real(packages, tmp_path_factory) -> tuple[dict, Path]:
    """The summary and the folder of a real build of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("emoji") / "emoji"
    return build(EmojiConfig(output_dir=str(folder), resolution=16, npm_dir=str(packages))), folder


def columns(folder: Path) -> dict[str, dict[str, list]]:
    """All of the data set but its pictures."""
    data = datasets.load_from_disk(str(folder))
    return {split: part.remove_columns("image").to_dict() for split, part in data.items()}


@pytest.mark.npm
def test_npm_without_a_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(RuntimeError, match="npm could not fetch the art: .*npm"):
        install_packages(tmp_path / "npm")


@pytest.mark.npm
def test_the_versions_asked_for_are_the_ones_installed(packages):
    for package, version in PACKAGE_VERSIONS.items():
        installed = json.loads((packages / "node_modules" / package / "package.json").read_text("utf-8"))
        assert installed["version"] == version
    before = os.stat(packages / "node_modules" / "emojibase-data" / "package.json").st_mtime_ns
    install_packages(packages)  # there already
    assert os.stat(packages / "node_modules" / "emojibase-data" / "package.json").st_mtime_ns == before


@pytest.mark.npm
def test_counts_and_licences_of_the_real_build(real):
    summary, folder = real
    data = columns(folder)
    assert {split: len(part["name"]) for split, part in data.items()} == summary["splits"]
    assert summary["pictures"] == sum(summary["splits"].values()) > 16_000
    assert 1500 < summary["concepts"] < 2000
    assert set(summary["styles"]) == {"3d", "flat", "noto", "twemoji", "emojione", "fxemoji"}
    licences = {licence for part in data.values() for licence in part["licence"]}
    assert licences == {"MIT", "Apache-2.0", "CC-BY-4.0"}  # none share-alike
    pairs = [pair for part in data.values() for pair in zip(part["hexcode"], part["style"], strict=True)]
    assert len(set(pairs)) == len(pairs) == summary["pictures"]


@pytest.mark.npm
def test_pictures_of_the_real_build_show_something(real):
    """Not one picture in two hundred is a flat square; well-known ones have the colours of their names."""
    pictures = datasets.load_from_disk(str(real[1]))["train"]
    blank = 0
    for row in pictures.select(range(0, len(pictures), 40)):
        pixels = np.asarray(row["image"])
        assert pixels.shape == (16, 16, 3)
        blank += pixels.std() < 2
    assert blank <= len(pictures) / 40 / 200
    names = pictures["name"]
    for name, dominant in (("red heart", 0), ("green heart", 1), ("blue heart", 2), ("red circle", 0)):
        rows = pictures.select([i for i, other in enumerate(names) if other == name])
        assert len(rows) >= 4
        for row in rows:
            colour = np.asarray(row["image"]).astype(float)[6:10, 6:10].mean((0, 1))
            assert colour.argmax() == dominant, (name, row["style"], colour)


@pytest.mark.npm
def test_validation_and_held_out_pictures_are_unseen(real):
    summary, folder = real
    data = columns(folder)
    unseen = set(data["validation"]["concept"])
    assert unseen == set(summary["validation_concepts"]) and len(unseen) > 50
    assert not unseen & (set(data["train"]["concept"]) | set(data["heldout_compositions"]["concept"]))
    held = set(data["heldout_compositions"]["hexcode"])
    assert held == {code for rule in summary["heldout_compositions"].values() for code in rule}
    assert not held & set(data["train"]["hexcode"]) and len(held) > 30


@pytest.mark.npm
def test_every_part_of_a_held_out_composition_is_seen_in_training(real):
    """Each word of its name is in the name of something else; for professions also the profession, and its
    gender and its tone with others."""
    summary, folder = real
    train = columns(folder)["train"]
    seen = defaultdict(set)
    for name in set(train["name"]):
        for word in re.findall(r"[a-z0-9]+", name):
            seen[word].add(name)
    for rule, compositions in summary["heldout_compositions"].items():
        assert len(compositions) >= 2, rule
        for name in compositions.values():
            assert all(seen[word] for word in re.findall(r"[a-z0-9]+", name)), name
    others = {(concept_of(code), gender_of(code)) for code in train["hexcode"]}
    tones = {(concept_of(code), t) for code in train["hexcode"] for t in re.findall("1F3F[B-F]", code)}
    for code in summary["heldout_compositions"]["profession x gender x tone"]:
        (tone,) = re.findall("1F3F[B-F]", code)
        assert (concept_of(code), gender_of(code)) in others and (concept_of(code), tone) in tones


@pytest.mark.npm
def test_two_builds_are_the_same(real, packages, tmp_path):
    summary, folder = real
    assert (
        build(EmojiConfig(output_dir=str(tmp_path / "again"), resolution=16, npm_dir=str(packages)))
        == summary
    )
    assert columns(tmp_path / "again") == columns(folder)
    first, second = (datasets.load_from_disk(str(path))["train"] for path in (folder, tmp_path / "again"))
    for row in range(0, len(first), 500):
        assert first[row]["image"].tobytes() == second[row]["image"].tobytes()
    shutil.rmtree(tmp_path / "again")


def test_articles_and_letters():
    spoken = {
        "apple": "an apple",
        "unicorn": "a unicorn",
        "one o'clock": "a one o'clock",
        "umbrella": "an umbrella",
    }
    assert {name: with_article(name) for name in spoken} == spoken
    assert name_in_words("regional indicator A") == "letter a"  # emojibase writes no colon here
