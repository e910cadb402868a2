"""Captioned pictures: batches, weights, pixels, folders and caches."""

import copy
import io
import json
import math
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from places import ROOT
from tiny_pictures import FP16, GOOD, B, G, K, R, W, channels, tiny_dataset, write_folder

from pipelines.drawing.images import decode_latents
from pipelines.drawing.text import encode_text
from training.data import pictures as module
from training.data.caches import cache_latents, cache_text, memory_map
from training.data.pictures import (
    PictureCache,
    StepBatchSampler,
    cache_pictures,
    check_picture_folder,
    concept_weights,
    load_pictures,
    to_pixels,
)

EMOJI64 = ROOT / "tests" / "data" / "emoji64"


def take(sampler: StepBatchSampler, count: int) -> list[list[int]]:
    return [batch for batch, _ in zip(sampler, range(count), strict=False)]


# ------------------------------------------------------------ batches

WEIGHTS = [None, torch.tensor([0.1, 0.4, 0.05, 0.05, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["epochs", "weighted"])
def test_a_resumed_start_sees_the_same_batches(weights):
    whole = take(StepBatchSampler(10, 4, 7, weights), 12)
    assert take(StepBatchSampler(10, 4, 7, weights, start=5), 7) == whole[5:]
    assert take(StepBatchSampler(10, 4, 8, weights), 12) != whole
    assert len({tuple(batch) for batch in whole}) > 6  # the steps differ from each other


@pytest.mark.parametrize("weights", WEIGHTS, ids=["epochs", "weighted"])
def test_slices_of_two_processes_make_up_the_global_batch(weights):
    one = take(StepBatchSampler(10, 6, 3, weights, start=2), 9)
    ranks = [take(StepBatchSampler(10, 3, 3, weights, 2, rank, 2), 9) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == one


@pytest.mark.parametrize("size, batch_size", [(10, 4), (10, 25), (7, 1), (3, 3)])
def test_an_epoch_visits_every_picture_once(size, batch_size):
    drawn = sum(take(StepBatchSampler(size, batch_size, 0), 5 * size), [])
    epochs = [drawn[at : at + size] for at in range(0, len(drawn) - size + 1, size)]
    assert len(epochs) >= 5 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # each in an order of its own


def test_weighted_draws_follow_the_weights():
    """Chi-square of 24,000 draws, 9 degrees of freedom, within its central 99.8 %: [1.15, 27.9]."""
    weights = WEIGHTS[1]
    drawn = sum(take(StepBatchSampler(10, 16, 0, weights), 1500), [])
    counts = torch.bincount(torch.tensor(drawn), minlength=10).double()
    expected = len(drawn) * weights.double()
    assert 1.15 < ((counts - expected) ** 2 / expected).sum() < 27.9
    pairs = Counter((batch[0], batch[1]) for batch in take(StepBatchSampler(10, 2, 1, weights), 6000))
    share = pairs[1, 1] / 6000  # independent draws: 0.4^2, standard error 0.0047
    assert share == pytest.approx(0.16, abs=4 * 0.0047)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="the data set is empty"):
        StepBatchSampler(0, 4, 0)


def test_concept_weights_in_closed_form():
    """Four pictures of a, one of b. A concept of n has n^power in all, shared evenly."""
    concepts = ["a", "a", "b", "a", "a"]
    root = 2**0.5  # 4^0.25
    for power, a, b in (
        (0.0, 1 / 8, 1 / 2),
        (1.0, 1 / 5, 1 / 5),
        (0.25, root / 4 / (root + 1), 1 / (root + 1)),
    ):
        expected = torch.tensor([a, a, b, a, a], dtype=torch.float64)
        torch.testing.assert_close(concept_weights(concepts, power), expected)
    torch.testing.assert_close(concept_weights(concepts), expected)  # 0.25 is the default


def test_style_weights_in_closed_form():
    """The four pictures of a are in two styles, three and one, and b in the first: sizes four and one."""
    concepts, styles = ["a", "a", "b", "a", "a"], ["x", "x", "x", "x", "y"]
    for style_power, x, y in ((0.0, 1 / 4, 1.0), (0.5, 1 / 2, 1.0), (1.0, 1.0, 1.0)):
        total = (3 * x + y) / 8 + x / 2
        expected = torch.tensor([x / 8, x / 8, x / 2, x / 8, y / 8], dtype=torch.float64) / total
        torch.testing.assert_close(concept_weights(concepts, 0.0, styles, style_power), expected)


# ------------------------------------------------------------ pixels


def saved(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    """The picture as a file gives it back."""
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return Image.open(file)


def grey(*rows: list[int]) -> np.ndarray:
    return np.array([rows] * 3, dtype=np.uint8)


def test_pixels_of_plain_modes():
    rgb = Image.fromarray(np.array([[R, G], [B, (1, 2, 3)]], dtype=np.uint8))
    np.testing.assert_array_equal(to_pixels(saved(rgb), 2), channels([R, G], [B, (1, 2, 3)]))
    levels = Image.fromarray(np.array([[0, 10], [200, 255]], dtype=np.uint8))
    np.testing.assert_array_equal(to_pixels(saved(levels), 2), grey([0, 10], [200, 255]))
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    np.testing.assert_array_equal(to_pixels(saved(bits), 2), grey([0, 255], [255, 0]))


def test_transparency_is_laid_over_white():
    """a c + (1 - a) 255; what hides under full transparency is not seen."""
    rgba = np.array(
        [[(255, 0, 0, 255), (0, 0, 0, 0)], [(0, 0, 255, 128), (50, 100, 150, 51)]], dtype=np.uint8
    )
    expected = channels([R, W], [(127, 127, 255), (214, 224, 234)])
    np.testing.assert_array_equal(to_pixels(saved(Image.fromarray(rgba)), 2), expected)
    la = np.array([[(100, 0), (100, 255)], [(100, 128), (0, 51)]], dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(saved(Image.fromarray(la)), 2), grey([255, 100], [177, 204]))


def test_transparency_of_palettes_and_of_one_colour():
    image = Image.new("P", (2, 2))
    image.putpalette([*R, *G, *B])
    image.putdata([0, 1, 2, 0])
    np.testing.assert_array_equal(to_pixels(saved(image), 2), channels([R, G], [B, R]))
    np.testing.assert_array_equal(to_pixels(saved(image, transparency=1), 2), channels([R, W], [B, R]))
    alphas = saved(image, transparency=bytes([255, 0, 51]))
    np.testing.assert_array_equal(to_pixels(alphas, 2), channels([R, W], [(204, 204, 255), R]))
    gif = saved(image, "GIF", transparency=2)
    np.testing.assert_array_equal(to_pixels(gif, 2), channels([R, G], [W, R]))
    rgb = Image.fromarray(np.array([[R, G], [B, R]], dtype=np.uint8))
    np.testing.assert_array_equal(to_pixels(saved(rgb, transparency=B), 2), channels([R, G], [W, R]))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(kind):
    """65535 is white: v / 257."""
    levels = np.array([[0, 257, 514], [32896, 20000, 65535], [1000, 40000, 65278]], dtype=np.uint16)
    expected = grey([0, 1, 2], [128, 78, 255], [4, 156, 254])
    np.testing.assert_array_equal(to_pixels(saved(Image.fromarray(levels), kind), 3), expected)


def test_cmyk():
    """r = 255 (1 - c)(1 - k), up to a level of rounding."""
    inks = np.array([[(255, 0, 0, 0), (0, 255, 0, 0)], [(0, 0, 0, 255), (51, 102, 0, 51)]], dtype=np.uint8)
    image = Image.frombytes("CMYK", (2, 2), inks.tobytes())
    expected = channels([(0, 255, 255), (255, 0, 255)], [K, (163, 122, 204)]).astype(int)
    for form in (image, saved(image, "TIFF")):
        assert np.abs(to_pixels(form, 2) - expected).max() <= 1
    flat = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    jpeg = to_pixels(saved(flat, "JPEG", quality=100), 8)  # Adobe's inverted form
    assert np.abs(jpeg[:, 4, 4] - np.array([0, 255, 255])).max() <= 2


@pytest.mark.parametrize(
    "orientation, shown",
    [
        (1, [[1, 2], [3, 4]]),
        (2, [[2, 1], [4, 3]]),  # mirrored
        (3, [[4, 3], [2, 1]]),  # upside down
        (6, [[3, 1], [4, 2]]),  # a quarter turn clockwise to show
        (8, [[2, 4], [1, 3]]),
    ],
)
def test_exif_rotation(orientation, shown):
    image = Image.fromarray(np.array([[1, 2], [3, 4]], dtype=np.uint8) * 50)
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = grey(*(50 * np.array(shown)).tolist())
    np.testing.assert_array_equal(to_pixels(saved(image, exif=exif), 2), expected)


def test_pictures_that_are_not_square():
    """Where the shorter side (for padding, the longer) is the resolution, every pixel is known."""
    wide = np.arange(32, dtype=np.uint8).reshape(4, 8)
    image = Image.fromarray(wide)
    np.testing.assert_array_equal(to_pixels(image, 4), [wide[:, 2:6]] * 3)
    np.testing.assert_array_equal(to_pixels(image.transpose(Image.Transpose.TRANSPOSE), 4), [wide.T[2:6]] * 3)
    padded = np.full((8, 8), 255, dtype=np.uint8)
    padded[2:6] = wide
    np.testing.assert_array_equal(to_pixels(image, 8, center_crop=False), [padded] * 3)


def lanczos(size: int, resolution: int) -> np.ndarray:
    """(resolution, size) weights of Lanczos' filter of three lobes, widened to the scale, by its formula."""
    scale = size / resolution
    offsets = np.arange(size)[None] + 0.5 - (np.arange(resolution)[:, None] + 0.5) * scale
    offsets = offsets / max(scale, 1)
    weights = np.where(np.abs(offsets) < 3, np.sinc(offsets) * np.sinc(offsets / 3), 0.0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size, resolution", [(24, 8), (20, 16), (8, 16)])
def test_resizing_is_lanczos(size, resolution):
    """Pillow rounds after each of its two passes: two levels of tolerance; bicubic is off by dozens."""
    image = np.random.default_rng(0).integers(64, 192, (size, size), dtype=np.uint8)
    exact = lanczos(size, resolution) @ image @ lanczos(size, resolution).T
    pixels = to_pixels(Image.fromarray(image), resolution)
    assert np.abs(pixels - exact).max() < 2


# ------------------------------------------------------------ folders and saved data sets


@pytest.mark.parametrize(
    "lines, message",
    [
        ((), r"has no metadata.jsonl; each line"),
        ((GOOD, "file_name: b.png"), r"metadata.jsonl line 2 is not JSON"),
        (('{"text": "a cat"}',), r"line 1 has no 'file_name'"),
        ((GOOD, "", '{"file_name": "b.png"}'), r"line 3 has no 'text'"),
        (('{"file_name": "a.png", "text": null}',), r"line 1 has no 'text'"),
        ((GOOD, '{"file_name": "c.png", "text": "x"}'), r"line 2 names c.png, which is not in"),
        (("[1, 2]",), r"line 1 has no 'file_name'"),
    ],
)
def test_errors_of_a_picture_folder(lines, message, tmp_path):
    folder = write_folder(tmp_path / "pictures", *lines)
    with pytest.raises(ValueError, match=message):
        check_picture_folder(folder)
    with pytest.raises(ValueError, match=message):
        load_pictures(str(folder), cache_dir=str(tmp_path / "cache"))


def test_a_good_picture_folder(tmp_path):
    folder = write_folder(tmp_path / "pictures", GOOD, "", '{"file_name": "b.png", "text": "ein Hündchen"}')
    check_picture_folder(folder)
    loaded = load_pictures(str(folder), cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["text"]) == ["a cat", "ein Hündchen"]


def test_the_committed_folder(tmp_path):
    loaded = load_pictures(str(EMOJI64), cache_dir=str(tmp_path / "cache"))
    rows = [json.loads(line) for line in (EMOJI64 / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert len(loaded) == len(rows) == 64
    by_text = {row["text"]: row for row in rows}
    assert len(by_text) == 64 and Counter(row["style"] for row in rows).keys() == {
        "3d", "flat", "noto", "twemoji", "emojione", "fxemoji"
    }  # fmt: skip
    for row in loaded:
        written = by_text[row["text"]]
        assert {key: row[key] for key in written if key != "file_name"} == {
            key: value for key, value in written.items() if key != "file_name"
        }
        np.testing.assert_array_equal(
            np.asarray(row["image"]), np.asarray(Image.open(EMOJI64 / written["file_name"]))
        )


def test_the_committed_pictures_may_be_passed_on():
    rows = [json.loads(line) for line in (EMOJI64 / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert {row["licence"] for row in rows} == {"MIT", "Apache-2.0", "CC-BY-4.0"}
    readme = (EMOJI64 / "README.md").read_text("utf-8")
    table = [line.split("|") for line in readme.splitlines() if line.startswith("|")]
    for row in rows:
        (cells,) = [cells for cells in table if row["style"] in cells[1].replace(",", " ").split()]
        assert row["licence"] in cells[4]


def test_data_sets_saved_to_disk(tmp_path):
    parts = {"train": tiny_dataset(1), "validation": tiny_dataset(2, 2)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    for split, value in (("train", 1), ("validation", 2)):
        loaded = load_pictures(str(tmp_path / "both"), split)
        assert [row["image"].getpixel((0, 0)) for row in loaded] == [
            (value, i, 0) for i in range(len(parts[split]))
        ]
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        load_pictures(str(tmp_path / "both"), "test")


def test_a_data_set_saved_without_splits_is_all_training(tmp_path):
    """It must not pass for its own validation split."""
    tiny_dataset(1).save_to_disk(str(tmp_path / "one"))
    assert load_pictures(str(tmp_path / "one"))["caption"][:] == ["picture 0", "picture 1", "picture 2"]
    with pytest.raises(ValueError, match="has no split 'validation'; it has train"):
        load_pictures(str(tmp_path / "one"), "validation")


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "~/nothing", "nowhere/at-all"])
def test_a_missing_data_set_is_named(source, monkeypatch, tmp_path):
    """The last may be a name on the Hub, which tests cannot reach."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"data set '{source}'"):
        load_pictures(source, cache_dir=str(tmp_path / "cache"))


# ------------------------------------------------------------ caches


def test_memory_map_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "deep" / "rows.npy"

    def fails(target: np.ndarray) -> None:
        target[:2] = 7
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory_map(path, (4, 3), np.dtype(np.float16), fails)
    assert [file.name for file in path.parent.iterdir()] == ["rows.npy.lock"]

    calls = []

    def works(target: np.ndarray) -> None:
        calls.append(target.shape)
        target[:] = np.arange(12).reshape(4, 3)

    for _ in range(2):
        array = memory_map(path, (4, 3), np.dtype(np.float16), works)
        assert array.dtype == np.float16 and array.tolist() == np.arange(12).reshape(4, 3).tolist()
    assert calls == [(4, 3)] and [file.name for file in path.parent.iterdir()] == ["rows.npy"]
    with pytest.raises(ValueError, match=r"rows.npy holds \(4, 3\), not \(5, 3\): delete it"):
        memory_map(path, (5, 3), np.dtype(np.float16), works)


def test_cached_pictures(tmp_path, monkeypatch):
    captions = [["a", "b"], ["c"], ["a", "d"]]
    made = tiny_dataset(100, captions=captions, concept=["x", "y", "x"])
    decoded = []
    real = module.to_pixels
    monkeypatch.setattr(module, "to_pixels", lambda *arguments: decoded.append(1) or real(*arguments))
    for _ in range(2):
        cache = cache_pictures(made, 8, tmp_path, "image", "caption")
        assert len(cache) == 3 and cache.captions == ["", "a", "b", "c", "d"]
        assert cache.choices == [[1, 2], [3], [1, 4]]
        assert cache.columns == {"caption": [f"picture {i}" for i in range(3)], "concept": ["x", "y", "x"]}
        images = cache.images(torch.tensor([2, 0]))
        expected = torch.tensor([[100, 2, 0], [100, 0, 0]]) / 127.5 - 1
        torch.testing.assert_close(images, expected[:, :, None, None].expand(2, 3, 8, 8))
    assert len(decoded) == 3  # the second time came from the file
    assert cache_pictures(made, 4, tmp_path, "image", "caption").pixels.shape == (3, 3, 4, 4)
    cache_pictures(made, 8, tmp_path, "image", "caption", center_crop=False)
    assert len(decoded) == 9  # other settings, other files


def test_one_caption_for_each_picture(tmp_path):
    cache = cache_pictures(tiny_dataset(0), 8, tmp_path, "image", "caption")
    assert cache.captions == ["", "picture 0", "picture 1", "picture 2"] and cache.choices == [[1], [2], [3]]


def test_changed_pictures_are_not_taken_from_the_cache(tmp_path):
    """Same names, same sizes, same captions: only the pixels differ."""
    for value in (10, 20):
        cache = cache_pictures(tiny_dataset(value), 8, tmp_path, "image", "caption")
        assert (cache.pixels[:, 0] == value).all()
    pictures = write_folder(tmp_path / "pictures", GOOD)
    for value in (30, 40):
        Image.new("RGB", (4, 4), (value, 0, 0)).save(pictures / "a.png")
        loaded = load_pictures(str(pictures), cache_dir=str(tmp_path / "arrow"))
        assert (cache_pictures(loaded, 4, tmp_path, "image", "text").pixels[:, 0] == value).all()


def test_errors_of_the_picture_cache(tmp_path):
    made = tiny_dataset(0)
    with pytest.raises(ValueError, match="has no column 'picture'; it has image, caption"):
        cache_pictures(made, 8, tmp_path, "picture", "caption")
    with pytest.raises(ValueError, match="has no column 'text'; it has image, caption"):
        cache_pictures(made, 8, tmp_path, "image", "text")
    with pytest.raises(ValueError, match="the data set is empty"):
        cache_pictures(made.select([]), 8, tmp_path, "image", "caption")
    rows = [made.with_format(None).cast_column("image", datasets.Image(decode=False))[0] for _ in range(2)]
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:40]
    broken = datasets.Dataset.from_list(rows, features=made.features)
    with pytest.raises(ValueError, match="picture 1 of the data set cannot be read"):
        cache_pictures(broken, 8, tmp_path, "image", "caption", strict=True)
    assert not list(tmp_path.glob("*.npy"))


def test_choice_of_captions():
    cache = PictureCache(np.zeros((2, 3, 1, 1), np.uint8), list("-abcde"), [[5], [1, 2, 3, 4]], {})

    def shares(canonical: float) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        draws = torch.rand(8000, 2, generator=generator)
        drawn = cache.choose_captions([0, 1] * 4000, draws, canonical).reshape(4000, 2)
        assert (drawn[:, 0] == 5).all()
        return (torch.bincount(drawn[:, 1], minlength=5)[1:] / 4000).tolist()

    for canonical in (0.0, 0.5):  # the first by right, or as one of four
        first, other = canonical + (1 - canonical) / 4, (1 - canonical) / 4
        errors = [4 * math.sqrt(p * (1 - p) / 4000) for p in (first, other)]
        drawn = shares(canonical)
        assert drawn[0] == pytest.approx(first, abs=errors[0])
        assert drawn[1:] == pytest.approx([other] * 3, abs=errors[1])
    assert shares(1.0) == [1, 0, 0, 0]
    edges = torch.tensor([[0.1, 0.9], [0.2, 0.0], [0.2, 0.26], [0.99, 0.999]])
    assert cache.choose_captions([1] * 4, edges, 0.2).tolist() == [1, 1, 2, 4]


def test_cached_text_is_what_the_encoder_says(tokenizer, make_text_encoder, tmp_path):
    captions = ["", *(f"a {'very ' * (i % 7)}red heart number {i}" for i in range(299))]
    encoder = make_text_encoder()
    encoded = []
    encoder.register_forward_hook(lambda model, inputs, output: encoded.append(len(output.last_hidden_state)))
    cache = cache_text(captions, tokenizer, encoder, tmp_path)
    assert sum(encoded) >= 300
    with torch.no_grad():
        states, pooled, _ = encode_text(tokenizer, encoder, captions)
    ids = torch.tensor([299, 0, 5, 256, 255, 5])
    found_states, found_pooled = cache.lookup(ids)
    assert found_states.dtype == found_pooled.dtype == torch.float32
    torch.testing.assert_close(found_states, states[ids], **FP16)
    torch.testing.assert_close(found_pooled, pooled[ids], **FP16)

    encoded.clear()
    again = cache_text(captions, tokenizer, encoder, tmp_path)
    assert sum(encoded) <= 1  # one text for the shape
    np.testing.assert_array_equal(again.rows, cache.rows)


def test_the_text_cache_knows_its_captions_and_weights(tokenizer, make_text_encoder, tmp_path):
    encoder = make_text_encoder()
    for captions in (["", "a cat", "a dog"], ["", "a dog", "a cat"]):
        with torch.no_grad():
            states = encode_text(tokenizer, encoder, captions)[0]
        found = cache_text(captions, tokenizer, encoder, tmp_path).lookup(torch.arange(3))[0]
        torch.testing.assert_close(found, states, **FP16)
    with torch.no_grad():
        encoder.text_projection.weight[0, 0] += 1
        pooled = encode_text(tokenizer, encoder, captions)[1]
    found = cache_text(captions, tokenizer, encoder, tmp_path).lookup(torch.arange(3))[1]
    torch.testing.assert_close(found, pooled, **FP16)

    padded = copy.deepcopy(tokenizer)
    padded.pad_token = tokenizer.convert_ids_to_tokens(5)
    with torch.no_grad():
        other = encode_text(padded, encoder, captions)[0]
    assert not torch.allclose(other, states, atol=1e-2)
    found = cache_text(captions, padded, encoder, tmp_path).lookup(torch.arange(3))[0]
    torch.testing.assert_close(found, other, **FP16)


def test_cached_latents_are_the_scaled_mode(tmp_path):
    """(mode - shift) scale, and the pipelines' decoder undoes it; another shift is another cache."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=2, norm_num_groups=4, scaling_factor=0.7, **blocks
    ).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (70, 3, 8, 8), dtype=np.uint8)
    pictures = PictureCache(pixels, ["", "a"], [[1]] * 70, {"concept": ["c"] * 70})
    with torch.no_grad():
        mode = vae.encode(pictures.images(list(range(70)))).latent_dist.mode()
    ids = [69, 0, 64, 63]
    for scale, shift in ((0.7, None), (0.7, 0.25), (1.3, 0.25)):
        vae.register_to_config(scaling_factor=scale, shift_factor=shift)
        for _ in range(2):
            cache = cache_latents(pictures, vae, tmp_path)
            assert len(cache) == 70 and cache.captions == ["", "a"] and cache.columns["concept"][0] == "c"
            latents = cache.images(ids)
            torch.testing.assert_close(latents, (mode[ids] - (shift or 0)) * scale, **FP16)
        with torch.no_grad():
            expected = vae.decode(mode[ids]).sample
            torch.testing.assert_close(decode_latents(vae, latents), expected, rtol=0, atol=5e-3)
