"""Coders against closed forms, and files that another process turns into the same pictures, or refuses."""

import json
import math
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT
from scipy.stats import kstest, norm

from pipelines import DDPMScheduler, TextToImagePipeline
from pipelines.coding.__main__ import main
from pipelines.coding.bits_back import in_units
from pipelines.coding.coding_model import BLOCK_OVERHEAD, best_end, coding_chain, denoiser, fingerprint, to_x0
from pipelines.coding.entropy_coding import CANDIDATES, Bits, Stack, candidate, choose_candidate
from pipelines.coding.file_format import MAGIC, unpack
from pipelines.coding.likelihood import vlb_terms
from pipelines.coding.progressive_coding import decode, encode

SIDE = 8
CAPTION = "a corgi in a party hat"


# ------------------------------------------------------------ the coders alone


def random_stack(words: int = 4000) -> Stack:
    return Stack(np.random.default_rng(0).integers(1, 2**32, words, np.uint32))


def mass(numbers: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    return norm.cdf(numbers + 0.5, mean, std) - norm.cdf(numbers - 0.5, mean, std)


def test_pushing_costs_the_logarithm_of_the_mass():
    """Of 20,000 numbers, with means anywhere: within 0.1 %."""
    random = np.random.default_rng(1)
    mean, std = random.uniform(-3000, 3000, 20000), random.uniform(1.5, 2.5, 20000)
    numbers = np.rint(random.normal(mean, std))
    stack = random_stack()
    before = len(stack.words())
    stack.push(numbers, mean, std, 2.5)
    cost = 32 * (len(stack.words()) - before)
    assert cost == pytest.approx(-np.log2(mass(numbers, mean, std)).sum(), rel=1e-3)
    np.testing.assert_array_equal(stack.pop(mean, std, 2.5), numbers)
    assert np.array_equal(stack.words(), random_stack().words())


def test_numbers_far_out_escape():
    """They come back, each for less than its Gaussian's -log2 density and 60 bits."""
    distance = np.array([0, 15, 16, 17, -16, -17, 40, -200, 5000, -(10**6), 0], dtype=float)
    mean, std = np.full(11, 0.3), np.full(11, 2.0)
    stack = random_stack()
    before = len(stack.words())
    stack.push(distance, mean, std, 2.0)
    bits = -norm.logpdf(distance, mean, std) / math.log(2)
    assert 32 * (len(stack.words()) - before) <= np.minimum(bits + 2, 60).sum() + 64
    np.testing.assert_array_equal(stack.pop(mean, std, 2.0), distance)
    assert np.array_equal(stack.words(), random_stack().words())
    with pytest.raises(ValueError, match="from its mean cannot be coded"):
        stack.push(np.array([2.0**23]), mean[:1], std[:1], 2.0)


def test_bits_back_costs_the_kl():
    """q = N(0.2, 2^2) drawn, p = N(1, 2.2^2) pushed, 30,000 times: the KL within four standard errors.

    What is drawn has q's distribution: chi-square over 15 numbers, 99.9 %. Undone, no trace is left.
    """
    n = 30000
    q, p = (np.full(n, 0.2), np.full(n, 2.0), 2.0), (np.full(n, 1.0), np.full(n, 2.2), 2.2)
    stack = random_stack(8000)
    before = len(stack.words())
    drawn = stack.draw(*q)
    stack.push(drawn, *p)
    cost = 32 * (len(stack.words()) - before) / n
    numbers = np.arange(-12, 14)
    masses, others = mass(numbers, 0.2, 2.0), mass(numbers, 1.0, 2.2)
    ratio = np.log2(masses / others)
    kl = (masses * ratio).sum()
    assert kl > 0.1 and cost == pytest.approx(
        kl, abs=4 * math.sqrt((masses * (ratio - kl) ** 2).sum() / n) + 64 / n
    )
    expected = n * masses[(numbers >= -7) & (numbers <= 7)]
    counts = np.array([(drawn == k).sum() for k in range(-7, 8)])
    assert ((counts - expected) ** 2 / expected).sum() < 37.7
    np.testing.assert_array_equal(stack.pop(*p), drawn)
    stack.undraw(drawn, *q)
    assert np.array_equal(stack.words(), random_stack(8000).words())
    with pytest.raises(ValueError, match="none could have been drawn"):
        stack.undraw(drawn + 40, *q)
    with pytest.raises(ValueError, match="too few bits"):
        random_stack(50).draw(*q)


def test_what_is_rounded_to_the_grid_keeps_its_variance():
    """60,000 numbers of deviation 1 on a grid of 1/2, with means anywhere: variance 4 in its units, within
    four standard errors. Rounding adds 1/12, which is taken off before; a tiny deviation stays above 0."""
    units, n = in_units(1.0, 0.5), 60000
    assert units**2 == pytest.approx(4 - 1 / 12) and in_units(0.1, 1.0) ** 2 == pytest.approx(0.05)
    mean = np.random.default_rng(2).uniform(-50, 50, n)
    drawn = random_stack(12000).draw(mean, np.full(n, units), float(units))
    assert np.square(drawn - mean).mean() == pytest.approx(4, abs=4 * 4 * math.sqrt(2 / n))


def test_levels_have_ho_s_masses():
    """0 and 255 take the tails beyond them: a white picture of mean 255, deviation 0.6 costs 0.326 bits."""
    stack = Stack(np.empty(0))
    stack.push_levels(np.full(20000, 255.0), np.full(20000, 255.0), np.full(20000, 0.6))
    assert 32 * len(stack.words()) / 20000 == pytest.approx(-math.log2(norm.cdf(0.5 / 0.6)), abs=0.005)
    assert (stack.pop_levels(np.full(20000, 255.0), np.full(20000, 0.6)) == 255).all()


@pytest.mark.parametrize(
    "size, kl, std", [(1, 2.0, 0.5), (300, 3.0, 1.0), (300, 6.5, 1.0), (50, 0.85, 0.9), (40, 4.0, 0.9)]
)
def test_relative_entropy_coding(size, kl, std):
    """The chosen candidate is q's, the number no longer than the theory says. 200 blocks for each case.

    Its projection on the mean is normal (Kolmogorov-Smirnov, p > 0.001; at 6.5 bits its deviation may be
    0.1 short), its squared distance from the mean that of q, both within four standard errors. The mean of
    log2 number is at most KL + 1.53 (Li and El Gamal 2018) and at least KL - 1, with four standard errors.
    """
    random = np.random.default_rng(2)
    spread = size * (std**2 - 1 - 2 * math.log(std)) / 2
    mean = random.choice([-1.0, 1.0], size) if kl > 4 else np.ones(size)
    mean *= math.sqrt(2 * (kl * math.log(2) - spread) / size)
    direction = mean / np.linalg.norm(mean)
    numbers, places, squares = [], [], []
    for trial in range(200):
        seed = [3, trial, size]
        numbers.append(choose_candidate(mean, np.full(size, std), seed))
        z = (candidate(numbers[-1], size, seed) - mean) / std
        places.append(z @ direction)
        squares.append(z @ z)
    assert abs(np.mean(places)) < 4 / math.sqrt(200)
    assert abs(np.std(places) - 1) < 4 / math.sqrt(400) + (0.1 if kl > 6 else 0)
    assert kstest(places, "norm").pvalue > 1e-3
    assert abs(np.mean(squares) - size) < 4 * math.sqrt(2 * size / 200)
    bits = np.log2(numbers)
    error = 4 * bits.std() / math.sqrt(200)
    assert kl - 1 - error < bits.mean() < kl + 1.54 + error


def test_candidates_are_normal_and_apart():
    """30 numbers next to each other: 60,000 normal values by KS; no two correlate by more than 5/sqrt(n)."""
    rows = np.stack([candidate(number, 2000, [5]) for number in (*range(1, 30), CANDIDATES)])
    assert kstest(rows.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(rows) - np.eye(30)
    assert np.abs(correlation).max() < 5 / math.sqrt(2000)
    assert not np.array_equal(candidate(1, 10, [5]), candidate(1, 10, [6]))


def test_bits():
    bits, numbers, changes = Bits(), [1, 2, 3, 7, 1000, CANDIDATES], [0, 1, -1, 2, -2, 50, -300]
    sizes = []
    for write, values in ((bits.write_number, numbers), (bits.write_change, changes)):
        for value in values:
            before = len(bits)
            write(value)
            sizes.append(len(bits) - before)
    assert sizes[:6] == [4, 5, 5, 6, 13, 19] and sizes[6:11] == [1, 3, 3, 5, 5]
    again = Bits(bits.to_bytes())
    assert [again.read_number() for _ in numbers] == numbers
    assert [again.read_change() for _ in changes] == changes
    with pytest.raises(ValueError, match="too early"):
        again.read(8)


# ------------------------------------------------------------ files


def picture(seed: int = 0, side: int = SIDE) -> Image.Image:
    """A gradient with a square on it, so that no level is everywhere."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(random.integers(0, 100), random.integers(150, 256), side)
    pixels = np.broadcast_to(ramp[:, None, None], (side, side, 3)).copy()
    pixels[2:5, 3:7] = random.integers(0, 256, 3)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the command line has it by default; a second one slows so small a model down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_model(make_unet, make_pipeline) -> Callable[..., TextToImagePipeline]:
    """make_model(kind, variance): of 8 x 8 pixels. With epsilon it says next to nothing, so that it takes x_t
    for the picture, and its guess gets better with every step."""

    def make(prediction: str = "epsilon", variance: str = "fixed_large") -> TextToImagePipeline:
        unet = make_unet(sample_size=SIDE, out_channels=6 if variance == "learned_range" else 3)
        for parameter in unet.conv_out.parameters():
            parameter.data *= 0.1
        settings = {"prediction_type": prediction, "variance_type": variance, "num_train_timesteps": 100}
        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", **settings)
        return make_pipeline(unet=unet, scheduler=scheduler)

    return make


@pytest.fixture
def model(make_model) -> TextToImagePipeline:
    return make_model()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(pixels(first), pixels(second))


@pytest.mark.parametrize("kind", ["progressive", "lossless"])
@pytest.mark.parametrize(
    "prediction, variance",
    [("epsilon", "fixed_large"), ("sample", "fixed_small"), ("epsilon", "learned_range")],
)
def test_round_trip(kind, prediction, variance, make_model):
    """All kinds of models, and a caption that matters: with another the file is refused or decodes wrong."""
    pipe = make_model(prediction, variance)
    data, cost = encode(pipe, [picture()], [CAPTION], kind, steps=10)
    decoded = decode(pipe, data)
    assert decoded.whole and decoded.captions == [CAPTION] and same(decoded.pictures[0], picture())
    assert cost.total == len(data) and cost.kl > cost.last > 0


def command(*arguments: object, module: str = "pipelines.coding") -> subprocess.CompletedProcess:
    """`python -m pipelines.coding`, a process of its own."""
    call = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(
        call, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )


def test_another_process_decodes_what_the_command_line_coded(model, tmp_path, capsys):
    """A progressive file, a lossless one of three pictures, and a refusal, all bit for bit."""
    model.save_pretrained(tmp_path / "model")
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"corgi {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    options = ["--model", str(tmp_path / "model"), "--steps", "10"]
    threads = torch.get_num_threads()
    main(["encode", str(folder / "1.png"), str(tmp_path / "one.bin"), "--caption", CAPTION, *options])
    printed = capsys.readouterr().out
    assert "KL sum" in printed and "bound of the relative entropy coder" in printed
    main(["encode", str(folder), str(tmp_path / "all.bin"), "--lossless", *options])
    assert "initial bits" in capsys.readouterr().out
    torch.set_num_threads(threads)
    for name, out in (("one.bin", "one.png"), ("all.bin", "again")):
        done = command("decode", tmp_path / name, tmp_path / out, *options[:2])
        assert done.returncode == 0 and "bit for bit" in done.stdout, done.stderr
        assert "FutureWarning: pipelines" not in done.stderr
    assert same(Image.open(tmp_path / "one.png"), picture(1))
    old = command(
        "decode",
        tmp_path / "one.bin",
        tmp_path / "old.png",
        *options[:2],
        module="pipelines.progressive_coding",
    )
    assert old.returncode == 0 and same(Image.open(tmp_path / "old.png"), picture(1))
    assert old.stderr.count("FutureWarning") == 1 and "run `python -m pipelines.coding`" in old.stderr
    for number in range(3):
        assert same(Image.open(tmp_path / "again" / f"{number:05d}.png"), picture(number))
    assert "corgi 2" in (tmp_path / "again" / "metadata.jsonl").read_text()
    refused = command("decode", tmp_path / "one.bin", tmp_path / "no.png", "--threads", 2, *options[:2])
    assert refused.returncode == 2 and "threads=2: must be 1, by which the file was written" in refused.stderr
    assert not (tmp_path / "no.png").exists() and not list(tmp_path.glob("*.partial"))


def test_the_kl_sum_is_the_bound(model):
    """That which vlb_terms gives, for both kinds; L_0 apart, too. Means of 12 files and of 40 draws.

    Within four standard errors; the terms of a file share their noise, so that at worst their deviations add
    up. A chain of one step has two terms, of which L_T is exact: (abar x0^2 - abar - ln(1 - abar))/2 nats.
    """
    x0, chain = to_x0(np.asarray(picture())), coding_chain(model, 20, 0)
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([
        vlb_terms(
            denoiser(model, CAPTION, chain), chain, x0,
            lambda t: torch.randn(x0.shape, generator=generator, dtype=torch.float64),
        ).bits
        for _ in range(40)
    ])  # fmt: skip
    draws = x0.numel() * draws
    for kind in ("progressive", "lossless"):
        costs = [
            encode(model, [picture()], [CAPTION], kind, steps=20, end=0, seed=seed)[1] for seed in range(12)
        ]
        kl, last = np.mean([cost.kl for cost in costs]), np.mean([cost.last for cost in costs])
        assert abs(kl - draws.sum(1).mean()) < 4 * draws.std(0).sum() / 12**0.5
        assert abs(last - draws[:, 0].mean()) < 4 * draws[:, 0].std() / 12**0.5
        one = encode(model, [picture()], [CAPTION], kind, steps=1, end=0)[1]
        abar = float(model.scheduler.alphas_cumprod[0])
        prior = (abar * x0**2 - abar - math.log(1 - abar)).sum() / 2 / math.log(2)
        assert one.kl - one.last == pytest.approx(float(prior), rel=1e-6)


def test_progressive_costs_what_the_coder_s_theory_says(model):
    """Between the KL sum and KL + 5.53 bits a block, with what frames the chunks (7 bytes each, 8 bits of the
    last word), five pictures together."""
    coded = kl = allowed = 0.0
    for seed in range(5):
        data, cost = encode(model, [picture(seed)], [CAPTION], steps=100, seed=seed, end=5)
        chunks = unpack(data, False)[1]
        coded += 8 * (cost.total - cost.header)
        kl += cost.kl
        allowed += cost.kl + BLOCK_OVERHEAD * cost.blocks + cost.side + 64 * len(chunks) + 64
        assert cost.blocks >= 5
    assert kl < coded < allowed


@pytest.mark.slow
def test_an_archive_costs_its_kl_sum(model):
    """40 pictures, initial bits included, at most 8 % above; without them within 3 %: the grid of the
    x_t costs about 1 %, and what is drawn, which other processors round otherwise, varies by as much."""
    pictures = [picture(seed) for seed in range(40)]
    data, cost = encode(model, pictures, [CAPTION] * 40, "lossless", steps=100, end=0)
    coded = 8 * (cost.total - cost.header)
    assert coded < 1.08 * cost.kl
    assert coded - cost.initial == pytest.approx(cost.kl, rel=0.03)
    assert all(map(same, decode(model, data).pictures, pictures))


def test_any_prefix_is_a_coarser_picture(model, make_model):
    """All prefixes that hold the header decode, to what the whole chunks tell; the error falls with them."""
    data, cost = encode(model, [picture()], [CAPTION], steps=100, end=0)
    whole = decode(model, data)
    assert whole.whole and whole.steps == whole.of
    ends = [cost.header]  # of the chunks
    for _, payload in unpack(data, False)[1]:
        ends.append(ends[-1] + 1 + (1 if len(payload) < 128 else 2) + len(payload) + 4)
    assert ends[-1] == len(data) and len(ends) >= 5
    errors = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        first = decode(model, data[:start], prefix=True)
        assert not first.whole
        assert same(decode(model, data[: end - 1], prefix=True).pictures[0], first.pictures[0])
        errors.append(((pixels(first.pictures[0]) - pixels(picture())) ** 2).mean() ** 0.5)
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 4
    grey = encode(make_model("sample"), [picture()], [CAPTION], steps=10, end=0)
    guess = decode(make_model("sample"), grey[0][: grey[1].header], prefix=True).pictures[0]
    assert pixels(guess).std() < 20  # of a model that guesses grey, not x_t, which is noise
    for cut in (len(data) - 1, ends[1], ends[2] + 3):
        with pytest.raises(ValueError, match="cut off in chunk .*--prefix"):
            decode(model, data[:cut])
    for cut in range(cost.header):
        with pytest.raises(ValueError, match="cut off in its header|begins with"):
            decode(model, data[:cut], prefix=True)


@pytest.mark.parametrize("kind", ["progressive", "lossless"])
def test_damage_is_refused(kind, model):
    """One bit of any byte, a byte more, any length but the right one."""
    data, cost = encode(model, [picture()], [CAPTION], kind, steps=10, end=0)
    chunks = unpack(data, False)[1]
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ValueError):
            decode(model, bytes(damaged))
        if kind == "progressive" and cost.header <= place:  # as a prefix at most what stands before it
            try:
                _, found, whole = unpack(bytes(damaged), prefix=True)
            except ValueError:
                continue
            assert not whole and found == chunks[: len(found)] and len(found) < len(chunks)
    for length in range(len(data)):
        with pytest.raises(ValueError):
            decode(model, data[:length])
    with pytest.raises(ValueError, match="bytes after the end=1"):
        decode(model, data + b"\0")
    if kind == "lossless":
        with pytest.raises(ValueError, match="cut off in chunk 1$"):
            decode(model, data[:-1], prefix=True)


def rewritten(data: bytes, **changes: Any) -> bytes:
    """The file with another header, its checksums right."""
    size = data[len(MAGIC)] & 127 | data[len(MAGIC) + 1] << 7
    begin = len(MAGIC) + 2
    text = json.dumps(json.loads(data[begin : begin + size]) | changes, separators=(",", ":")).encode()
    result = MAGIC + bytes([len(text) & 127 | 128, len(text) >> 7]) + text
    crc = zlib.crc32(result)
    result += crc.to_bytes(4, "little")
    for latents, payload in unpack(data, False)[1]:
        size = len(payload)
        head = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
        crc = zlib.crc32(bytes([latents]) + head + payload, crc)
        result += bytes([latents]) + head + payload + crc.to_bytes(4, "little")
    return result


def test_files_of_elsewhere_are_refused(model, make_model):
    data = encode(model, [picture()], [CAPTION], steps=10, end=0)[0]
    assert rewritten(data) == data
    for name, value in (
        ("torch", "2.0"),
        ("threads", 3),
        ("cpu", "Z80"),
        ("numpy", "1.0"),
        ("model", "0" * 32),
    ):
        with pytest.raises(
            ValueError, match=f"^{name}=.* must be '?{value}'?, by which the file was written"
        ):
            decode(model, rewritten(data, **{name: value}))
    own = fingerprint(model)
    model.unet.conv_in.weight.data[0, 0, 0, 0] += 1e-6
    assert fingerprint(model) != own
    with pytest.raises(ValueError, match="^model="):
        decode(model, data)
    assert fingerprint(make_model("sample")) != fingerprint(make_model("epsilon"))
    with pytest.raises(ValueError, match="initial bits"):  # another stack than the one it was made on
        decode_lossless_of_another_seed(make_model())


def decode_lossless_of_another_seed(pipe: TextToImagePipeline) -> None:
    data = encode(pipe, [picture()], [CAPTION], "lossless", steps=5, end=0)[0]
    decode(pipe, rewritten(data, seed=1))


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_chain_ends_where_the_bound_is_least(make_model, many):
    """By vlb_terms, 6 draws for each of 12 ends, none is better by more than 1 %; the last timesteps of a
    model that guesses grey cost it as much again. Of several pictures their sum counts."""
    pipe, x0s = make_model("sample"), [to_x0(np.asarray(picture()))]
    if many:  # a grey one, which that model knows, would end at 0 alone
        x0s = [torch.full_like(x0s[0], 1 / 255), *x0s]
    captions = [CAPTION] * len(x0s)
    best = best_end(pipe, x0s, captions, 50, None, 0)
    generator = torch.Generator().manual_seed(1)
    bounds = {}
    for end in (best, *range(0, 99, 9)):
        chain = coding_chain(pipe, 50, end)
        bounds[end] = sum(
            float(
                vlb_terms(
                    denoiser(pipe, CAPTION, chain), chain, x0,
                    lambda t: torch.randn(x0s[0].shape, generator=generator, dtype=torch.float64),
                ).bits.sum()
            )
            for _ in range(6)
            for x0 in x0s
        )  # fmt: skip
    assert 0 < best < 99
    assert bounds[best] < 1.01 * min(bounds.values())
    assert bounds[0] > (1 if many else 2) * bounds[best]
    assert not many or best_end(pipe, x0s[:1], captions[:1], 50, None, 0) != best


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pictures": [picture(side=9)]}, r"size=\(9, 9\): must be \(8, 8\)"),
        ({"pictures": [picture().convert("RGBA")]}, "mode='RGBA'"),
        ({"pictures": [picture()] * 2, "captions": ["", ""]}, "pictures=2"),
        ({"captions": []}, "captions=0: must be 1"),
        ({"kind": "lossy"}, "kind='lossy'"),
        ({"steps": 0}, r"steps=0: must be in 1 \.\. 100"),
        ({"steps": 101}, "steps=101"),
        ({"end": 100}, r"end=100: must be in 0 \.\. 99"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range': must be fixed"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_cannot_be_coded_is_named(changes, message, model):
    with pytest.raises(ValueError, match=message):
        encode(model, **({"pictures": [picture()], "captions": [""]} | changes))


def test_the_library_s_absence_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match="coding needs constriction: pip install"):
        Stack(np.empty(0))


def test_the_command_line_says_what_is_wrong(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    picture().save(tmp_path / "in.png")
    (tmp_path / "bad.bin").write_bytes(b"PNG")
    here = ["--model", str(tmp_path / "model")]
    for arguments, message in (
        (["encode", "nowhere.png", "out.bin"], "nowhere.png"),
        (["encode", "in.png", "out.bin", "--steps", "0"], "steps=0"),
        (["encode", "in.png", "no/where/out.bin"], "in a folder that is there"),
        (["encode", "in.png", "out.bin", "--model", "none"], "--model='none'"),
        (["decode", "bad.bin", "out.png"], "cut off in its header"),
    ):
        where = [str(tmp_path / part) if "." in part else part for part in arguments[1:3]]
        with pytest.raises(SystemExit) as stop:
            main([arguments[0], *where, *here, *arguments[3:]])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.bin", "in.png", "model"]
