"""Words never seen: WordNet's files, the lists by rule, the figures by hand."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_wordnet import FREQUENCY, write_npm, write_wordnet

from training.data import words
from training.data.emoji import unit_hash
from training.data.words import (
    UnseenWord,
    WordNet,
    emoji_tags,
    read_wordnet,
    split_words,
    unseen_words,
)
from training.evaluation.judge import Concepts
from training.evaluation.words import word_ranks


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WordNet:
    monkeypatch.setattr(words, "zipf_frequency", lambda text: FREQUENCY.get(text, 3.0))
    return read_wordnet(write_wordnet(tmp_path))


def test_wordnet_is_read_as_its_manual_page_says(wordnet: WordNet) -> None:
    assert wordnet.synsets[300].words == ["dog", "domestic dog", "canis familiaris"]
    assert wordnet.synsets[300].hypernyms == [200]
    assert wordnet.synsets[200].gloss == "what can be touched"  # no example
    assert wordnet.synsets[300].gloss == "of the genus canis"  # no aside, no second definition
    assert wordnet.senses["car"] == [400, 410] and wordnet.senses["dog"] == [300]
    assert {"sad", "sadly", "run", "railway car"} <= wordnet.words
    assert wordnet.synsets[330].instance and not wordnet.synsets[310].instance
    assert wordnet.kinds_of("dog") == {300, 310, 320, 330}


def test_nouns_are_found_in_the_plural(wordnet: WordNet) -> None:
    assert [wordnet.noun(text) for text in ("dogs", "taxis", "geese", "dog")] == [
        "dog",
        "taxi",
        "goose",
        "dog",
    ]
    assert wordnet.noun("unheard") is None
    assert wordnet.synonyms("cars") == ["car", "auto", "automobile", "motorcar"]  # the first sense alone
    assert wordnet.synonyms("unheard") == []


def test_a_missing_wordnet_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wordnet_dir: there is no data\.noun in .*wordnet-base"):
        read_wordnet(tmp_path)


def test_a_missing_wordfreq_names_the_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(ValueError, match=r"training/requirements-words\.txt"):
        words.zipf_frequency("dog")


def test_unseen_words_are_synonyms_and_kinds_that_no_caption_holds(wordnet: WordNet) -> None:
    names = {"D": {"dog", "dog face"}, "C": {"cars"}, "R": {"red car"}, "G": {"goose"}}
    seen = ["a goose", "dog, noto style", "cars", "a big AUTOS salon", "poodle", "taxi-rank"]
    seen += ["domestic cat and dog"]
    found = {word.text: (word.concepts, word.kind) for word in unseen_words(names, seen, wordnet)}
    # Not "dog", "auto" (its plural is seen), "taxi", "poodle"; not "canis familiaris", "motorcar" (too rare);
    # not "toto" (one dog), "coach" (first of all a trainer); "domestic dog" is nowhere in one piece; and of
    # the kinds "corgi", "poodle dog", "welsh corgi" the two whose hashes come first.
    assert found == {
        "automobile": ({"C"}, False),
        "domestic dog": ({"D"}, False),
        "cab": ({"C"}, True),
        "limo": ({"C"}, True),
        "corgi": ({"D"}, True),
        "poodle dog": ({"D"}, True),
    }
    assert unit_hash("welsh corgi", "kind") > max(unit_hash(w, "kind") for w in ("corgi", "poodle dog"))


def test_a_word_of_two_concepts_belongs_to_both(wordnet: WordNet) -> None:
    found = {w.text: w.concepts for w in unseen_words({"A": {"car"}, "B": {"motorcar"}}, ["car"], wordnet)}
    assert found["automobile"] == {"A", "B"}


def test_the_lists_are_a_rule_of_the_words_alone() -> None:
    synonyms = [UnseenWord(f"word{i}", {"A"}, kind=False) for i in range(500)]
    kinds = [UnseenWord(f"kind{i}", {"A"}, kind=True) for i in range(400)]
    taught, kept_out = split_words(synonyms + kinds)
    assert len(kept_out) == 300 and not any(word.kind for word in taught)
    kept = {word.text for word in kept_out if not word.kind}
    assert kept == {w.text for w in synonyms if unit_hash(w.text, "kept out") < 0.2}
    assert {word.text for word in taught} | kept == {word.text for word in synonyms}
    again = split_words((synonyms + kinds)[::-1])
    assert [w.text for w in again[1]] == [w.text for w in kept_out]
    fewer = split_words(synonyms[:250] + kinds)  # other words do not move a word from list to list
    assert {w.text for w in fewer[0]} == {w.text for w in taught} & {w.text for w in synonyms[:250]}


def test_tags_and_names_come_from_emojibase(tmp_path: Path) -> None:
    assert emoji_tags(str(write_npm(tmp_path))) == {"dog face", "Puppy", "pet"}


def test_a_word_ranks_as_the_best_of_its_concepts() -> None:
    class Compass:
        def embed_texts(self, texts: list[str]) -> torch.Tensor:
            angles = torch.tensor([{"east": 0.0, "north": 90.0, "south-west": 225.0}[t] for t in texts])
            return torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], dim=1)

    angles = torch.tensor([10.0, 80.0, 170.0]).deg2rad()
    concepts = Concepts(["A", "B", "C"], torch.arange(3), torch.stack([angles.cos(), angles.sin()], 1))
    listed = [
        UnseenWord("east", {"A"}, False),  # A, B, C
        UnseenWord("east", {"B"}, False),
        UnseenWord("south-west", {"A", "B"}, False),  # C at 55 degrees, A at 145, B at 145
        UnseenWord("north", {"A", "C"}, False),  # B at 10, A and C at 80: a tie, which counts against
    ]
    assert word_ranks(Compass(), concepts, listed[:2]).tolist() == [0, 1]
    assert word_ranks(Compass(), concepts, listed[2:3]).tolist() in ([1], [2])
    listed[3].concepts = {"B", "C"}
    assert word_ranks(Compass(), concepts, listed[3:]).tolist() == [0]
