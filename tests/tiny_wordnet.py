"""A WordNet of a dozen nouns, and the packages of one emoji."""

import json
from pathlib import Path

from training.data.emoji import PACKAGE_VERSIONS

# offset, words, pointers, gloss
NOUNS = [
    (100, ["entity"], [], "that which exists"),
    (200, ["physical_entity"], [("@", 100)], 'what can be touched; "the chair is a physical entity"'),
    (300, ["dog", "domestic_dog", "Canis_familiaris"], [("@", 200)], "of the genus Canis (dogs); a pet"),
    (310, ["corgi", "Welsh_corgi"], [("@", 300)], "either of two Welsh breeds"),
    (320, ["poodle", "poodle_dog"], [("@", 300)], "an intelligent dog"),
    (330, ["Toto"], [("@i", 300)], "a dog in a story"),
    (400, ["car", "auto", "automobile", "motorcar"], [("@", 200)], "a motor vehicle; a machine"),
    (410, ["car", "railway_car"], [("@", 200)], "a vehicle on rails"),
    (420, ["cab", "taxi"], [("@", 400)], "a car that takes passengers for money"),
    (430, ["coach"], [("@", 100)], "someone in charge of training"),
    (440, ["coach", "limo"], [("@", 400)], "a car with a driver"),
    (500, ["goose"], [("@", 200)], "a web-footed bird"),
    (600, ["joy", "delight"], [("@", 100)], "the emotion of great happiness"),
]  # fmt: skip
SENSES = {  # noun -> offsets, the most frequent first
    "entity": [100], "physical_entity": [200], "dog": [300], "domestic_dog": [300], "canis_familiaris": [300],
    "corgi": [310], "welsh_corgi": [310], "poodle": [320], "poodle_dog": [320], "toto": [330],
    "car": [400, 410], "auto": [400], "automobile": [400], "motorcar": [400], "railway_car": [410],
    "cab": [420], "taxi": [420], "coach": [430, 440], "limo": [440], "goose": [500], "joy": [600],
    "delight": [600],
}  # fmt: skip
FREQUENCY = {"canis familiaris": 1.9, "motorcar": 2.4}  # of all others 3


def write_wordnet(folder: Path) -> Path:
    """A WordNet of a dozen nouns in the format of wndb(5WN)."""
    licence = "  1 This software and database is being provided to you\n"
    records = []
    for offset, own, pointers, gloss in NOUNS:
        parts = [f"{offset:08d} 03 n {len(own):02x}", *(f"{word} 0" for word in own), f"{len(pointers):03d}"]
        parts += [f"{symbol} {target:08d} n 0000" for symbol, target in pointers]
        records.append(" ".join(parts) + f" | {gloss}  \n")
    (folder / "data.noun").write_text(licence + "".join(records), encoding="utf-8")
    index = []
    for word, offsets in SENSES.items():
        symbols = "2 @ ~" if word == "dog" else "1 @"
        places = " ".join(f"{offset:08d}" for offset in offsets)
        index.append(f"{word} n {len(offsets)} {symbols} {len(offsets)} 1 {places}  \n")
    (folder / "index.noun").write_text(licence + "".join(index), encoding="utf-8")
    (folder / "noun.exc").write_text("geese goose\n", encoding="utf-8")
    for part, word in (("verb", "v run"), ("adj", "a sad"), ("adv", "r sadly")):
        letter, word = word.split()
        line = f"{word} {letter} 1 1 ! 1 1 00000900  \n"
        (folder / f"index.{part}").write_text(licence + line, encoding="utf-8")
    return folder


def write_npm(folder: Path) -> Path:
    """What training.emoji's packages say of one emoji."""
    modules = folder / "node_modules"
    for package in PACKAGE_VERSIONS:
        (modules / package).mkdir(parents=True)
        (modules / package / "package.json").write_text("{}")
    for name, content in (
        ("meta/groups.json", {"groups": {"0": "animals"}, "subgroups": {"0": "mammal"}}),
        ("en/data.json", [{"hexcode": "1F436", "label": "dog face", "tags": ["Puppy", "pet"], "group": 0}]),
    ):
        path = modules / "emojibase-data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder
