"""Training a CLIP and what its text tower learns from a sentence encoder."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_wordnet import FREQUENCY, write_npm, write_wordnet
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import BertConfig, BertModel, CLIPModel, CLIPTokenizer, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from training import clip, evaluate
from training.clip import ClipTrainingConfig, Towers, build_clip, learning_rate_factor, tokenize_by_length
from training.data import words
from training.data.emoji import unit_hash
from training.data.words import TEMPLATES, WordNet, read_wordnet
from training.objectives import distillation
from training.objectives.distillation import (
    SHARES,
    Distillation,
    DistillationBatches,
    Teacher,
    distillation_loss,
    distillation_texts,
    principal_basis,
)
from training.run import loop
from training.run.checkpoints import Checkpoints

TEXTS = ["a", "a very long dog, noto style, with a red car", "dog", "", "cat and dog", "the the the"]


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """A tiny BERT with random weights and a tokenizer of letters, saved."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    torch.manual_seed(5)
    letters = [chr(ord("a") + i) for i in range(26)]
    vocab = {
        t: i
        for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + x for x in letters)])
    }
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocab), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=256,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wordnet_folder(tmp_path_factory) -> Path:
    return write_wordnet(tmp_path_factory.mktemp("wordnet"))


@pytest.fixture
def wordnet(wordnet_folder: Path, monkeypatch: pytest.MonkeyPatch) -> WordNet:
    for module in (words, distillation):
        monkeypatch.setattr(module, "zipf_frequency", lambda text: FREQUENCY.get(text, 3.0))
    return read_wordnet(wordnet_folder)


def tiny_config(**settings: Any) -> ClipTrainingConfig:
    sizes = {"resolution": 16, "patch_size": 8, "vision_width": 16, "vision_layers": 1, "text_width": 16}
    sizes |= {"text_layers": 2, "head_dim": 8, "projection_dim": 16, "num_merges": 300}
    return ClipTrainingConfig(**({"output_dir": "unused"} | sizes | settings))


# The teacher


def test_the_teacher_is_the_mean_of_berts_states(teacher_folder: Path, tmp_path: Path) -> None:
    embeds = Teacher(teacher_folder, tmp_path).embed_texts(TEXTS)
    model = BertModel.from_pretrained(teacher_folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher_folder)
    for text, embed in zip(TEXTS, embeds, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]  # alone: no padding
        torch.testing.assert_close(embed, F.normalize(states.mean(0), dim=0), atol=1e-3, rtol=0)  # fp16


def test_the_teachers_cache_knows_texts_and_weights(teacher_folder: Path, tmp_path: Path) -> None:
    teacher = Teacher(teacher_folder, tmp_path / "cache")
    first = np.array(teacher.cached(TEXTS))
    teacher._fill = None  # type: ignore[method-assign, assignment]  # a second computation would fail
    np.testing.assert_array_equal(teacher.cached(TEXTS), first)
    with pytest.raises(TypeError):
        teacher.cached(TEXTS[::-1])
    other = Teacher(teacher_folder, tmp_path / "cache")
    assert other.key == teacher.key != Teacher(teacher_folder, tmp_path, "bf16").key
    model = BertModel.from_pretrained(teacher_folder)
    model.embeddings.word_embeddings.weight.data[7, 7] += 1
    model.save_pretrained(tmp_path / "changed")
    PreTrainedTokenizerFast.from_pretrained(teacher_folder).save_pretrained(tmp_path / "changed")
    assert Teacher(tmp_path / "changed").key != teacher.key


def test_a_missing_teacher_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no sentence encoder in"):
        Teacher(tmp_path)
    monkeypatch.setattr(distillation, "PACKAGE", "no_such_package")
    with pytest.raises(
        ValueError, match=r"no-such-package.* pip install -r training/requirements-words\.txt"
    ):
        Teacher()


def test_the_basis_is_that_of_the_singular_value_decomposition() -> None:
    embeds = np.random.default_rng(0).normal(size=(500, 12)) * np.linspace(0.1, 3, 12) + 0.5
    basis, energy = principal_basis(embeds.astype(np.float16), 5)
    _, values, rows = np.linalg.svd(embeds.astype(np.float16).astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(basis @ basis.T, rows[:5].T @ rows[:5], atol=1e-4)  # one subspace
    assert energy == pytest.approx((values[:5] ** 2).sum() / (values**2).sum(), rel=1e-5)
    wide, energy = principal_basis(embeds, 20)
    assert energy == 1.0
    torch.testing.assert_close(
        torch.from_numpy(embeds).float() @ wide, F.pad(torch.from_numpy(embeds).float(), (0, 8))
    )


# The texts


def test_distilled_texts_hold_no_word_kept_out(wordnet: WordNet) -> None:
    captions = ["", "dog, noto style", "a corgi"]
    lists = distillation_texts("words", captions, wordnet, ["corgi", "passenger"])
    assert list(lists) == list(SHARES) and lists["captions"] == captions
    assert "corgi" not in lists["things"] and "welsh corgi" not in lists["things"]
    assert {"dog", "domestic dog", "car", "taxi", "goose"} <= set(lists["things"])
    assert {"joy", "delight", "sad", "run", "sadly"} <= set(lists["words"])
    assert not {"joy", "entity", "toto", "motorcar"} & set(
        lists["things"]
    )  # a feeling, abstract, a name, rare
    assert "toto" not in lists["words"]
    assert "a web-footed bird" in lists["glosses"]
    assert not any("passengers" in text for text in lists["glosses"])  # the plural too
    assert "the emotion of great happiness" not in lists["glosses"]  # no thing
    everything = distillation_texts("words", captions, wordnet)
    assert "corgi" in everything["things"] and any("passengers" in text for text in everything["glosses"])
    assert all(any(word in prompt for word in lists["things"]) for prompt in lists["prompts"])
    assert all(len(set(own)) == len(own) for own in lists.values())
    assert distillation_texts("captions", [*captions, ""]) == {"captions": captions}


def test_batches_are_functions_of_seed_and_step_and_keep_the_shares() -> None:
    sizes = {"captions": 50, "things": 1000, "words": 7, "prompts": 300, "glosses": 1}
    batches = DistillationBatches(sizes, 20_000, seed=3)
    rows = batches.global_batch(11)
    assert torch.equal(rows, DistillationBatches(sizes, 20_000, seed=3).global_batch(11))
    assert not torch.equal(rows, batches.global_batch(12))
    assert torch.equal(DistillationBatches(sizes, 10_000, seed=3).global_batch(11, num_processes=2), rows)
    start = 0
    for kind, size in sizes.items():
        own = rows[(rows >= start) & (rows < start + size)]
        assert len(own) / 20_000 == pytest.approx(SHARES[kind], abs=0.012)  # 3.5 deviations
        counts = torch.bincount(own - start, minlength=size).float()
        assert counts.max() <= counts.mean() + 6 * counts.mean().sqrt()  # evenly within a kind
        start += size
    assert len(rows) == 20_000 and rows.max() < start


# The towers


@pytest.fixture(scope="module")
def towers(tokenizer: CLIPTokenizer) -> Towers:
    torch.manual_seed(6)
    model = build_clip(tiny_config(num_merges=1000)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def features(output: Any) -> torch.Tensor:
    return output.pooler_output if isinstance(output, BaseModelOutputWithPooling) else output


@torch.no_grad()
def test_towers_embed_as_transformers_clip_does(towers: Towers, tokenizer: CLIPTokenizer) -> None:
    plain = CLIPModel(towers.config).eval()
    plain.load_state_dict(towers.state_dict())
    images = torch.randn(2, 3, 16, 16)
    parts, place = tokenize_by_length(tokenizer, TEXTS, rows=4)
    assert [len(part) for part in parts] == [4, 2]
    texts, image_embeds = towers(parts, images)
    torch.testing.assert_close(
        image_embeds, F.normalize(features(plain.get_image_features(pixel_values=images)), dim=-1)
    )
    longest = [len(part[0]) for part in parts for _ in part]
    for text, row, length in zip(TEXTS, texts[place], [longest[i] for i in place], strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids  # alone
        pooled = F.normalize(features(plain.get_text_features(input_ids=ids)), dim=-1)[0]
        torch.testing.assert_close(row[0], pooled)
        count = ids.shape[1]
        padded = F.pad(ids, (0, length - count), value=tokenizer.eos_token_id)
        states = plain.text_model(input_ids=padded).last_hidden_state[0]
        if count > 2:
            mean = plain.text_projection(states[1 : count - 1].mean(0))
            torch.testing.assert_close(row[1], F.normalize(mean, dim=0))
        torch.testing.assert_close(row[2], F.normalize(plain.text_projection(states[-1]), dim=0))
    assert towers(parts)[1] is None


def test_texts_of_like_length_share_a_part(tokenizer: CLIPTokenizer) -> None:
    texts = [" ".join(["dog"] * (1 + 7 * i % 11)) for i in range(11)]  # two tokens a dog
    parts, place = tokenize_by_length(tokenizer, texts, rows=3)
    rows = [row for part in parts for row in part.tolist()]
    for text, at in zip(texts, place.tolist(), strict=True):
        ids = tokenizer(text).input_ids
        assert rows[at][: len(ids)] == ids and set(rows[at][len(ids) :]) <= {tokenizer.eos_token_id}
    assert [part.shape for part in parts] == [(3, 8), (3, 14), (3, 20), (2, 24)]


def test_distillation_loss_is_one_less_the_cosine() -> None:
    east, north, west = torch.eye(2)[0], torch.eye(2)[1], -torch.eye(2)[0]
    texts = torch.stack([torch.stack([east, north, west]), torch.stack([north, north, east])])  # (2, 3, 2)
    targets = torch.stack([3 * east, 5 * north])
    # first kind: 0 and 0; states: 1, 2 and 0, 1
    assert float(distillation_loss(texts, targets)) == pytest.approx(0.0)
    assert float(distillation_loss(texts, targets, 0.5)) == pytest.approx(0.5 * (1 + 2 + 0 + 1) / 4)
    assert float(distillation_loss(texts.flip(1), targets)) == pytest.approx((2 + 1) / 2)


def test_the_learning_rate_warms_up_twice() -> None:
    factor = [learning_rate_factor(step, warmup=4, text_steps=10, total=34) for step in range(34)]
    assert factor[:10] == [0.25, 0.5, 0.75] + [1.0] * 7
    assert factor[10:14] == [0.25, 0.5, 0.75, 1.0]
    assert factor[24] == pytest.approx(0.5) and factor[14] == 1.0 and factor[33] < 0.01
    plain = [learning_rate_factor(step, warmup=4, text_steps=0, total=24) for step in range(24)]
    assert plain == factor[10:]


@torch.no_grad()
def test_the_table_starts_with_the_teachers_view(
    teacher_folder: Path,
    tmp_path: Path,
    wordnet_folder: Path,
    wordnet: WordNet,
    tokenizer: CLIPTokenizer,
) -> None:
    folders = {"cache_dir": str(tmp_path), "teacher": str(teacher_folder), "wordnet_dir": str(wordnet_folder)}
    config = tiny_config(num_merges=1000, distill="words", **folders)
    learnt = Distillation(config, ["", "dog"], concepts=False)
    vocabulary = tokenizer.get_vocab()
    whole = sorted(t for t in vocabulary if re.fullmatch("[a-z]{3,}</w>", t) and "s" not in t)
    pieces = sorted(t for t in vocabulary if re.fullmatch("[a-z]{2,}", t) and t + "</w>" not in whole)
    learnt.kept_out = [whole[0].removesuffix("</w>")]
    model = build_clip(config)
    before = model.text_model.get_input_embeddings().weight.clone()
    learnt.start_table(model.text_model, tokenizer)
    after = model.text_model.get_input_embeddings().weight
    untouched = [vocabulary[t] for t in (whole[0], tokenizer.bos_token, tokenizer.eos_token)]
    assert torch.equal(after[untouched], before[untouched])
    taught = [*whole[1:40], *pieces[:40]]
    rows = after[[vocabulary[t] for t in taught]]
    everything = [tokenizer.decode([i]).strip() for i in range(len(vocabulary))]
    own = learnt.teacher.embed_texts([t.removesuffix("</w>") for t in taught])
    expected = (own - learnt.teacher.embed_texts(everything).mean(0)) @ learnt.basis
    torch.testing.assert_close(rows / rows.norm(), expected / expected.norm(), atol=2e-3, rtol=0)
    assert float(after.std()) == pytest.approx(float(before.std()), rel=0.1)


# The recipe


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory) -> Path:
    """Coloured squares without concepts."""
    rng = np.random.default_rng(0)
    rows = [
        {"image": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), "caption": f"{text}, noto style"}
        for text in ("dog", "car", "taxi", "goose", "red dog", "sad goose", "joy", "entity")
    ]
    schema = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    folder = tmp_path_factory.mktemp("pictures")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows, features=schema)}).save_to_disk(
        str(folder)
    )
    return folder


@pytest.fixture
def train(
    picture_folder: Path, teacher_folder: Path, wordnet_folder: Path, wordnet: WordNet, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:  # fmt: skip
    """train(name, **settings) -> the folder of the CLIP."""

    def run(name: str, **settings: Any) -> Path:
        sizes = {
            "output_dir": tmp_path / name, "dataset": picture_folder, "cache_dir": tmp_path / "cache",
            "resolution": 16, "patch_size": 8, "vision_width": 16, "vision_layers": 1, "text_width": 16,
            "text_layers": 1, "head_dim": 8, "projection_dim": 16, "num_merges": 300, "train_batch_size": 4,
            "distill_batch_size": 16, "distill": "words", "teacher": teacher_folder,
            "wordnet_dir": wordnet_folder, "text_steps": 4, "max_train_steps": 8, "lr_warmup_steps": 2,
            "checkpointing_steps": 3,
        }  # fmt: skip
        argv = [f"--{key}={value}" for key, value in (sizes | settings).items()]
        monkeypatch.setattr(sys, "argv", ["training.clip", *argv])
        clip.main()
        return tmp_path / name / "clip"

    return run


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(train: Any) -> None:
    whole = load_file(train("whole") / "model.safetensors")

    class Stop(Exception): ...

    class Stopping(Checkpoints):
        def save(self, step: int, *others: Any, **settings: Any) -> Any:
            super().save(step, *others, **settings)
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Checkpoints", Stopping)
        for settings in ({}, {"resume_from_checkpoint": "latest"}):  # stops at step 3, on text, and at step 6
            with pytest.raises(Stop):
                train("parts", **settings)
    parts = load_file(train("parts", resume_from_checkpoint="latest") / "model.safetensors")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_the_temperature_learns(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first gradient in closed form: of L = (CE over rows + CE over columns)/2 of the logits
    e^l cos(image_i, text_j), dL/dl = mean_i sum_j (P_ij + Q_ij - 2 [i = j]) logits_ij / 2, P the softmax over
    texts and Q over images."""
    seen: dict[str, Any] = {}
    forward, tokenize = Towers.forward, clip.tokenize_by_length

    def watched(self: Towers, *given: Any) -> Any:
        output = forward(self, *given)
        seen.setdefault("scale", self.logit_scale.detach().exp())
        seen.setdefault("embeds", [part.detach() for part in output])
        return output

    def placed(*given: Any, **settings: Any) -> Any:
        parts, place = tokenize(*given, **settings)
        seen.setdefault("place", place)
        return parts, place

    def keep_gradient(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        (scale,) = (p for group in optimizer.param_groups for p in group["params"] if p.ndim == 0)
        seen.setdefault("gradient", None if scale.grad is None else scale.grad.clone())

    monkeypatch.setattr(Towers, "forward", watched)
    monkeypatch.setattr(clip, "tokenize_by_length", placed)
    hook = register_optimizer_step_pre_hook(keep_gradient)
    try:
        train("warm", distill="none", text_steps=0, max_train_steps=1, max_grad_norm=1e9)
    finally:
        hook.remove()
    texts, images = seen["embeds"]
    logits = seen["scale"] * images @ texts[seen["place"], 0].T
    target = torch.eye(len(logits))
    expected = ((logits.softmax(1) + logits.softmax(0) - 2 * target) * logits).sum() / (2 * len(logits))
    assert seen["gradient"] is not None and abs(expected) > 1e-3
    torch.testing.assert_close(seen["gradient"], expected, rtol=1e-3, atol=1e-5)


def test_text_steps_leave_the_image_tower_alone(train: Any) -> None:
    torch.manual_seed(0)
    short = load_file(train("short", text_steps=7) / "model.safetensors")
    longer = load_file(train("longer", text_steps=7, learning_rate=1e-6) / "model.safetensors")
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    # one step with pictures at most: Adam's first step moves no weight further than the learning rate
    assert float((short[name] - longer[name]).abs().max()) <= 1.1e-3
    assert float((short["text_projection.weight"] - longer["text_projection.weight"]).abs().max()) > 2e-3


def test_the_tower_learns_words_of_no_caption_from_the_teacher(
    train: Any, teacher_folder: Path, tmp_path: Path
) -> None:
    """By the saved CLIP, read with transformers' own class, they are as far apart as the teacher has them."""
    unseen = ["domestic dog", "cab", "welsh corgi", "delight", "a web-footed bird"]
    distances = {}
    for distill in ("none", "captions", "words"):
        folder = train(
            distill, distill=distill, text_steps=0 if distill == "none" else 45,
            max_train_steps=60, learning_rate=5e-3, checkpointing_steps=1000,
        )  # fmt: skip
        model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
        assert '"CLIPModel"' in (folder / "config.json").read_text()
        teacher = Teacher(teacher_folder, tmp_path / "cache").embed_texts(unseen)
        with torch.no_grad():
            ids = tokenizer(unseen, padding=True, return_tensors="pt").input_ids
            own = F.normalize(features(model.get_text_features(input_ids=ids)), dim=-1)
        kinds = (own @ own.T, teacher @ teacher.T)
        distances[distill] = float((kinds[0] - kinds[1]).abs().mean())
    assert distances["words"] < 0.5 * distances["none"]
    assert distances["words"] < 0.7 * distances["captions"]


def test_a_text_tower_that_is_given_stays_and_the_pictures_come_to_it(
    train: Any, picture_folder: Path
) -> None:
    plain = {"distill": "none", "text_steps": 0}
    first = train("first", **plain)
    lit = {**plain, "text_encoder": first, "seed": 1, "text_width": 32}  # its own sizes count, not text_width
    given = load_file(first / "model.safetensors")
    steps = {"max_train_steps": 60, "learning_rate": 1e-2, "shift": 0, "noise": 0.0, "canonical_caption": 1.0}
    folder = train("second", **lit, **steps)
    trained = load_file(folder / "model.safetensors")
    assert given.keys() == trained.keys()
    for name, tensor in trained.items():
        if name.startswith("text"):
            assert torch.equal(tensor, given[name]), name
    data = datasets.load_from_disk(str(picture_folder))["train"]
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    pictures = torch.stack([torch.from_numpy(np.array(image)) for image in data["image"]])
    pixels = pictures.permute(0, 3, 1, 2) / 127.5 - 1
    ids = tokenizer(list(data["caption"]), padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    found = (logits.argmax(1) == torch.arange(len(data))).float().mean()
    assert found >= 0.75, found  # 1/8 by chance


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"text_encoder": "nowhere", "distill": "none", "text_steps": 0}, "text_encoder must be .*'nowhere'"),
        ({"text_encoder": "models/emoji"}, "distill must be none with text_encoder, got 'words'"),
        ({"distill": "glosses"}, "distill must be one of none, captions, words, got 'glosses'"),
        ({"text_steps": 8}, "text_steps must be .* fewer than max_train_steps, got 8"),
        ({"distill": "none"}, "text_steps must be 0, .*got 4"),
        ({"distill_batch_size": 0}, "distill_batch_size must be at least 1, got 0"),
        ({"wordnet_dir": "nowhere"}, r"wordnet_dir: there is no data\.noun in 'nowhere'"),
    ],
)
def test_settings_that_cannot_be(train: Any, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train("refused", **setting)


# The figures


@torch.no_grad()
def test_the_figures_of_words(
    teacher_folder: Path, wordnet_folder: Path, wordnet: WordNet, towers: Towers, tokenizer: CLIPTokenizer,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """`training.evaluate words` against a brute-force count, of the tower and of the teacher."""
    names = {
        "A": ["dog"],
        "B": ["car", "red car"],
        "C": ["goose"],
        "D": ["joy"],
        "E": ["entity"],
        "F": ["taxi"],
    }
    row = {"image": np.zeros((16, 16, 3), np.uint8)}
    rows = [row | {"caption": n, "name": n, "concept": c} for c, own in names.items() for n in own]
    schema = datasets.Features(
        {"image": datasets.Image()} | {k: datasets.Value("string") for k in ("caption", "name", "concept")}
    )
    parts = {s: datasets.Dataset.from_list(rows, features=schema) for s in words.SPLITS}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "data"))
    CLIPModel(towers.config).save_pretrained(tmp_path / "clip")
    plain = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    plain.load_state_dict(towers.state_dict())
    plain.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    (tmp_path / "tiny_teacher").mkdir()
    (tmp_path / "tiny_teacher" / "__init__.py").touch()
    shutil.copytree(teacher_folder, tmp_path / "tiny_teacher" / "model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(distillation, "PACKAGE", "tiny_teacher")
    monkeypatch.setattr(words, "KEPT_OUT", 3)
    argv = {"clip": tmp_path / "clip", "dataset": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    argv |= {"npm_dir": write_npm(tmp_path / "npm"), "wordnet_dir": wordnet_folder, "json": tmp_path / "out"}
    monkeypatch.setattr(
        sys, "argv", ["evaluate", "words", "--teacher", *(f"--{k}={v}" for k, v in argv.items())]
    )
    evaluate.main()
    figures = json.loads((tmp_path / "out").read_text())
    argv["model"] = argv.pop("clip")  # without --clip, the tower of the model
    monkeypatch.setattr(sys, "argv", ["evaluate", "words", *(f"--{k}={v}" for k, v in argv.items())])
    evaluate.main()
    assert json.loads((tmp_path / "out").read_text())["tower"] == figures["tower"]

    def clip_embeds(text: str) -> torch.Tensor:
        ids = tokenizer(text, return_tensors="pt").input_ids
        return F.normalize(features(plain.get_text_features(input_ids=ids)), dim=-1)[0]

    def ensemble(embed: Any, name: str) -> torch.Tensor:
        return F.normalize(sum(embed(t.format(name)) for t in TEMPLATES), dim=0)

    teacher = Teacher(teacher_folder, tmp_path / "cache")
    meanings = {"automobile": "B", "auto": "B", "domestic dog": "A", "delight": "D", "cab": "F"}  # synonyms
    taught = {w: c for w, c in meanings.items() if unit_hash(w, "kept out") >= 0.2}
    assert figures["words"]["taught synonyms"] == len(taught) and figures["words"]["kept out"] == 3
    assert figures["concepts"] == 6
    for name, embed in (("tower", clip_embeds), ("teacher", lambda text: teacher.embed_texts([text])[0])):
        scores = {}  # of each concept, its best name's mean over the templates
        for word in taught:
            scores[word] = {
                c: max(float(embed(word) @ ensemble(embed, n)) for n in own) for c, own in names.items()
            }
        ranks = [sorted(s, key=s.__getitem__, reverse=True).index(taught[w]) for w, s in scores.items()]
        assert figures[name]["taught synonyms"] == {
            f"top {n}": pytest.approx(sum(rank < n for rank in ranks) / len(ranks)) for n in (1, 5)
        }
    ratio = figures["tower"]["taught synonyms"]["top 5"] / figures["teacher"]["taught synonyms"]["top 5"]
    assert figures["share of the teacher's top 5"]["taught synonyms"] == pytest.approx(ratio)
    assert "states:" in capsys.readouterr().out
