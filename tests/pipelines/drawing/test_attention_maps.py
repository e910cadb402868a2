"""Cross-attention maps against torch's own attention, and their drawing."""

import importlib
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image

from pipelines.drawing.attention_maps import AttentionMaps, draw_attention, word_places

PROMPT = "a corgi in a party hat"


def test_places_are_those_of_the_words_tokens(tokenizer):
    ids = tokenizer(PROMPT).input_ids
    for word in ("corgi", "party hat", "a", "HAT"):
        own = [tokenizer(part).input_ids[1:-1] for part in [word]][0]
        found = [i for i in range(len(ids)) if ids[i : i + len(own)] == own]
        assert word_places(tokenizer, PROMPT, word) == [i + k for i in found for k in range(len(own))]
    assert len(word_places(tokenizer, PROMPT, "corgi")) > 1  # several tokens, or this shows nothing
    for word in ("cat", "part", ""):
        with pytest.raises(ValueError, match="words must be words of the prompt"):
            word_places(tokenizer, PROMPT, word)


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "diffusers"])
def test_maps_are_the_attention_that_the_prompts_rows_pay(make_pipeline, make_unet, theirs):
    """The matrix itself comes out of torch's attention when the values are the identity."""
    unet = make_unet()
    if theirs:
        state, unet = unet.state_dict(), make_unet(UNet2DConditionModel)
        unet.load_state_dict(state)
    pipe = make_pipeline(unet=unet)
    seen: list[torch.Tensor] = []

    def capture(layer, args, kwargs):
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        q, k = (
            t.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for t in (layer.to_q(args[0]), layer.to_k(text))
        )
        seen.append(
            F.scaled_dot_product_attention(q, k, torch.eye(k.shape[2]).expand(*k.shape[:3], -1)).mean(1)
        )

    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    hooks = [layer.register_forward_pre_hook(capture, with_kwargs=True) for layer in layers]
    call = {"num_images_per_prompt": 2, "num_inference_steps": 2, "height": 16, "width": 32}
    call |= {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    with AttentionMaps(pipe, PROMPT, ["corgi", "hat"]) as maps:
        drawn = pipe(PROMPT, callback_on_step_end=maps, **call).images
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * len(layers) and len(layers) > 2
    for word in ("corgi", "hat"):
        places = word_places(pipe.tokenizer, PROMPT, word)
        grids = [m[2:, :, places].sum(-1).reshape(2, 1, 8, 16) for m in seen]  # [negative, prompt], two each
        expected = torch.cat([F.interpolate(g, (16, 32), mode="bilinear") for g in grids], dim=1).mean(1)
        torch.testing.assert_close(maps[word], expected, atol=1e-5, rtol=1e-4)
        assert maps[word].std() > 1e-4
    call["generator"] = torch.Generator().manual_seed(0)
    assert torch.equal(pipe(PROMPT, **call).images, drawn)  # the pictures are as without
    assert len(maps.steps) == 2  # and the hooks are gone


def test_a_word_beyond_the_context_is_refused(pipeline):
    with pytest.raises(ValueError, match="within the 32 tokens"):
        AttentionMaps(pipeline, "the " * 40 + "hat", ["hat"])


def test_drawing_covers_the_hottest_place_and_leaves_the_coldest():
    image = Image.fromarray(np.full((32, 32, 3), 200, dtype=np.uint8))
    attention = torch.zeros(32, 32)
    attention[8:24, 8:24] = 0.02
    pixels = np.asarray(draw_attention(image, attention, strength=1.0)).astype(int)
    assert (pixels[0, 0] == 200).all() and (pixels[31, 31] == 200).all()
    assert np.abs(pixels[16, 16] - np.array([252, 255, 164])).max() <= 2  # the hot end of inferno
    half = np.asarray(draw_attention(image, attention, strength=0.5)).astype(int)
    assert np.abs(half[16, 16] - (pixels[16, 16] + 200) / 2).max() <= 1


def test_the_module_of_before_still_imports_and_names_the_new_one() -> None:
    sys.modules.pop("pipelines.attention_maps", None)
    with pytest.warns(FutureWarning, match="import from pipelines.drawing.attention_maps") as warned:
        old = importlib.import_module("pipelines.attention_maps")
    assert len(warned) == 1
    assert old.AttentionMaps is AttentionMaps and old.draw_attention is draw_attention
