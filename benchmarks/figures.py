"""The lecture notes' and the papers' demonstrations, redrawn: `python -m benchmarks.figures`.

    forward          a picture under the linear and the cosine schedule (Nichol 2021, figure 3)
    digit            a digit step by step, beta = 0.2, T = 10
    swiss-roll       forward, posterior and backward, beta = 0.05, T = 10
    progressive      the model's predictions of x0 during sampling (Ho 2020, figure 6)
    interpolation    two pictures mixed at several noise levels and denoised (Ho 2020, figure 9)
    denoise          noised pictures and samples of what they were (Sohl-Dickstein 2015, figure 3)
    rate-distortion  the rate spent and the distortion left when sampling stops early (Ho 2020, figure 5)

The first three need nothing. The others need a model without a VAE, and the last two also held-out pictures.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.toys import DIGIT, backward_chain, forward_chain, posterior_chain, swiss_roll
from pipelines import DDPMScheduler, TextToImagePipeline
from pipelines.chain.guidance import guide
from pipelines.coding.likelihood import chain_of, rate_distortion
from pipelines.drawing.images import to_tensor, to_unit
from pipelines.drawing.text import NULL_PROMPT, encode_text
from training.evaluation import bits_per_dim as likelihood
from training.evaluation.figures import chart, finish
from training.evaluation.samples import call

PICTURES = Path(__file__).parent.parent / "tests" / "data" / "emoji64"
PROMPTS = ["dog face, noto style", "red heart, 3d style", "pizza, flat style", "house, twemoji style"]


# ------------------------------------------------------------ drawing


def draw_pictures(rows: dict[str, Tensor], titles: list[str], path: Path) -> None:
    """A row of pictures for each entry, (n, C, H, W) in [-1, 1]: names on the left, titles on top."""
    columns = len(titles)
    with chart(path, 1.1 * columns + 0.9, 1.15 * len(rows) + 0.3, columns, len(rows)) as axes:
        for row, pictures in zip(np.atleast_2d(axes), rows.values(), strict=True):
            for ax, picture in zip(row, to_unit(pictures.float()), strict=True):
                ax.imshow(picture.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
                ax.set(xticks=[], yticks=[])
        for ax, title in zip(np.atleast_2d(axes)[0], titles, strict=True):
            ax.set_title(title, fontsize=8)
        for ax, name in zip(np.atleast_2d(axes)[:, 0], rows, strict=True):
            ax.set_ylabel(name, fontsize=8)


def draw_points(rows: dict[str, Tensor], titles: dict[str, list[str]], path: Path) -> None:
    """One row of scatter plots for each entry, (n, points, 2); a point keeps its colour along the row."""
    columns = max(map(len, rows.values()))
    with chart(path, 1.6 * columns, 1.8 * len(rows), columns, len(rows)) as axes:
        for row, (name, clouds) in zip(axes, rows.items(), strict=True):
            for ax, cloud, title in zip(row, clouds, titles[name], strict=True):
                ax.scatter(*cloud.T.numpy(), s=1, c=range(len(cloud)), cmap="viridis")
                ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
                ax.set_title(title, fontsize=8)
            row[0].set_ylabel(name, fontsize=9)


# ------------------------------------------------------------ without a model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noised_pictures(picture: Tensor, schedule: str, timesteps: list[int], seed: int) -> Tensor:
    """The picture (1, C, H, W) at these timesteps of a schedule, all with the same noise: (n, C, H, W)."""
    eps = torch.randn(picture.shape, generator=seeded(seed)).expand(len(timesteps), -1, -1, -1)
    scheduler = DDPMScheduler(beta_schedule=schedule)
    return scheduler.add_noise(picture.expand_as(eps), eps, torch.tensor(timesteps))


def draw_forward(settings: argparse.Namespace, path: Path) -> None:
    picture = to_tensor(Image.open(PICTURES / "dog-face-noto.png"))
    timesteps = [0, 125, 250, 375, 500, 625, 750, 875, 999]
    schedules = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    rows = {name: noised_pictures(picture, s, timesteps, settings.seed) for name, s in schedules.items()}
    draw_pictures(rows, [f"t = {t}" for t in timesteps], path)


def draw_digit(settings: argparse.Namespace, path: Path) -> None:
    chain = forward_chain(DIGIT, beta=0.2, T=10, generator=seeded(settings.seed))  # (11, 1, 8, 8)
    titles = ["x_0", *(f"x_{t}" for t in range(1, 11))]
    draw_pictures({"beta = 0.2": chain}, titles, path)


def draw_swiss_roll(settings: argparse.Namespace, path: Path) -> None:
    """q(x_t | x_{t-1}), q(x_{t-1} | x_t, x_0) and p(x_{t-1} | x_t): every other one of the eleven clouds.

    The backward chain starts from noised points of its own and sees no x0. It uses the exact model, E[eps |
    x_t] for x0 uniform over the roll's points. Ten steps are few: the last one goes to the mean of the points
    that x_1 may have come from, which for some lies between the coils.
    """
    roll, T, beta = swiss_roll(1000, settings.seed), 10, 0.05
    generator = seeded(settings.seed)
    forward = forward_chain(roll, beta, T, generator)
    posterior = posterior_chain(roll, forward[-1], beta, T, generator)
    backward = backward_chain(roll, forward_chain(roll, beta, T, generator)[-1], beta, T, generator)
    shown = list(range(0, T + 1, 2))
    rows = {"forward": forward[shown], "posterior": posterior[shown], "backward": backward[shown]}
    up, down = [f"x_{t}" for t in shown], [f"x_{T - t}" for t in shown]
    draw_points(rows, dict(zip(rows, (up, down, down), strict=True)), path)


# ------------------------------------------------------------ with a model


@torch.no_grad()
def progressive_predictions(
    pipe: TextToImagePipeline, prompts: list[str], steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """(timesteps (n,), the x0 predicted at each (n, B, 3, H, W)) while the model's DDPM chain draws the
    prompts.

    Prompt i has the seed seed + i; the last prediction is the picture.
    """
    scheduler, channels = chain_of(pipe.scheduler), pipe.unet.config.in_channels
    scheduler.set_timesteps(steps)
    states, pooled, _ = encode_text(pipe.tokenizer, pipe.text_encoder, [NULL_PROMPT] * len(prompts) + prompts)
    added = {"pooled_text": pooled} if pipe.requires_pooled_text else None
    generators = [seeded(seed + i) for i in range(len(prompts))]
    size = pipe.unet.config.sample_size
    x = torch.cat([torch.randn(1, channels, size, size, generator=generator) for generator in generators])
    predictions = []
    for t in scheduler.timesteps:
        output = pipe.unet(torch.cat([x, x]), t, states, added_cond_kwargs=added).sample
        output = guide(output, channels, pipe.config.default_guidance_scale, 0.0)
        x, x0 = scheduler.step(output, t, x, generators, return_dict=False)
        predictions.append(x0)
    return scheduler.timesteps, torch.stack(predictions)


def draw_progressive(settings: argparse.Namespace, path: Path) -> None:
    pipe = likelihood.load_pixel_pipeline(settings.model)
    timesteps, x0 = progressive_predictions(pipe, PROMPTS, settings.steps, settings.seed)
    shown = torch.linspace(0, len(timesteps) - 1, min(10, len(timesteps))).round().long()
    rows = {prompt: x0[shown, i] for i, prompt in enumerate(PROMPTS)}
    draw_pictures(rows, [f"t = {t}" for t in timesteps[shown].tolist()], path)


def mixed_noise(pictures: Tensor, shares: Tensor, abar: float, seed: int) -> Tensor:
    """x_t and x'_t ~ q(x_t | picture), interpolated with lambda = `shares`, (n,): (n, C, H, W).

    A plain interpolation of independent noises would have a lower variance in the middle than any x_t, so the
    noise is scaled back to its variance of 1 - abar: ((1 - lambda) eps + lambda eps')/sqrt((1 - lambda)^2 +
    lambda^2).
    """
    eps = torch.randn(pictures.shape, generator=seeded(seed))
    s = shares.reshape(-1, 1, 1, 1)
    clean = (1 - s) * pictures[:1] + s * pictures[1:]
    noise = ((1 - s) * eps[:1] + s * eps[1:]) / ((1 - s) ** 2 + s**2).sqrt()
    return math.sqrt(abar) * clean + math.sqrt(1 - abar) * noise


def timesteps_from(t: int, steps: int) -> list[int]:
    """`steps` evenly spaced timesteps from t to 0, or all of them if there are fewer."""
    return torch.linspace(t, 0, min(steps, t + 1)).round().long().unique().flip(0).tolist()


def draw_from(
    pipe: TextToImagePipeline, x_t: Tensor, t: int, steps: int, seeds: Iterable[int], **arguments: Any
) -> Tensor:
    """Denoise x_t with the model's DDPM chain from timestep t on: (B, 3, H, W) in [-1, 1]."""
    pipe.scheduler = chain_of(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return call(pipe, seeds, timesteps=timesteps_from(t, steps), latents=x_t, **arguments)


@torch.no_grad()
def interpolate(
    pipe: TextToImagePipeline, x0: Tensor, captions: list[str], t: int, shares: Tensor, steps: int, seed: int
) -> Tensor:
    """Interpolate two pictures x0 (2, 3, H, W) at timestep t and denoise from there: (n, 3, H, W) in [-1, 1].

    The captions' states are interpolated with the same shares, and all are denoised with the same noise.
    """
    abar = float(pipe.scheduler.alphas_cumprod[t])
    states, pooled, _ = encode_text(pipe.tokenizer, pipe.text_encoder, captions)
    mixed: dict[str, Any] = {"prompt_embeds": torch.lerp(states[:1], states[1:], shares.reshape(-1, 1, 1))}
    if pipe.requires_pooled_text:
        mixed["pooled_prompt_embeds"] = torch.lerp(pooled[:1], pooled[1:], shares.reshape(-1, 1))
    x_t = mixed_noise(x0, shares, abar, seed)
    return draw_from(pipe, x_t, t, steps, [seed + 1] * len(shares), **mixed)


def draw_interpolation(settings: argparse.Namespace, path: Path) -> None:
    pipe = likelihood.load_pixel_pipeline(settings.model)
    lines = (PICTURES / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    captions = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
    names = ["dog-face-noto.png", "cat-face-noto.png"]
    side = pipe.unet.config.sample_size
    pictures = to_tensor([Image.open(PICTURES / name).convert("RGB").resize((side, side)) for name in names])
    shares, own = torch.linspace(0, 1, 7), [captions[name] for name in names]
    rows = {}
    for t in (int(share * (len(chain_of(pipe.scheduler)) - 1)) for share in (0.25, 0.5, 0.75, 1)):
        mixes = interpolate(pipe, pictures, own, t, shares, settings.steps, settings.seed)
        rows[f"t = {t}"] = torch.cat([pictures[:1], mixes, pictures[1:]])
    draw_pictures(rows, ["a picture", *(f"{share:.2f}" for share in shares.tolist()), "another"], path)


def noise_to_level(scheduler: DDPMScheduler, pictures: Tensor, sigma: float, seed: int) -> tuple[int, Tensor]:
    """(t, x_t) such that x_t/sqrt(abar_t) is the pictures plus noise of standard deviation `sigma`, or of the
    nearest one that a timestep has, where sigma_t^2 = (1 - abar_t)/abar_t. Picture i has the seed seed +
    i."""
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).log()
    t = int((levels - 2 * math.log(sigma)).abs().argmin())
    eps = torch.stack([torch.randn(x.shape, generator=seeded(seed + i)) for i, x in enumerate(pictures)])
    return t, scheduler.add_noise(pictures, eps, torch.full((len(pictures),), t))


@torch.no_grad()
def sample_posterior(pipe: TextToImagePipeline, x_t: Tensor, t: int, steps: int, seed: int) -> Tensor:
    """x0 ~ p(x0 | x_t), by the model's chain from t on without a prompt: (B, C, H, W) in [-1, 1]."""
    seeds = range(seed, seed + len(x_t))
    return draw_from(pipe, x_t, t, steps, seeds, prompt=[NULL_PROMPT] * len(x_t), guidance_scale=1.0)


def counted(settings: argparse.Namespace, num_pictures: int) -> likelihood.BitsPerDimConfig:
    """Settings to measure `num_pictures` held-out pictures. Raises ValueError if one is out of range."""
    shared = {name: getattr(settings, name) for name in ("model", "dataset", "cache_dir", "seed")}
    config = likelihood.BitsPerDimConfig(**shared, num_pictures=num_pictures)
    config.check()
    return config


def draw_denoise(settings: argparse.Namespace, path: Path) -> None:
    """Add noise of variance 1, as in the paper, and weaker and stronger noise, and denoise each twice."""
    pipe, _, held_out = likelihood.prepare(counted(settings, 8))
    pictures = held_out.pictures.images(held_out.numbers)
    scheduler, rows = chain_of(pipe.scheduler), {"held out": pictures}
    for sigma in (0.5, 1.0, 2.0):
        t, x_t = noise_to_level(scheduler, pictures, sigma, settings.seed)
        rows[f"+ noise\nof {sigma}"] = x_t / float(scheduler.alphas_cumprod[t]) ** 0.5
        for name, seed in (("denoised", 1000), ("once more", 2000)):
            rows[f"{name}\n({sigma})"] = sample_posterior(pipe, x_t, t, settings.steps, settings.seed + seed)
    draw_pictures(rows, [""] * len(pictures), path)


def draw_rate_distortion(settings: argparse.Namespace, path: Path) -> None:
    config = counted(settings, settings.num_pictures)
    pipe, chain, held_out = likelihood.prepare(config)
    rate, distortion = rate_distortion(likelihood.measure(config, pipe, chain, held_out, held_out.captions))
    steps = (torch.arange(len(rate)), "reverse process steps (T - t)")
    lost, spent = (distortion, "distortion (RMSE, 0 .. 255)"), (rate, "rate (bits/dim)")
    with chart(path, 11, 3.2, columns=3) as axes:
        for ax, (x, xlabel), (y, ylabel) in zip(
            axes, (steps, steps, spent), (lost, spent, lost), strict=True
        ):
            ax.plot(x.numpy(), y.numpy(), lw=1)
            finish(ax, xlabel=xlabel, ylabel=ylabel)


# ------------------------------------------------------------ the command


FIGURES: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    draw.__name__.removeprefix("draw_").replace("_", "-"): draw
    for draw in (
        draw_forward, draw_digit, draw_swiss_roll, draw_progressive, draw_interpolation, draw_denoise,
        draw_rate_distortion,
    )
}  # fmt: skip
NEED_A_MODEL = ("progressive", "interpolation", "denoise", "rate-distortion")


def main(argv: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.figures", None, __doc__, formatter_class=formatter)
    parser.add_argument("figures", nargs="*", metavar="figure", help="figures to draw; all by default")
    for name, default, text in (
        ("--output_dir", Path("outputs/figures"), "where the PNGs go"),
        ("--model", "models/emoji", "pipeline without a VAE"),
        ("--dataset", "data/emoji", "denoise, rate-distortion: source of the validation pictures"),
        ("--cache_dir", "data/cache", "where decoded pictures are kept"),
        ("--num_pictures", 50, "rate-distortion: how many pictures to measure"),
        ("--steps", 100, "denoising steps"),
        ("--seed", 0, "seed of the noise"),
    ):
        parser.add_argument(name, type=type(default), default=default, help=text)
    settings = parser.parse_args(argv)
    names = settings.figures or list(FIGURES)
    for name in names:
        if name not in FIGURES:
            parser.error(f"figure {name!r}: must be one of {', '.join(FIGURES)}")
    if settings.steps < 2:
        parser.error(f"--steps must be at least 2, got {settings.steps}")
    if set(names) & set(NEED_A_MODEL) and not (Path(settings.model) / "model_index.json").is_file():
        free = " ".join(name for name in FIGURES if name not in NEED_A_MODEL)
        parser.error(
            f"--model: there is no pipeline in {settings.model!r}; without one, name figures: {free}"
        )
    for name in names:
        path = settings.output_dir / f"{name}.png"
        try:
            FIGURES[name](settings, path)
        except ValueError as error:
            parser.error(f"{name}: {error}")
        print(path)


if __name__ == "__main__":
    main()
