"""More captions and compositions: words by WordNet and by nearness, heads in hats, in closed form."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_wordnet import write_wordnet

from training.data.words import WordNet, read_wordnet
from training.widening import (
    captions_of,
    cut_out,
    kinds,
    kinds_of_heads,
    nearest,
    party_hat,
    put_on,
    widened,
)


@pytest.fixture
def wordnet(tmp_path: Path) -> WordNet:
    return read_wordnet(write_wordnet(tmp_path))


def test_words_are_those_of_a_concept_and_of_its_kinds(wordnet: WordNet) -> None:
    """A head counts as its animal, a person's name is no word, and "car" goes to the car, not the train."""
    found = kinds({"D": {"dog face"}, "C": {"automobile"}, "J": {"joy"}, "X": {"unheard"}}, wordnet)
    dogs = {"dog", "domestic dog", "canis familiaris", "corgi", "welsh corgi", "poodle", "poodle dog"}
    # "coach" means a trainer first of all, and so is no word for a car
    assert found == {
        "D": dogs,
        "C": {"car", "auto", "automobile", "motorcar", "cab", "taxi", "limo"},
        "J": {"joy", "delight"},
    }


def test_kinds_end_where_another_concept_begins_and_after_some_levels(wordnet: WordNet) -> None:
    found = kinds({"D": {"dog"}, "P": {"poodle"}, "T": {"physical entity"}}, wordnet)
    assert not {"poodle", "poodle dog"} & found["D"] and found["P"] == {"poodle", "poodle dog"}
    assert "corgi" in found["D"] and not found["T"] & found["D"]
    assert {"car", "cab"} <= found["T"]  # one and two below
    assert "cab" not in kinds({"T": {"physical entity"}}, wordnet, levels=1)["T"]
    assert kinds({"D": {"dog"}}, wordnet, levels=0)["D"] == {"dog", "domestic dog", "canis familiaris"}


class Plane:
    """Embeds a text at the angle that it names, in degrees."""

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        angles = torch.tensor([float(text.split()[-1]) for text in texts]).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_other_words_go_to_the_nearest_concept_if_it_is_near() -> None:
    """cos 45 is 0.707, cos 46 0.695; the bound is 0.7."""
    names = {"A": {"at 0"}, "B": {"at 120", "at 140"}}
    words = ["w 10", "w 45", "w 46", "w 100", "w 130", "w 184", "w 186"]
    assert nearest(words, names, Plane()) == {"A": {"w 10", "w 45"}, "B": {"w 100", "w 130", "w 184"}}


def test_each_picture_takes_ten_words_by_itself_alone() -> None:
    words = [f"word{i}" for i in range(30)]
    row = {"hexcode": "1F436", "style": "flat"}
    chosen = captions_of(words, row)
    assert len(chosen) == 10 and chosen == captions_of(words[::-1], row)
    forms = {f.format(w) for w in words for f in ("{}, flat style", "{}", "a {}", "a {} in flat style")}
    assert set(chosen) <= forms
    assert set(chosen) != set(captions_of(words, row | {"style": "noto"}))


def disc(colour: str, hole: str | None = None, size: int = 64) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).ellipse([16, 20, 47, 51], fill=colour)
    if hole:
        ImageDraw.Draw(image).rectangle([28, 32, 35, 39], fill=hole)
    return image


def test_white_around_is_cut_away_and_white_within_stays() -> None:
    cut = cut_out(disc("red", hole="white"))
    assert cut.size == (32, 32)
    pixels = np.asarray(cut)
    assert tuple(pixels[16, 16]) == (255, 255, 255, 255)  # the hole
    assert tuple(pixels[16, 4]) == (255, 0, 0, 255)
    assert pixels[0, 0, 3] == pixels[31, 31, 3] == 0  # the corners
    filled = np.asarray(disc("red", hole="red"))[..., 1] < 128
    assert (pixels[..., 3] == 255).sum() == filled.sum()


def test_a_hat_sits_on_the_head_and_both_are_whole() -> None:
    """A blue head at the bottom in the middle; the red hat above, over its top quarter at most."""
    chance = random.Random(0)
    for _ in range(20):
        image = np.asarray(
            put_on(Image.new("RGBA", (30, 30), "blue"), Image.new("RGBA", (20, 20), "red"), chance, 64)
        ).astype(int)
        blue = (image[..., 2] > 200) & (image[..., 0] < 60)
        red = (image[..., 0] > 200) & (image[..., 2] < 60)
        rows, columns = np.nonzero(blue)
        height = round(0.66 * 64)
        assert rows.max() == 64 - 1 - 1 and abs((columns.min() + columns.max()) / 2 - 31.5) <= 1
        assert columns.max() - columns.min() + 1 == height
        top = 64 - 1 - height
        hat_rows, hat_columns = np.nonzero(red)
        assert hat_rows.min() < top - 5  # it rises above the head
        assert hat_rows.max() <= top + 0.25 * height
        assert abs((hat_columns.min() + hat_columns.max()) / 2 - 31.5) <= 2
        assert image[0, 0].tolist() == image[-1, 0].tolist() == [255, 255, 255]


def test_a_party_hat_is_a_cone_in_three_colours() -> None:
    pixels = np.asarray(party_hat(random.Random(1)))
    widths = (pixels[..., 3] > 0).sum(1)
    assert widths[240] > widths[160] > widths[90] > 0 and pixels[0, 0, 3] == 0
    assert (
        abs(widths[240] / widths[130] - (240 - 36) / (130 - 36)) < 0.1
    )  # straight sides, from the tip at 0.14
    colours = {tuple(c) for c in pixels[pixels[..., 3] == 255][:, :3].tolist()}
    assert len(colours) == 3


def picture(colour: str) -> dict:
    png = io.BytesIO()
    disc(colour).save(png, format="PNG")
    return {"bytes": png.getvalue(), "path": None}


def row(name: str, style: str, hexcode: str, group: str, colour: str) -> dict:
    return {
        "image": picture(colour), "caption": f"{name}, {style} style", "captions": [f"{name}, {style} style"],
        "name": name, "concept": hexcode.split("-")[0], "hexcode": hexcode, "style": style, "group": group,
        "subgroup": "", "licence": f"licence of {style}",
    }  # fmt: skip


def test_rows_gain_words_and_heads_gain_the_hats_of_their_style() -> None:
    rows = [
        row("dog face", "flat", "1F436", "animals-nature", "brown"),
        row("robot", "noto", "1F916", "smileys-emotion", "grey"),
        row("crown", "flat", "1F451", "objects", "yellow"),
        row("crown", "noto", "1F451", "objects", "orange"),
        row("waving hand, dark skin tone", "flat", "1F44B-1F3FF", "people-body", "black"),
    ]
    wide = widened(rows, {"1F436": ["corgi"], "1F44B": ["wave"]})
    assert [len(one["captions"]) for one in wide[:5]] == [2, 1, 1, 1, 1]  # the toned hand takes no word
    assert "corgi" in wide[0]["captions"][1] and rows[0]["captions"] == ["dog face, flat style"]
    worn = wide[5:13]
    assert [one["caption"] for one in worn] == [
        *["dog face in a party hat, flat style"] * 3,
        "dog face in a crown, flat style",
        *["robot in a party hat, noto style"] * 3,
        "robot in a crown, noto style",
    ]
    assert [one["licence"] for one in worn] == ["licence of flat"] * 4 + ["licence of noto"] * 4
    assert len({one["hexcode"] for one in worn}) == 8 and worn[0]["concept"] == "1F436 party hat"
    assert (
        "a dog in a party hat" in worn[0]["captions"] and "a dog face wearing a crown" in worn[3]["captions"]
    )
    assert "a corgi in a crown" in worn[3]["captions"]
    assert not any("corgi" in caption for one in worn[:3] for caption in one["captions"])
    crowned = np.asarray(Image.open(io.BytesIO(worn[3]["image"]["bytes"]))).astype(int)
    yellow = (crowned[..., 0] > 200) & (crowned[..., 1] > 200) & (crowned[..., 2] < 90)
    brown = abs(crowned - np.array([165, 42, 42])).max(2) < 40
    assert yellow.sum() > 100 and brown.sum() > 500
    assert np.nonzero(yellow)[0].mean() < np.nonzero(brown)[0].mean() - 20  # the crown above the dog
    alone = wide[-8:]
    assert [one["caption"] for one in alone] == ["crown, flat style"] * 4 + ["crown, noto style"] * 4
    assert len({one["concept"] for one in alone}) == 8 and not {"1F451"} & {one["concept"] for one in alone}
    assert alone[0]["image"] == rows[2]["image"]


def test_every_word_for_a_head_is_a_concept_in_hats_too_and_the_corgi_in_the_party_hat_is_left_out() -> None:
    rows = [
        row("dog face", "flat", "1F436", "animals-nature", "brown"),
        row("dog face", "noto", "1F436", "animals-nature", "brown"),
        row("pizza", "flat", "1F355", "food-drink", "red"),
        *(row(hat, "flat", "1F451", "objects", "yellow") for hat in ("crown", "top hat", "billed cap")),
    ]
    kinds = list(kinds_of_heads(rows, {"1F436": ["beagle", "corgi"], "1F355": ["pie"]}))
    plain = [one for one in kinds if " in a" not in one["name"]]
    assert [one["caption"] for one in plain] == [
        f"{word}, {style} style" for style in ("flat", "noto") for word in ("beagle", "corgi")
    ]
    assert plain[1]["captions"] == ["corgi, flat style", "corgi", "a corgi", "a corgi in flat style"]
    assert plain[1]["image"] == rows[0]["image"] and plain[1]["concept"] == "1F436 corgi"
    hats = {(one["name"], one["style"]): one for one in kinds if " in a" in one["name"]}
    assert len(hats) == len(kinds) - len(plain) == 2 * 3 + 2 - 2  # noto has no hat but the party hat
    assert {style for name, style in hats if name == "beagle in a party hat"} == {"flat", "noto"}
    assert sum(name.startswith("corgi") for name, _ in hats) == 2  # flat's others
    assert not any("corgi" in name and "party" in name for name, _ in hats)
    one = hats["beagle in a party hat", "noto"]
    assert "a beagle wearing a party hat" in one["captions"] and one["concept"] == "1F436 beagle party hat"
    brown = abs(np.asarray(Image.open(io.BytesIO(one["image"]["bytes"]))).astype(int) - [165, 42, 42]).max(2)
    assert (brown < 40).sum() > 500
