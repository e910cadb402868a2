"""`ConditionalUNet` against diffusers' `UNet2DConditionModel`; keys of our own against formulas written out.

Both classes get the same random weights (norms and biases included, so that none of them can be swapped or
lost unseen); outputs, and gradients, must agree to 1e-5 of the largest value.
"""

import inspect
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipelines.components.conditional_unet import Attention, ConditionalUNet, ResnetBlock2D

OWN_KEYS = {
    "patch_size",
    "self_conditioning",
    "text_concat_channels",
    "pooled_text_time_embedding",
    "pooled_text_dim",
}

# The published shapes at a tenth of their width, each with all four levels and their quirks.
FULL: dict[str, Any] = {
    "block_out_channels": (32, 64, 96, 96),
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}
SD_1_5 = {**FULL, "attention_head_dim": 8}
SD_2_1 = {**FULL, "attention_head_dim": [2, 4, 8, 8], "use_linear_projection": True, "upcast_attention": True}
SD_INPAINT = {**SD_1_5, "in_channels": 9}
X4_UPSCALER = {
    **SD_1_5,
    "in_channels": 7,
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    "only_cross_attention": [True, True, True, False],
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}

# A small one, for everything else.
SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": (2, 4),
}
TIME_DIM = 64  # of SMALL


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def reference(**config: Any) -> UNet2DConditionModel:
    """diffusers' model with no parameter left at a round number."""
    model = UNet2DConditionModel(**config).eval()
    generator = seeded(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def twins(**config: Any) -> tuple[UNet2DConditionModel, ConditionalUNet]:
    """diffusers' model and ours, with the same weights."""
    theirs = reference(**config)
    ours = ConditionalUNet(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(config: dict[str, Any], size: tuple[int, int] = (16, 8), batch: int = 2) -> dict[str, Any]:
    """x_t, a timestep for each picture, and text states."""
    return {
        "sample": randn(batch, config.get("in_channels", 4), *size, seed=2),
        "timestep": torch.tensor([3, 871, 40, 500, 999, 0, 77, 250])[:batch],
        "encoder_hidden_states": randn(batch, 7, max(np.atleast_1d(config["cross_attention_dim"])), seed=3),
    }


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Elementwise within `tolerance` of the largest expected value, which must be worth comparing with."""
    assert actual.shape == expected.shape
    size = expected.abs().max().item()
    assert 1e-9 < size < 1e9
    assert (actual - expected).abs().max().item() <= tolerance * size


NESTED = {"layers_per_block": (2, 1), "transformer_layers_per_block": [[1, 2], [2]]}

# name: (config, further inputs)
SHARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd 1.5": (SD_1_5, {}),
    "sd 2.1": (SD_2_1, {}),
    "sd 1.5 inpainting": (SD_INPAINT, {}),
    "x4 upscaler": (X4_UPSCALER, {"class_labels": torch.tensor([20, 350])}),
    "scale shift": ({**SMALL, "resnet_time_scale_shift": "scale_shift"}, {}),
    "class timestep": ({**SMALL, "class_embed_type": "timestep"}, {"class_labels": torch.tensor([5, 900])}),
    "class table": ({**SMALL, "num_class_embeds": 10}, {"class_labels": torch.tensor([0, 9])}),
    "guidance embedding": ({**SMALL, "time_cond_proj_dim": 10}, {"timestep_cond": randn(2, 10)}),
    "two transformer layers": ({**SMALL, "transformer_layers_per_block": 2}, {}),
    "transformer layers per level": ({**SMALL, "transformer_layers_per_block": (1, 3)}, {}),
    "transformer layers per layer": (
        {**SMALL, **NESTED, "reverse_transformer_layers_per_block": [[1, 2], [2, 1, 1]]},
        {},
    ),
    "layers per level": ({**SMALL, "layers_per_block": (1, 3)}, {}),
    "text width per level": ({**SMALL, "cross_attention_dim": [12, 12]}, {}),
    "only cross attention": ({**SMALL, "only_cross_attention": True}, {}),
    "heads that do not divide": ({**SMALL, "attention_head_dim": 3}, {}),
    "middle without attention": ({**SMALL, "mid_block_type": "UNetMidBlock2D"}, {}),
    "sines first": ({**SMALL, "flip_sin_to_cos": False, "freq_shift": 1}, {}),
    "odd time width": ({**SMALL, "block_out_channels": (15, 30), "norm_num_groups": 5}, {}),
    "time width": ({**SMALL, "time_embedding_dim": 20}, {}),
    "norm": ({**SMALL, "norm_eps": 0.1, "norm_num_groups": 4}, {}),
    "fractional timestep": (SMALL, {"timestep": 12.625}),
    "one timestep": (SMALL, {"timestep": 44}),
    "timestep of no dimension": (SMALL, {"timestep": torch.tensor(44)}),
}


@pytest.mark.parametrize("name", SHARED)
def test_same_output_as_diffusers(name: str) -> None:
    config, more = SHARED[name]
    theirs, ours = twins(**config)
    with torch.no_grad():
        expected = theirs(**{**inputs(config), **more}).sample
        assert_close(ours(**{**inputs(config), **more}).sample, expected)
        assert_close(ours(**{**inputs(config), **more}, return_dict=False)[0], expected)


@pytest.mark.parametrize("size", [(16, 16), (13, 22), (9, 7), (1, 3)])
def test_same_output_at_any_size(size: tuple[int, int]) -> None:
    theirs, ours = twins(**SD_1_5)
    with torch.no_grad():
        given = inputs(SD_1_5, size)
        assert_close(ours(**given).sample, theirs(**given).sample)


def test_same_output_without_any_attention() -> None:
    config = {
        **SMALL,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
    }
    theirs, ours = twins(**config)
    given = {**inputs(config), "encoder_hidden_states": None}
    with torch.no_grad():
        assert_close(ours(**given).sample, theirs(**given).sample)


def test_same_dropout_as_diffusers() -> None:
    theirs, ours = twins(**SMALL, dropout=0.3)
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        outputs.append(model.train()(**inputs(SMALL)).sample)
    assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[1], ours.eval()(**inputs(SMALL)).sample, rtol=0.01)


@pytest.mark.parametrize("config", [SMALL, {**SMALL, "use_linear_projection": True}], ids=["conv", "linear"])
def test_same_gradients_as_diffusers(config: dict[str, Any]) -> None:
    theirs, ours = twins(**config)
    gradients = []
    for model in (theirs, ours):
        given = inputs(config)
        sample, text = given["sample"].requires_grad_(), given["encoder_hidden_states"].requires_grad_()
        (model(**given).sample * randn(2, 4, 16, 8, seed=8)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        grads = {name: p.grad for name, p in model.named_parameters()}
        gradients.append({**grads, "sample": sample.grad, "text": text.grad})
    largest = max(g.abs().max().item() for g in gradients[0].values())
    for name, expected in gradients[0].items():
        # A bias in front of a GroupNorm of one channel a group has no gradient but rounding noise.
        atol = 1e-5 * max(expected.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("config", [SD_1_5, X4_UPSCALER], ids=["sd 1.5", "x4 upscaler"])
def test_same_seed_same_weights(config: dict[str, Any]) -> None:
    """Makes training runs of the two classes comparable, and optimizer states, which go by the order of the
    parameters, exchangeable."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config).state_dict()
    torch.manual_seed(0)
    ours = ConditionalUNet(**config).state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_keys_and_defaults_are_those_of_diffusers() -> None:
    theirs = inspect.signature(UNet2DConditionModel.__init__).parameters
    ours = inspect.signature(ConditionalUNet.__init__).parameters
    assert {k: p.default for k, p in ours.items() if k not in OWN_KEYS} == {
        k: p.default for k, p in theirs.items()
    }
    assert {k: ours[k].default for k in OWN_KEYS} == {
        "patch_size": 1,
        "self_conditioning": False,
        "text_concat_channels": 0,
        "pooled_text_time_embedding": False,
        "pooled_text_dim": None,
    }


FOLDERS = [SD_2_1, X4_UPSCALER]


@pytest.mark.parametrize("config", FOLDERS, ids=["sd 2.1", "x4 upscaler"])
def test_folders_load_into_each_other(config: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = twins(**config)
    given = inputs(config)
    if "num_class_embeds" in config:
        given["class_labels"] = torch.tensor([1, 2])
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    ours_from_theirs = ConditionalUNet.from_pretrained(str(tmp_path / "theirs")).eval()
    theirs_from_ours = UNet2DConditionModel.from_pretrained(str(tmp_path / "ours")).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert ours.config[key] == value, key
            assert theirs_from_ours.config[key] == ours_from_theirs.config[key], key
    with torch.no_grad():
        expected = theirs(**given).sample
        assert_close(ours_from_theirs(**given).sample, expected)
        assert_close(theirs_from_ours(**given).sample, expected)


def test_own_keys_survive_a_folder(tmp_path: Path) -> None:
    own = {"patch_size": 2, "self_conditioning": True, "text_concat_channels": 3, "pooled_text_dim": 6}
    model = ConditionalUNet(**SMALL, **own, pooled_text_time_embedding=True, in_channels=3).eval()
    model.save_pretrained(str(tmp_path))
    again = ConditionalUNet.from_pretrained(str(tmp_path)).eval()
    assert {k: again.config[k] for k in OWN_KEYS} == {**own, "pooled_text_time_embedding": True}
    given = {**inputs({**SMALL, "in_channels": 3}), "added_cond_kwargs": {"pooled_text": randn(2, 6)}}
    with torch.no_grad():
        assert torch.equal(again(**given).sample, model(**given).sample)


# ---- what is refused

REFUSED: dict[str, list[Any]] = {
    "down_block_types": [("AttnDownBlock2D", "DownBlock2D"), ("DownBlock2D", "KDownBlock2D")],
    "up_block_types": [("UpBlock2D", "SimpleCrossAttnUpBlock2D"), ("UpBlock2D", "UpBlock2D", "UpBlock2D")],
    "mid_block_type": ["UNetMidBlock2DSimpleCrossAttn", None],
    "act_fn": ["tanh", "gelu"],
    "time_embedding_act_fn": ["silu"],
    "timestep_post_act": ["silu"],
    "resnet_time_scale_shift": ["ada_group", "spatial"],
    "class_embed_type": ["label", "identity", "projection", "simple_projection"],
    "addition_embed_type": ["text_time", "text", "text_image", "image", "image_hint"],
    "encoder_hid_dim": [8],
    "encoder_hid_dim_type": ["text_proj", "text_image_proj", "image_proj", "ip_image_proj"],
    "center_input_sample": [True],
    "downsample_padding": [0],
    "mid_block_scale_factor": [1.7],
    "conv_in_kernel": [5],
    "conv_out_kernel": [1],
    "class_embeddings_concat": [True],
    "projection_class_embeddings_input_dim": [5],
    "num_attention_heads": [8, (2, 4)],
    "dual_cross_attention": [True],
    "resnet_skip_time_act": [True],
    "resnet_out_scale_factor": [2.0],
    "time_embedding_type": ["fourier"],
    "attention_type": ["gated", "gated-text-image"],
    "mid_block_only_cross_attention": [True],
    "cross_attention_norm": ["layer_norm", "group_norm"],
    "norm_num_groups": [None],
    "patch_size": [0, -1],
    "block_out_channels": [(16, 32, 64)],
    "layers_per_block": [(1,)],
    "attention_head_dim": [(2, 2, 2)],
    "cross_attention_dim": [[12]],
    "only_cross_attention": [[True]],
    "transformer_layers_per_block": [(1, 1, 1)],
    "reverse_transformer_layers_per_block": [[1]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in REFUSED for value in REFUSED[key]])
def test_refuses_by_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError) as refusal:
        ConditionalUNet(**{**SMALL, key: value})
    message = str(refusal.value)
    named = (
        [repr(kind) for kind in value if kind not in ("UpBlock2D", "DownBlock2D")]
        if "block_types" in key
        else []
    )
    assert message.startswith(f"{key}={named[0] if named else repr(value)} ")
    assert "allowed: " in message


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        (NESTED, r"reverse_transformer_layers_per_block=\[2\]"),
        ({"transformer_layers_per_block": [[1, 1], 1]}, r"transformer_layers_per_block=\[1, 1\]"),
    ],
)
def test_refuses_what_lacks_its_partner(config: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ValueError, match=f"^{culprit} .*allowed: "):
        ConditionalUNet(**{**SMALL, **config})


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, {"encoder_hidden_states": None}, "encoder_hidden_states"),
        ({}, {"timestep_cond": torch.ones(2, 4)}, "time_cond_proj_dim"),
        ({}, {"cross_attention_kwargs": {"gligen": {}}}, "gligen"),
        ({"num_class_embeds": 4}, {}, "class_labels"),
        ({"pooled_text_time_embedding": True}, {}, "'pooled_text'.*pooled_text_time_embedding"),
        ({"text_concat_channels": 2}, {"added_cond_kwargs": {}}, "'pooled_text'.*text_concat_channels"),
        ({"patch_size": 3}, {}, "patch_size=3.*16x8"),
    ],
)
def test_inputs_that_do_not_fit_the_config(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    model = ConditionalUNet(**{**SMALL, **config})
    with pytest.raises(ValueError, match=message):
        model(**{**inputs(SMALL), **change})


# ---- keys of our own


def fold(x: Tensor, p: int) -> Tensor:
    """Patches into channels: output channel c * p^2 + i * p + j holds pixel (i, j) of each patch of c."""
    b, c, height, width = x.shape
    out = torch.empty(b, c * p * p, height // p, width // p)
    for i in range(p):
        for j in range(p):
            out[:, i * p + j :: p * p] = x[:, :, i::p, j::p]
    return out


def unfold(x: Tensor, p: int) -> Tensor:
    b, c, height, width = x.shape
    out = torch.empty(b, c // p**2, height * p, width * p)
    for i in range(p):
        for j in range(p):
            out[:, :, i::p, j::p] = x[:, i * p + j :: p * p]
    return out


def own_twin(
    theirs: UNet2DConditionModel, renamed: dict[str, str] | None = None, **config: Any
) -> ConditionalUNet:
    """Our model with features of its own, and the weights of diffusers' model, some under another name."""
    ours = ConditionalUNet(**config).eval()
    names = renamed or {}
    ours.load_state_dict({names.get(k, k): v for k, v in theirs.state_dict().items()})
    return ours


@pytest.mark.parametrize("size", [(32, 16), (20, 12)], ids=["even", "odd number of patches"])
def test_patches(size: tuple[int, int]) -> None:
    theirs = reference(**SMALL, in_channels=48, out_channels=32)
    ours = own_twin(theirs, **SMALL, in_channels=3, out_channels=2, patch_size=4)
    given = inputs({**SMALL, "in_channels": 3}, size)
    with torch.no_grad():
        expected = theirs(**{**given, "sample": fold(given["sample"], 4)}).sample
        assert_close(ours(**given).sample, unfold(expected, 4))


def test_pooled_text_in_the_time_embedding() -> None:
    """diffusers' "simple_projection" of class labels adds a Linear of any vector to the time embedding."""
    config = {**SMALL, "class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 6}
    theirs = reference(**config)
    names = {f"class_embedding.{n}": f"pooled_text_time_proj.{n}" for n in ("weight", "bias")}
    ours = own_twin(theirs, names, **SMALL, pooled_text_time_embedding=True, pooled_text_dim=6)
    pooled = randn(2, 6)
    with torch.no_grad():
        expected = theirs(**inputs(SMALL), class_labels=pooled).sample
        assert_close(ours(**inputs(SMALL), added_cond_kwargs={"pooled_text": pooled}).sample, expected)


def test_time_embedding_by_hand() -> None:
    """emb = W2 silu(W1 [cos(t w), sin(t w)] + b1) + b2 + Wp pooled + bp, w_k = 10000^(-k/8), on the way into
    the first ResNet block. Without `pooled_text_dim` the pooled text is as wide as the text states."""
    model = ConditionalUNet(**SMALL, pooled_text_time_embedding=True).double().eval()
    pooled, t = randn(2, 12).double(), torch.tensor([7.0, 650.0], dtype=torch.float64)
    seen: list[Tensor] = []
    model.down_blocks[0].resnets[0].register_forward_hook(lambda _, args, __: seen.append(args[1]))
    given = {k: v.double() for k, v in inputs(SMALL).items()}
    model(**{**given, "timestep": t}, added_cond_kwargs={"pooled_text": pooled})
    w = torch.tensor([math.pow(10000, -k / 8) for k in range(8)], dtype=torch.float64)
    waves = torch.cat([torch.cos(t[:, None] * w), torch.sin(t[:, None] * w)], dim=1)
    p = dict(model.named_parameters())
    hidden = waves @ p["time_embedding.linear_1.weight"].T + p["time_embedding.linear_1.bias"]
    hidden = hidden / (1 + torch.exp(-hidden))
    emb = hidden @ p["time_embedding.linear_2.weight"].T + p["time_embedding.linear_2.bias"]
    emb = emb + pooled @ p["pooled_text_time_proj.weight"].T + p["pooled_text_time_proj.bias"]
    assert_close(
        seen[0], emb, 1e-4
    )  # the sinusoids are float32 whatever the model is, and t w goes up to 650


@pytest.mark.parametrize("p", [1, 2])
def test_pooled_text_joined_to_the_picture(p: int) -> None:
    theirs = reference(**SMALL, in_channels=4 * p * p + 3, out_channels=4 * p * p)
    ours = ConditionalUNet(**SMALL, patch_size=p, text_concat_channels=3, pooled_text_dim=6).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert (
        set(missing) == {"pooled_text_concat_proj.weight", "pooled_text_concat_proj.bias"} and not unexpected
    )
    given, pooled = inputs(SMALL), randn(2, 6)
    with torch.no_grad():
        folded = fold(given["sample"], p)
        proj = ours.pooled_text_concat_proj
        text = pooled @ proj.weight.T + proj.bias
        tiles = text[:, :, None, None].repeat(1, 1, *folded.shape[-2:])
        expected = theirs(**{**given, "sample": torch.cat([folded, tiles], dim=1)}).sample
        assert_close(ours(**given, added_cond_kwargs={"pooled_text": pooled}).sample, unfold(expected, p))


@pytest.mark.parametrize("p", [1, 2])
def test_self_conditioning(p: int) -> None:
    theirs = reference(**SMALL, in_channels=8 * p * p, out_channels=4 * p * p)
    ours = own_twin(theirs, **SMALL, patch_size=p, self_conditioning=True)
    given, x0 = inputs(SMALL), randn(2, 4, 16, 8, seed=7)
    with torch.no_grad():
        for estimate, added in (
            (x0, {"x0_self": x0}),
            (torch.zeros_like(x0), {}),
            (torch.zeros_like(x0), None),
        ):
            joined = torch.cat([fold(given["sample"], p), fold(estimate, p)], dim=1)
            expected = unfold(theirs(**{**given, "sample": joined}).sample, p)
            assert_close(ours(**given, added_cond_kwargs=added).sample, expected)


# ---- attention, batches


@pytest.mark.parametrize("upcast", [False, True])
def test_attention_by_hand(upcast: bool) -> None:
    """softmax(q k^T / sqrt(d)) v, head by head, in float64. With `upcast`, a bfloat16 module may round
    its projections and its result, nothing in between."""
    torch.manual_seed(0)
    attention = Attention(12, 10, heads=3, dim_head=4, upcast=upcast)
    x, context = 4 * randn(2, 5, 12), 4 * randn(2, 7, 10, seed=1)
    if upcast:
        attention, x, context = attention.bfloat16(), x.bfloat16(), context.bfloat16()
    with torch.no_grad():
        q, k, v = (
            f(y).double()
            for f, y in ((attention.to_q, x), (attention.to_k, context), (attention.to_v, context))
        )
        heads = []
        for h in range(3):
            own = slice(4 * h, 4 * h + 4)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(4)
            heads.append(scores.softmax(-1) @ v[..., own])
        expected = attention.to_out(torch.cat(heads, dim=-1).to(x.dtype))
        actual = attention(x, context)
    assert_close(actual.float(), expected.float(), 1e-6)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    model = twins(**SD_1_5)[1]
    given = inputs(SD_1_5, batch=8)
    with torch.no_grad():
        together = model(**given).sample
        alone = torch.cat([model(**{k: v[i : i + 1] for k, v in given.items()}).sample for i in range(8)])
    assert_close(together, alone)


def test_channels_last() -> None:
    theirs, ours = twins(**SD_2_1)
    given = inputs(SD_2_1)
    with torch.no_grad():
        expected = theirs(**given).sample
        ours.to(memory_format=torch.channels_last)
        given["sample"] = given["sample"].contiguous(memory_format=torch.channels_last)
        assert_close(ours(**given).sample, expected)


# ---- training, compiling, adapters


@pytest.mark.parametrize("config", [SMALL, X4_UPSCALER], ids=["small", "x4 upscaler"])
def test_gradient_checkpointing(config: dict[str, Any]) -> None:
    model = ConditionalUNet(**config).train()
    given = inputs(config)
    if "num_class_embeds" in config:
        given["class_labels"] = torch.tensor([1, 2])
    blocks = [m for m in model.modules() if isinstance(m, (ResnetBlock2D, Attention))]
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    for block in blocks:
        block.register_forward_pre_hook(count)

    def gradients() -> tuple[int, dict[str, Tensor]]:
        nonlocal runs
        runs = 0
        model.zero_grad()
        model(**given).sample.square().sum().backward()
        return runs, {name: p.grad.clone() for name, p in model.named_parameters()}

    plain_runs, plain = gradients()
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    saving_runs, saving = gradients()
    model.disable_gradient_checkpointing()
    assert gradients()[0] == plain_runs == len(blocks)
    assert saving_runs == 2 * len(blocks)  # every block runs again on the way back
    for name, expected in plain.items():
        torch.testing.assert_close(saving[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def compiled_agrees(backend: str) -> None:
    torch._dynamo.reset()  # what other tests compiled would count as compiled before
    own = {"patch_size": 2, "self_conditioning": True, "text_concat_channels": 3}
    model = ConditionalUNet(**SMALL, **own, pooled_text_time_embedding=True).eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    given = {
        **inputs(SMALL),
        "added_cond_kwargs": {"pooled_text": randn(2, 12), "x0_self": randn(2, 4, 16, 8)},
        "cross_attention_kwargs": {"scale": 1.0},
    }
    with torch.no_grad():
        assert_close(compiled(**given).sample, model(**given).sample)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        given["timestep"] = torch.tensor([900, 3])
        assert_close(compiled(**given).sample, model(**given).sample)


def test_compiles_without_graph_breaks() -> None:
    compiled_agrees("eager")


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_compiles_to_machine_code() -> None:
    compiled_agrees("inductor")


def test_lora_adapters(tmp_path: Path) -> None:
    """An adapter made on ours acts as well on diffusers' model; `scale` sets its strength, for one call."""
    peft = pytest.importorskip("peft")
    theirs, ours = twins(**SMALL)
    given = inputs(SMALL)
    with torch.no_grad():
        base = ours(**given).sample
        ours.add_adapter(
            peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        )
        layers = [name for name, p in ours.named_parameters() if "lora_B" in name]
        assert len(layers) == 4 * sum(isinstance(m, Attention) for m in ours.modules())
        for name, p in ours.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * randn(*p.shape, seed=len(name)))
        ours.save_lora_adapter(str(tmp_path))
        theirs.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
        full = ours(**given).sample
        assert_close(full, theirs(**given).sample)
        half = {"scale": 0.5}
        assert_close(
            ours(**given, cross_attention_kwargs=half).sample,
            theirs(**given, cross_attention_kwargs=half).sample,
        )
        assert_close(ours(**given, cross_attention_kwargs={"scale": 0.0}).sample, base)
        assert_close(ours(**given).sample, full)
        assert (full - base).abs().max() > 0.01 * base.abs().max()


@pytest.mark.slow
def test_full_size_stable_diffusion() -> None:
    """The published shape of Stable Diffusion 1.5, both classes on one and the same copy of the weights."""
    config = {"cross_attention_dim": 768, "sample_size": 64}
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config).eval()
    with torch.device("meta"):
        ours = ConditionalUNet(**config).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    given = inputs(config, (16, 24), batch=1)
    with torch.no_grad():
        assert_close(ours(**given).sample, theirs(**given).sample)
