"""The demonstrations: toy chains by their statistics, a model's figures against its pipeline, the command."""

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler as DiffusersDDPM
from PIL import Image

from benchmarks import figures
from benchmarks.figures import (
    interpolate,
    mixed_noise,
    noise_to_level,
    noised_pictures,
    progressive_predictions,
    sample_posterior,
)
from benchmarks.toys import DIGIT, backward_chain, expected_noise, forward_chain, posterior_chain, swiss_roll
from pipelines import DDPMScheduler, TextToImagePipeline
from pipelines.drawing.text import encode_text


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------ toys


def test_the_digit_is_a_picture():
    assert (
        DIGIT.shape == (1, 8, 8) and DIGIT.min() == -1 and DIGIT.max() == 7 / 8
    )  # 15 of 16 is its brightest


def test_the_roll():
    points = swiss_roll(2000)
    assert points.shape == (2000, 2)
    torch.testing.assert_close(points.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    assert points.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    steps = (points[1:] - points[:-1]).norm(dim=1)
    assert steps.max() < 0.15  # coils are 0.8 apart: neighbours in order are neighbours on the roll


@pytest.mark.parametrize("beta", [0.05, 0.2])
def test_forward_and_posterior_chains_have_the_closed_form_moments(beta):
    """From one x0, 40,000 times: x_t has mean sqrt(abar) x0 and variance 1 - abar on the way up and on the
    way down, within five standard errors, and neighbours correlate as the chain's do; down ends at x0."""
    n, T, x0 = 40_000, 10, 0.7
    start = torch.full((n, 1), x0)
    up = forward_chain(start, beta, T, seeded())
    down = posterior_chain(start, up[-1], beta, T, seeded(1)).flip(0)
    assert len(up) == len(down) == T + 1
    torch.testing.assert_close(down[0], start, rtol=0, atol=1e-6)
    for chain in (up, down):
        for t in range(1, T + 1):
            abar, x = (1 - beta) ** t, chain[t]
            assert abs(float(x.mean()) - math.sqrt(abar) * x0) < 5 * math.sqrt((1 - abar) / n), t
            assert abs(float(x.var()) / (1 - abar) - 1) < 5 * math.sqrt(2 / n), t
            if t > 1:
                covariance = float(torch.cov(torch.cat([chain[t - 1], x], dim=1).T)[0, 1])
                expected = math.sqrt(1 - beta) * (1 - (1 - beta) ** (t - 1))
                assert covariance == pytest.approx(expected, abs=0.02), t


def test_expected_noise_by_bayes():
    """Weights of each point written out: N(x_t; sqrt(abar) point, 1 - abar)."""
    points, x_t, abar = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]]), torch.tensor([[0.3, 0.2]]), 0.6
    densities = [
        math.exp(
            -sum((float(a) - math.sqrt(abar) * float(b)) ** 2 for a, b in zip(x_t[0], p, strict=True)) / 0.8
        )
        for p in points
    ]
    x0 = sum(d * p for d, p in zip(densities, points, strict=True)) / sum(densities)
    expected = (x_t - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    torch.testing.assert_close(expected_noise(points, x_t, abar), expected)


def test_the_backward_chain_goes_back_to_the_roll():
    """2,000 points of x_10: the mean of the roll within four standard errors, and most of them within 0.1 of
    it (the coils are 0.8 apart)."""
    points = swiss_roll(400)
    noised = forward_chain(points.repeat(5, 1), 0.05, 10, seeded())[-1]
    chain = backward_chain(points, noised, 0.05, 10, seeded(1))
    assert chain.shape == (11, 2000, 2) and torch.equal(chain[0], noised)
    near = [float((torch.cdist(x, points).min(1).values < 0.1).float().mean()) for x in (chain[0], chain[-1])]
    print(f"within 0.1 of the roll: {near[0]:.3f} of x_10, {near[1]:.3f} of x_0")
    assert near[0] < 0.25 and near[1] > 0.8
    error = (chain[-1].mean(0) - points.mean(0)).abs()
    assert (error < 4 * points.std(0) / math.sqrt(2000)).all()


def test_noised_pictures_are_those_of_diffusers():
    picture = torch.rand(1, 3, 4, 4, generator=seeded()) * 2 - 1
    for schedule in ("linear", "squaredcos_cap_v2"):
        found = noised_pictures(picture, schedule, [0, 400, 999], seed=7)
        eps = torch.randn(picture.shape, generator=seeded(7))
        theirs = DiffusersDDPM(beta_schedule=schedule)
        for x, t in zip(found, (0, 400, 999), strict=True):
            torch.testing.assert_close(
                x, theirs.add_noise(picture, eps, torch.tensor([t]))[0], rtol=1e-5, atol=1e-5
            )


# ------------------------------------------------------------ a model's figures


@pytest.fixture
def pipe(make_pipeline, make_unet) -> TextToImagePipeline:
    scheduler = DDPMScheduler(num_train_timesteps=20, timestep_spacing="trailing", prediction_type="sample")
    unet = make_unet(pooled_text_time_embedding=True, pooled_text_dim=24)
    return make_pipeline(scheduler=scheduler, unet=unet)


def test_progressive_predictions_end_in_the_picture_that_the_pipeline_draws(pipe):
    timesteps, x0 = progressive_predictions(pipe, ["a dog", "a cat"], steps=6, seed=4)
    assert x0.shape == (6, 2, 3, 16, 16) and timesteps.tolist() == sorted(timesteps.tolist(), reverse=True)
    for i, prompt in enumerate(("a dog", "a cat")):
        drawn = pipe(prompt, num_inference_steps=6, generator=seeded(4 + i), output_type="pt").images[0]
        torch.testing.assert_close(x0[-1, i].clamp(-1, 1), drawn * 2 - 1, rtol=0, atol=1e-4)
    assert (x0[0] - x0[-1]).abs().mean() > 0.01


def test_mixes_have_the_mean_and_variance_of_their_timestep():
    """Ends are x_t of either picture; in between a mix of the clean, and noise of variance 1 - abar."""
    pictures = torch.cat([torch.full((1, 1, 200, 200), 0.5), torch.full((1, 1, 200, 200), -0.9)])
    shares, abar = torch.tensor([0.0, 0.25, 0.5, 1.0]), 0.3
    mixes = mixed_noise(pictures, shares, abar, seed=2)
    eps = torch.randn(pictures.shape, generator=seeded(2))
    for end, i in ((0, 0), (-1, 1)):
        x_t = math.sqrt(abar) * pictures[i] + math.sqrt(1 - abar) * eps[i]
        torch.testing.assert_close(mixes[end], x_t)
    for mix, share in zip(mixes, shares.tolist(), strict=True):
        mean = math.sqrt(abar) * ((1 - share) * 0.5 - share * 0.9)
        assert abs(float(mix.mean()) - mean) < 5 * math.sqrt((1 - abar) / 40_000)
        assert float(mix.var()) == pytest.approx(1 - abar, rel=0.03)


def test_interpolation_is_denoising_from_the_mix(pipe):
    """Each mix again, alone, through the scheduler's own steps from t on, with the captions' states mixed."""
    pictures = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    shares, captions = torch.tensor([0.0, 0.5, 1.0]), ["a dog", "a cat"]
    pipe.register_to_config(default_guidance_scale=1.0)
    found = interpolate(pipe, pictures, captions, t=12, shares=shares, steps=5, seed=3)
    states, pooled, _ = encode_text(pipe.tokenizer, pipe.text_encoder, captions)
    scheduler = DDPMScheduler(num_train_timesteps=20, prediction_type="sample")
    scheduler.set_timesteps(timesteps=[12, 9, 6, 3, 0])
    abar = float(scheduler.alphas_cumprod[12])
    starts = mixed_noise(pictures, shares, abar, seed=3)
    for x, share, drawn in zip(starts, shares.tolist(), found, strict=True):
        generator, x = seeded(4), x[None]
        text = (1 - share) * states[:1] + share * states[1:]
        added = {"pooled_text": (1 - share) * pooled[:1] + share * pooled[1:]}
        for t in scheduler.timesteps:
            with torch.no_grad():
                output = pipe.unet(x, t, text, added_cond_kwargs=added).sample
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        torch.testing.assert_close(drawn, x[0].clamp(-1, 1), rtol=0, atol=1e-4)


def test_pictures_are_noised_to_the_level_that_was_asked_for():
    scheduler, pictures = DDPMScheduler(beta_schedule="squaredcos_cap_v2"), torch.zeros(2, 3, 64, 64)
    for sigma in (0.1, 1.0, 5.0):
        t, x_t = noise_to_level(scheduler, pictures, sigma, seed=0)
        noise = x_t / scheduler.alphas_cumprod[t] ** 0.5
        assert noise.std().item() == pytest.approx(sigma, rel=0.03)
    assert scheduler.alphas_cumprod[noise_to_level(scheduler, pictures, 1.0, 0)[0]] == pytest.approx(
        0.5, abs=2e-3
    )


def test_the_posterior_of_a_gaussian_model(pipe):
    """Of data N(0, s^2 I) the posterior of y = x0 + sigma z is N(y s^2/(s^2 + sigma^2), s^2 sigma^2/(s^2 +
    sigma^2) I), and the exact network E[x0 | x_t] = sqrt(abar) s^2/(abar s^2 + 1 - abar) x_t."""
    pipe.scheduler = DDPMScheduler(num_train_timesteps=400, prediction_type="sample", clip_sample=False)
    s, abar = 0.2, pipe.scheduler.alphas_cumprod

    class Exact(torch.nn.Module):
        config, dtype, device = pipe.unet.config, torch.float32, torch.device("cpu")

        def forward(self, x_t, t, *_, **__):
            a = abar[t]
            return (a**0.5 * s**2 / (a * s**2 + 1 - a) * x_t,)

    pipe.register_modules(unet=Exact())
    x0 = s * torch.randn(8, 3, 16, 16, generator=seeded())
    t, x_t = noise_to_level(pipe.scheduler, x0, s, seed=1)
    sigma2 = float((1 - abar[t]) / abar[t])
    drawn = sample_posterior(pipe, x_t, t, steps=400, seed=5)
    left = drawn - x_t / float(abar[t]) ** 0.5 * s**2 / (s**2 + sigma2)
    variance, count = s**2 * sigma2 / (s**2 + sigma2), x0.numel()
    assert abs(float(left.mean())) < 5 * (variance / count) ** 0.5
    assert float(left.var()) == pytest.approx(variance, rel=0.1)  # 5 standard errors, and the last steps'


# ------------------------------------------------------------ the command


@pytest.fixture
def data_folder(tmp_path) -> Path:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(p), "caption": f"thing {i}"} for i, p in enumerate(pixels)]
    data = datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows, features=features)})
    data.save_to_disk(str(tmp_path / "data"))
    return tmp_path / "data"


def test_one_command_draws_all(pipe, data_folder, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    figures.main(
        ["--output_dir", str(tmp_path / "drawn"), "--model", str(tmp_path / "model"),
         "--dataset", str(data_folder), "--cache_dir", str(tmp_path), "--num_pictures", "3", "--steps", "4"]
    )  # fmt: skip
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == sorted(f"{name}.png" for name in figures.FIGURES)
    for path in drawn:
        picture = np.asarray(Image.open(path).convert("L"))
        assert (picture < 250).mean() > 0.01, path.name  # something is on the page
    paths = [str(tmp_path / "drawn" / f"{name}.png") for name in figures.FIGURES]
    assert capsys.readouterr().out.split() == paths


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["faces"], "figure 'faces': must be one of forward, digit, swiss-roll, progressive"),
        (["digit", "--steps", "1"], "--steps must be at least 2, got 1"),
        (
            ["--model", "{tmp}"],
            "there is no pipeline in '{tmp}'; without one, name figures: forward digit swiss-roll",
        ),
        (["rate-distortion", "--num_pictures", "1", "--model", "{model}"], "num_pictures must be at least 2"),
        (["rate-distortion", "--dataset", "{tmp}/no/data", "--model", "{model}"], "there is no such folder"),
        (["progressive", "--model", "{latent}"], "a pipeline without a VAE"),
    ],
)
def test_errors_are_one_clear_line(
    arguments: list[str], message: str, pipe: Any, stable_diffusion_folder, tmp_path, capsys
):
    pipe.save_pretrained(tmp_path / "model")
    places = {"tmp": str(tmp_path), "model": str(tmp_path / "model"), "latent": str(stable_diffusion_folder)}
    with pytest.raises(SystemExit):
        figures.main([a.format(**places) for a in arguments] + ["--output_dir", str(tmp_path / "drawn")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert message.format(**places) in error
