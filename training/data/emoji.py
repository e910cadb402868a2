"""The parts of the emoji data set: the art packages, the names of the emoji, the captions, and what is kept
out of training.

A *hexcode* is an emoji's code points joined by "-", without the invisible ones (FE0F, FE0E, 200D), for
example "1F469-1F692". A *concept* is the hexcode without skin tone and gender: "woman firefighter: dark skin
tone" and "firefighter" are one concept, drawn 18 times.
"""

import hashlib
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.folders.files import read_json

# Package -> the word that captions use for its drawing style.
STYLES = {
    "fluent-emoji": "3d",
    "fluent-emoji-flat": "flat",
    "noto": "noto",
    "twemoji": "twemoji",
    "emojione": "emojione",
    "fxemoji": "fxemoji",
    "openmoji": "openmoji",
}
SHARE_ALIKE = {"openmoji"}
PACKAGE_VERSIONS = {  # those that the shipped model was trained on
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/openmoji": "1.2.29",
    "emojibase-data": "17.0.0",
}
INVISIBLE, GENDER_SIGNS = {"FE0F", "FE0E", "200D"}, {"2640", "2642"}
TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
GENDERLESS = {  # man, woman -> person; boy, girl -> child; old man, old woman -> older person
    "1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2",
    "1F474": "1F9D3", "1F475": "1F9D3",
}  # fmt: skip
# Pairs whose sequence spells out both genders, mapped to the code of the plain form.
SAME_CONCEPT = {
    "1F46B": "1F9D1-1F91D-1F9D1", "1F46C": "1F9D1-1F91D-1F9D1", "1F46D": "1F9D1-1F91D-1F9D1",  # holding hands
    "1F9D1-2764-1F48B-1F9D1": "1F48F", "1F9D1-2764-1F9D1": "1F491",  # kiss, couple with heart
    "1F9D1-1F430-1F9D1": "1F46F", "1FAF1-1FAF2": "1F91D",  # people with bunny ears, handshake
}  # fmt: skip
# Names in fxemoji, the oldest set, that appear in no list of emoji names.
FXEMOJI_NAMES = {
    "asiaaustraliaglobe": "1F30F", "europeafricaglobe": "1F30D", "bunny": "1F430", "bunnyside": "1F407",
    "cellphone": "1F4F1", "chartdownwardstrend": "1F4C9", "chartupwardstrendyen": "1F4B9", "catside": "1F408",
    "construct": "1F6A7", "devilhorns": "1F608", "dogside": "1F415", "dragonhead": "1F432",
    "fallingleaf": "1F342", "fishcakeswirl": "1F365", "fistedhand": "270A", "floppydisk2": "1F4BE",
    "foxcrying": "1F63F", "frontfacingchick": "1F425", "frownmouth": "2639", "grinsweat": "1F605",
    "grintears": "1F602", "hampster": "1F439", "heartgreen": "1F49A", "heartyellow": "1F49B",
    "heavyexclaimationmarksymbol": "2757", "heavylatincross": "271D", "loudlycrying": "1F62D",
    "manltepiececlock": "1F570", "monkeyhear": "1F649", "mouseside": "1F401", "nogesture": "1F645",
    "okgesture": "1F646", "pigside": "1F416", "pigsnout": "1F43D", "rightmagnifyingglass": "1F50E",
    "rightspeaker": "1F508", "smiletongue": "1F61B", "tennisball": "1F3BE", "tigerside": "1F405",
    "toykotower": "1F5FC", "turnedokhand": "1F44C", "videocasette": "1F4FC", "whitestar": "2B50",
    "whitesun": "2600", "winking": "1F609", "eightspokedasterix": "2733",
}  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
SHAPES = ("heart", "circle", "square", "book", "apple", "diamond")


@dataclass
class Emoji:
    """One emoji character: its names and how it is classified."""

    hexcode: str
    concept: str
    name: str  # in words, including tone and gender: "woman firefighter, dark skin tone"
    tags: list[str]
    group: str
    subgroup: str
    tones: tuple[int, ...] = ()
    gender: str = "person"  # or "woman", "man"


def normalise_hexcode(hexcode: str) -> str:
    """Upper case, without variation selectors and joiners: "1f469-200d-1f692" -> "1F469-1F692"."""
    return "-".join(point for point in hexcode.upper().split("-") if point not in INVISIBLE)


def concept_of(hexcode: str) -> str:
    """The hexcode without skin tone and gender."""
    points = [p for p in normalise_hexcode(hexcode).split("-") if p not in TONES | GENDER_SIGNS]
    concept = "-".join(GENDERLESS.get(p, p) for p in points)
    return SAME_CONCEPT.get(concept, concept)


def gender_of(hexcode: str) -> str:
    """ "woman", "man" or, if the character does not specify a gender, "person"."""
    points = set(hexcode.split("-"))
    if points & {"2640", "1F469", "1F467", "1F475"}:
        return "woman"
    return "man" if points & {"2642", "1F468", "1F466", "1F474"} else "person"


def slug(name: str) -> str:
    """A label in the form of an icon name: "Woman’s hat" -> "womans-hat"."""
    plain = name.lower().translate(str.maketrans("ñéô", "neo", "’'"))
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def install_packages(npm_dir: Path) -> Path:
    """Fetch the art and the names once, through npm; return the node_modules folder.

    Raises:
        RuntimeError: npm is not installed, or could not fetch a package.
    """
    modules = npm_dir / "node_modules"
    if all((modules / package / "package.json").exists() for package in PACKAGE_VERSIONS):
        return modules
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is not on this machine. Install Node.js (https://nodejs.org), which has it.")
    npm_dir.mkdir(parents=True, exist_ok=True)
    packages = [f"{name}@{version}" for name, version in PACKAGE_VERSIONS.items()]
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(npm_dir)]
    command = [npm, "install", *options, *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"npm could not fetch the art: {done.stderr.strip().splitlines()[-1:]}")
    return modules


def read_emoji(emojibase: Path) -> dict[str, Emoji]:
    """All emoji in emojibase-data, including skin tones, by normalised hexcode."""
    meta = read_json(emojibase / "meta" / "groups.json")
    emoji: dict[str, Emoji] = {}
    for entry in read_json(emojibase / "en" / "data.json"):
        group = meta["groups"].get(str(entry.get("group")), "symbols")
        subgroup = meta["subgroups"].get(str(entry.get("subgroup")), "alphanum")
        for item in [entry, *entry.get("skins", [])]:
            hexcode = normalise_hexcode(item["hexcode"])
            tone, tags = item.get("tone", ()), entry.get("tags", [])
            tones = tuple(tone) if isinstance(tone, list | tuple) else (tone,)
            concept = concept_of(entry["hexcode"])  # the skins of an entry belong to its concept
            words, gender = name_in_words(item["label"]), gender_of(hexcode)
            emoji[hexcode] = Emoji(hexcode, concept, words, tags, group, subgroup, tones, gender)
    return emoji


def name_in_words(label: str) -> str:
    """Emojibase's label as a person would write it: "flag: Peru" -> "flag of peru"."""
    name = label.lower().replace("’", "'")
    name = re.sub(r"^(flag): (.*)$", r"\1 of \2", name)
    name = re.sub(r"^regional indicator:? (.*)$", r"letter \1", name)
    name = re.sub(r"^keycap: (.*)$", r"keycap \1", name)
    return name.replace(": ", ", ").replace("“", "").replace("”", "")


def names_to_hexcodes(modules: Path, emoji: dict[str, Emoji]) -> dict[str, str]:
    """Each spelling of an emoji's name that a package may use -> its hexcode, by the most reliable source."""
    known: dict[str, str] = {}

    def add(name: str, hexcode: str) -> None:
        hexcode = normalise_hexcode(hexcode)
        if hexcode in emoji:
            for spelling in (slug(name), slug(name).replace("-", "")):
                known.setdefault(spelling, hexcode)

    for item in read_json(modules / "emojibase-data" / "en" / "data.json"):
        for entry in [item, *item.get("skins", [])]:
            add(entry["label"], entry["hexcode"])
            if entry["label"].startswith("flag: "):
                for prefix in ("flag for ", "flag for flag "):
                    add(prefix + entry["label"].removeprefix("flag: "), entry["hexcode"])
    for package in STYLES:
        chars = read_json(modules / "@iconify-json" / package / "chars.json")
        icons = read_json(modules / "@iconify-json" / package / "icons.json")
        by_name = {name: code for code, name in chars.items()}
        for name, code in by_name.items():
            add(name, code)
        for name, alias in icons.get("aliases", {}).items():
            if alias["parent"] in by_name and not {"hFlip", "vFlip", "rotate"} & alias.keys():
                add(name, by_name[alias["parent"]])
    for code, name in read_json(modules / "emojibase-data" / "meta" / "unicode-names.json").items():
        add(name, code)
    for codes in sorted((modules / "emojibase-data" / "en" / "shortcodes").glob("*.json")):
        for code, names in read_json(codes).items():
            for name in [names] if isinstance(names, str) else names:
                add(name, code)
    clocks = {f"clock{hour}oclock": f"1F5{0x4F + hour:02X}" for hour in range(1, 13)}
    clocks |= {f"clock{hour}thirty": f"1F5{0x5B + hour:02X}" for hour in range(1, 13)}
    for name, code in (clocks | FXEMOJI_NAMES).items():
        add(name, code)
    return known


def iter_icons(
    modules: Path, package: str, emoji: dict[str, Emoji], names: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """(hexcode, svg) for each emoji in one package, once each, in the package's order."""
    folder = modules / "@iconify-json" / package
    icons = read_json(folder / "icons.json")
    # Both Fluent sets share their names, but only the flat one lists the characters.
    named = folder.with_name("fluent-emoji-flat") if package == "fluent-emoji" else folder
    chars = read_json(named / "chars.json")
    by_name = {name: normalise_hexcode(code) for code, name in chars.items()}
    seen: set[str] = set()
    for name in [*icons["icons"], *icons.get("aliases", {})]:
        alias = icons.get("aliases", {}).get(name, {})
        hexcode = by_name.get(name) or names.get(slug(name)) or names.get(slug(name).replace("-", ""))
        if hexcode not in emoji or hexcode in seen or (alias and not alias.get("hFlip")):
            continue
        seen.add(hexcode)
        icon = icons["icons"][alias.get("parent", name)]
        left, top, body = icon.get("left", 0), icon.get("top", 0), icon["body"]
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        if alias.get("hFlip"):
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        yield hexcode, f'<svg {spaces} viewBox="{left} {top} {width} {height}">{body}</svg>'


def with_article(name: str) -> str:
    spoken_with_a = name.startswith(("one", "uni", "use", "eu"))  # these start with a consonant sound
    return f"{'an' if name[0] in 'aeiou' and not spoken_with_a else 'a'} {name}"


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def telling_tags(emoji: dict[str, Emoji]) -> set[str]:
    """Tags that can stand for an emoji by themselves, as "puppy" does for dog face.

    These are the tags that fewer than 40 concepts share and whose words occur in no emoji's name: "cat" is a
    tag of tiger, but someone who writes "cat" means the cat.
    """
    concepts = {item.concept: item for item in emoji.values() if not any(item.tones)}
    in_names = set().union(*(words_of(item.name) for item in concepts.values()))
    counts = Counter(tag for item in concepts.values() for tag in item.tags)
    few = {tag for tag, n in counts.items() if n < 40 and len(tag) > 1 and words_of(tag)}
    return {tag for tag in few if not words_of(tag) & in_names}


def caption_variants(item: Emoji, style: str, telling: set[str]) -> list[str]:
    """Captions of one picture; the first is the canonical one, such as "red heart, noto style". Pictures with
    a skin tone take no tags: there are many of them
    already, and the words that tell them apart are tone and gender."""
    one = with_article(item.name)
    captions = [f"{item.name}, {style} style", item.name, one, f"{one} in {style} style"]
    if not any(item.tones):
        own = [tag.lower() for tag in item.tags if tag in telling][:4]
        for tag in own:
            captions += [f"{tag}, {style} style", with_article(tag)]
        if len(own) > 1:
            captions.append(f"{item.name}, {own[0]}, {own[1]}, {style} style")
    return list(dict.fromkeys(captions))


def unit_hash(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{text}".encode()).digest()[:8], "big") / 2**64


def heldout_compositions(emoji: dict[str, Emoji]) -> dict[str, list[str]]:
    """Rule -> the hexcodes that it keeps out of training, although training sees each of their parts in other
    combinations.

    colour x shape: the concepts "<colour> <shape>" where (colour index + shape index) mod 4 is 2;
    animal x expression: every fourth of the cat faces in alphabetical order;
    profession x gender x tone: for each profession, one (gender, tone) pair, picked by the profession's hash.
    """
    coloured, people = [], []
    plain = {code: item for code, item in emoji.items() if not any(item.tones)}
    for code, item in plain.items():
        *_, colour, shape = ["", *item.name.split()]
        if colour in COLOURS and shape in SHAPES and (COLOURS.index(colour) + SHAPES.index(shape)) % 4 == 2:
            coloured.append(code)
    cats = sorted((item.name, code) for code, item in plain.items() if item.subgroup == "cat-face")
    roles: dict[str, list[Emoji]] = defaultdict(list)
    for item in emoji.values():
        if item.subgroup == "person-role" and len(item.tones) == 1:
            roles[item.concept].append(item)
    for concept, members in roles.items():
        pairs = sorted({(m.gender, m.tones[0]) for m in members})
        if len({gender for gender, _ in pairs}) > 1:
            pick = pairs[int(unit_hash(concept, "composition") * len(pairs))]
            people += [m.hexcode for m in members if (m.gender, m.tones[0]) == pick]
    faces = [code for _, code in cats[3::4]]
    rules = {"colour x shape": coloured, "animal x expression": faces, "profession x gender x tone": people}
    return {rule: sorted(codes) for rule, codes in rules.items()}


def validation_concepts(emoji: dict[str, Emoji], heldout: set[str], fraction: float) -> list[str]:
    """Concepts that training does not see, chosen by hash. Flags, letters and keycaps stay in training, since
    nothing in the name of an unseen one says what it looks like. The parts that held-out compositions need
    stay as well."""
    items = emoji.values()
    drawable = (i for i in items if i.group != "flags" and i.subgroup not in ("keycap", "alphanum"))
    needed = {emoji[code].concept for code in heldout}
    needed |= {i.concept for i in items if i.name.split()[-1] in SHAPES or i.subgroup == "cat-face"}
    unseen = {i.concept for i in drawable if unit_hash(i.concept, "validation") < fraction}
    return sorted(unseen - needed)
