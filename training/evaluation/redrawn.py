"""Real pictures as the model redraws them: noised a little, and drawn on from there without a prompt.

Drawn pictures have smudges and soft edges that real pictures lack, and a classifier of styles may mistake
them for a style. These are real pictures with such smudges whose style is known, since the model is not told
which style to draw. They are the control in `training.evaluate styles`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training.data.arrays import content_key, memory_map
from training.evaluation.samples import pipeline_key

WEAKEST, STRONGEST = 60, 240  # t: above, the style itself begins to go
BATCH = 64


@torch.no_grad()
def redraw(pipe: Any, x0: Tensor, seed: int) -> Tensor:
    """x_0 (B, C, H, W) in [-1, 1], noised to t and denoised in two steps, t and t/2, without a prompt -> the
    same, as uint8. t is of 60..240 at random, one for the batch."""
    generator = torch.Generator().manual_seed(seed)
    t = int(torch.randint(WEAKEST, STRONGEST + 1, (1,), generator=generator))
    x_t = pipe.scheduler.add_noise(x0, torch.randn(x0.shape, generator=generator), torch.tensor(t))
    plain: Any = {"guidance_scale": 1.0, "clip_guidance_scale": 0.0, "output_type": "pt"}
    drawn = pipe([""] * len(x0), latents=x_t, timesteps=[t, t // 2], generator=generator, **plain)
    return (drawn.images * 255).round().to(torch.uint8)


def cache_redrawn(pictures: Any, pipe: Any, cache_dir: str | Path) -> np.ndarray:
    """Every picture of a PictureCache redrawn once, (N, C, H, W) uint8, keyed by pictures and model."""
    path = Path(cache_dir) / f"redrawn-{content_key(pictures.key, pipeline_key(pipe))}.npy"

    def fill(target: np.ndarray) -> None:
        pipe.set_progress_bar_config(disable=True)
        for start in tqdm(range(0, len(pictures), BATCH), desc="redrawing pictures", unit="batch"):
            rows = list(range(start, min(start + BATCH, len(pictures))))
            target[start : start + len(rows)] = redraw(pipe, pictures.images(rows), start).numpy()

    shape = (len(pictures), *pictures.images([0]).shape[1:])
    return memory_map(path, shape, np.dtype(np.uint8), fill)
