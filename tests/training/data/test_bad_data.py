"""Pictures and captions that are not as they should be; what the caches of pictures, text, latents know."""

import copy
import io
import json
import zipfile
import zlib

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from disks import small_disk
from PIL import Image
from tars import write_tars
from tiny_pictures import FP16, GOOD, B, G, channels, tiny_dataset, write_folder

from pipelines.drawing.text import encode_text
from training.data.caches import cache_latents, cache_text, memory_map
from training.data.pictures import (
    PictureCache,
    cache_pictures,
    check_picture_folder,
    draw_row,
    load_pictures,
    open_picture,
    to_pixels,
)

# ------------------------------------------------------------ bad data


def test_one_bad_picture_is_named_and_left_out(tmp_path, caplog):
    """The rest keep their captions; the second time, from the cache, the same."""
    folder = tmp_path / "pictures"
    names = [f"{i}.png" for i in range(5)]
    write_folder(
        folder, *(json.dumps({"file_name": n, "text": f"text of {n}"}) for n in names), pictures=names
    )
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:45])  # ends early
    (folder / "3.png").write_text("<svg/>")  # is none
    data = load_pictures(str(folder), cache_dir=str(tmp_path / "arrow"))
    for _ in range(2):
        caplog.clear()
        cache = cache_pictures(data, 4, tmp_path / "cache")
        assert "2 of 5 pictures cannot be used" in caplog.text
        assert f"{folder}/1.png cannot be read" in caplog.text and f"{folder}/3.png" in caplog.text
        assert len(cache) == 3 and cache.columns == {"text": [f"text of {i}.png" for i in (0, 2, 4)]}
        assert [cache.captions[own[0]] for own in cache.choices] == cache.columns["text"]
        reds = (cache.images([0, 1, 2])[:, 0, 0, 0] + 1) * 127.5
        assert reds.round().tolist() == [0, 20, 40]  # as write_folder paints 0, 2 and 4
    for where in ("cache", "another"):
        with pytest.raises(ValueError, match="1.png cannot be read"):
            cache_pictures(data, 4, tmp_path / where, strict=True)
    for name in names:
        (folder / name).write_text("")
    data = load_pictures(str(folder), cache_dir=str(tmp_path / "arrow"))
    with pytest.raises(ValueError, match="no picture of the data set can be read: .*0.png cannot be read"):
        cache_pictures(data, 4, tmp_path / "cache")


def test_rows_without_a_caption_are_named_and_left_out(tmp_path, caplog):
    made = tiny_dataset(0, 3).remove_columns("caption").add_column("text", ["a", None, "c"])
    cache = cache_pictures(made, 8, tmp_path)
    assert "1 of 3 pictures cannot be used: picture 1 of the data set has no caption" in caplog.text
    assert cache.captions == ["", "a", "c"]
    assert (cache.images([0, 1])[:, 1, 0, 0] * 127.5 + 127.5).round().tolist() == [0, 2]
    with pytest.raises(ValueError, match="picture 1 of the data set has no caption"):
        cache_pictures(made, 8, tmp_path, strict=True)


def test_columns(tmp_path):
    """Captions in `caption`, in `text`, or where they are said to be; several to a picture too."""
    plain = tiny_dataset(0).remove_columns("caption")
    for name, asked in (("caption", None), ("text", None), ("prompt", "prompt")):
        cache = cache_pictures(plain.add_column(name, list("abc")), 8, tmp_path, caption_column=asked)
        assert cache.captions == ["", "a", "b", "c"]
    several = plain.add_column("text", [["a", "b"], ["c"], ["b"]])
    assert cache_pictures(several, 8, tmp_path).choices == [[1, 2], [3], [2]]
    numbers = plain.add_column("number", [1, 2, 3])
    for asked, message in (
        ({}, "the data set has no column 'caption'; it has image, number"),
        ({"caption_column": "text"}, "has no column 'text'"),
        ({"caption_column": "number"}, "caption_column 'number' holds int, not text"),
        ({"image_column": "number", "caption_column": "number"}, "its column holds int, not a picture"),
    ):
        with pytest.raises(ValueError, match=message):
            cache_pictures(numbers, 8, tmp_path, **asked)


def test_pictures_that_no_line_names(tmp_path, caplog):
    folder = write_folder(tmp_path / "pictures", GOOD)
    check_picture_folder(folder)
    assert f"{folder}: no line of the metadata names b.png; left out" in caplog.text
    with pytest.raises(ValueError, match="no line of the metadata names b.png"):
        check_picture_folder(folder, strict=True)


def test_folders_as_people_have_them(tmp_path):
    """`caption` for `text`; a column of one's own; metadata.csv; a folder for each split."""
    line = '{"file_name": "a.png", "caption": "a cat", "prompt": "b"}'
    folder = write_folder(tmp_path / "caption", line, pictures=("a.png",))
    check_picture_folder(folder)
    check_picture_folder(folder, "prompt")
    with pytest.raises(ValueError, match="line 1 has no 'title'"):
        check_picture_folder(folder, "title")
    splits = tmp_path / "splits"
    for split, text in (("train", "a cat"), ("validation", "a dog")):
        splits.mkdir(exist_ok=True)
        write_folder(splits / split, pictures=("a.png",))
        (splits / split / "metadata.csv").write_text(f"file_name,text\na.png,{text}\n")
    for split, text in (("train", "a cat"), ("validation", "a dog")):
        assert load_pictures(str(splits), split, cache_dir=str(tmp_path / "cache"))["text"][:] == [text]
    (splits / "train" / "metadata.csv").write_text("file_name,text\nc.png,x\n")
    with pytest.raises(ValueError, match="metadata.csv line 2 names c.png"):
        check_picture_folder(splits)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no metadata.jsonl; each line"):
        load_pictures(str(tmp_path / "empty"))
    (tmp_path / "empty" / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty has no pictures: its metadata are empty"):
        load_pictures(str(tmp_path / "empty"))


def test_a_single_pixel_and_four_hundred_million(tmp_path):
    """One grows to a flat square, the other shrinks; Pillow alone refuses it as a bomb."""
    blue = to_pixels(Image.new("RGB", (1, 1), B), 4)
    np.testing.assert_array_equal(blue, np.full((4, 4, 3), B).transpose(2, 0, 1))
    huge = Image.new("L", (20_000, 20_000), 40)
    huge.paste(200, (10_000, 0, 20_000, 20_000))
    huge.save(tmp_path / "huge.png", compress_level=1)
    del huge
    row = {"image": {"bytes": None, "path": str(tmp_path / "huge.png")}}
    pixels = draw_row(row, 0, "image", 4, True).astype(int)
    assert np.abs(pixels - [40, 40, 200, 200]).max() <= 12  # Lanczos overshoots beside the edge


def test_a_picture_inside_an_archive(tmp_path):
    Image.new("RGB", (2, 2), G).save(tmp_path / "green.png")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "green.png", "green.png")
    image = open_picture({"bytes": None, "path": f"zip://green.png::{tmp_path}/all.zip"})
    np.testing.assert_array_equal(to_pixels(image, 2), channels([G, G], [G, G]))


def test_a_huge_jpeg_is_decoded_small(tmp_path):
    """100 million pixels; in a 64th of its memory."""
    Image.new("RGB", (20_000, 5_000), (10, 200, 90)).save(tmp_path / "wide.jpg")
    image = open_picture(str(tmp_path / "wide.jpg"))
    assert np.abs(to_pixels(image, 8)[:, 4, 4].astype(int) - (10, 200, 90)).max() <= 2
    assert image.size == (2_500, 625)


def test_more_pixels_than_memory_holds_are_named(tmp_path):
    """The header alone says 30,000 x 30,000."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, format="PNG")
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + file.getvalue()[24:29]
    content = file.getvalue()[:12] + header + zlib.crc32(header).to_bytes(4, "big") + file.getvalue()[33:]
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bomb.png cannot be read: it has 30000 x 30000 pixels"):
        draw_row({"image": {"bytes": None, "path": str(tmp_path / "bomb.png")}}, 0, "image", 4, True)


def test_a_caption_of_five_thousand_words(tokenizer, make_text_encoder, tmp_path, caplog):
    """It is cut where every prompt is, and counted rather than shown."""
    encoder, long = make_text_encoder(), "a cat " + "on a mat " * 1666
    cache = cache_text(["", "a dog", long], tokenizer, encoder, tmp_path)
    assert "1 of 3 captions are longer than 32 tokens" in caplog.text and len(caplog.text) < 400
    with torch.no_grad():
        states, pooled, _ = encode_text(tokenizer, encoder, [long])
    found = cache([long])
    torch.testing.assert_close(found[0], states, **FP16)
    torch.testing.assert_close(found[1], pooled, **FP16)


# ------------------------------------------------------------ what the caches know


def test_the_text_cache_knows_the_towers_config_and_tokenizer(make_text_encoder, tokenizer, tmp_path):
    """The same weights, captions and vocabulary: another activation, another context, another answer."""
    captions = ["", "a cat that sat on a mat"]
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 4
    for tower, words in (
        (make_text_encoder(hidden_act="quick_gelu"), tokenizer),
        (make_text_encoder(hidden_act="relu"), tokenizer),
        (make_text_encoder(hidden_act="relu"), short),
    ):
        with torch.no_grad():
            states, pooled, _ = encode_text(words, tower, captions)
        found = cache_text(captions, words, tower, tmp_path)(captions)
        torch.testing.assert_close(found[0], states, **FP16)
        torch.testing.assert_close(found[1], pooled, **FP16)
    assert len(list(tmp_path.glob("text-*.npy"))) == 3


def test_a_cache_that_finds_no_room_is_an_error_and_no_crash(tmp_path):
    """Before it is filled: a mapped file that the disk cannot hold would end the process with SIGBUS."""
    filled = []
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        with pytest.raises(OSError, match=f"cache_dir {disk}: rows.npy could not be written: .*No space"):
            memory_map(disk / "rows.npy", (1_000_000,), np.dtype(np.float32), filled.append)
        assert not filled and [path.name for path in disk.iterdir()] == ["rows.npy.lock"]


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cache_dir {tmp_path}/file: rows.npy could not be written"):
        memory_map(tmp_path / "file" / "rows.npy", (4,), np.dtype(np.float32), print)


def test_latents_of_mirrored_pictures(tmp_path):
    """Of the mirrored picture, not the mirrored latent; pixels are simply mirrored."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 16), latent_channels=2, norm_num_groups=4, **blocks).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    rows = np.array([0, 2, 3, 4])  # one is left out
    pictures = PictureCache(pixels, ["", "a"], [[1]] * 4, {}, rows)
    mirror = torch.tensor([True, False, True, True])
    x0 = torch.from_numpy(pixels[rows]).float() / 127.5 - 1
    expected = torch.where(mirror[:, None, None, None], x0.flip(-1), x0)
    assert torch.equal(pictures.images([0, 1, 2, 3], mirror), expected)
    with torch.no_grad():
        latents = vae.encode(expected).latent_dist.mode() * vae.config.scaling_factor
    cache = cache_latents(pictures, vae, tmp_path, mirrored=True)
    torch.testing.assert_close(cache.images([0, 1, 2, 3], mirror), latents, **FP16)
    assert len(cache) == 4
    plain = cache_latents(pictures, vae, tmp_path)
    torch.testing.assert_close(plain.images([1]), cache.images([1]), rtol=0, atol=0)


def test_webdataset_tars(tmp_path):
    """Pictures and captions by the kinds of their files; a folder below for each further split."""
    write_tars(tmp_path / "tars", [range(3), range(3, 5)])
    write_tars(tmp_path / "tars" / "validation", [range(5, 7)])
    for split, numbers in (("train", range(5)), ("validation", range(5, 7))):
        data = load_pictures(str(tmp_path / "tars"), split, cache_dir=str(tmp_path / "arrow"))
        cache = cache_pictures(data, 4, tmp_path / "cache")
        assert [cache.captions[own[0]] for own in cache.choices] == [f"picture {i}" for i in numbers]
        assert (cache.images(list(range(len(cache))))[:, 0, 0, 0] * 127.5 + 127.5).round().tolist() == [
            10.0 * i for i in numbers
        ]
