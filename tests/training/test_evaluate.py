"""Evaluation: ranks by hand, the judge against transformers' own CLIP, whole commands, clear errors."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from transformers import CLIPModel

from pipelines import TextToImagePipeline
from pipelines.drawing.images import save_png, to_pil
from training import evaluate
from training.data.emoji import STYLES
from training.data.words import TEMPLATES
from training.evaluation.judge import Concepts, Judge, recall
from training.evaluation.samples import draw

pytest_plugins = ["evaluation_folders"]


# ------------------------------------------------------------ ranks


CONCEPTS = Concepts(  # a concept with two names, two with one
    ids=["up", "right", "left"],
    owner=torch.tensor([0, 0, 1, 2]),
    embeds=torch.tensor([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0], [-1.0, 0.0]]),
)


def test_ranks_by_hand():
    """Scores of (0.6, 0.8): up max(0.8, 1) = 1, right 0.6, left -0.6."""
    tilted, down = [0.6, 0.8], [0.8, -0.6]  # of down: up max(-0.6, 0) = 0, right 0.8, left -0.8
    pictures = torch.tensor([tilted, tilted, tilted, down, down, down])
    ranks = CONCEPTS.rank(pictures, ["up", "right", "left", "up", "right", "left"])
    assert ranks.tolist() == [0, 1, 2, 1, 0, 2]


def test_ties_and_nonsense_are_never_the_first():
    """A model that says the same of everything, or NaN, must not pass for a perfect one."""
    same = Concepts(["a", "b", "c"], torch.arange(3), torch.ones(3, 2))
    assert same.rank(torch.ones(2, 2), ["a", "c"]).tolist() == [2, 2]
    assert CONCEPTS.rank(torch.full((2, 2), torch.nan), ["up", "left"]).tolist() == [2, 2]


def test_recall():
    assert recall(torch.tensor([0, 0, 1, 4, 5, 5, 5, 100])) == {"R@1": 0.25, "R@5": 0.5}
    assert recall(torch.tensor([0, 0])) == {"R@1": 1.0, "R@5": 1.0}


# ------------------------------------------------------------ the judge


def features(
    model: CLIPModel, tokenizer: Any, text: str, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(text embedding, image embeddings) as CLIPModel.forward gives them, one text without any padding."""
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=images)
    return output.text_embeds[0], output.image_embeds


def ensemble(model: CLIPModel, tokenizer: Any, name: str) -> torch.Tensor:
    """The mean of the unit vectors of a name in each of the eight templates, normalised."""
    styles = ["3d", "flat", "noto", "twemoji", "emojione", "fxemoji"]
    texts = [name, f"a {name}", *(f"{name}, {style} style" for style in styles)]
    mean = sum(features(model, tokenizer, text, torch.zeros(1, 3, 16, 16))[0] for text in texts) / 8
    return mean / mean.norm()


def test_the_judge_embeds_as_transformers_does(clip_folder, tokenizer):
    judge, model = Judge(str(clip_folder)), CLIPModel.from_pretrained(clip_folder).eval()
    names = ["red heart", "a very long name of a thing with, commas", "x"]
    expected = torch.stack([ensemble(model, tokenizer, name) for name in names])
    torch.testing.assert_close(judge.embed_names(names), expected, rtol=1e-4, atol=1e-5)
    assert len(TEMPLATES) == 8

    images = torch.rand(130, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1  # two batches
    found = judge.embed_images(images)
    _, expected = features(model, tokenizer, "x", images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len({tuple(row) for row in (found * 1e3).round().tolist()}) == 130


def test_many_names_come_back_in_order(clip_folder):
    """600 texts and 8 templates of 100 names cross the batches of 512."""
    judge = Judge(str(clip_folder))
    names = [f"thing number {i}" for i in range(100)]
    expected = torch.cat([judge.embed_names([name]) for name in names[::9]])
    torch.testing.assert_close(judge.embed_names(names)[::9], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ whole commands


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()


def direct_ranks(
    clip_folder: Path, dataset_folder: Path, images: torch.Tensor, truth: list[str]
) -> list[int]:
    """Place of the truth among the concepts by CLIPModel's own embeddings."""
    judge = Judge(str(clip_folder))  # only for its tokenizer
    model = CLIPModel.from_pretrained(clip_folder).eval()
    data = datasets.load_from_disk(str(dataset_folder))
    names = {
        concept: name
        for part in data.values()
        for concept, name in zip(part["concept"], part["name"], strict=True)
    }
    table = {concept: ensemble(model, judge.tokenizer, name) for concept, name in names.items()}
    _, embeds = features(model, judge.tokenizer, "x", images)
    ranks = []
    for embed, concept in zip(embeds, truth, strict=True):
        order = sorted(table, key=lambda other: -float(embed @ table[other]))
        ranks.append(order.index(concept))
    return ranks


def shares(ranks: list[int]) -> dict[str, Any]:
    return {
        "R@1": pytest.approx(sum(rank == 0 for rank in ranks) / len(ranks)),
        "R@5": pytest.approx(sum(rank < 5 for rank in ranks) / len(ranks)),
    }


def pixels(row: dict) -> torch.Tensor:
    image = row["image"].resize((16, 16), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


def test_zero_shot(clip_folder, dataset_folder, tmp_path, monkeypatch, capsys):
    command(monkeypatch, "zero-shot", "--clip", clip_folder, "--dataset", dataset_folder,
            "--cache_dir", tmp_path / "cache", "--json", tmp_path / "deep" / "figures.json")  # fmt: skip
    figures = json.loads((tmp_path / "deep" / "figures.json").read_text())
    assert figures["concepts"] == 12
    for split, part in datasets.load_from_disk(str(dataset_folder)).items():
        images = torch.stack([pixels(row) for row in part])
        ranks = direct_ranks(clip_folder, dataset_folder, images, part["concept"])
        assert figures[split] == {"pictures": len(part), **shares(ranks)}, split
    assert f"R@5: {figures['train']['R@5']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("eta", [None, 0.0])
def test_retrieval(eta, clip_folder, dataset_folder, model_folder, tmp_path, monkeypatch):
    """Real, drawn and shuffled pictures of the same captions, each drawn again alone and ranked directly."""
    folders = ["--model", model_folder, "--judge", clip_folder, "--dataset", dataset_folder]
    numbers = ["--num_pictures", 11, "--num_inference_steps", 3, "--seed", 5, "--batch_size", 4]
    places = ["--cache_dir", tmp_path / "cache", "--output", tmp_path / "sheet.png"]
    sampler = [] if eta is None else ["--eta", eta]
    command(
        monkeypatch, "retrieval", *folders, *numbers, *places, *sampler, "--json", tmp_path / "figures.json"
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {key: figures[key] for key in ("split", "pictures", "concepts", "steps")} == {
        "split": "train", "pictures": 11, "concepts": 12, "steps": 3
    }  # fmt: skip
    train = datasets.load_from_disk(str(dataset_folder))["train"]
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(5))[:11].tolist()
    rows = [train[i] for i in chosen]
    pipe = TextToImagePipeline.from_pretrained(model_folder)
    if eta == 0:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    drawn = []
    for number, row in enumerate(rows):
        generator = torch.Generator().manual_seed(5 + number)
        drawn.append(
            pipe(row["caption"], num_inference_steps=3, generator=generator, output_type="pt").images[0]
        )
    drawn_images = torch.stack(drawn) * 2 - 1
    truth = [row["concept"] for row in rows]

    def expected(images: torch.Tensor) -> dict[str, Any]:
        return shares(direct_ranks(clip_folder, dataset_folder, images, truth))

    assert figures["real"] == expected(torch.stack([pixels(row) for row in rows]))
    assert figures["generated"] == expected(drawn_images)
    assert figures["shuffled"] == expected(drawn_images.roll(1, 0))
    assert sorted(path.name for path in tmp_path.glob("sheet*")) == ["sheet.png"]
    assert Image.open(tmp_path / "sheet.png").width >= 10 * 16


def test_pictures_do_not_depend_on_the_batch(model_folder):
    pipe = TextToImagePipeline.from_pretrained(model_folder)
    captions = ["red heart", "a rocket", "pizza", "", "red heart"]
    batches = [draw(pipe, captions, batch_size=size, num_inference_steps=3, seed=8) for size in (1, 2, 5)]
    for images in batches[1:]:
        torch.testing.assert_close(images, batches[0], rtol=0, atol=1e-4)
    assert (batches[0][0] - batches[0][4]).abs().mean() > 0.1  # one caption, another seed
    alone = pipe(
        "pizza", num_inference_steps=3, generator=torch.Generator().manual_seed(10), output_type="pt"
    ).images
    torch.testing.assert_close(batches[0][2], alone[0] * 2 - 1, rtol=0, atol=1e-4)


def test_the_sheet(model_folder, tmp_path, monkeypatch):
    """Row by prompt, column by style; cells at both ends drawn again alone."""
    path = tmp_path / "sheet.png"
    command(monkeypatch, "sheet", "--model", model_folder, "--num_inference_steps", 3, "--guidance_scale", 1,
            "--output", path)  # fmt: skip
    sheet = np.asarray(Image.open(path)).astype(int)
    pipe = TextToImagePipeline.from_pretrained(model_folder)

    def cell(caption: str, number: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(number)
        call = {"num_inference_steps": 3, "guidance_scale": 1.0, "generator": generator}
        return np.asarray(pipe(caption, **call).images[0]).astype(int)

    gap = (sheet.shape[1] - 10 * 16) // 11  # round each cell
    assert sheet.shape == (sheet.shape[1], 10 * 16 + 11 * gap, 3)
    styles = [*STYLES.values()][:6]
    for caption, row, column in (
        (f"red heart, {styles[0]} style", 0, 0),
        (f"dog face, {styles[5]} style", 1, 5),
        ("a crown", 9, 9),
    ):
        y, x = gap + row * (16 + gap), gap + column * (16 + gap)
        shown = sheet[y : y + 16, x : x + 16]
        assert np.abs(shown - cell(caption, 10 * row + column)).max() <= 1, caption


def test_pictures_of_tensors(tmp_path):
    """-1 .. 1 to 0 .. 255, rounded, beyond that cut."""
    values = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    (image,) = to_pil(values)
    assert [pixel[0] for pixel in np.asarray(image)[0].tolist()] == [0, 0, 128, 191, 255, 255]
    save_png(image, str(tmp_path / "new" / "picture.dat"))
    again = Image.open(tmp_path / "new" / "picture.dat")
    assert again.format == "PNG" and again.tobytes() == image.tobytes()
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_the_command_line_says_what_there_is(monkeypatch, capsys):
    usage = "usage: python -m training.evaluate {zero-shot,retrieval,sheet,"
    for arguments in ((), ("bogus",)):
        with pytest.raises(SystemExit, match=usage):
            command(monkeypatch, *arguments)
    command(monkeypatch, "--help")  # asked for, so no error
    assert capsys.readouterr().out.startswith(usage)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("zero-shot", "--clip", "{tmp}"),
            "training.evaluate zero-shot: there is no CLIP in '{tmp}'; train one",
        ),
        (("retrieval", "--judge", "{tmp}"), "training.evaluate retrieval: there is no CLIP in '{tmp}'"),
        (("retrieval", "--num_pictures", "0"), "num_pictures must be at least 1, got 0"),
        (("sheet", "--num_inference_steps", "0"), "num_inference_steps must be at least 1, got 0"),
        (
            ("zero-shot", "--clip", "{clip}", "--dataset", "{tmp}/nowhere"),
            "data set '{tmp}/nowhere': there is no such",
        ),
        (
            ("zero-shot", "--clip", "{clip}", "--dataset", "{data}", "--split", "test"),
            "has no split 'test'; it has",
        ),
        (("sheet", "--colour", "red"), "--colour"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, clip_folder, dataset_folder, tmp_path, monkeypatch):
    places = {"tmp": tmp_path, "clip": clip_folder, "data": dataset_folder}
    arguments = [argument.format(**places) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *arguments, "--cache_dir", tmp_path / "cache")
    assert message.format(**places) in str(stopped.value) and "\n" not in str(stopped.value)
