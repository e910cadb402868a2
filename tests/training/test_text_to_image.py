"""The text-to-image recipe: its loss against diffusers, its settings, and whole runs through accelerate."""

import contextlib
import copy
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler as DiffusersDDPM
from diffusers.training_utils import compute_snr
from PIL import Image
from places import ROOT
from safetensors.torch import load_file

from pipelines import (
    ConditionalUNet,
    DDPMScheduler,
    NoisyClassifier,
    SuperResolutionPipeline,
    TextToImagePipeline,
)
from pipelines.drawing.images import image_grid
from pipelines.drawing.text import encode_text
from training import export, text_to_image
from training.data.caches import cache_text
from training.data.pictures import PictureCache, StepBatchSampler, seed_for
from training.objectives.denoising import (
    DenoisingLoss,
    draw_noise,
    plain_attention,
    target_of,
    validation_loss,
)
from training.run.building import as_mapping, compile_blocks, widen_input
from training.text_to_image import TextToImageConfig

EMOJI64 = ROOT / "tests" / "data" / "emoji64"
KINDS = ["epsilon", "sample", "v_prediction"]


def assert_same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# ------------------------------------------------------------ noise and targets


def test_two_processes_draw_the_noise_of_one():
    shape = (6, 3, 4, 4)
    eps, t = draw_noise(3, 11, shape, 1000, 0, 1)
    halves = [draw_noise(3, 11, (3, 3, 4, 4), 1000, rank, 2) for rank in (0, 1)]
    assert_same(torch.cat([half[0] for half in halves]), eps)
    assert_same(torch.cat([half[1] for half in halves]), t)
    for other in (draw_noise(3, 12, shape, 1000, 0, 1), draw_noise(4, 11, shape, 1000, 0, 1)):
        assert not torch.equal(other[0], eps) and not torch.equal(other[1], t)
    torch.rand(5)  # torch's own generator has no part in it
    assert_same(draw_noise(3, 11, shape, 1000, 0, 1), (eps, t))


def test_draws_are_those_of_every_run_before():
    """Fixed numbers: a checkpoint of last year goes on as it would have then."""
    eps, t = draw_noise(3, 11, (4, 2), 1000, 0, 1)
    assert t.tolist() == [741, 670, 519, 956]
    expected = [0.6255376, 2.0521958, -0.3993005, 1.0758858, -0.3943550, 0.2254972, -1.7497036, -0.8794196]
    torch.testing.assert_close(eps.flatten(), torch.tensor(expected), rtol=0, atol=1e-6)
    assert StepBatchSampler(10, 4, 7).global_batch(3).tolist() == [3, 5, 2, 6]
    weights = torch.arange(1, 11).double() / 55
    assert StepBatchSampler(10, 4, 7, weights).global_batch(3).tolist() == [0, 4, 9, 2]
    assert seed_for(5, "captions", 3) == 844763463143564155


def test_noise_offset_is_constant_over_a_channel():
    """eps + 0.1 z with one normal z for each picture and channel, the same eps and t as without; in two
    processes as in one. 6,000 numbers: mean and deviation within four standard errors."""
    shape = (2000, 3, 2, 2)
    plain, t = draw_noise(0, 5, shape, 1000, 0, 1)
    eps, same = draw_noise(0, 5, shape, 1000, 0, 1, noise_offset=0.1)
    assert_same(t, same)
    z = (eps - plain) / 0.1
    torch.testing.assert_close(z, z[..., :1, :1].expand(shape), rtol=0, atol=1e-4)
    assert abs(z[..., 0, 0].mean()) < 4 / 6000**0.5 and abs(z[..., 0, 0].std() - 1) < 4 / 12000**0.5
    assert_same(draw_noise(0, 5, (1000, 3, 2, 2), 1000, 1, 2, noise_offset=0.1)[0], eps[1000:])


def test_the_noise_is_normal_and_t_is_uniform():
    """49,152 numbers: mean 0, variance 1 within four standard errors; 20 bins of t by chi-square, 99.9 %."""
    eps, t = draw_noise(0, 0, (4096, 12), 1000, 0, 1)
    assert abs(eps.mean()) < 4 / 49152**0.5 and abs(eps.var() - 1) < 4 * (2 / 49152) ** 0.5
    assert t.min() >= 0 and t.max() <= 999
    counts = torch.bincount(t // 50, minlength=20).double()
    assert ((counts - 204.8) ** 2 / 204.8).sum() < 43.8
    assert (draw_noise(0, 0, (512, 1), 4, 0, 1)[1].unique() == torch.arange(4)).all()  # both ends included


def test_shifted_timesteps():
    """With u even, s u/(1 + (s - 1) u) is below a where u is below a/(s - (s - 1) a): shares of 100,000 draws
    within five standard errors; the same noise as without."""
    shape = (100_000, 1)
    eps, plain = draw_noise(2, 1, shape, 1000, 0, 1)
    same, t = draw_noise(2, 1, shape, 1000, 0, 1, timestep_shift=3.0)
    assert_same(eps, same)
    assert (t >= plain).all() and t.min() >= 0 and t.max() == 999
    for a in (0.25, 0.5, 0.9):
        expected = a / (3 - 2 * a)
        error = 5 * (expected * (1 - expected) / 100_000) ** 0.5 + 1e-3  # and the width of a timestep
        assert abs((t < 1000 * a).double().mean() - expected) < error
    assert_same(draw_noise(2, 1, (50_000, 1), 1000, 1, 2, timestep_shift=3.0)[1], t[50_000:])


@pytest.mark.parametrize("kind", KINDS)
def test_targets(kind):
    """eps, x0, or sqrt(abar) eps - sqrt(1 - abar) x0, abar by the cosine's formula (Nichol 2021)."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    x0, eps = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 100, 500, 900, 990])
    levels = (((torch.arange(1001).double() / 1000 + 0.008) / 1.008) * torch.pi / 2).cos() ** 2
    abar = (levels[t + 1] / levels[0]).float().reshape(-1, 1, 1, 1)
    expected = {"epsilon": eps, "sample": x0, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x0}
    torch.testing.assert_close(target_of(scheduler, x0, eps, t), expected[kind], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------ the loss of a micro-batch


@pytest.fixture
def make_loss(make_pipeline, tmp_path) -> Any:
    """make_loss(kind, pictures, **settings): (the loss of a single process, its pipeline)."""

    def make(kind: str, pictures: PictureCache, unet: Any = None, **settings: Any) -> Any:
        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
        pipe = make_pipeline(scheduler=scheduler, **({} if unet is None else {"unet": unet}))
        text = cache_text(pictures.captions, pipe.tokenizer, pipe.text_encoder, tmp_path)
        config = TextToImageConfig(output_dir=str(tmp_path), **settings)
        return DenoisingLoss(config, pipe, pipe.unet, pictures, text, 0, 1), pipe

    return make


def random_pictures(count: int = 12) -> PictureCache:
    """Each with two captions of its own: "cat 3", the canonical one, and "dog 3"."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
    captions = ["", *(f"{kind} {i}" for i in range(count) for kind in ("cat", "dog"))]
    return PictureCache(pixels, captions, [[1 + 2 * i, 2 + 2 * i] for i in range(count)], {})


def by_hand(
    pipe: Any, x0: torch.Tensor, captions: list[str], eps: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Plain loss of each sample: diffusers' scheduler, the text encoder itself, torch's mse_loss."""
    kind = pipe.scheduler.config.prediction_type
    theirs = DiffusersDDPM(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    target = {"epsilon": eps, "sample": x0, "v_prediction": theirs.get_velocity(x0, eps, t)}[kind]
    with torch.no_grad():
        states, pooled, _ = encode_text(pipe.tokenizer, pipe.text_encoder, captions)
        added = {"pooled_text": pooled} if pipe.unet.config.pooled_text_time_embedding else None
        output = pipe.unet(theirs.add_noise(x0, eps, t), t, states, added_cond_kwargs=added).sample
    return F.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3))


def min_snr(kind: str, t: torch.Tensor, floor: float) -> torch.Tensor:
    """Hang 2023 with gamma 5, SNR from diffusers, and our floor."""
    snr = compute_snr(DiffusersDDPM(beta_schedule="squaredcos_cap_v2"), t)
    capped = torch.maximum(torch.minimum(snr, torch.tensor(5.0)), torch.tensor(floor))
    return capped / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]


@pytest.mark.parametrize("snr_gamma, snr_floor", [(None, 0.0), (5.0, 0.0), (5.0, 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_against_diffusers_parts(kind, snr_gamma, snr_floor, make_loss):
    pictures = random_pictures()
    settings = {"snr_gamma": snr_gamma, "snr_floor": snr_floor, "caption_dropout": 0.0, "seed": 4}
    loss, pipe = make_loss(kind, pictures, canonical_caption=1.0, **settings)
    indices = [7, 0, 3, 3]
    mean, details = loss(indices, 9)
    x0 = torch.from_numpy(pictures.pixels[indices]).float() / 255 * 2 - 1
    eps, t = draw_noise(4, 9, (4, 3, 16, 16), 1000, 0, 1)
    expected = by_hand(pipe, x0, [f"cat {i}" for i in indices], eps, t)
    if snr_gamma:
        expected = expected * min_snr(kind, t, snr_floor)
    torch.testing.assert_close(details["per_sample"], expected, rtol=2e-3, atol=1e-5)  # fp16 text states
    assert_same(details["t"], t)
    assert mean.item() == pytest.approx(details["per_sample"].mean().item(), rel=1e-6)
    mean.backward()
    assert pipe.unet.conv_out.weight.grad.abs().sum() > 0
    pipe.unet.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", KINDS)
def test_detail_weight_adds_the_error_of_x0_where_it_is_nearly_clean(kind, make_loss):
    """x0 as diffusers reads it from the output, not clipped; t of both sides of SNR 5 occur."""
    pictures, indices, theirs = random_pictures(), [1, 4, 4, 8], DiffusersDDPM(
        beta_schedule="squaredcos_cap_v2", prediction_type=kind, clip_sample=False
    )  # fmt: skip
    x0 = pictures.images(indices)
    settings = {"snr_gamma": 5.0, "caption_dropout": 0.0, "canonical_caption": 1.0}
    loss, pipe = make_loss(kind, pictures, **settings, detail_weight=0.7)
    states, _, _ = encode_text(pipe.tokenizer, pipe.text_encoder, [f"cat {i}" for i in indices])
    sides = set()
    for step in range(6):
        eps, t = draw_noise(loss.config.seed, step, (4, 3, 16, 16), 1000, 0, 1)
        with torch.no_grad():
            found = loss(indices, step)[1]["per_sample"]
            loss.config.detail_weight = 0.0
            without = loss(indices, step)[1]["per_sample"]
            loss.config.detail_weight = 0.7
            x_t = theirs.add_noise(x0, eps, t)
            rows = zip(pipe.unet(x_t, t, states).sample, t, x_t, strict=True)
            x0_hat = [theirs.step(o[None], int(k), x[None]).pred_original_sample[0] for o, k, x in rows]
        clean = theirs.alphas_cumprod[t] >= 5 / 6  # abar / (1 - abar) >= 5
        expected = 0.7 * (torch.stack(x0_hat) - x0).abs().mean(dim=(1, 2, 3)) * clean
        torch.testing.assert_close(found - without, expected, rtol=5e-3, atol=1e-5)
        sides |= set(clean.tolist())
    assert sides == {False, True}


def test_pooled_text_and_the_null_prompt(make_loss, make_unet):
    """Dropped captions are the empty prompt through the encoder, its pooled vector too."""
    unet = make_unet(pooled_text_time_embedding=True, pooled_text_dim=24)
    pictures = random_pictures()
    x0 = torch.from_numpy(pictures.pixels[:4]).float() / 255 * 2 - 1
    eps, t = draw_noise(0, 2, (4, 3, 16, 16), 1000, 0, 1)
    losses = {}
    for dropout, captions in ((0.0, [f"cat {i}" for i in range(4)]), (1.0, [""] * 4)):
        settings = {"canonical_caption": 1.0, "caption_dropout": dropout, "snr_gamma": None}
        loss, pipe = make_loss("epsilon", pictures, unet, **settings)
        losses[dropout] = loss(list(range(4)), 2)[1]["per_sample"]
        torch.testing.assert_close(losses[dropout], by_hand(pipe, x0, captions, eps, t), rtol=2e-3, atol=1e-5)
    assert ((losses[0.0] - losses[1.0]).abs() > 1e-4).all()


def test_shares_of_captions_and_of_mirrored_pictures(make_loss, monkeypatch):
    """2,400 draws, four standard errors: 10 % null, and of the rest 0.6 + 0.4/2 canonical; half mirrored."""
    pictures = random_pictures()
    loss, _ = make_loss("epsilon", pictures, canonical_caption=0.6, caption_dropout=0.1, random_flip=True)
    seen = []
    monkeypatch.setattr(loss, "loss", lambda x0, captions, *_, **__: seen.append((x0, captions)))
    for step in range(200):
        loss(list(range(12)), step)
    captions = np.array([captions for _, captions in seen])  # (200, 12)
    cats, dogs = (np.array([f"{kind} {i}" for i in range(12)]) for kind in ("cat", "dog"))
    for share, found in ((0.1, captions == ""), (0.72, captions == cats), (0.18, captions == dogs)):
        assert found.mean() == pytest.approx(share, abs=4 * (share * (1 - share) / 2400) ** 0.5)
    plain = pictures.images(list(range(12)))
    images = torch.stack([x0 for x0, _ in seen])
    same, mirrored = (images == plain).all((2, 3, 4)), (images == plain.flip(-1)).all((2, 3, 4))
    assert (same ^ mirrored).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 2400**0.5)
    again = [captions for _, captions in seen[:3]]
    for step in range(3):
        torch.rand(step)  # nothing else moves them
        loss(list(range(12)), step)
        assert seen[-1][1] == again[step]


@pytest.mark.parametrize("kind", KINDS)
def test_validation_loss_in_closed_form(kind, make_loss, make_unet):
    """A U-Net that says 0 costs, with x0 = c everywhere: E eps^2 = 1, c^2, or abar + (1 - abar) c^2, in each
    tenth of the timesteps. Some 20,000 normal numbers to a bucket: 0.05 is five standard errors."""
    level = 26  # c = -0.796
    pixels = np.full((256, 3, 16, 16), level, dtype=np.uint8)
    pictures = PictureCache(pixels, ["", "cat 0"], [[1]] * 256, {})
    unet = make_unet()
    for parameter in unet.conv_out.parameters():
        parameter.data.zero_()
    loss, pipe = make_loss(kind, random_pictures(), unet, snr_gamma=5.0)
    before = loss.data
    buckets = validation_loss(loss, pictures, seed=0)
    c2 = (level / 127.5 - 1) ** 2
    abar = DiffusersDDPM(beta_schedule="squaredcos_cap_v2").alphas_cumprod.reshape(10, 100).mean(1)
    expected = {
        "epsilon": torch.ones(10),
        "sample": torch.full((10,), c2),
        "v_prediction": abar + (1 - abar) * c2,
    }
    torch.testing.assert_close(
        torch.tensor(buckets), expected[kind], rtol=0, atol=1e-6 if kind == "sample" else 0.05
    )
    torch.rand(3)
    assert validation_loss(loss, pictures, seed=0) == buckets
    assert loss.config.snr_gamma == 5.0 and loss.data is before


@pytest.mark.parametrize("kind", KINDS)
def test_self_conditioning_shows_the_first_guess_of_x0(kind, make_loss, make_unet):
    """Chen 2022, algorithm 1, by hand: x0 as diffusers' scheduler reads it from a first pass on zeros, in the
    half of the steps that a coin picks; zeros in the others."""
    unet = make_unet(self_conditioning=True)
    pictures = random_pictures()
    x0 = pictures.images([2, 5, 5, 9])
    settings = {"snr_gamma": None, "caption_dropout": 0.0, "canonical_caption": 1.0}
    loss, pipe = make_loss(kind, pictures, unet, **settings)
    theirs = DiffusersDDPM(
        beta_schedule="squaredcos_cap_v2", prediction_type=kind
    )  # it clips x0, as ours does
    guessed = 0
    for step in range(40):
        with torch.no_grad():
            details = loss([2, 5, 5, 9], step)[1]
        eps, t = draw_noise(0, step, (4, 3, 16, 16), 1000, 0, 1)
        with torch.no_grad():
            x_t = theirs.add_noise(x0, eps, t)
            states, _, _ = encode_text(pipe.tokenizer, pipe.text_encoder, [f"cat {i}" for i in (2, 5, 5, 9)])
            first = unet(x_t, t, states).sample
            rows = zip(first, t, x_t, strict=True)
            guess = torch.stack(
                [theirs.step(o[None], int(k), x[None]).pred_original_sample[0] for o, k, x in rows]
            )
            second = unet(x_t, t, states, added_cond_kwargs={"x0_self": guess}).sample
        target = {"epsilon": eps, "sample": x0, "v_prediction": theirs.get_velocity(x0, eps, t)}[kind]
        expected = [(output - target).square().mean(dim=(1, 2, 3)) for output in (first, second)]
        assert ((expected[0] - expected[1]).abs() > 1e-4).any()
        guided = (details["per_sample"] - expected[1]).abs().max() < (
            details["per_sample"] - expected[0]
        ).abs().max()
        torch.testing.assert_close(details["per_sample"], expected[int(guided)], rtol=2e-3, atol=1e-5)
        guessed += int(guided)
    assert abs(guessed - 20) <= 4 * 40**0.5 / 2  # four standard deviations


def test_a_network_made_self_conditioned_predicts_what_it_did(make_unet):
    plain = make_unet(patch_size=2, text_concat_channels=3, pooled_text_dim=24)
    wider = widen_input(plain, self_conditioning=True).eval()
    assert wider.config.self_conditioning and not plain.config.self_conditioning
    g = torch.Generator().manual_seed(0)
    x, guess = torch.randn(2, 2, 3, 16, 16, generator=g)
    added = {"pooled_text": torch.randn(2, 24, generator=g)}
    states, t = torch.randn(2, 7, 32, generator=g), torch.tensor([3, 900])
    with torch.no_grad():
        before = plain(x, t, states, added_cond_kwargs=added).sample
        after = wider(x, t, states, added_cond_kwargs=added | {"x0_self": guess}).sample
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
        wider.conv_in.weight[:, 12:24] += 0.1  # 3 channels in patches of 2 x 2 from x_t, then 12 of the guess
        moved = wider(x, t, states, added_cond_kwargs=added | {"x0_self": guess}).sample
        unseen = wider(x, t, states, added_cond_kwargs=added).sample
    assert (moved - before).abs().mean() > 1e-3
    torch.testing.assert_close(unseen, before, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_compiled_blocks_learn_the_same_in_bf16(make_unet):
    """Prediction and gradients are within the rounding of bf16 of what they are uncompiled; the names too."""
    unet = make_unet(patch_size=2, self_conditioning=True)
    compiled = copy.deepcopy(unet)
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == list(unet.state_dict())
    generator = torch.Generator().manual_seed(0)
    x, estimate = torch.randn(2, 4, 3, unet.config.sample_size, unet.config.sample_size, generator=generator)
    text = torch.randn(4, 5, unet.config.cross_attention_dim, generator=generator)
    outputs = []
    for model in (unet, compiled):
        with torch.autocast("cpu", torch.bfloat16), plain_attention(torch.device("cpu")):
            output = model(x, torch.tensor([3, 400, 800, 999]), text, added_cond_kwargs={"x0_self": estimate})
        output.sample.float().square().mean().backward()
        outputs.append([output.sample.float(), torch.cat([p.grad.flatten() for p in model.parameters()])])
    for expected, found in zip(*outputs, strict=True):
        assert (found - expected).norm() <= 0.03 * expected.norm()


def test_plain_attention_is_the_same_attention(make_unet):
    """Loss and gradients of the two ways that torch has on a CPU."""
    results = []
    x, states = torch.randn(2, 3, 16, 16), torch.randn(2, 7, 32)
    for context in (contextlib.nullcontext(), plain_attention(torch.device("cpu"))):
        unet = make_unet()
        with context:
            unet(x, torch.tensor([5, 500]), states).sample.square().mean().backward()
        results.append({name: p.grad for name, p in unet.named_parameters()})
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------ settings


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path, clip_folder, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    config = write_config(tmp_path, clip_folder, train_data_dir="my_folder", max_train_steps=1)
    with pytest.raises(ValueError, match="train_data_dir must be a folder that is there, got 'my_folder'"):
        train(config)


GOOD = {"output_dir": "out", "unet": {}, "text_encoder": "clip", "train_data_dir": "pictures"}
SAVED = {"pretrained_model_name_or_path": "model", "unet": None}


@pytest.mark.parametrize(
    "name, changes",
    [
        ("unet", {"unet": None}),
        ("unet", {"pretrained_model_name_or_path": "model"}),
        ("dataset_name", {"train_data_dir": None}),
        ("dataset_name", {"dataset_name": "also"}),
        ("text_encoder", {"text_encoder": None}),
        ("caption_dropout", {"caption_dropout": -0.1}),
        ("caption_dropout", {"caption_dropout": 1.1}),
        ("canonical_caption", {"canonical_caption": 1.5}),
        ("concept_power", {"concept_power": -1.0}),
        ("style_power", {"style_power": 1.5}),
        ("timestep_shift", {"timestep_shift": 0.0}),
        ("detail_weight", {"detail_weight": -0.1}),
        ("detail_weight", {"detail_weight": 0.5, "snr_gamma": None}),
        ("detail_weight", {"detail_weight": 0.5, "loss": "vlb"}),
        ("more_ema_decays", {"more_ema_decays": [0.9995]}),
        ("more_ema_decays", {"more_ema_decays": [1.5]}),
        ("train_batch_size", {"train_batch_size": 0}),
        ("gradient_accumulation_steps", {"gradient_accumulation_steps": 0}),
        ("max_train_steps", {"max_train_steps": 0}),
        ("checkpointing_steps", {"checkpointing_steps": 0}),
        ("validation_steps", {"validation_steps": 0}),
        ("prediction_type", {"prediction_type": "x0"}),
        ("num_train_epochs", {"num_train_epochs": 0}),
        ("num_train_epochs", {"num_train_epochs": 2, "streaming": True}),
        ("mixed_precision", {"mixed_precision": "half"}),
        ("lr_scheduler", {"lr_scheduler": "sinus"}),
        ("rank", {"rank": 4}),
        ("lora_layers", {"lora_layers": ["conv1"]}),
        ("rank", {"rank": 0} | SAVED | {"text_encoder": None}),
        ("lora_alpha", {"lora_alpha": 4.0} | SAVED | {"text_encoder": None}),
        ("train_text_encoder", {"train_text_encoder": True} | SAVED | {"text_encoder": None}),
        ("text_encoder", SAVED),
        ("vae", {"vae": "vae"} | SAVED | {"text_encoder": None}),
        ("checkpoints_total_limit", {"checkpoints_total_limit": 0}),
        ("learning_rate", {"learning_rate": 0.0}),
        ("muon_learning_rate", {"muon_learning_rate": 0.0}),
        ("optimizer", {"optimizer": "Muon"}),
        ("snr_gamma", {"snr_gamma": 0.0}),
        ("snr_floor", {"snr_floor": 6.0}),
        ("snr_floor", {"snr_gamma": None, "snr_floor": 1.0}),
        ("lr_warmup_steps", {"lr_warmup_steps": -1}),
        ("lr_decay_steps", {"lr_decay_steps": -1}),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(name, changes):
    TextToImageConfig(**GOOD).check()
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        TextToImageConfig(**(GOOD | changes)).check()


def test_configs_inside_the_config(tmp_path):
    """A mapping, JSON (longer than any file name too), or a file of JSON."""
    config = {"block_out_channels": list(range(200)), "sample_size": 16}
    (tmp_path / "unet.json").write_text(json.dumps(config))
    for given in (config, json.dumps(config), "  " + json.dumps(config), str(tmp_path / "unet.json")):
        assert as_mapping(given, "unet") == config
    assert as_mapping(None, "unet") == {}
    for bad in ("{'sample_size': 16}", "nowhere.json"):
        with pytest.raises(ValueError, match="unet must be JSON or a JSON file"):
            as_mapping(bad, "unet")


# ------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, tokenizer, make_text_encoder) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    make_text_encoder().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_machine(tmp_path_factory) -> Iterator[None]:
    """On the CPU, and what `datasets` keeps goes where the tests' files go."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
        reset_accelerate()


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def unet_config(size: int, **changes: Any) -> dict[str, Any]:
    config = {
        "sample_size": size,
        "in_channels": 3,
        "out_channels": 3,
        "patch_size": 2,
        "layers_per_block": 1,
    }
    config |= {"block_out_channels": [16, 32], "attention_head_dim": 4, "norm_num_groups": 8}
    config |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "cross_attention_dim": 32}
    return config | {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]} | changes


def write_config(folder: Path, clip_folder: Path, **changes: Any) -> Path:
    """The YAML file of a small run that keeps everything in `folder`."""
    config = {
        "output_dir": str(folder / "run"),
        "text_encoder": str(clip_folder),
        "train_data_dir": str(EMOJI64),
        "cache_dir": str(folder / "cache"),
        "unet": unet_config(64, patch_size=4, dropout=0.1),
        "noise_scheduler": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
        "prediction_type": "v_prediction",
        "train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "report_to": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes))
    return folder / "config.yaml"


def train(config: Path, *arguments: object) -> None:
    """`python -m training.text_to_image`, in this process."""
    reset_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["text_to_image", "--config", str(config), *map(str, arguments)])
        text_to_image.main()


PROMPTS = ["red heart, 3d style", "a rocket"]


@pytest.fixture(scope="module")
def runs(clip_folder, tmp_path_factory) -> tuple[Path, Path]:
    """Two runs of six steps: one at a stretch; one stopped after three and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    shared = {"gradient_accumulation_steps": 2, "random_flip": True, "checkpointing_steps": 3}
    shared |= {"more_ema_decays": [0.0, 0.3]}
    whole = write_config(
        folder / "whole", clip_folder, max_train_steps=6, validation_prompts=PROMPTS, **shared
    )
    train(whole, "--report_to", "tensorboard")
    parts = write_config(folder / "parts", clip_folder, max_train_steps=3, **shared)
    train(parts)
    train(parts, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    return folder / "whole" / "run", folder / "parts" / "run"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_three_steps_and_three_resumed_are_six_bit_for_bit(runs):
    whole, parts = runs
    for part in (
        "pipeline/unet",
        "checkpoint-3/unet",
        "checkpoint-3/unet_ema",
        "checkpoint-6/unet",
        "checkpoint-6/unet_ema",
        "checkpoint-6/unet_ema_0.3",
    ):
        assert_same(weights(parts / part), weights(whole / part))
    first, second = (torch.load(run / "checkpoint-6" / "optimizer.bin", weights_only=True) for run in runs)
    assert_same(first["state"], second["state"])


def test_the_saved_pipeline_has_the_averaged_weights(runs):
    whole, _ = runs
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    saved, raw = weights(whole / "pipeline" / "unet"), weights(whole / "checkpoint-6" / "unet")
    assert_same(saved, weights(whole / "checkpoint-6" / "unet_ema"))
    moved = [
        name for name in raw if not torch.equal(raw[name], weights(whole / "checkpoint-3" / "unet")[name])
    ]
    assert len(moved) == len(raw) and not torch.equal(saved[moved[0]], raw[moved[0]])


def test_further_averages_are_kept_and_one_can_be_exported(runs, tokenizer, tmp_path, monkeypatch):
    """With decay 0 the weights themselves, else each another; exported is the checkpoint's, in fp16."""
    folder = runs[0] / "checkpoint-6"
    raw, short, long = (weights(folder / f"unet{name}") for name in ("", "_ema_0.3", "_ema"))
    torch.testing.assert_close(weights(folder / "unet_ema_0.0"), raw, rtol=1e-6, atol=1e-9)
    assert not torch.equal(short["conv_out.weight"], raw["conv_out.weight"])
    assert not torch.equal(short["conv_out.weight"], long["conv_out.weight"])
    arguments = ["--config", runs[0].parent / "config.yaml", "--checkpoint", folder, "--to", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments), "--ema", "0.3"])
    export.main()
    assert_same(weights(tmp_path / "out" / "unet"), {name: tensor.half() for name, tensor in short.items()})
    # The tokenizer is the same, its file without indents
    words = "a warm square, 12 o'clock! <|endoftext|>"
    given, shipped = tokenizer, type(tokenizer).from_pretrained(tmp_path / "out/tokenizer")
    assert shipped(words).input_ids == given(words).input_ids
    assert len((tmp_path / "out/tokenizer/tokenizer.json").read_text().splitlines()) == 1
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments), "--ema", "0.7"])
    with pytest.raises(SystemExit, match=r"ema must be one that the checkpoint has, of \['0.0', '0.3'\]"):
        export.main()


def test_the_mean_of_several_networks_is_exported(runs, clip_folder, make_unet, tmp_path, monkeypatch):
    """Of three whose weights are w, w + 0.5 and w + 2.5, exported is w + 1; another shape is refused."""
    folders, base = [], make_unet()
    for number, shift in enumerate((0.0, 0.5, 2.5)):
        shifted = copy.deepcopy(base)
        for weight in shifted.parameters():
            weight.data += shift
        shifted.save_pretrained(tmp_path / str(number))
        folders.append(str(tmp_path / str(number)))
    arguments = ["export", "--config", str(runs[0].parent / "config.yaml")]
    arguments += ["--to", str(tmp_path / "mean"), "--unets"]
    monkeypatch.setattr(sys, "argv", [*arguments, *folders])
    export.main()
    mean = load_file(tmp_path / "mean" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in base.state_dict().items():
        torch.testing.assert_close(mean[name].float(), weight + 1, rtol=1e-3, atol=1e-3)  # it is in fp16
    make_unet(patch_size=2).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(sys, "argv", [*arguments, *folders, str(tmp_path / "other")])
    with pytest.raises(SystemExit, match=r"export: unets must be of the shape of .*0, got .*other"):
        export.main()


def test_classifiers_of_several_seeds_are_exported_as_one_ensemble(tmp_path, monkeypatch):
    """Its p is the product of theirs, made to sum to 1 after the root; another configuration is refused."""
    shapes, folders = {"sample_size": 16, "patch_size": 2, "block_out_channels": (8, 16)}, []
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        member = NoisyClassifier(
            labels=["cold", "warm", "wet"], norm_num_groups=4, heads=2, guidance_limit=0.1, **shapes
        )
        members.append(member.half().float().eval())
        folders.append(str(tmp_path / f"seed{seed}"))
        members[-1].save_pretrained(folders[-1])
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["export", "--to", str(out), "--classifiers", *folders])
    export.main()
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.float16}
    joined = NoisyClassifier.from_pretrained(out, torch_dtype=torch.float32).eval()
    assert joined.config.ensemble == 3 and joined.config.guidance_limit == 0.1
    x, t = torch.randn(5, 3, 16, 16), torch.tensor([0, 10, 300, 999, 50])
    with torch.no_grad():
        product = torch.stack([member(x, t).double().softmax(1) for member in members]).prod(0) ** (1 / 3)
        torch.testing.assert_close(
            joined(x, t).double().softmax(1), product / product.sum(1, keepdim=True), atol=1e-6, rtol=1e-5
        )
    NoisyClassifier(labels=["a", "b"], norm_num_groups=4, heads=2, **shapes).save_pretrained(tmp_path / "ab")
    for sources, message in (
        ([folders[0], str(tmp_path / "ab")], "classifiers must be of the configuration of .*seed0, got .*ab"),
        ([str(out), str(out)], "classifiers must be a single network, no ensemble, got .*out"),
        ([folders[0], str(tmp_path / "nowhere")], "classifiers must be a folder, got .*nowhere"),
    ):
        monkeypatch.setattr(sys, "argv", ["export", "--to", str(tmp_path / "no"), "--classifiers", *sources])
        with pytest.raises(SystemExit, match=message):
            export.main()
    assert not (tmp_path / "no").exists()


def test_upsamplers_and_guides_are_exported_in_fp16_without_code(make_upsampler, tmp_path, monkeypatch):
    make_upsampler().save_pretrained(tmp_path / "up")
    classifier = NoisyClassifier(["cold", "warm"], 16, 3, 2, (8, 16), 4, 2)
    classifier.save_pretrained(tmp_path / "classifier")
    for source, part in (("up", "unet"), ("classifier", "")):
        arguments = ["--folder", tmp_path / source, "--to", tmp_path / "out" / source]
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        export.main()
        halves = {name: tensor.half() for name, tensor in weights(tmp_path / source / part).items()}
        assert_same(weights(tmp_path / "out" / source / part), halves)
        assert not list((tmp_path / "out" / source).rglob("*.py"))
    shipped = SuperResolutionPipeline.from_pretrained(tmp_path / "out/up")
    assert shipped.scale == 4 and shipped.config.default_num_inference_steps == 3
    (tmp_path / "bare").mkdir()
    for source, message in (
        (tmp_path / "up/unet", "folder must be one of .*, and it is ConditionalUNet"),
        (tmp_path / "bare", "folder must be one with a model_index.json or config.json"),
        (tmp_path / "nowhere", "folder must be a folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["export", "--folder", str(source), "--to", str(tmp_path / "no")])
        with pytest.raises(SystemExit, match=message):
            export.main()
    assert not (tmp_path / "no").exists() and not (tmp_path / "no.partial").exists()


def test_the_saved_pipeline_draws(runs):
    """And the sheet of validation prompts is what it draws, so it was drawn with the averaged weights."""
    whole, _ = runs
    pipe = TextToImagePipeline.from_pretrained(whole / "pipeline")
    assert type(pipe.unet) is ConditionalUNet and type(pipe.scheduler) is DDPMScheduler
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert not pipe.unet.training
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    images = pipe(PROMPTS, num_inference_steps=25, generator=generators).images
    assert [image.size for image in images] == [(64, 64)] * 2
    sheet = np.asarray(Image.open(whole / "samples" / "0000006.png")).astype(int)
    gap = (sheet.shape[0] - 64) // 2
    for number, image in enumerate(images):
        x = gap + number * (64 + gap)
        assert np.abs(sheet[gap : gap + 64, x : x + 64] - np.asarray(image).astype(int)).max() <= 2
    assert list((whole / "logs").rglob("events.out.tfevents*"))


def test_training_goes_on_from_a_saved_pipeline(runs, tmp_path):
    """Without EMA, with a learning rate of next to nothing: the same weights, all but."""
    whole, _ = runs
    changes = {"unet": None, "noise_scheduler": None, "text_encoder": None, "prediction_type": None}
    start = {
        "pretrained_model_name_or_path": str(whole / "pipeline"),
        "learning_rate": 1e-6,
        "use_ema": False,
    }
    train(write_config(tmp_path, Path(), max_train_steps=1, lr_warmup_steps=0, **changes, **start))
    before, after = weights(whole / "pipeline" / "unet"), weights(tmp_path / "run" / "pipeline" / "unet")
    torch.testing.assert_close(after, before, rtol=0, atol=1.1e-6)
    assert not torch.equal(after["conv_in.weight"], before["conv_in.weight"])
    kind = json.loads((tmp_path / "run" / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert kind["prediction_type"] == "v_prediction"


def test_latent_training(clip_folder, tmp_path):
    """With a VAE the U-Net sees latents, and the VAE travels with the pipeline, untouched."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(block_out_channels=(8, 8, 8), latent_channels=2, norm_num_groups=4, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    unet = unet_config(16, in_channels=2, out_channels=2)
    config = write_config(tmp_path, clip_folder, vae=str(tmp_path / "vae"), unet=unet, max_train_steps=2)
    train(config)
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert_same(dict(pipe.vae.state_dict()), dict(vae.state_dict()))
    assert pipe("a crown", num_inference_steps=2).images[0].size == (64, 64)
    (latents,) = (tmp_path / "cache").glob("latents-*.npy")
    assert np.load(latents).shape == (64, 2, 16, 16)


def saved_data_set(folder: Path, broken: bool = False) -> Path:
    """Four training pictures, and two validation pictures whose captions training does not have."""
    rows = [json.loads(line) for line in (EMOJI64 / "metadata.jsonl").read_text("utf-8").splitlines()]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    parts = {}
    for split, part in (("train", rows[:4]), ("validation", rows[30:32])):
        made = [
            {"image": {"bytes": (EMOJI64 / r["file_name"]).read_bytes(), "path": None}, "caption": r["text"]}
            for r in part
        ]
        if broken and split == "validation":
            made[1]["image"]["bytes"] = made[1]["image"]["bytes"][:60]
        parts[split] = datasets.Dataset.from_list(made, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


def test_validation_pictures_keep_their_captions(clip_folder, tmp_path, monkeypatch, capsys):
    data = saved_data_set(tmp_path / "data")
    config = write_config(
        tmp_path, clip_folder, train_data_dir=None, dataset_name=str(data), max_train_steps=1
    )
    looked_up = []
    real = text_to_image.validation_loss

    def watched(loss: DenoisingLoss, pictures: PictureCache, seed: int) -> list[float]:
        captions = pictures.columns["caption"]
        assert [pictures.captions[own[0]] for own in pictures.choices] == captions
        looked_up.append((captions, *loss.text(captions)))
        return real(loss, pictures, seed)

    monkeypatch.setattr(text_to_image, "validation_loss", watched)
    train(config)
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert [len(captions) for captions, _, _ in looked_up] == [4, 2]
    for captions, states, pooled in looked_up:
        with torch.no_grad():
            expected = encode_text(pipe.tokenizer, pipe.text_encoder, captions)
        torch.testing.assert_close(states, expected[0], rtol=2**-10, atol=1e-6)
        torch.testing.assert_close(pooled, expected[1], rtol=2**-10, atol=1e-6)
    printed = capsys.readouterr().out
    assert "step 1 train loss by t: " in printed and "step 1 validation loss by t: " in printed


def test_a_broken_validation_picture_stops_the_run(clip_folder, tmp_path):
    """It must not pass for a data set without a validation split."""
    data = saved_data_set(tmp_path / "data", broken=True)
    config = write_config(
        tmp_path, clip_folder, train_data_dir=None, dataset_name=str(data), max_train_steps=1, strict=True
    )
    with pytest.raises(ValueError, match="picture 1 of the data set cannot be read"):
        train(config)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_run_ends_where_a_plain_one_does(clip_folder, tmp_path):
    """Four steps: the weights differ by less than a hundredth of how far they moved (AdamW's first steps
    have the sign of the gradient, so rounding can turn single weights round)."""
    ends = {}
    for steps, compiled in ((1, False), (4, False), (4, True)):
        folder = tmp_path / f"{steps}-{compiled}"
        settings = {
            "max_train_steps": steps,
            "use_ema": False,
            "lr_decay_steps": 2,
            "validation_prompts": ["a dog"],
        }
        config = write_config(folder, clip_folder, unet=unet_config(64, patch_size=4), **settings)
        train(config, "--compile", compiled)
        ends[steps, compiled] = torch.cat(
            [w.flatten() for w in weights(folder / "run/pipeline/unet").values()]
        )
    moved = (ends[4, False] - ends[1, False]).abs().mean()
    assert moved > 1e-5
    assert (ends[4, True] - ends[4, False]).abs().mean() < 0.01 * moved


COLOURS = {"red": (230, 30, 40), "blue": (20, 60, 220)}


def test_training_learns_what_the_words_mean(clip_folder, tmp_path):
    """Two flat pictures and their one-word captions; each word then draws its colour, whatever the seed.

    Measured: within 3 of 255 levels of the right colour, where the other is 190 away; asked for: 15.
    Without min-SNR weights, so that the noisiest steps count, in which only the words tell the colour.
    """
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    config = write_config(
        tmp_path,
        clip_folder,
        train_data_dir=str(folder),
        resolution=16,
        unet=unet_config(16, patch_size=4),
        noise_scheduler={"beta_schedule": "linear", "timestep_spacing": "trailing"},
        prediction_type="sample",
        snr_gamma=None,
        train_batch_size=8,
        max_train_steps=300,
        learning_rate=3e-3,
        lr_warmup_steps=10,
        ema_decay=0.98,
    )
    train(config)
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    prompts = ["red", "blue"] * 4
    for guidance_scale in (1.0, 2.0):
        generators = [torch.Generator().manual_seed(i) for i in range(8)]
        call = {"num_inference_steps": 20, "guidance_scale": guidance_scale, "output_type": "np"}
        images = pipe(prompts, generator=generators, **call).images
        for prompt, image in zip(prompts, images, strict=True):
            assert np.abs(255 * image.mean((0, 1)) - COLOURS[prompt]).max() < 15, prompt
            assert 255 * image.std((0, 1)).max() < 15  # and flat


def test_the_sheet_of_validation_has_a_seed_for_each_prompt(make_pipeline, tmp_path):
    pipe, prompts = make_pipeline(), ["a cat", "a cat", "a dog"]
    text_to_image.save_sheet(pipe, prompts, tmp_path / "samples" / "1.png", seed=3)
    single = [
        pipe(prompt, num_inference_steps=25, generator=torch.Generator().manual_seed(3 + i)).images[0]
        for i, prompt in enumerate(prompts)
    ]
    with Image.open(tmp_path / "samples" / "1.png") as sheet:
        drawn, expected = (np.asarray(one, dtype=int) for one in (sheet, image_grid(single, columns=8)))
    assert np.abs(drawn - expected).max() <= 1
    assert np.abs(np.asarray(single[0], dtype=int) - np.asarray(single[1])).mean() > 5
