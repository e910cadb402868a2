"""How many bits a model needs for a picture, and how many of them the caption saves.

    python -m training.evaluate bits-per-dim --model models/emoji --split validation --output terms.png
    python -m training.evaluate text-information --model models/emoji --split validation --output caption.png

Every term of the variational bound is estimated with one draw of noise (Nichol 2021, section 3), for pictures
with 256 levels and a U-Net that works on pixels. The noise is a function of the seed, the picture's number in
its split and t alone, so two runs never differ in their noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pipelines import DDPMScheduler, TextToImagePipeline
from pipelines.chain.equations import FIXED_VARIANCES, LEARNED_VARIANCES
from pipelines.coding.likelihood import VLBTerms, chain_of, vlb_terms
from pipelines.drawing.text import NULL_PROMPT, encode_text
from training.data.pictures import PictureCache, load_pictures, seed_for
from training.evaluation.figures import chart, finish
from training.evaluation.samples import (
    fewest_matches,
    first_captions,
    load_pipeline,
    random_rows,
    read_pictures,
)
from training.evaluation.settings import CountSettings, ModelSettings, PassSettings
from training.objectives.denoising import BUCKETS
from training.run.settings import Rule, require, setting

VARIANCES = (*FIXED_VARIANCES, *LEARNED_VARIANCES)
FOR_AN_ERROR = Rule(lambda count: count >= 2, "at least 2, for a standard error")


class BitsPerDimConfig(ModelSettings, PassSettings, CountSettings):
    """Settings of `training.evaluate bits-per-dim` and `text-information`."""

    variance_type: str | None = setting(
        "fixed_small, fixed_large, ...; the model's own by default.", None, VARIANCES
    )
    num_inference_steps: int | None = setting(
        "Timesteps of the chain, ends included; all T by default.", None, "at least 1"
    )
    num_pictures: int = setting("Pictures drawn at random; at least 2.", 100, FOR_AN_ERROR)


def load_pixel_pipeline(name: str) -> TextToImagePipeline:
    """A pipeline whose likelihood is exact: one that draws RGB pixels itself.

    Raises:
        ValueError: it has a VAE, whose decoder is not a bijection, or draws something other than RGB.
    """
    pipe = load_pipeline(name)
    no_vae = "a pipeline without a VAE: bits per dimension are of pixels, and a VAE's latents lose some"
    require(pipe.vae is None, "model", name, no_vae)
    require(pipe.unet.config.in_channels == 3, "model", name, "a pipeline of RGB pixels")
    return pipe


def evaluation_chain(
    pipe: TextToImagePipeline, variance_type: str | None = None, steps: int | None = None
) -> DDPMScheduler:
    """The model's chain with x0 clipped to [-1, 1] and all T timesteps, or `steps` of them including both
    ends.

    This is the spacing of Nichol 2021, section 4: the chain ends at t = 0, where the noise is a fraction of a
    level.

    Raises:
        ValueError: a learned variance is requested of a U-Net that does not predict one, or `steps` is not in
            1 .. T.
    """
    variance_type = variance_type or pipe.scheduler.config.get("variance_type") or "fixed_small"
    tells_variance = pipe.unet.config.out_channels == 2 * pipe.unet.config.in_channels
    fixed = f"one of {FIXED_VARIANCES}: the U-Net tells no variance"
    require(tells_variance or variance_type in FIXED_VARIANCES, "variance_type", variance_type, fixed)
    clipped: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}
    chain = chain_of(pipe.scheduler, variance_type=variance_type, timestep_spacing="linspace", **clipped)
    if steps is not None:
        chain.set_timesteps(steps)
    return chain


@torch.no_grad()
def captioned_model(
    pipe: TextToImagePipeline, captions: list[str], chain: DDPMScheduler
) -> Callable[[Tensor, int], Tensor]:
    """(x_t (B, 3, H, W), t) -> the U-Net's output for these captions; without the variance unless the chain
    uses a learned one."""
    states, pooled, _ = encode_text(pipe.tokenizer, pipe.text_encoder, captions)
    added = {"pooled_text": pooled} if pipe.requires_pooled_text else None
    channels = 6 if chain.config.variance_type in LEARNED_VARIANCES else 3

    def model(x_t: Tensor, t: int) -> Tensor:
        output = pipe.unet(x_t, t, encoder_hidden_states=states, added_cond_kwargs=added).sample
        return output[:, :channels]

    return model


def picture_noise(seed: int, numbers: list[int], shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    """t -> eps, one row for each picture. It depends only on the seed, the picture's number and t, so it is
    the same in every batch."""

    def noise(t: int) -> Tensor:
        seeds = [seed_for(seed, "bits per dimension", number, t) for number in numbers]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    return noise


@dataclass
class HeldOut:
    """The pictures to measure: their numbers in the split, and a caption for each."""

    pictures: PictureCache
    numbers: list[int]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.numbers)


def held_out_pictures(config: BitsPerDimConfig, pipe: TextToImagePipeline) -> HeldOut:
    """`num_pictures` random pictures (all of them if there are fewer), at the size that the U-Net draws."""
    side = pipe.unet.config.sample_size
    require(isinstance(side, int), "model", config.model, "a pipeline of square pictures")
    columns = load_pictures(config.dataset, config.split).column_names
    pictures = read_pictures(config, config.split, side, "caption" if "caption" in columns else "text")
    require(len(pictures) >= 2, "split", config.split, "of at least 2 pictures")
    numbers = random_rows(len(pictures), config.num_pictures, config.seed)
    return HeldOut(pictures, numbers, first_captions(pictures, numbers))


def prepare(config: BitsPerDimConfig) -> tuple[TextToImagePipeline, DDPMScheduler, HeldOut]:
    """(model, chain, pictures) according to the settings."""
    pipe = load_pixel_pipeline(config.model)
    chain = evaluation_chain(pipe, config.variance_type, config.num_inference_steps)
    return pipe, chain, held_out_pictures(config, pipe)


def measure(
    config: BitsPerDimConfig,
    pipe: TextToImagePipeline,
    chain: DDPMScheduler,
    held_out: HeldOut,
    captions: list[str],
    label: str = "pictures",
) -> VLBTerms:
    """The terms of the bound for every picture, given the caption at its place in `captions`."""
    parts = []
    for start in tqdm(range(0, len(held_out), config.batch_size), desc=label, unit="batch"):
        numbers = held_out.numbers[start : start + config.batch_size]
        x0 = held_out.pictures.images(numbers)
        model = captioned_model(pipe, captions[start : start + config.batch_size], chain)
        parts.append(vlb_terms(model, chain, x0, picture_noise(config.seed, numbers, tuple(x0.shape[1:]))))
    return VLBTerms(parts[0].timesteps, *(torch.cat(rows) for rows in list(zip(*parts, strict=True))[1:]))


def mean_and_error(values: Tensor) -> dict[str, float]:
    """The mean of values (N,) over pictures and its standard error, s/sqrt(N)."""
    return {"mean": float(values.mean()), "standard error": float(values.std() / len(values) ** 0.5)}


def summary(terms: VLBTerms) -> dict[str, Any]:
    """The bound, its three parts, and every single term, in bits per dimension."""
    bits, last = terms.bits, len(terms.timesteps) - 1
    each = [mean_and_error(column) for column in bits.T]
    return {
        "bits/dim": mean_and_error(bits.sum(1)),
        "L_0 (the last step, to 256 levels)": each[0],
        f"L_1 .. L_{last} (the steps between)": mean_and_error(bits[:, 1:-1].sum(1)),
        "L_T (the prior)": each[-1],
        "timesteps": terms.timesteps.tolist(),
        "terms": [term["mean"] for term in each],
        "standard errors of the terms": [term["standard error"] for term in each],
    }


def description(config: BitsPerDimConfig, chain: DDPMScheduler, held_out: HeldOut) -> dict[str, Any]:
    settings = chain.config
    return {
        "model": config.model,
        "split": config.split,
        "pictures": len(held_out),
        "chain": f"{len(chain.timesteps)} of {len(chain)} timesteps, {settings.beta_schedule}",
        "variance": settings.variance_type,
    }


def bits_per_dim(config: BitsPerDimConfig) -> dict[str, Any]:
    """Bits per dimension of held-out pictures under their own captions."""
    pipe, chain, held_out = prepare(config)
    terms = measure(config, pipe, chain, held_out, held_out.captions)
    if config.output:
        draw_terms(terms, config.output)
    return description(config, chain, held_out) | summary(terms)


# ------------------------------------------------------------ what the caption is worth


def shuffle_captions(captions: list[str]) -> list[str]:
    """Give each picture another's caption, by shifting all captions by the number of places that leaves the
    fewest unchanged."""
    k = fewest_matches(captions)
    return captions[k:] + captions[:k]


def text_information(config: BitsPerDimConfig) -> dict[str, Any]:
    """Bits per dimension of the same pictures with the same noise, given their own captions, the null prompt,
    and each other's captions.

    What a caption saves, log2 p(x0 | caption) - log2 p(x0), is the number of bits that it tells the model
    about the picture (both terms are estimated by their bounds). For a model that ignores its text, both
    differences are 0.
    """
    pipe, chain, held_out = prepare(config)
    shuffled = shuffle_captions(held_out.captions)
    nothing = [NULL_PROMPT] * len(held_out)
    captions = {"conditional": held_out.captions, "unconditional": nothing, "shuffled": shuffled}
    terms = {name: measure(config, pipe, chain, held_out, texts, name) for name, texts in captions.items()}
    size = 3 * pipe.unet.config.sample_size**2  # dimensions of a picture
    own = terms["conditional"].bits
    savings = {name: size * (terms[name].bits - own) for name in ("unconditional", "shuffled")}  # (N, n + 1)
    if config.output:
        draw_savings(terms["conditional"].timesteps, savings, config.output)
    figures = description(config, chain, held_out)
    left = sum(a == b for a, b in zip(held_out.captions, shuffled, strict=True))
    figures["captions that the shuffle left"] = left
    figures |= {f"{name}, bits/dim": mean_and_error(part.bits.sum(1)) for name, part in terms.items()}
    saved = {f"{name} - conditional, bits a picture": bits for name, bits in savings.items()}
    figures |= {name: mean_and_error(bits.sum(1)) for name, bits in saved.items()}
    figures["timesteps"] = terms["conditional"].timesteps.tolist()
    return figures | {f"{name}, term by term": bits.mean(0).tolist() for name, bits in saved.items()}


# ------------------------------------------------------------ figures


def draw_terms(terms: VLBTerms, path: str) -> None:
    """Plot each term against its timestep, on a logarithmic scale (Nichol 2021, figure 2)."""
    title = f"{terms.bits.sum(1).mean():.3f} bits/dim in all"
    with chart(path, 7, 3.5) as ax:
        ax.semilogy(terms.timesteps.tolist(), terms.bits.mean(0)[:-1].clamp(min=1e-12).tolist(), lw=1)
        finish(ax, xlabel="t", ylabel="L_t, bits/dim", title=title)


def draw_savings(timesteps: Tensor, savings: dict[str, Tensor], path: str) -> None:
    """Plot the bits per picture in each of BUCKETS stretches of the chain, with error bars of two standard
    errors on either side."""
    titles = {"unconditional": "what the caption saves", "shuffled": "what another's caption costs"}
    places = [float(part.double().mean()) for part in timesteps.tensor_split(BUCKETS) if len(part)]
    width = 0.8 * float(timesteps[-1] + 1) / len(places)
    with chart(path, 9, 3.5, columns=len(savings)) as axes:
        for ax, (name, saved) in zip(axes, savings.items(), strict=True):
            stretches = saved[:, :-1].tensor_split(BUCKETS, dim=1)  # the prior term depends on no caption
            sums = torch.stack([part.sum(1) for part in stretches if part.shape[1]], dim=1)  # (N, buckets)
            error = 2 * sums.std(0) / len(sums) ** 0.5
            ax.bar(places, sums.mean(0).tolist(), width, yerr=error.tolist(), capsize=2)
            ax.axhline(0, color="black", lw=0.5)
            title = f"{titles[name]}: {saved.sum(1).mean():.1f} bits"
            ax.set(xlabel="t", ylabel="bits a picture", title=title)
