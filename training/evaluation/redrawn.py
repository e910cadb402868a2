"""Real pictures redrawn by the model: noised a little, then denoised without a prompt.

Generated pictures have smudges and soft edges that real pictures lack, and a style classifier may mistake
these for a style. Redrawn pictures have such smudges as well, but their style is known, since the model is
not told which style to draw. They are the control in `training.evaluate styles`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training.data.arrays import content_key, memory_map
from training.evaluation.samples import pipeline_key

WEAKEST, STRONGEST = 60, 240  # of t; above this, the style itself begins to change
BATCH = 64


@torch.no_grad()
def redraw(pipe: Any, x0: Tensor, seed: int) -> Tensor:
    """Noise x0, (B, C, H, W) in [-1, 1], to t and denoise it in two steps, t and t/2, without a prompt. t is
    one random timestep from 60..240 for the whole batch. Returns (B, C, H, W), uint8."""
    generator = torch.Generator().manual_seed(seed)
    t = int(torch.randint(WEAKEST, STRONGEST + 1, (1,), generator=generator))
    x_t = pipe.scheduler.add_noise(x0, torch.randn(x0.shape, generator=generator), torch.tensor(t))
    plain: Any = {"guidance_scale": 1.0, "clip_guidance_scale": 0.0, "output_type": "pt"}
    drawn = pipe([""] * len(x0), latents=x_t, timesteps=[t, t // 2], generator=generator, **plain)
    return (drawn.images * 255).round().to(torch.uint8)


def cache_redrawn(pictures: Any, pipe: Any, cache_dir: str | Path) -> np.ndarray:
    """Redraw each picture of a PictureCache once, keyed by pictures and model: (N, C, H, W) uint8."""
    path = Path(cache_dir) / f"redrawn-{content_key(pictures.key, pipeline_key(pipe))}.npy"

    def fill(target: np.ndarray) -> None:
        pipe.set_progress_bar_config(disable=True)
        for start in tqdm(range(0, len(pictures), BATCH), desc="redrawing pictures", unit="batch"):
            rows = list(range(start, min(start + BATCH, len(pictures))))
            target[start : start + len(rows)] = redraw(pipe, pictures.images(rows), start).numpy()

    shape = (len(pictures), *pictures.images([0]).shape[1:])
    return memory_map(path, shape, np.dtype(np.uint8), fill)
