"""The emoji data set, pushed to the Hub and read back by name."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PICTURES = Path(__file__).parents[1] / "data/emoji64"

# saved with the columns and splits of `training.emoji`, then pushed as its users would
PUSH = """
import json
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk
texts = ("name", "concept", "hexcode", "style", "group", "subgroup", "licence")
features = Features({"image": Image(), "caption": Value("string"), "captions": List(Value("string"))}
                    | {key: Value("string") for key in texts})
rows = []
for row in map(json.loads, open(folder + "/metadata.jsonl")):
    picture = {"bytes": open(folder + "/" + row["file_name"], "rb").read(), "path": None}
    made = {"image": picture, "caption": row["text"], "captions": [row["text"], row["name"]]}
    rows.append(dict.fromkeys(texts, "") | {key: row[key] for key in texts if key in row} | made)
parts = {"train": rows[8:], "validation": rows[4:8], "heldout_compositions": rows[:4]}
data = {key: Dataset.from_list(part, features=features) for key, part in parts.items()}
DatasetDict(data).save_to_disk("emoji")
load_from_disk("emoji").push_to_hub("me/emoji", private=True)
"""
READ = """
from training.data.pictures import load_pictures
import hashlib, numpy
data = load_pictures("me/emoji", split)
pixels = [hashlib.sha256(numpy.asarray(row["image"].convert("RGB")).tobytes()).hexdigest() for row in data]
value = [len(data), list(data["caption"]), list(data["captions"]), pixels]
"""


def expected(split: slice) -> list:
    rows = [json.loads(line) for line in (PICTURES / "metadata.jsonl").read_text().splitlines()][split]
    pictures = [np.asarray(Image.open(PICTURES / row["file_name"]).convert("RGB")) for row in rows]
    captions = [row["text"] for row in rows]
    pairs = [[row["text"], row["name"]] for row in rows]
    return [len(rows), captions, pairs, [sha256(picture.tobytes()).hexdigest() for picture in pictures]]


def test_the_emoji_are_pushed_and_read_by_name(elsewhere, hub):
    elsewhere(PUSH, folder=str(PICTURES))
    files = hub.repositories["dataset", "me/emoji"].files()
    assert {
        "README.md",
        "data/train-00000-of-00001.parquet",
        "data/validation-00000-of-00001.parquet",
    } <= set(files)
    elsewhere.forget()
    for split, rows in (("train", slice(8, None)), ("validation", slice(4, 8))):
        assert elsewhere(READ, ours=True, split=split) == expected(rows)
    with pytest.raises(
        Exception, match="NoSuchSplit: .*has no split 'test'; it has train, validation, heldout_compositions"
    ):
        elsewhere(READ, ours=True, split="test")
    elsewhere.forget()
    with pytest.raises(Exception, match="ValueError: data set 'me/emoji'"):
        elsewhere(READ, ours=True, token=None, split="train")


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["truncate", pytest.param("500", marks=slow), pytest.param("drop", marks=slow)]
)
def test_a_data_set_whose_download_breaks_off_loads_the_next_time(elsewhere, hub, kind):
    elsewhere(PUSH, folder=str(PICTURES))
    elsewhere.forget()
    no_waiting = "import time; time.sleep = lambda seconds: None\n"
    hub.fail("GET", r"train-00000-of-00001\.parquet", kind, times=-1)
    with pytest.raises(Exception, match="ValueError: data set 'me/emoji': there is no such folder, and "):
        elsewhere(no_waiting + READ, ours=True, split="train")
    hub.repair()
    assert elsewhere(READ, ours=True, split="train") == expected(slice(8, None))
