"""The model card: what a new one says, what is kept of an old one, and taken over from another model's."""

import json

import pytest
from huggingface_hub import EvalResult, ModelCard

from pipelines import TextToImagePipeline


def test_a_new_card_has_the_front_matter_of_the_page(pipeline, tmp_path):
    result = EvalResult("text-to-image", "emoji", "64 emoji", "kid", 0.0123, metric_name="KID")
    fields = {
        "license": "apache-2.0",
        "base_model": "me/base",
        "datasets": ["me/emoji"],
        "eval_results": [result],
    }
    pipeline.save_pretrained(tmp_path / "corgi", model_card=fields)
    card = ModelCard.load(tmp_path / "corgi/README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == "me/base"
    assert card.data.datasets == ["me/emoji"] and card.data.eval_results == [result]
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert card.data.widget == [{"text": "a corgi in a party hat"}]
    for shown in (
        "# corgi",
        "trust_remote_code=True",
        "guidance_scale=3.0",
        "me/emoji",
        "| KID | 0.0123 | 64 emoji |",
    ):
        assert shown in card.text


def test_a_card_that_is_there_keeps_every_byte(pipeline, tmp_path):
    mine = b"---\r\n# mine\r\nlicense: mit\r\ntags: [cats]\r\n---\r\nMy words.\r\n"
    (tmp_path / "README.md").write_bytes(mine)
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == mine
    pipeline.save_pretrained(tmp_path, model_card={"datasets": ["me/emoji"]})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == "My words."
    assert (card.data.license, card.data.tags, card.data.datasets) == ("mit", ["cats"], ["me/emoji"])
    (tmp_path / "other.md").write_text("# Another\n")
    pipeline.save_pretrained(tmp_path, model_card=tmp_path / "other.md")
    assert (tmp_path / "README.md").read_text() == "# Another\n"


def test_the_licence_travels_and_the_results_do_not(pipeline, tmp_path):
    result = EvalResult("text-to-image", "emoji", "64 emoji", "kid", 0.0123)
    fields = {"license": "cc-by-4.0", "datasets": ["me/emoji"], "eval_results": [result]}
    pipeline.save_pretrained(tmp_path / "first", model_card=fields)
    loaded = TextToImagePipeline.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    card = ModelCard.load(tmp_path / "second/README.md")
    assert (card.data.license, card.data.datasets, card.data.eval_results) == (
        "cc-by-4.0",
        ["me/emoji"],
        None,
    )
    (tmp_path / "first/README.md").write_text("---\nlicense: [\n---\n")  # broken front matter stops nothing
    TextToImagePipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "third")


@pytest.mark.parametrize(
    "front",
    [
        "widget: a cat",
        "widget: [a cat]",
        "license: 42",
        "datasets: [{a: b}]",
        "base_model: 3",
        "eval_results: 3",
        "- no\n- mapping",
        "name: caf\xe9",  # in Latin-1
    ],
)
def test_the_broken_card_of_another_model_stops_nothing(pipeline, tmp_path, front):
    pipeline.save_pretrained(tmp_path / "first")
    (tmp_path / "first/README.md").write_bytes(f"---\n{front}\n---\n# Theirs\n".encode("latin-1"))
    TextToImagePipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    card = ModelCard.load(tmp_path / "second/README.md")
    assert card.data.widget == [{"text": "a corgi in a party hat"}] and "# second" in card.text
    assert (card.data.license, card.data.datasets, card.data.base_model) == (None, None, None)


def test_bytes_that_are_no_text_are_kept(pipeline, tmp_path):
    mine = "# Caf\xe9\n".encode("latin-1")
    (tmp_path / "README.md").write_bytes(mine)
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == mine
    pipeline.save_pretrained(tmp_path, model_card={"license": "mit"})
    assert (tmp_path / "README.md").read_bytes().endswith(mine)


def test_the_prompt_is_quoted_as_python_reads_it(pipeline, tmp_path):
    prompt = 'a "red" heart\nand a back\\slash'
    pipeline.save_pretrained(tmp_path, model_card={"widget": [{"text": prompt}]})
    (line,) = (line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("pipe("))
    assert json.loads(line.removeprefix("pipe(").split(", guidance_scale")[0]) == prompt


def test_cards_that_cannot_be_are_refused_before_work(pipeline, tmp_path):
    (tmp_path / "latin.md").write_bytes(b"# caf\xe9")
    for card, message in (
        (3, "model_card.*got 3"),
        (tmp_path / "latin.md", "model_card.*UTF-8.*latin.md"),
        ({"eval_results": 3}, "eval_results"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.save_pretrained(tmp_path / "new", model_card=card)
    assert not (tmp_path / "new").exists()
    pipeline.save_pretrained(tmp_path / "old")
    (tmp_path / "old/README.md").write_text("---\nlicense: [\n---\n# Mine\n")
    pipeline.save_pretrained(tmp_path / "old")  # as it is it may stay
    with pytest.raises(ValueError, match=r"(?s)model_card.*front matter cannot be read.*Mend it"):
        pipeline.save_pretrained(tmp_path / "old", model_card={"license": "mit"})
