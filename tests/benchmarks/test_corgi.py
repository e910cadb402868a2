"""The thirty pictures to fine-tune on: what they show, that training reads them, what prompts ask beyond."""

import itertools

import numpy as np
import pytest
from PIL import ImageColor

from benchmarks.corgi import COATS, THINGS, draw_corgi, write_pictures
from benchmarks.fine_tuning import NEW
from training.data.pictures import load_pictures


def test_thirty_pictures_that_training_reads(tmp_path):
    captions = write_pictures(tmp_path / "pictures")
    assert len(captions) == len(set(captions)) == 30
    assert not set(captions) & set(NEW)
    for words in (*COATS, *filter(None, THINGS), "asleep", "standing", "left", "right"):
        assert 5 <= sum(words in caption for caption in captions) <= 16, words
    rows = load_pictures(str(tmp_path / "pictures"), cache_dir=str(tmp_path / "cache"))
    assert sorted(rows["text"]) == sorted(captions)
    pictures = [np.asarray(image) for image in rows["image"]]
    for first, second in itertools.combinations(pictures, 2):
        assert (first != second).any(axis=-1).mean() > 0.002


@pytest.mark.parametrize("coat", COATS)
def test_coat_side_and_what_it_wears(coat):
    plain = np.asarray(draw_corgi(coat, "", False, False))
    assert tuple(plain[int(0.6 * 256), int(0.75 * 256)]) == ImageColor.getrgb(COATS[coat])  # its back
    assert (plain[:20, -20:] == 255).all()
    mirrored = np.asarray(draw_corgi(coat, "", False, True))
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    for thing, colour in (("a red collar", "#d7263d"), ("a blue scarf", "#2f6fde"), ("a crown", "#f5c518")):
        worn = (np.asarray(draw_corgi(coat, thing, False, False)) == ImageColor.getrgb(colour)).all(axis=-1)
        assert worn.sum() > 300 > (plain == ImageColor.getrgb(colour)).all(axis=-1).sum()
