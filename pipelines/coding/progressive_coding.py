"""Pictures as files whose length is the variational bound: Algorithms 3 and 4 of DDPM (Ho 2020, section 4.3).

Sender and receiver have the same model, and so the same p(x_T), p(x_{t-1} | x_t) and p(x0 | x_1).
    - progressive: x_T, ..., x_1 by relative entropy coding, then x0. Each x_t that arrives gives a better
      guess of the picture, so a prefix of the file decodes to a coarser one (`--prefix`).
    - lossless: bits back; x_t are rounded to a grid and cost nothing but the bound. It suits many pictures in
      one file, as the bits with which the first draws its x_t are never recovered (Kingma 2019, Bit-Swap).

The KL terms that a file should cost are those of `likelihood`, summed along the x_t that were actually sent.

A float that differs in its last digit decodes to another picture, so a file is read where it was written: by
the same weights, libraries, kind of CPU and number of threads, which the header names. The U-Net sees one
picture at a time.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..chain.equations import posterior_mean, posterior_variance, require
from ..components.ddpm_scheduler import DDPMScheduler
from .bits_back import BitsBack, initial_words
from .coding_model import Cost, best_end, coding_chain, denoiser, environment, fingerprint, flat, to_x0
from .entropy_coding import Bits, Stack, candidate, choose_candidate
from .file_format import pack, unpack
from .likelihood import discretized_gaussian_nll, gaussian_kl

KINDS = ("progressive", "lossless")
BLOCK_BITS = 7.0  # of KL in one relative entropy code: 2^16 candidates have twice the deviation to spare
CHUNK_BYTES = 64  # least payload between checksums: a prefix grows in such steps


class Decoded(NamedTuple):
    """What a file holds. `whole` is False for a prefix, whose picture is the model's guess."""

    pictures: list[Image.Image]
    captions: list[str]
    whole: bool
    steps: int  # latents received, of `of`
    of: int


# ------------------------------------------------------------ progressive: Algorithm 3 sends, 4 receives


class EndOfPrefix(Exception):
    """No further chunk has arrived."""


def run_chain(chain: DDPMScheduler, model: Any, side: Any, shape: tuple[int, ...]) -> Tensor:
    """The loop of both algorithms: x_T by p(x_T), each x_t by p(x_t | x_{t+1}), x0 by p(x0 | x_1).

    `side` sends or receives, and in both cases returns what has arrived. Returns x0, or the guess of it from
    the last x_t if the receiver's file ends early.
    """
    zero = torch.zeros(shape, dtype=torch.float64)
    x_t = side.latent(0, None, zero, zero, torch.ones_like(zero))
    guess = zero
    for step, t in enumerate(chain.timesteps.tolist(), start=1):
        p = chain.p_mean_variance(model(x_t, t), t, x_t)
        std, guess = (0.5 * p.log_variance).exp().expand_as(x_t), p.pred_x0
        try:
            if step == len(chain.timesteps):
                return side.picture(p.mean, std)
            x_t = side.latent(step, t, x_t, p.mean, std)
        except EndOfPrefix:
            break
    return guess


def blocks_of(seed: int, step: int, size: int, count: int) -> list[tuple[np.ndarray, list[int]]]:
    """The dimensions in `count` random blocks, so that each has its share of the KL, and a seed for each."""
    order = np.random.default_rng([seed, step]).permutation(size)
    return [(part, [seed, step, number]) for number, part in enumerate(np.array_split(order, count))]


@dataclass
class Sender:
    """Algorithm 3 for the picture x0; `chunks` are its file without the header."""

    chain: DDPMScheduler
    x0: Tensor
    seed: int
    cost: Cost
    chunks: list[tuple[int, bytes]] = field(default_factory=list)  # (latents in it, payload)
    bits: Bits = field(default_factory=Bits)
    pending: int = 0  # latents in `bits`
    count: int = 0  # blocks of the latent before

    def latent(self, step: int, t: int | None, x_t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Send x ~ q(x | x_t, x0), coded by p = N(mean, std^2)."""
        abar = self.chain.alphas_cumprod.double()
        if t is None:
            first = abar[self.chain.timesteps[0]]
            q_mean, q_variance = first.sqrt() * self.x0, 1 - first
        else:
            abar_t, abar_prev = abar[t], abar[self.chain.previous_timestep(t)]
            q_mean = posterior_mean(self.x0, x_t, abar_t, abar_prev)
            q_variance = posterior_variance(abar_t, abar_prev)
        kl = float(gaussian_kl(q_mean, q_variance.log(), mean, 2 * std.log()).sum()) / math.log(2)
        before, self.count = self.count, self._count(kl)
        size = len(self.bits)
        self.bits.write_change(self.count - before)
        self.cost.side += len(self.bits) - size
        m, s = flat((q_mean - mean) / std, mean), flat(q_variance.sqrt() / std, mean)
        z = np.random.default_rng([self.seed, step, 0, 1]).standard_normal(m.size)
        for part, seed in blocks_of(self.seed, step, m.size, self.count) if self.count else []:
            number = choose_candidate(m[part], s[part], seed)
            self.bits.write_number(number)
            z[part] = candidate(number, len(part), seed)
        self.cost.kl += kl
        self.cost.blocks += self.count
        self.pending += 1
        if len(self.bits) >= 8 * CHUNK_BYTES or self.pending == 255:
            self._close()
        return mean + std * torch.from_numpy(z).reshape(mean.shape)

    def _count(self, kl: float) -> int:
        """How many blocks of about BLOCK_BITS; as many as before if that fits, since a change costs bits."""
        if kl < 0.05:
            return 0
        fits = self.count and (kl / self.count <= 1.25 * BLOCK_BITS)
        if fits and (self.count == 1 or kl / self.count >= 0.6 * BLOCK_BITS):
            return self.count
        return max(math.ceil(kl / BLOCK_BITS), math.ceil(self.x0.numel() / 2**16))

    def _close(self) -> None:
        self.chunks.append((self.pending, self.bits.to_bytes()))
        self.bits, self.pending = Bits(), 0

    def picture(self, mean: Tensor, std: Tensor) -> Tensor:
        """Send x0, coded by the levels' masses under p."""
        if self.pending:
            self._close()
        stack = Stack(np.empty(0))
        levels = np.rint((flat(self.x0, mean) + 1) * 127.5)
        stack.push_levels(levels, (flat(mean, mean) + 1) * 127.5, flat(std, mean) * 127.5)
        self.chunks.append((0, stack.words().astype("<u4").tobytes()))
        nll = discretized_gaussian_nll(self.x0, mean, 2 * std.log())
        self.cost.last += float(nll.sum()) / math.log(2)
        self.cost.kl += float(nll.sum()) / math.log(2)
        return self.x0


@dataclass
class Receiver:
    """Algorithm 4: receives what `Sender` sent."""

    seed: int
    chunks: list[tuple[int, bytes]]
    bits: Bits = field(default_factory=Bits)
    pending: int = 0
    count: int = 0
    received: int = 0

    def latent(self, step: int, t: int | None, x_t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        z = np.random.default_rng([self.seed, step, 0, 1]).standard_normal(mean.numel())
        if self.pending == 0 and not self.chunks:
            if t is not None:
                raise EndOfPrefix
            return mean + std * torch.from_numpy(z).reshape(mean.shape)  # x_T needs hardly any bits
        if self.pending == 0:
            self.pending, payload = self.chunks.pop(0)
            require(self.pending, "latents in a chunk", self.pending, "1 or more before the last chunk")
            self.bits = Bits(payload)
        self.count += self.bits.read_change()
        for part, seed in blocks_of(self.seed, step, z.size, self.count) if self.count else []:
            z[part] = candidate(self.bits.read_number(), len(part), seed)
        self.pending -= 1
        self.received += 1
        return mean + std * torch.from_numpy(z).reshape(mean.shape)

    def picture(self, mean: Tensor, std: Tensor) -> Tensor:
        if not self.chunks:
            raise EndOfPrefix
        latents, payload = self.chunks.pop(0)
        last = latents == 0 and not self.chunks and self.pending == 0
        require(last, "chunks", len(self.chunks) + 1, "one with x0, after all latents")
        stack = Stack(np.frombuffer(payload, "<u4"))
        levels = stack.pop_levels((flat(mean, mean) + 1) * 127.5, flat(std, mean) * 127.5)
        require(not len(stack.words()), "words left", len(stack.words()), "0")
        return torch.from_numpy(levels / 127.5 - 1).reshape(mean.shape)


# ------------------------------------------------------------ files


def encode(
    pipe: Any, pictures: list[Image.Image], captions: list[str], kind: str = "progressive", steps: int = 100,
    end: int | None = None, variance_type: str | None = None, seed: int = 0,
) -> tuple[bytes, Cost]:  # fmt: skip
    """The file for these pictures, and what it costs.

    Args:
        pipe: a TextToImagePipeline that draws RGB pixels.
        pictures: RGB, of the U-Net's size; exactly one if progressive.
        captions: one for each picture.
        kind: "progressive" or "lossless".
        steps, end, variance_type: see `coding_chain`; by default the end is `best_end` of these pictures.
        seed: of the randomness that both sides share.

    Raises:
        ValueError: names the argument that is out of range.
    """
    require(kind in KINDS, "kind", kind, f"one of {KINDS}")
    fits = len(pictures) == 1 or (kind == "lossless" and pictures)
    require(fits, "pictures", len(pictures), "1 in a progressive file, 1 or more in a lossless one")
    require(len(captions) == len(pictures), "captions", len(captions), f"{len(pictures)}, one for each")
    require(0 <= seed < 2**31, "seed", seed, "in 0 .. 2^31 - 1")
    coding_chain(pipe, steps, end or 0, variance_type)  # its errors, before work
    x0s = [to_x0(levels_of(picture, pipe)) for picture in pictures]
    if end is None:
        end = best_end(pipe, x0s, captions, steps, variance_type, seed)
    chain, cost = coding_chain(pipe, steps, end, variance_type), Cost()
    header = environment() | {"model": fingerprint(pipe), "kind": kind, "captions": captions}
    header |= {"steps": steps, "end": end, "variance": variance_type, "seed": seed}
    if kind == "progressive":
        sender = Sender(chain, x0s[0], seed, cost)
        run_chain(chain, denoiser(pipe, captions[0], chain), sender, tuple(x0s[0].shape))
        chunks = sender.chunks
    else:
        start = initial_words(seed, x0s[0].numel())
        coder = BitsBack(chain, Stack(start), tuple(x0s[0].shape))
        for x0, caption in zip(x0s, captions, strict=True):
            coder.push(denoiser(pipe, caption, chain), x0, cost)
        words = coder.stack.words()
        both = min(len(words), len(start))
        same = words[:both] == start[:both]
        header["initial"] = both if same.all() else int(same.argmin())  # words that nothing has touched
        cost.initial = 32 * (len(start) - header["initial"])
        chunks = [(0, words[header["initial"] :].astype("<u4").tobytes())]
    data, cost.header = pack(header, chunks)
    cost.total = len(data)
    return data, cost


def decode(pipe: Any, data: bytes, prefix: bool = False) -> Decoded:
    """The pictures of a file that `encode` made; with `prefix`, also of the beginning of a progressive one.

    Raises:
        ValueError: the file is damaged or cut off, or was written with another model, library, kind of CPU or
            number of threads, so that it would decode to something else.
    """
    header, chunks, whole = unpack(data, prefix)
    for name, here in (environment() | {"model": fingerprint(pipe)}).items():
        there = header.get(name)
        require(here == there, name, here, f"{there!r}, by which the file was written")
    chain = coding_chain(pipe, header["steps"], header["end"], header["variance"])
    side, captions, seed = pipe.unet.config.sample_size, header["captions"], header["seed"]
    shape = (1, 3, side, side)
    if header["kind"] == "progressive":
        receiver = Receiver(seed, chunks)
        x0s = [run_chain(chain, denoiser(pipe, captions[0], chain), receiver, shape)]
        received = receiver.received
    else:
        start = initial_words(seed, math.prod(shape))
        words = np.concatenate([start[: header["initial"]], np.frombuffer(chunks[0][1], "<u4")])
        coder = BitsBack(chain, Stack(words), shape)
        x0s = [coder.pop(denoiser(pipe, caption, chain)) for caption in reversed(captions)][::-1]
        intact = np.array_equal(coder.stack.words(), start)
        require(intact, "initial bits", "changed", "those that the file was begun with: it is damaged")
        received = len(chain.timesteps)
    pictures = [to_picture(x0) for x0 in x0s]
    return Decoded(pictures, captions, whole, received, len(chain.timesteps))


def levels_of(picture: Image.Image, pipe: Any) -> np.ndarray:
    """(H, W, 3) uint8. Raises ValueError unless 8-bit RGB holds all of the picture and its size is right."""
    side = pipe.unet.config.sample_size
    require(isinstance(side, int), "sample_size", side, "one number: square pictures")
    require(picture.size == (side, side), "size", picture.size, f"({side}, {side}), what the model draws")
    opaque = picture.mode in ("RGB", "L", "P", "1") and not picture.has_transparency_data
    require(opaque, "mode", picture.mode, "RGB, L or P without transparency: nothing else would come back")
    return np.asarray(picture.convert("RGB"))


def to_picture(x0: Tensor) -> Image.Image:
    levels = ((x0[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
    return Image.fromarray(levels)
