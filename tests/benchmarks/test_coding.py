"""`benchmarks.coding`: its codecs by hand, and a whole run whose figures are those of the files it made."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import coding
from pipelines import DDPMScheduler
from pipelines.coding.progressive_coding import decode, encode
from pipelines.drawing.text import NULL_PROMPT

SIDE = 8


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 200, SIDE)[None, :, None, None] + random.integers(0, 50, (count, 1, 1, 3))
    return [
        Image.fromarray(p) for p in np.broadcast_to(ramp, (count, SIDE, SIDE, 3)).round().astype(np.uint8)
    ]


def test_a_sheet_holds_every_picture_once():
    shown = pictures(12)
    sheet = np.asarray(coding.sheet_of(shown))
    assert sheet.shape == (2 * SIDE, 10 * SIDE, 3)
    cells = sheet.reshape(2, SIDE, 10, SIDE, 3).swapaxes(1, 2).reshape(20, SIDE, SIDE, 3)
    for i, cell in enumerate(cells):
        np.testing.assert_array_equal(cell, np.asarray(shown[min(i, 11)]))


def test_codecs():
    """What is lossless comes back; what is not costs more and errs less with a better quality."""
    image = coding.sheet_of(pictures(20))
    for options in coding.available(coding.LOSSLESS).values():
        size, back = coding.compress(image, options)
        assert coding.squared_error(image, back) == 0 and size < 3 * image.width * image.height
    curves = coding.others(pictures(20))
    assert {"JPEG", "WebP"} <= curves.keys()
    for curve in curves.values():
        assert curve["bytes"][0] < curve["bytes"][-1]
        assert curve["squared error"][0] > curve["squared error"][-1] > 0
    black, grey = (Image.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 3))
    assert coding.squared_error(black, grey) == pytest.approx(3.0)  # 9 in one of three channels


def test_the_figures_are_those_of_the_files(make_unet, make_pipeline, tmp_path, capsys):
    shown, names = pictures(3), [f"thing {i}" for i in range(3)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = [{"image": p, "caption": name} for p, name in zip(shown, names, strict=True)]
    data = datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows, features=features)})
    data.save_to_disk(str(tmp_path / "data"))
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50)
    pipe = make_pipeline(unet=make_unet(sample_size=SIDE), scheduler=scheduler)
    pipe.save_pretrained(tmp_path / "model")
    places = {"model": "model", "dataset": "data", "cache_dir": "cache", "output_dir": "out"}
    arguments = [part for name, place in places.items() for part in (f"--{name}", str(tmp_path / place))]
    coding.main([*arguments, "--num_pictures", "3", "--num_progressive", "2", "--steps", "4"])
    figures = json.loads((tmp_path / "out" / "coding.json").read_text())
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.rindex("}") + 1]) == {
        k: v for k, v in figures.items() if k != "curves"
    }

    order = torch.randperm(3, generator=torch.Generator().manual_seed(0)).tolist()
    shown, names = [shown[i] for i in order], [names[i] for i in order]
    pipe.set_progress_bar_config(disable=True)
    whole, cost = encode(pipe, shown, names, kind="lossless", steps=4)
    assert figures["archive"]["bytes"] == len(whole)
    assert figures["archive"]["KL sum, bytes"] == round(cost.kl / 8)
    assert figures["archive"]["file above the KL sum, %"] == pytest.approx(
        100 * (8 * len(whole) / cost.kl - 1)
    )
    unknown = encode(pipe, shown, [NULL_PROMPT] * 3, kind="lossless", steps=4)[1]
    saved = (unknown.kl - cost.kl) / 3
    assert figures["the captions save, bits a picture"] == pytest.approx(saved, abs=8)  # of rounded bytes
    png = io.BytesIO()
    shown[0].save(png, format="PNG", optimize=True)
    singles = [coding.compress(p, {"format": "PNG", "optimize": True})[0] for p in shown]
    assert singles[0] == len(png.getvalue()) and figures["as single files, bytes"]["PNG"] == sum(singles)

    curve = figures["curves"]["ours"]
    assert curve["squared error"][-1] == 0 and curve["bytes"] == sorted(curve["bytes"])
    files = [encode(pipe, [p], [n], steps=4) for p, n in zip(shown[:2], names[:2], strict=True)]
    halves = []
    for (data_, spent), original in zip(files, shown[:2], strict=True):
        size = round(0.5 * (spent.total - spent.header))
        guess = decode(pipe, data_[: spent.header + size], prefix=True).pictures[0]
        halves.append((size, coding.squared_error(original, guess)))
    at = coding.CUTS.index(0.5)
    assert curve["bytes"][at] == pytest.approx(sum(size for size, _ in halves) / 2)
    assert curve["squared error"][at] == pytest.approx(sum(error for _, error in halves) / 2)
    drawn = np.asarray(Image.open(tmp_path / "out" / "rate-distortion.png").convert("L"))
    assert (drawn < 250).mean() > 0.01


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_progressive", "0"], "num_progressive must be in 1 .. num_pictures, got 0"),
        (["--num_pictures", "1"], "num_pictures must be at least 2"),
        (["--model", "no/model"], "no/model"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        coding.main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
