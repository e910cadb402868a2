"""Words to conditioning, against transformers' own towers."""

import copy

import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from pipelines.drawing.text import context_length, encode_text

PROMPT = "a corgi in a party hat"
LONG = "a red and blue corgi " * 20


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_null_prompt_goes_through_the_encoder(pipeline):
    null, _, _ = encode_text(pipeline.tokenizer, pipeline.text_encoder, [""])
    _, negative = pipeline.encode_prompt(PROMPT)
    assert torch.equal(negative, null) and null.abs().max() > 0.1
    call = {"output_type": "pt"}
    plain = pipeline(PROMPT, generator=seeded(), **call).images
    assert torch.equal(plain, pipeline(PROMPT, negative_prompt="", generator=seeded(), **call).images)
    given = pipeline(PROMPT, negative_prompt_embeds=null, generator=seeded(), **call).images
    assert torch.equal(plain, given)
    assert (
        plain - pipeline(PROMPT, negative_prompt="a cat", generator=seeded(), **call).images
    ).abs().max() > 1e-3


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("end", ["legacy", "right", "wrong"])
def test_pooled_text_is_the_state_at_the_first_end_of_text(tokenizer, make_text_encoder, cls, end):
    """transformers' own pooled output where it pools rightly; the same truth where the id is wrong."""
    prompts = ["", "a cat", PROMPT, LONG]
    right = make_text_encoder(cls, eos_token_id=tokenizer.eos_token_id)
    encoder = make_text_encoder(
        cls, eos_token_id={"legacy": 2, "right": tokenizer.eos_token_id, "wrong": 777}[end]
    )
    encoder.load_state_dict(right.state_dict())
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        states, pooled, mask = encode_text(tokenizer, encoder, prompts)
        truth = (encoder if end == "legacy" else right)(tokens.input_ids)
        theirs = truth.text_embeds if cls is CLIPTextModelWithProjection else truth.pooler_output
        torch.testing.assert_close(pooled, theirs, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(states, truth.last_hidden_state, atol=1e-6, rtol=1e-5)
    first_end = (tokens.input_ids == tokenizer.eos_token_id).int().argmax(1)
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == (first_end + 1).tolist()
    assert mask.sum(1)[0] == 2 and mask.sum(1)[3] == 32 and (mask.int().diff(dim=1) <= 0).all()


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("skip", [0, 1, 3])
def test_clip_skip_equals_a_tower_without_those_layers(tokenizer, make_text_encoder, cls, skip):
    encoder = make_text_encoder(cls)
    shorter = copy.deepcopy(encoder)
    tower = getattr(shorter, "text_model", shorter)
    tower.encoder.layers = tower.encoder.layers[: 3 - skip]
    with torch.no_grad():
        states, pooled, _ = encode_text(tokenizer, encoder, [PROMPT, ""], clip_skip=skip)
        tokens = tokenizer([PROMPT, ""], padding="max_length", return_tensors="pt")
        torch.testing.assert_close(states, shorter(tokens.input_ids).last_hidden_state, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(pooled, encode_text(tokenizer, encoder, [PROMPT, ""])[1])
    with pytest.raises(ValueError, match="clip_skip"):
        encode_text(tokenizer, encoder, [PROMPT], clip_skip=4)


def test_clip_skip_holds_for_both_sides(pipeline):
    prompt, negative = pipeline.encode_prompt(PROMPT, clip_skip=1, negative_prompt="a cat")
    for embeds, text in ((prompt, PROMPT), (negative, "a cat")):
        expected = encode_text(pipeline.tokenizer, pipeline.text_encoder, [text], clip_skip=1)[0]
        assert torch.equal(embeds, expected)
        assert (embeds - encode_text(pipeline.tokenizer, pipeline.text_encoder, [text])[0]).abs().max() > 1e-2
    skipped = pipeline(
        PROMPT, clip_skip=1, generator=seeded(), negative_prompt="a cat", output_type="pt"
    ).images
    call = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "output_type": "pt"}
    assert torch.equal(skipped, pipeline(**call, generator=seeded()).images)


def test_context_is_the_smaller_of_tokenizer_and_tower(tokenizer, make_text_encoder):
    long_tokenizer = copy.deepcopy(tokenizer)
    long_tokenizer.model_max_length = 77
    assert context_length(long_tokenizer, make_text_encoder()) == 32
    assert context_length(tokenizer, make_text_encoder(max_position_embeddings=77)) == 32
    assert encode_text(long_tokenizer, make_text_encoder(), [LONG])[0].shape == (1, 32, 32)
