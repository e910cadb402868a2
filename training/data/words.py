"""Words that no caption contains: WordNet, word frequencies, and the lists made from both.

WordNet (Miller 1995) records which words are synonyms and what each word means.
`training.objectives.distillation` teaches its words and definitions to the text tower; `training.evaluate
words` tests its synonyms of the concepts' names.

WordNet's files come with Debian's and Ubuntu's package wordnet-base, wordfreq from PyPI
(training/requirements-words.txt). Drawing pictures needs neither.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from training.data.emoji import STYLES, install_packages, read_emoji, unit_hash
from training.data.pictures import load_pictures

# How a concept's name appears in captions: a judge embeds a name as its mean over these
TEMPLATES = ("{}", "a {}", *(f"{{}}, {style} style" for style in list(STYLES.values())[:6]))
WORDNET_DIR = "/usr/share/wordnet"
SPLITS = ("train", "validation", "heldout_compositions")
MINIMUM_ZIPF = 2.5  # once in three million words, like "popsicle"
KINDS_EACH = 2  # for each concept; otherwise most of them would be kinds of people
KEPT_OUT = 300  # words that no distillation text may contain
KEPT_OUT_SHARE = 0.2  # of the synonyms, so that 300 are left to teach; the rest of KEPT_OUT are kinds


# ------------------------------------------------------------ WordNet


@dataclass
class Synset:
    """One meaning: its words, what it means, and the synsets it is a kind of."""

    words: list[str]
    gloss: str  # the definition, without examples
    hypernyms: list[int]
    instance: bool = False  # a particular person or place, such as "alan shepard"


@dataclass
class WordNet:
    """WordNet's nouns by meaning, and its words of every part of speech."""

    synsets: dict[int, Synset]  # nouns
    senses: dict[str, list[int]]  # noun -> its meanings, the most frequent first
    words: set[str]
    irregular: dict[str, str] = field(default_factory=dict)  # plural -> singular

    def noun(self, text: str) -> str | None:
        """The text as a singular noun in WordNet, by its rules of detachment; None if it is not a noun."""
        if text in self.senses:
            return text
        regular = [text.removesuffix(end) + one for end, one in _ENDINGS if text.endswith(end)]
        candidates = [self.irregular.get(text, ""), *regular]
        return next((noun for noun in candidates if noun in self.senses), None)

    def synonyms(self, text: str) -> list[str]:
        """The words of the first noun sense of a text; none if it is not a noun in WordNet."""
        noun = self.noun(text)
        return [] if noun is None else self.synsets[self.senses[noun][0]].words

    @cached_property
    def hyponyms(self) -> dict[int, list[int]]:
        """Synset -> the synsets that are a kind of it."""
        below: dict[int, list[int]] = defaultdict(list)
        for key, synset in self.synsets.items():
            for parent in synset.hypernyms:
                below[parent].append(key)
        return below

    def own_words(self, key: int) -> list[str]:
        """The words whose first sense is this synset; none for a particular person or place. The first sense
        matters: to most people, a "shepherd" is not a dog."""
        synset = self.synsets[key]
        return [w for w in synset.words if not synset.instance and self.senses.get(w, [None])[0] == key]

    def concepts_by_sense(self, names: dict[str, set[str]], ending: str = "") -> dict[int, set[str]]:
        """First sense -> the concepts that have a name with that sense. A name that is not a noun is tried
        again without `ending`."""
        found: dict[int, set[str]] = defaultdict(set)
        for concept, own in names.items():
            for name in own:
                noun = self.noun(name) or self.noun(name.removesuffix(ending))
                if noun is not None:
                    found[self.senses[noun][0]].add(concept)
        return found

    def kinds_of(self, ancestor: str) -> set[int]:
        """The first sense of `ancestor` and all synsets below it."""
        found, stack = set(), [self.senses[ancestor][0]]
        while stack:
            key = stack.pop()
            if key not in found:
                found.add(key)
                stack += self.hyponyms[key]
        return found


_ENDINGS = (  # morphy(7WN)
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
    ("ies", "y"),
)  # fmt: skip


def read_wordnet(folder: str | Path = WORDNET_DIR) -> WordNet:
    """Parse WordNet's own files (wndb(5WN)) in a folder.

    Raises:
        ValueError: a file is missing; the message names the package that provides it.
    """
    folder = Path(folder)
    names = ("data.noun", "noun.exc", *(f"index.{part}" for part in ("noun", "verb", "adj", "adv")))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(
                f"wordnet_dir: there is no {name} in {str(folder)!r}; Debian's package wordnet-base puts "
                f"WordNet's files in {WORDNET_DIR}"
            )

    def lines(name: str) -> Iterable[str]:
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):  # the licence
                yield line

    synsets = {}
    for line in lines("data.noun"):
        record, _, gloss = line.partition(" | ")
        columns = record.split()
        count = int(columns[3], 16)
        words = [columns[4 + 2 * i].replace("_", " ").lower() for i in range(count)]
        pointers = columns[5 + 2 * count :]
        hypernyms = [int(pointers[i + 1]) for i in range(0, len(pointers), 4) if pointers[i] in ("@", "@i")]
        definition = re.sub(r"\([^)]*\)", " ", gloss.partition('"')[0]).partition(";")[0]
        definition = " ".join(definition.lower().split())
        synsets[int(columns[0])] = Synset(words, definition, hypernyms, "@i" in pointers[::4])
    senses: dict[str, list[int]] = {}
    words_of_all: set[str] = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in lines(f"index.{part}"):
            columns = line.split()
            word = columns[0].replace("_", " ")
            words_of_all.add(word)
            if part == "noun":
                senses[word] = [int(offset) for offset in columns[-int(columns[2]) :]]
    irregular = dict(line.split()[:2] for line in lines("noun.exc"))
    return WordNet(synsets, senses, words_of_all, irregular)


def zipf_frequency(text: str) -> float:
    """log10 of how often the text occurs in a billion words of English (wordfreq; Speer 2022).

    Raises:
        ValueError: wordfreq is not installed.
    """
    try:
        from wordfreq import zipf_frequency as frequency
    except ImportError as error:
        missing = "wordfreq is not installed: pip install -r training/requirements-words.txt"
        raise ValueError(missing) from error
    return float(frequency(text, "en"))


# ------------------------------------------------------------ words that no caption holds


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


class Phrases:
    """The runs of whole words that occur in some texts: `text in phrases` looks one up."""

    def __init__(self, texts: Iterable[str], longest: int = 6):
        self.runs: set[tuple[str, ...]] = set()
        for text in texts:
            words = tokens(text)
            for start in range(len(words)):
                self.runs |= {tuple(words[start : start + 1 + more]) for more in range(longest)}

    def __contains__(self, text: str) -> bool:
        return tuple(tokens(text)) in self.runs


@dataclass
class UnseenWord:
    """A word that no caption or tag contains, and the concepts that it stands for."""

    text: str
    concepts: set[str]
    kind: bool  # True for a kind of the concept ("corgi" for dog), False for a synonym ("automobile" for car)


def concept_names(dataset: str) -> tuple[dict[str, set[str]], set[str]]:
    """(every name of each concept, every caption), from all splits."""
    names: dict[str, set[str]] = defaultdict(set)
    captions: set[str] = set()
    for split in SPLITS:
        data = load_pictures(dataset, split)
        listed = data["captions"] if "captions" in data.column_names else [[c] for c in data["caption"]]
        for concept, name, texts in zip(data["concept"], data["name"], listed, strict=True):
            names[concept].add(name)
            captions.update(texts)
    return dict(names), captions


def emoji_tags(npm_dir: str) -> set[str]:
    """The names and tags of every emoji, whether or not captions use them."""
    modules = install_packages(Path(npm_dir))
    emoji = read_emoji(modules / "emojibase-data").values()
    return {tag for item in emoji for tag in item.tags} | {item.name for item in emoji}


def unseen_words(names: dict[str, set[str]], seen: Iterable[str], wordnet: WordNet) -> list[UnseenWord]:
    """Unseen words for the names that are nouns in WordNet, in alphabetical order and without repeats.

    For the first sense of each name these are all synonyms and two words for direct kinds of it (hyponyms),
    chosen by hash. No text of `seen` contains the word as a run of whole words, in the singular or the
    plural, and its Zipf frequency is at least 2.5.
    """
    phrases = Phrases(seen)

    def is_unseen(word: str) -> bool:
        forms = {word, wordnet.noun(word) or word, *(word + ending for ending in ("s", "es"))}
        unseen = bool(tokens(word)) and not any(form in phrases for form in forms)
        return unseen and zipf_frequency(word) >= MINIMUM_ZIPF

    concepts_of = wordnet.concepts_by_sense(names)
    found: dict[str, UnseenWord] = {}
    for sense, concepts in concepts_of.items():
        for word in filter(is_unseen, wordnet.synsets[sense].words):
            found.setdefault(word, UnseenWord(word, set(), kind=False)).concepts.update(concepts)
    synonyms = set(found)
    for sense, concepts in concepts_of.items():
        kinds = {word for key in wordnet.hyponyms[sense] for word in wordnet.own_words(key)} - synonyms
        for word in sorted(filter(is_unseen, kinds), key=lambda text: unit_hash(text, "kind"))[:KINDS_EACH]:
            found.setdefault(word, UnseenWord(word, set(), kind=True)).concepts.update(concepts)
    return [found[text] for text in sorted(found)]


def split_words(words: list[UnseenWord]) -> tuple[list[UnseenWord], list[UnseenWord]]:
    """(taught words, kept-out words). The synonyms whose hash falls in the first fifth are kept out, followed
    by kinds in the order of their hash, until there are 300. The other synonyms are taught."""
    order = sorted(words, key=lambda word: (word.kind, unit_hash(word.text, "kept out")))
    synonyms = [word for word in order if not word.kind]
    few = sum(unit_hash(word.text, "kept out") < KEPT_OUT_SHARE for word in synonyms)
    return synonyms[few:], (synonyms[:few] + order[len(synonyms) :])[: max(few, KEPT_OUT)]


def word_lists(
    dataset: str, npm_dir: str, wordnet: WordNet
) -> tuple[list[UnseenWord], list[UnseenWord], dict[str, set[str]]]:
    """(taught words, kept-out words, the names of each concept) of the data set."""
    names, captions = concept_names(dataset)
    words = unseen_words(names, captions | emoji_tags(npm_dir), wordnet)
    return (*split_words(words), names)
