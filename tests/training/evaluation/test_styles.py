"""`training.evaluate styles`: which prompts it chooses, and what it counts."""

import json
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import TextToImagePipeline
from pipelines.components.noisy_classifier import NoisyClassifier
from training.evaluation.judge import Judge
from training.evaluation.redrawn import redraw
from training.evaluation.styles import StylesConfig, accuracies, choose_rows, classify, styles
from training.objectives.noised import NoisedPictures

pytest_plugins = ["evaluation_folders"]

SIX = ["3d", "emojione", "flat", "fxemoji", "noto", "twemoji"]


def test_names_are_of_all_styles_and_each_comes_once_in_each():
    names = ["a", "b", "a", "c", "b", "d", "d", "d", "a"]
    kinds = ["x", "x", "y", "x", "y", "y", "x", "x", "x"]
    rows = choose_rows(names, kinds, ["y", "x"], 10, 0)
    assert sorted(rows) == [0, 1, 2, 4, 5, 6]  # c has one style alone; second pictures of a style are left
    pairs = [(names[i], kinds[i]) for i in rows]
    assert [kind for _, kind in pairs] == ["y", "x"] * 3 and pairs[0][0] == pairs[1][0]
    assert choose_rows(names, kinds, ["y", "x"], 2, 0) == rows[:4]
    assert any(choose_rows(names, kinds, ["y", "x"], 10, seed) != rows for seed in range(1, 6))


def test_accuracies_by_hand():
    found, truth = ["x", "y", "y", "x", "y"], ["x", "x", "y", "y", "y"]
    assert accuracies(found, truth) == {"all": 0.6, "x": 0.5, "y": pytest.approx(2 / 3)}


def test_clean_pictures_for_a_classifier_of_clean_pictures(model_folder, dataset_folder, tmp_path):
    pipe = TextToImagePipeline.from_pretrained(model_folder)
    pictures = NoisedPictures(pipe, str(dataset_folder), "train", str(tmp_path))
    x, t = pictures.batch([3, 1], 0, 5, 0, 1, noised=False)
    assert torch.equal(x, pictures.data.images([3, 1])) and t.tolist() == [0, 0]
    x_t, t = pictures.batch([3, 1], 0, 5, 0, 1)
    assert not torch.equal(x, x_t) and t.max() > 0


def test_pictures_are_mirrored_half_the_time(model_folder, dataset_folder, tmp_path):
    pipe = TextToImagePipeline.from_pretrained(model_folder)
    pictures = NoisedPictures(pipe, str(dataset_folder), "train", str(tmp_path))
    rows = [i % len(pictures) for i in range(200)]
    plain = pictures.data.images(rows)
    x, _ = pictures.batch(rows, 0, 5, 0, 1, noised=False, flip=True)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(x, plain, strict=True)]
    as_is = [torch.equal(a, b) for a, b in zip(x, plain, strict=True)]
    assert all(a or b for a, b in zip(mirrored, as_is, strict=True))
    assert 70 <= sum(mirrored) <= 130  # four standard errors of 200 throws about a half: 28
    again, _ = pictures.batch(rows, 0, 5, 0, 1, noised=False, flip=True)
    other, _ = pictures.batch(rows, 0, 6, 0, 1, noised=False, flip=True)
    assert torch.equal(x, again) and not torch.equal(x, other)


def test_the_command_with_guidance_to_the_style(
    model_folder, dataset_folder, clip_folder, tmp_path, monkeypatch
):
    """What is drawn is what the pipeline draws, told each picture's style; and not drawn twice."""
    for seed, name in enumerate(("classifier", "guide")):
        torch.manual_seed(seed)
        made = NoisyClassifier(SIX, 16, 3, 2, (8, 16), 4, 2)
        for parameter in made.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        made.save_pretrained(tmp_path / name)
    settings = {
        "model": str(model_folder), "classifier": str(tmp_path / "classifier"), "judge": str(clip_folder),
        "dataset": str(dataset_folder), "cache_dir": str(tmp_path / "cache"), "num_names": 2, "seed": 2,
        "num_inference_steps": 2, "styles": ["noto", "3d"], "output": str(tmp_path / "out"),
        "noisy_classifier": str(tmp_path / "guide"), "classifier_guidance_scale": 200.0,
    }  # fmt: skip
    config = StylesConfig(**settings)
    config.check()
    figures = styles(config)
    assert figures["classifier_guidance_scale"] == 200.0
    assert (
        "Each guided to its style by a noised classifier, at scale 200."
        in (tmp_path / "out" / "index.html").read_text()
    )
    train = datasets.load_from_disk(str(dataset_folder))["train"]
    pipe = TextToImagePipeline.from_pretrained(model_folder)
    pipe.register_modules(noisy_classifier=made.eval())
    sheet = np.array(Image.open(tmp_path / "out" / "sheet.png"))
    moved = []
    for i, row in enumerate(choose_rows(train["name"], train["style"], ["noto", "3d"], 2, 2)):
        style = train[row]["style"]
        caption, drawn = f"{train[row]['name']}, {style} style", []
        for more in ({"class_labels": style, "classifier_guidance_scale": 200.0}, {}):
            generator = torch.Generator().manual_seed(2 + i)
            image = pipe(caption, num_inference_steps=2, generator=generator, **more).images[0]
            drawn.append(np.array(image))
        guided, plain = drawn
        assert np.array_equal(guided, sheet[2:18, 2 + 18 * i : 18 + 18 * i])
        moved.append(int(np.abs(guided.astype(int) - plain).max()))
    assert min(moved) > 2
    with monkeypatch.context() as patch:
        patch.setattr(TextToImagePipeline, "__call__", None)
        assert styles(config) == figures
    changes = {"num_candidates": 5, "classifier_guidance_scale": 1.0, "output": str(tmp_path / "best")}
    several = StylesConfig(**(settings | changes))
    assert styles(several)["num_candidates"] == 5
    assert "5 seeds each, of which the guides keep one" in (tmp_path / "best" / "index.html").read_text()
    best, others = np.array(Image.open(tmp_path / "best" / "sheet.png")), 0
    for i, row in enumerate(choose_rows(train["name"], train["style"], ["noto", "3d"], 2, 2)):
        style, here = train[row]["style"], np.s_[2:18, 2 + 18 * i : 18 + 18 * i]
        image = pipe(
            f"{train[row]['name']}, {style} style", num_inference_steps=2, num_candidates=5,
            class_labels=style, classifier_guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(2 + i + j * 2**24) for j in range(5)],
        ).images[0]  # fmt: skip
        assert np.array_equal(np.array(image), best[here])
        generator = torch.Generator().manual_seed(2 + i)
        first = pipe(
            f"{train[row]['name']}, {style} style", num_inference_steps=2, generator=generator,
            class_labels=style, classifier_guidance_scale=1.0,
        ).images[0]  # fmt: skip
        others += not np.array_equal(best[here], np.array(first))
    assert others > 0
    for changes, message in (
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"output": __file__}, "output must be a folder, there is a file, got "),
        ({"classifier_guidance_scale": -1.0}, "classifier_guidance_scale must be 0 or more"),
        ({"noisy_classifier": ""}, "noisy_classifier must be given: this model has none, got ''"),
        (
            {"noisy_classifier": "nowhere"},
            "noisy_classifier must be the folder of a trained one, got 'nowhere'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            wrong = StylesConfig(**(settings | changes))
            wrong.check()
            styles(wrong)


def test_the_command(model_folder, dataset_folder, clip_folder, tmp_path, monkeypatch):
    """Styles of pictures drawn one by one, their nearest training pictures by all cosines; nothing is drawn
    twice."""
    torch.manual_seed(0)
    classifier = NoisyClassifier(SIX, 16, 3, 2, (8, 16), 4, 2)
    for parameter in classifier.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    classifier.save_pretrained(tmp_path / "classifier")
    settings = {
        "model": str(model_folder), "classifier": str(tmp_path / "classifier"), "judge": str(clip_folder),
        "dataset": str(dataset_folder), "cache_dir": str(tmp_path / "cache"), "num_names": 3, "seed": 2,
        "num_inference_steps": 2, "styles": ["noto", "3d"], "output": str(tmp_path / "out"),
    }  # fmt: skip
    config = StylesConfig(**settings)
    config.check()
    figures = styles(config)
    train = datasets.load_from_disk(str(dataset_folder))["train"]
    rows = choose_rows(train["name"], train["style"], ["noto", "3d"], 3, 2)
    pipe = TextToImagePipeline.from_pretrained(model_folder)
    found, nearest = [], []
    judge = Judge(str(clip_folder))
    resized = [train[i]["image"].resize((16, 16), Image.Resampling.LANCZOS) for i in range(len(train))]
    real = judge.embed_images(
        torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 127.5 - 1 for p in resized])
    )
    for i, row in enumerate(rows):
        caption = f"{train[row]['name']}, {train[row]['style']} style"
        image = pipe(caption, num_inference_steps=2, generator=torch.Generator().manual_seed(2 + i)).images[0]
        x = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)[None]
        with torch.no_grad():
            logits = dict(zip(SIX, classifier.eval()(x, 0)[0].tolist(), strict=True))
        found.append("noto" if logits["noto"] > logits["3d"] else "3d")
        nearest.append(int((judge.embed_images(x) @ real.T).argmax()))
        assert classify(classifier, x, ["noto", "3d"]) == found[-1:]
        assert classify(classifier, x, SIX) == [max(logits, key=lambda style: logits[style])]
    truth = [train[row]["style"] for row in rows]
    assert figures["pictures"] == 6 and figures["names"] == 3
    assert figures["style found, generated"]["all"] == np.mean(np.array(found) == np.array(truth))
    held_out = datasets.load_from_disk(str(dataset_folder))["validation"]
    resized = [np.array(one.resize((16, 16), Image.Resampling.LANCZOS)) for one in held_out["image"]]
    pictures = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 127.5 - 1
    again = redraw(pipe, pictures, 0) / 127.5 - 1  # fewer than a batch
    for name, real in (("real held-out", pictures), ("real held-out, redrawn", again)):
        kept = [i for i, style in enumerate(held_out["style"]) if style in ("noto", "3d")]
        right = [
            classify(classifier, real[i : i + 1], ["noto", "3d"]) == [held_out["style"][i]] for i in kept
        ]
        assert figures[f"style found, {name}"]["all"] == pytest.approx(np.mean(right))
    assert json.loads((tmp_path / "out" / "styles.json").read_text()) == figures
    text = (tmp_path / "out" / "index.html").read_text()
    shown = re.findall(r"found: (\w+); nearest: ([^,<]+), (\w+)", text)
    assert shown == [(a, train[j]["name"], train[j]["style"]) for a, j in zip(found, nearest, strict=True)]
    assert len(re.findall("<img ", text)) == 12
    assert "guided" not in text
    with monkeypatch.context() as patch:
        patch.setattr(TextToImagePipeline, "__call__", None)
        assert styles(config) == figures
    for changes, message in (
        ({"styles": ["noto", "oil"]}, "styles must be some of the classifier's"),
        ({"num_names": 0}, "num_names must be at least 1"),
        ({"classifier": "nowhere"}, "classifier must be the folder of a NoisyClassifier"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong = StylesConfig(**(settings | changes))
            wrong.check()
            styles(wrong)
