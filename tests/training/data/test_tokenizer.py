"""The tokenizer against open_clip's own, which is OpenAI's original code."""

import pytest
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from training.data.tokenizer import NUM_CLIP_MERGES, build_clip_tokenizer

SENTENCES = [
    "a corgi in a party hat",
    "",
    "It's 2024! WOW, naïve café — 北京 🎉🤖 they're don't we'll I'd 'S",
    "grinning face: smile_cat 3.14 (b) #1 <tag> & co... ?!",
    "x" * 60,
    "a\n b\t c   d",
    "🏳️‍🌈 family 👩‍👩‍👧 🇯🇵 ½ é ß İ",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "привет мир, γειά σου κόσμε, สวัสดี",
]


@pytest.fixture(scope="module")
def reference() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def small() -> CLIPTokenizer:
    return build_clip_tokenizer(1000, model_max_length=32)


def test_all_merges_give_open_clip_ids(reference):
    tokenizer = build_clip_tokenizer(NUM_CLIP_MERGES)
    assert len(tokenizer) == reference.vocab_size == 49408
    for text in SENTENCES:
        expected = [reference.sot_token_id, *reference.encode(text), reference.eot_token_id]
        assert tokenizer(text).input_ids == expected, text


def test_padding_and_cutting_match_open_clip_up_to_the_pad_token(reference):
    tokenizer = build_clip_tokenizer(NUM_CLIP_MERGES)
    ids = tokenizer(
        [*SENTENCES, "long " * 99], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    expected = reference([*SENTENCES, "long " * 99])
    expected[expected == 0] = (
        reference.eot_token_id
    )  # open_clip pads with 0, CLIP's Hub tokenizer with the end
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("num_merges", [0, 1000, 8192])
def test_fewer_merges_keep_the_text_and_the_layout_of_ids(num_merges, reference):
    tokenizer = build_clip_tokenizer(num_merges)
    assert len(tokenizer) == num_merges + 514
    assert tokenizer.bos_token_id == num_merges + 512
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == num_merges + 513
    for text in SENTENCES:
        pieces = reference.pat.findall(reference.clean_fn(text))  # words, digits, runs of signs
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(pieces)
        assert max(ids[1:-1], default=0) < tokenizer.bos_token_id


def test_shared_ids_do_not_depend_on_the_number_of_merges(small, reference):
    for token in ("a", "a</w>", "the</w>", "!", "Ġ", "Ģ</w>"):
        assert small.get_vocab()[token] == reference.encoder[token]


def test_round_trip_through_a_folder(small, tmp_path):
    small.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 32
    for text in [*SENTENCES, "long " * 99]:
        options = {"padding": "max_length", "truncation": True}
        assert loaded(text, **options).input_ids == small(text, **options).input_ids
        assert loaded.decode(loaded(text).input_ids) == small.decode(small(text).input_ids)


@pytest.mark.parametrize("num_merges, length", [(-1, 77), (NUM_CLIP_MERGES + 1, 77), (100, 2)])
def test_impossible_settings_are_refused(num_merges, length):
    with pytest.raises(ValueError, match="must"):
        build_clip_tokenizer(num_merges, length)
