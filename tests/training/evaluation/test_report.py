"""The report and the card: figures of pictures drawn here again, a page that needs no other file, runs that
go on, text that stays."""

import base64
import html.parser
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import CLIPModel

from pipelines import TextToImagePipeline
from training import evaluate
from training.data.pictures import cache_pictures, load_pictures
from training.evaluation.card import BEGIN, END
from training.evaluation.html_tags import pair_tags
from training.evaluation.inception import WEIGHTS, inception_figures
from training.evaluation.judge import Judge, embed_concepts
from training.evaluation.metrics import density_coverage, frechet_distance, kernel_distance, precision_recall
from training.evaluation.report import picked
from training.evaluation.report_page import shown
from training.evaluation.samples import draw, fewest_matches, pipeline_key, two_halves

pytest_plugins = ["evaluation_folders"]

SEED = 3


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()


@pytest.fixture(scope="module")
def arguments(clip_folder, dataset_folder, model_folder, tmp_path_factory) -> list[object]:
    cache = tmp_path_factory.mktemp("cache")
    return [
        "report", "--judge", clip_folder, "--dataset", dataset_folder, "--cache_dir", cache, "--seed", SEED,
        "--num_pictures", 13, "--num_held_out", 4, "--num_inference_steps", 2, "--num_validation", 40,
        "--replicates", 20, "--num_shown", 5, "--batch_size", 5, "--model", model_folder,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(arguments, tmp_path_factory) -> Path:
    """One whole report, which several tests read."""
    output = tmp_path_factory.mktemp("report") / "new"
    with pytest.MonkeyPatch.context() as monkeypatch:
        command(monkeypatch, *arguments, "--output", output)
    return output


@pytest.fixture(scope="module")
def figures(folder) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


class Again:
    """Everything drawn and embedded once more: one by one through the pipeline, by CLIPModel itself."""

    def __init__(self, clip_folder: Path, dataset_folder: Path, model_folder: Path):
        self.model = CLIPModel.from_pretrained(clip_folder).eval()
        self.judge = Judge(str(clip_folder))
        self.pipe = TextToImagePipeline.from_pretrained(model_folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.data = datasets.load_from_disk(str(dataset_folder))
        order = torch.randperm(
            len(self.data["train"]), generator=torch.Generator().manual_seed(SEED)
        ).tolist()
        self.reference, self.seen = order[:13], order[13:26]

    def rows(self, split: str, numbers: list[int] | None = None) -> list[dict[str, Any]]:
        part = self.data[split]
        return [part[i] for i in (range(len(part)) if numbers is None else numbers)]

    def embed(self, pictures: list[np.ndarray]) -> torch.Tensor:
        pixels = torch.tensor(np.stack(pictures), dtype=torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            features = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features / features.norm(dim=1, keepdim=True)

    def real(self, split: str, numbers: list[int] | None = None) -> torch.Tensor:
        size, kind = (16, 16), Image.Resampling.LANCZOS
        return self.embed([np.asarray(row["image"].resize(size, kind)) for row in self.rows(split, numbers)])

    def drawn(self, split: str, numbers: list[int]) -> torch.Tensor:
        pictures = []
        for place, row in enumerate(self.rows(split, numbers)):
            generator = torch.Generator().manual_seed(SEED + place)
            pictures.append(self.pipe(row["caption"], num_inference_steps=2, generator=generator).images[0])
        return self.embed([np.asarray(picture) for picture in pictures])


@pytest.fixture(scope="module")
def again(clip_folder, dataset_folder, model_folder) -> Again:
    return Again(clip_folder, dataset_folder, model_folder)


# ------------------------------------------------------------ the figures


def test_retrieval_and_clip_score(figures, again, dataset_folder):
    """Each split apart; ranks by sorting, cosines one by one, 8-bit pictures drawn one by one."""
    concepts = embed_concepts(again.judge, str(dataset_folder))  # tested in test_evaluate.py
    assert figures["concepts"] == 12 and list(figures["against captions"]) == [
        "seen captions", "held-out compositions", "held-out concepts"
    ]  # fmt: skip
    for name, split in (("seen captions", "train"), ("held-out concepts", "validation")):
        count = 13 if split == "train" else 4
        order = torch.randperm(len(again.data[split]), generator=torch.Generator().manual_seed(SEED))
        numbers = again.seen if split == "train" else order[:4].tolist()
        found = figures["against captions"][name]
        assert found["pictures"] == count
        rows = again.rows(split, numbers)
        texts = again.judge.embed_texts([row["caption"] for row in rows])
        drawn = again.drawn(split, numbers)
        for column, embeds in (("generated", drawn), ("real", again.real(split, numbers))):
            ranks = concepts.rank(embeds, [row["concept"] for row in rows])
            for k in (1, 5):
                assert found[column][f"R@{k}"]["value"] == pytest.approx(float((ranks < k).float().mean()))
            score = sum(100 * max(0.0, float(a @ b)) for a, b in zip(embeds, texts, strict=True)) / count
            assert found[column]["CLIP score"]["value"] == pytest.approx(score, rel=2e-2), (name, column)
            low, high = found[column]["CLIP score"]["interval"]
            assert low < found[column]["CLIP score"]["value"] < high


def test_the_shuffled_control_is_under_others_captions(figures, folder, again, dataset_folder):
    """Picture j is scored under the caption of the picture k places before it, k leaving fewest concepts as
    they were; the kept pictures themselves, one by one."""
    concepts = embed_concepts(again.judge, str(dataset_folder))
    rows = again.rows("train", again.seen)
    captions, truth = ([row[column] for row in rows] for column in ("caption", "concept"))
    count = len(rows)

    def left(k: int) -> int:
        return sum(truth[(j + k) % count] == truth[j] for j in range(count))

    k = min(range(1, count), key=left)
    kept = draw(again.pipe, captions, SEED, 2, 2.0, folder=folder / "samples")
    embeds, texts = again.judge.embed_images(kept), again.judge.embed_texts(captions)
    others = torch.stack([embeds[(j + k) % count] for j in range(count)])
    found = figures["against captions"]["seen captions"]
    scores = []
    for column, images in (("generated", embeds), ("shuffled", others)):
        scores.append(sum(100 * max(0.0, float(a @ b)) for a, b in zip(images, texts, strict=True)) / count)
        assert found[column]["CLIP score"]["value"] == pytest.approx(scores[-1], abs=1e-3), column
        ranks = concepts.rank(images, truth)
        for top in (1, 5):
            assert found[column][f"R@{top}"]["value"] == pytest.approx(float((ranks < top).float().mean()))
    assert abs(scores[0] - scores[1]) > 1e-2  # else the control could be the drawn pictures themselves


def test_distances_to_half_of_the_training_pictures(figures, again):
    """Half A is the reference, half B's captions are drawn and half B's pictures are the floor."""
    found = figures["against half of the training pictures"]
    reference = again.real("train", again.reference)
    columns = {"generated": again.drawn("train", again.seen), "real": again.real("train", again.seen)}
    assert found["pictures"] == 13
    for column, embeds in columns.items():
        row = {key: value["value"] for key, value in found[column].items()}
        assert row["Frechet distance"] == pytest.approx(frechet_distance(embeds, reference), rel=1e-2)
        scaled = (24**0.5 * x for x in (embeds, reference))
        assert row["KID"] == pytest.approx(kernel_distance(*scaled), rel=1e-2, abs=1e-4)
        assert (row["precision"], row["recall"]) == pytest.approx(precision_recall(reference, embeds))
        assert (row["density"], row["coverage"]) == pytest.approx(density_coverage(reference, embeds))
    assert found["generated"]["Frechet distance"]["value"] > found["real"]["Frechet distance"]["value"]


def test_nearest_training_pictures(figures, again):
    """By the whole table of cosines; training pictures pass themselves over."""
    train = again.real("train")
    unseen = (1 - (again.real("validation") @ train.T).max(1).values).double()
    drawn = (1 - (again.drawn("train", again.seen) @ train.T).max(1).values).double()
    own = again.real("train", again.seen) @ train.T
    own[torch.arange(13), again.seen] = -1
    found = figures["nearest training pictures"]
    levels = torch.tensor(found["quantiles"], dtype=torch.float64)
    for name, values in (
        ("generated, seen captions", drawn),
        ("real, held-out concepts", unseen),
        ("real, training", (1 - own.max(1).values).double()),
    ):
        assert found[name]["pictures"] == len(values)
        expected = values.quantile(levels).tolist()
        assert found[name]["distances"] == pytest.approx(expected, rel=2e-2, abs=1e-4), name
    share = float((drawn < unseen.quantile(0.05)).double().mean())
    near = "nearer than 95 % of unseen real pictures are"
    assert found["generated, seen captions"][near] == pytest.approx(share)


def test_the_validation_loss_is_that_of_its_split(figures, again):
    """The mean over all buckets, estimated again with noise of our own; x_t and the target written out."""
    losses = figures["validation loss"]
    assert losses["target"] == "epsilon" and losses["timesteps"][0] == "0 .. 99"
    assert losses["timesteps"][-1] == "900 .. 999"
    generator = torch.Generator().manual_seed(0)
    t = (torch.arange(100) * 617 + 31) % 1000
    abar = again.pipe.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    for name, split in (("seen captions", "train"), ("held-out compositions", "heldout_compositions")):
        rows = again.rows(split)
        rows = [rows[i % len(rows)] for i in range(100)]
        pictures = [np.asarray(row["image"].resize((16, 16), Image.Resampling.LANCZOS)) for row in rows]
        x0 = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
        eps = torch.randn(x0.shape, generator=generator)
        with torch.no_grad():
            states = again.pipe.encode_prompt([row["caption"] for row in rows], "cpu", 1, False)[0]
            output = again.pipe.unet(abar**0.5 * x0 + (1 - abar) ** 0.5 * eps, t, states).sample
        values = (output - eps).square().flatten(1).mean(1)
        spread = float(values.std()) * (1 / 100 + 1 / 160) ** 0.5
        assert abs(np.mean(losses[name]["mean"]) - float(values.mean())) < 4 * spread
        assert spread < 0.05 * float(values.mean()) and losses[name]["pictures"] == min(
            40, len(again.rows(split))
        )


def test_what_the_report_says_of_itself(figures, model_folder, clip_folder):
    assert figures["model"] == str(model_folder) and figures["judge"] == str(clip_folder)
    assert figures["drawing"]["steps"] == 2 and figures["drawing"]["guidance scale"] == 2.0
    assert figures["drawing"]["drawn"] == 13 + 4 + 4 and figures["seed"] == SEED
    assert figures["data"]["pictures"] == {"train": 52, "heldout_compositions": 6, "validation": 6}
    assert sum(figures["data"]["training pictures by licence"].values()) == 52
    assert figures["Inception"].startswith(f"not measured: {WEIGHTS}")
    assert all(seconds >= 0 for seconds in figures["seconds"].values())
    assert figures["seconds"]["of these, pictures drawn anew"] == 21


def test_small_parts():
    assert fewest_matches(["a", "a", "b", "b"]) == 2 and fewest_matches(["a", "b", "c"]) == 1
    first, second = two_halves(11, 100, 0)
    assert len(first) == len(second) == 5 and not set(first) & set(second)
    assert two_halves(11, 3, 0) == (first[:3], two_halves(11, 3, 0)[1]) and len(two_halves(11, 3, 0)[1]) == 3
    assert shown({"value": 0.41234, "interval": [0.3, 0.52]}) == "0.412 (0.300 to 0.520)"
    assert shown({"value": 0.0151, "interval": [-1e-5, 0.03]}) == "0.015 (0.000 to 0.030)"
    assert shown({"value": 0.00123}) == "0.00123" and shown({"value": 31.46}) == "31.5" and shown(None) == ""


def test_picked_pictures(dataset_folder, tmp_path):
    pictures = cache_pictures(load_pictures(str(dataset_folder), "train"), 16, tmp_path, "image", "caption")
    numbers = [5, 0, 40, 5]
    for some, order in (
        (picked(pictures, numbers), [5, 0, 40, 5]),
        (picked(picked(pictures, numbers), [2, 0]), [40, 5]),
    ):
        assert torch.equal(some.images(range(len(order))), pictures.images(order))
        found = [some.captions[choice[0]] for choice in some.choices]
        assert found == [pictures.columns["caption"][i] for i in order]
    assert picked(pictures, [5, 0]).key != picked(pictures, [0, 5]).key


# ------------------------------------------------------------ the page


class Page(html.parser.HTMLParser):
    """Sources of the pictures, and every attribute that could point elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href"):
                (self.pictures if tag == "img" else self.links).append(value or "")


def test_the_page_needs_no_other_file(folder, figures):
    text = (folder / "index.html").read_text()
    page = Page(text)
    assert page.links == [] and not re.search(r"https?://|@import|url\(", text)
    pictures = []
    for source in page.pictures:
        kind, content = source.split(",", 1)
        assert kind == "data:image/png;base64"
        pictures.append(Image.open(io.BytesIO(base64.b64decode(content))))
    small = [picture for picture in pictures if picture.size == (16, 16)]
    shown_pairs = 5 + 4 + 4  # --num_shown 5
    nearest_pairs = 2 * (13 + 4 + 4)
    assert len(small) == 2 * (shown_pairs + nearest_pairs) and len(pictures) == len(small) + 5
    for value in ("R@5", "Frechet distance", "coverage", "not measured: ", "Held-out concepts"):
        assert value in text
    assert shown(figures["against captions"]["seen captions"]["generated"]["CLIP score"]) in text


def test_captions_are_text_and_not_tags():
    tags = pair_tags(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), ('a"b', "c"), ["<script>\n1 < 2"])
    assert "<script>" not in tags and "&lt;script&gt;<br>1 &lt; 2" in tags and 'alt="a&quot;b"' in tags


# ------------------------------------------------------------ going on


def test_a_stopped_report_goes_on(arguments, figures, folder, tmp_path, monkeypatch):
    """With some of the pictures there, only the others are drawn, and nothing but the seconds differs."""
    there = tmp_path / "report" / "samples"
    there.mkdir(parents=True)
    kept = sorted((folder / "samples").glob("*.png"))[::2]
    for path in kept:
        (there / path.name).write_bytes(path.read_bytes())
    times = {path.name: path.stat().st_mtime_ns for path in there.glob("*")}
    command(monkeypatch, *arguments, "--output", tmp_path / "report")
    again = json.loads((tmp_path / "report" / "report.json").read_text())
    assert again.pop("seconds")["of these, pictures drawn anew"] == 21 - len(kept)
    expected = {key: value for key, value in figures.items() if key != "seconds"}
    again, expected = flat(again), flat(expected)
    assert again.keys() == expected.keys()
    for name, value in expected.items():  # another batch may round another way
        close = isinstance(value, str) or value is None
        assert again[name] == (value if close else pytest.approx(value, rel=0.05, abs=1e-3)), name
    assert {path.name: path.stat().st_mtime_ns for path in there.glob("*")}.items() >= times.items()
    names = [{path.name for path in place.glob("*")} for place in (there, folder / "samples")]
    assert names[0] == names[1]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, item in items for key, leaf in flat(item, f"{name}/{k}").items()}
    return {name: value}


def test_what_a_kept_picture_depends_on(model_folder, tmp_path):
    """Caption, seed, steps, guidance and weights, each alone, is another picture; the batch is not."""
    pipe = TextToImagePipeline.from_pretrained(model_folder)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "folder": tmp_path}

    def files() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    first = draw(pipe, ["red heart", "pizza"], seed=1, **settings)
    here = files()
    assert len(here) == 2
    again = draw(pipe, ["red heart", "pizza"], seed=1, **(settings | {"num_inference_steps": None}) | {
        "num_inference_steps": 2, "batch_size": 1, "guidance_scale": None
    })  # fmt: skip
    assert files() == here and torch.equal(first, again)  # 2.0 is the model's own guidance
    for change in (
        {"seed": 5}, {"num_inference_steps": 3}, {"guidance_scale": 1.0}, {"captions": ["dog", "cat"]}
    ):  # fmt: skip
        call = {"captions": ["red heart", "pizza"], "seed": 1, **settings, **change}
        draw(pipe, **call)
        assert len(files()) == len(here) + 2, change
        here = files()
    key = pipeline_key(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert pipeline_key(pipe) != key
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    assert pipeline_key(pipe) != key


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--num_pictures", "5"], "num_pictures must be at least 6, got 5"),
        (["--num_validation", "9"], "num_validation must be at least 40, got 9"),
        (["--guidance_scale", "-1"], "guidance_scale must be 0 or more, or none, got -1.0"),
        (["--inception_weights", "{tmp}/no.pth"], "inception_weights must be a file, got '{tmp}/no.pth'"),
        (["--model", "{tmp}"], "model '{tmp}': "),
        (["--judge", "{tmp}"], "there is no CLIP in '{tmp}'"),
        (["--output", "{tmp}/file/new"], "output must be a folder to write to, got '{tmp}/file/new'"),
    ],
)
def test_errors_of_the_report_are_one_clear_line(settings, message, arguments, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    settings = [value.format(tmp=tmp_path) for value in settings]
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *arguments, "--output", tmp_path / "report", *settings)
    shown = str(stopped.value)
    assert shown.startswith("training.evaluate report: ") and message.format(tmp=tmp_path) in shown
    assert "\n" not in shown


# ------------------------------------------------------------ Inception


def test_inception_is_never_fetched(monkeypatch, tmp_path):
    images = torch.zeros(2, 3, 8, 8)
    assert inception_figures(None, images, images).startswith("not measured: ")
    (tmp_path / WEIGHTS).write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = inception_figures(tmp_path / WEIGHTS, images, images)
    assert line == "not measured: torch-fidelity is not installed (pip install torch-fidelity)"


@pytest.mark.metrics
def test_inception_with_weights_of_a_file(tmp_path, monkeypatch):
    """Random weights in the standard file's layout: FID of pictures from themselves is 0, from others the
    Frechet distance of torch-fidelity's own features."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        extractor = Extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    for module in extractor.modules():
        if isinstance(module, torch.nn.Conv2d):  # else next to nothing of the pictures reaches the end
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(extractor.state_dict(), tmp_path / "weights.pth")
    a, b = (torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (0, 1))
    own, other = (inception_figures(tmp_path / "weights.pth", a, x) for x in (a, b / 3))
    assert abs(own["FID"]) < 1e-3 < other["FID"] and own["Inception score"] >= 1
    features = [extractor(((x + 1) * 127.5).round().to(torch.uint8))[0] for x in (a, b / 3)]
    assert other["FID"] == pytest.approx(frechet_distance(*features), rel=1e-2)


# ------------------------------------------------------------ the card


@pytest.fixture
def model_copy(model_folder, tmp_path) -> Path:
    """The measured model in a folder of its own, without a card."""
    TextToImagePipeline.from_pretrained(model_folder).save_pretrained(tmp_path / "corgi")
    (tmp_path / "corgi" / "README.md").unlink()
    return tmp_path / "corgi"


MINE = """---
license: cc-by-4.0
tags: [cats]
---
# Mine

My own words.

## Limits

None that I know of.
"""


def test_the_card_of_a_report(model_copy, folder, figures, monkeypatch, capsys):
    """Front matter for the Hub, what people wrote as it was, a second run the same bytes."""
    report = folder / "report.json"
    (model_copy / "README.md").write_text(MINE)
    command(monkeypatch, "card", "--model", model_copy, "--report", report, "--training", "an hour on a core")
    assert "README.md" in capsys.readouterr().out
    text = (model_copy / "README.md").read_text()
    command(monkeypatch, "card", "--model", model_copy, "--report", report, "--training", "an hour on a core")
    assert (model_copy / "README.md").read_text() == text
    card = ModelCard(text)
    assert (card.data.license, card.data.tags, card.data.model_name) == ("cc-by-4.0", ["cats"], "corgi")
    results = {(r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results}
    for split, name in (("train", "seen captions"), ("validation", "held-out concepts")):
        found = figures["against captions"][name]["generated"]
        for metric in ("R@1", "R@5", "CLIP score"):
            assert results[split, metric] == pytest.approx(found[metric]["value"], abs=1e-5)
    halves = figures["against half of the training pictures"]["generated"]
    for metric in ("Frechet distance", "KID", "precision", "recall", "density", "coverage"):
        assert results["train", metric] == pytest.approx(halves[metric]["value"], abs=1e-5)
    assert len(results) == 3 * 3 + 6
    before, rest = card.text.split(BEGIN)
    block, after = rest.split(END)
    assert "My own words." in before and "None that I know of." in before and not after.strip()
    real = figures["against captions"]["held-out concepts"]["real"]["R@5"]
    for words in (
        "an hour on a core", "seeds 3 on", "2 steps of DDPMScheduler", "guidance 2", "21 pictures",
        "Apache-2.0",
        "52 training pictures", f"{real['value']:.0%} of real ones", shown(halves["Frechet distance"]),
        "not measured: ", f"| 900 .. 999 | {figures['validation loss']['seen captions']['mean'][9]:.4f} ±",
    ):  # fmt: skip
        assert words in block, words
    TextToImagePipeline.from_pretrained(model_copy)  # the folder still loads


def test_a_new_card_and_another_file(model_copy, folder, tmp_path, monkeypatch):
    """Without a card: the one that saving writes. The block may be moved, and stays where it is put."""
    report = folder / "report.json"
    command(monkeypatch, "card", "--model", model_copy, "--report", report, "--license", "mit",
            "--output", tmp_path / "deep" / "card.md")  # fmt: skip
    card = ModelCard.load(tmp_path / "deep" / "card.md")
    assert card.data.license == "mit" and card.data.library_name == "diffusers"
    assert (
        card.data.pipeline_tag == "text-to-image"
        and "# corgi" in card.text
        and card.text.count("## Results") == 1
    )
    assert not (model_copy / "README.md").exists()
    (model_copy / "README.md").write_text(f"# First\n\n{BEGIN}\nold\n{END}\n\n## Last\n")
    command(monkeypatch, "card", "--model", model_copy, "--report", report)
    text = (model_copy / "README.md").read_text()
    assert text.index("# First") < text.index(BEGIN) < text.index(END) < text.index("## Last")
    assert "\nold\n" not in text


def test_cards_that_cannot_be(model_copy, folder, tmp_path, monkeypatch):
    report = folder / "report.json"
    pipe = TextToImagePipeline.from_pretrained(model_copy)
    with torch.no_grad():
        pipe.unet.conv_in.bias += 1
    pipe.save_pretrained(tmp_path / "other")
    mine = (tmp_path / "other" / "README.md").read_bytes()
    (model_copy / "README.md").write_text(f"# Mine\n{BEGIN}\nno end\n")
    for arguments, message in (
        (["--report", tmp_path / "no.json"], "report must be the report.json of `report`, got"),
        (["--report", report, "--model", tmp_path / "nowhere"], "model must be a pipeline's folder, got"),
        (["--report", report, "--model", tmp_path / "other"], "measure them again"),
        (["--report", report], "mend it"),
    ):
        with pytest.raises(SystemExit, match="^training.evaluate card: ") as stopped:
            command(monkeypatch, "card", "--model", model_copy, *arguments)
        assert message in str(stopped.value) and "\n" not in str(stopped.value)
    assert (tmp_path / "other" / "README.md").read_bytes() == mine
    assert (model_copy / "README.md").read_text() == f"# Mine\n{BEGIN}\nno end\n"
