"""Streams: what order rows come in, that a resumed one goes on in it, and that processes share it."""

import io
import itertools
import json
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT
from tars import write_tars

from training.data.pictures import PictureCache, cache_pictures, load_pictures, to_pixels
from training.data.streaming import PictureStream

EMOJI64 = ROOT / "tests" / "data" / "emoji64"


@pytest.fixture
def tars(tmp_path) -> str:
    """Twenty-two pictures in four tars: 0-5, 6-11, 12-17, 18-21."""
    return str(write_tars(tmp_path / "tars", [range(6), range(6, 12), range(12, 18), range(18, 22)]))


def stream(
    source: str, batch_size: int = 4, seed: int = 0, rank: int = 0, world: int = 1, **options
) -> PictureStream:
    data = load_pictures(source, streaming=True)
    return PictureStream(
        data, batch_size, seed, rank, world, **({"resolution": 4, "buffer_size": 5} | options)
    )


def numbers(batch: PictureCache) -> list[int]:
    """Which pictures these are, by their pixels, having checked that their captions are theirs."""
    found = ((batch.images(list(range(len(batch))))[:, 0, 0, 0] + 1) * 12.75).round().int().tolist()
    assert [[batch.captions[c] for c in own] for own in batch.choices] == [[f"picture {i}"] for i in found]
    return found


def take(made: PictureStream, count: int) -> list[list[int]]:
    return [numbers(batch) for batch in itertools.islice(made, count)]


def test_every_epoch_has_every_picture_once_in_an_order_of_its_own(tars):
    drawn = sum(take(stream(tars, 4), 17), [])
    epochs = [tuple(drawn[at : at + 22]) for at in (0, 22, 44)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs) and len(set(epochs)) == 3
    assert sum(take(stream(tars, 4), 17), []) == drawn
    assert sum(take(stream(tars, 4, seed=1), 17), []) != drawn


def test_what_shuffling_means(tars, tmp_path):
    """Files in random order and in turn; rows out of a buffer, so that none comes much before its place."""
    firsts = {
        tuple(i // 6 for i in sum(take(stream(tars, 4, seed, buffer_size=1), 1), [])) for seed in range(9)
    }
    assert all(sorted(files) == [0, 1, 2, 3] for files in firsts) and len(firsts) > 1
    single = str(write_tars(tmp_path / "single", [range(22)]))
    assert sum(take(stream(single, 1, buffer_size=1), 22), []) == list(range(22))
    for seed in range(5):
        drawn = sum(take(stream(single, 1, seed, buffer_size=5), 22), [])
        assert drawn != list(range(22)) and all(number <= at + 5 for at, number in enumerate(drawn))


def test_a_resumed_stream_goes_on_where_it_stopped(tars):
    """Within an epoch, and across its end."""
    whole = take(stream(tars), 14)
    for stop in (0, 3, 5, 6, 11):
        first = stream(tars)
        assert take(first, stop) == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        second = stream(tars)
        second.load_state_dict(state)
        assert take(second, 14 - stop) == whole[stop:]


def test_two_processes_make_up_the_global_batch(tars):
    one = take(stream(tars, 6), 9)
    first, second = (take(stream(tars, 3, 0, rank, 2), 9) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == one


def test_streamed_pictures_are_those_that_a_cache_has(tars, tmp_path):
    data = load_pictures(tars, cache_dir=str(tmp_path / "arrow"))
    cache = cache_pictures(data, 8, tmp_path)
    head = stream(tars, resolution=8).head(7)
    assert torch.equal(head.images(list(range(7))), cache.images(list(range(7))))
    assert head.captions == cache.captions[:8] and len(head) == 7


def rows(*changes: dict) -> datasets.IterableDataset:
    """Four red pictures of 0, 10, 20 and 30 as rows, changed as said."""
    made = []
    for number in range(4):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (10 * number, 0, 0)).save(file, format="PNG")
        image = {"bytes": file.getvalue(), "path": f"{number}.png"}
        made.append(
            {"image": image, "caption": f"picture {number}"} | dict(enumerate(changes)).get(number, {})
        )
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_list(made, features=features).to_iterable_dataset()


BAD = [{}, {"caption": None}, {"image": {"bytes": b"none", "path": "2.png"}}]


def test_bad_rows_leave_their_place_to_others_of_the_batch(caplog):
    made = PictureStream(rows(*BAD), 4, resolution=4, buffer_size=1)
    batch = next(iter(made))
    counts = Counter(numbers(batch))
    assert counts == {0: 2, 3: 2}
    assert "2.png cannot be read" in caplog.text and "row 1 has no caption" in caplog.text
    with pytest.raises(ValueError, match="row 1 has no caption|2.png cannot be read"):
        next(iter(PictureStream(rows(*BAD), 4, resolution=4, strict=True)))
    nothing = [{"caption": None}] * 4
    with pytest.raises(ValueError, match="none of 4 pictures of the stream can be read"):
        next(iter(PictureStream(rows(*nothing), 4, resolution=4)))


def test_errors_of_streams(tmp_path):
    with pytest.raises(ValueError, match="has no column 'title'; it has image, caption"):
        next(iter(PictureStream(rows(), 2, resolution=4, caption_column="title")))
    with pytest.raises(ValueError, match="the data set is empty"):
        next(iter(PictureStream(rows().take(0), 2, resolution=4)))
    with pytest.raises(ValueError, match="the data set is empty"):
        PictureStream(rows().take(0), 2, resolution=4).head(3)


@pytest.mark.parametrize("kind", ["folder", "saved"])
def test_folders_and_saved_data_sets_are_streamed_too(kind, tmp_path):
    source = str(EMOJI64)
    if kind == "saved":
        load_pictures(source, cache_dir=str(tmp_path / "arrow")).save_to_disk(str(tmp_path / "saved"))
        source = str(tmp_path / "saved")
    made = PictureStream(load_pictures(source, streaming=True), 64, resolution=64, buffer_size=10)
    batch = next(iter(made))
    texts = [batch.captions[own[0]] for own in batch.choices]
    lines = [json.loads(line) for line in (EMOJI64 / "metadata.jsonl").read_text("utf-8").splitlines()]
    files = {line["text"]: line["file_name"] for line in lines}
    assert sorted(texts) == sorted(files)
    for number in range(0, 64, 9):
        expected = to_pixels(Image.open(EMOJI64 / files[texts[number]]), 64)
        np.testing.assert_array_equal(batch.pixels[number], expected)
