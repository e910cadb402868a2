"""What sender and receiver of a coded picture share: the model, its chain, what their digits depend on."""

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..chain.equations import LEARNED_VARIANCES, require, spaced_timesteps
from ..components.ddpm_scheduler import DDPMScheduler
from ..drawing.text import encode_text
from .likelihood import chain_of, prior_term, vlb_term

# bits of a relative entropy code beyond its KL: the length of the number, and Li and El Gamal's bound
BLOCK_OVERHEAD = 4 + 1 + math.log2(math.e) / math.e

PICTURES_FOR_END = 8  # how many pictures of an archive decide where its chain ends


@dataclass
class Cost:
    """Where the bits of a file go; `kl` is what they should add up to."""

    kl: float = 0.0  # all terms of the bound, of all pictures, bits
    last: float = 0.0  # of these, L_0: p(x0 | x_t) at the last step
    blocks: int = 0  # progressive: number of relative entropy codes
    side: int = 0  # progressive: bits that say how many blocks a step has
    initial: int = 0  # lossless: initial bits
    header: int = 0  # bytes of the header, captions among them
    total: int = 0  # bytes of the file

    @property
    def bound(self) -> float:
        """Bits that relative entropy coding may take: KL sum, BLOCK_OVERHEAD per block, block counts."""
        return self.kl + BLOCK_OVERHEAD * self.blocks + self.side

    def __str__(self) -> str:
        coded = self.total - self.header
        lines = [
            f"{self.total} bytes: header {self.header}, coded {coded}",
            f"KL sum {self.kl / 8:.0f} bytes, of them {self.last / 8:.0f} in the last step; coded is "
            f"{800 * coded / self.kl - 100:+.1f} %, the file {800 * self.total / self.kl - 100:+.1f} %",
        ]
        if self.blocks:
            lines.append(
                f"bound of the relative entropy coder: KL sum + {BLOCK_OVERHEAD:.2f} bits for each of "
                f"{self.blocks} blocks + {self.side} bits of block counts = {self.bound / 8:.0f} bytes"
            )
        if self.initial:
            lines.append(f"initial bits: {self.initial / 8:.0f} bytes, once for each file")
        return "\n".join(lines)


def coding_chain(pipe: Any, steps: int, end: int, variance_type: str | None = None) -> DDPMScheduler:
    """`steps` of the model's timesteps, both ends included, without those below `end`; x0 is clipped.

    Raises:
        ValueError: the model does not draw pixels, steps or end are out of range, or the variance is to be
            learned and the U-Net does not predict it.
    """
    require(pipe.vae is None and pipe.unet.config.in_channels == 3, "model", type(pipe).__name__, "of pixels")
    T = pipe.scheduler.config.num_train_timesteps
    require(1 <= steps <= T, "steps", steps, f"in 1 .. {T}")
    require(0 <= end < T, "end", end, f"in 0 .. {T - 1}")
    changes = {} if variance_type is None else {"variance_type": variance_type}
    clipped = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}
    chain = chain_of(pipe.scheduler, **clipped, **changes)
    kind, tells = chain.config.variance_type, pipe.unet.config.out_channels == 6
    require(tells or kind not in LEARNED_VARIANCES, "variance_type", kind, "fixed: the U-Net tells none")
    chain.set_timesteps(timesteps=[t for t in spaced_timesteps("linspace", T, steps).tolist() if t >= end])
    return chain


@torch.no_grad()
def denoiser(pipe: Any, caption: str, chain: DDPMScheduler) -> Callable[[Tensor, int], Tensor]:
    """(x_t (1, 3, H, W) float64, t) -> the U-Net's output, float64."""
    states, pooled, _ = encode_text(pipe.tokenizer, pipe.text_encoder, [caption])
    added = {"pooled_text": pooled} if pipe.requires_pooled_text else None
    channels = 6 if chain.config.variance_type in LEARNED_VARIANCES else 3

    def model(x_t: Tensor, t: int) -> Tensor:
        with torch.no_grad():
            output = pipe.unet(x_t.float(), t, encoder_hidden_states=states, added_cond_kwargs=added).sample
        return output[:, :channels].double()

    return model


def fingerprint(pipe: Any) -> str:
    """128 bits of the SHA-256 of all that the numbers depend on: weights, configs, the tokenizer's files."""
    digest = hashlib.sha256()
    for part in (pipe.unet, pipe.text_encoder):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for config in (dict(pipe.unet.config), dict(pipe.scheduler.config), pipe.text_encoder.config.to_dict()):
        kept = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    tokenizer = json.loads(pipe.tokenizer.backend_tokenizer.to_str())
    of_the_last_call = ("padding", "truncation")
    kept = {key: value for key, value in tokenizer.items() if key not in of_the_last_call}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def environment() -> dict[str, Any]:
    """What else the last digit of a float, or a random number, depends on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "constriction")}
    cpu = torch.backends.cpu.get_cpu_capability()
    return versions | {"cpu": cpu, "threads": torch.get_num_threads()}


def best_end(
    pipe: Any, pictures: list[Tensor], captions: list[str], steps: int, variance: str | None, seed: int
) -> int:
    """The timestep at which the chain should end for the smallest bound, estimated from one draw for each of
    the first eight pictures.

    A model of x0 may be blurrier than the noise at the last timesteps, each of which then adds to the bound.
    """
    chain = coding_chain(pipe, steps, 0, variance)
    generator = torch.Generator().manual_seed(seed)
    bounds = dict.fromkeys(chain.timesteps.tolist(), 0.0)
    for picture, caption in list(zip(pictures, captions, strict=True))[:PICTURES_FOR_END]:
        model, x0 = denoiser(pipe, caption, chain), picture.double()
        sent = prior_term(chain, x0)
        for t in bounds:
            eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
            x_t = chain.add_noise(x0, eps, torch.tensor(t))
            output, ends_here = model(x_t, t), coding_chain(pipe, steps, t, variance)
            bounds[t] += float(sent + vlb_term(ends_here, output, t, x0, x_t).bits)
            sent = sent + vlb_term(chain, output, t, x0, x_t).bits
    return min(bounds, key=lambda t: bounds[t])


def to_x0(levels: np.ndarray) -> Tensor:
    """Levels (H, W, 3) -> x0 (1, 3, H, W), float64."""
    return torch.from_numpy(levels.astype(np.float64) / 127.5 - 1).permute(2, 0, 1).unsqueeze(0).contiguous()


def flat(x: Tensor, like: Tensor) -> np.ndarray:
    return x.expand_as(like).reshape(-1).numpy().copy()
