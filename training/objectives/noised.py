"""The noised pictures on which the guides, a CLIP image tower and a classifier, are trained.

    accelerate launch -m training.clip --noised --config training/configs/noisy_clip.yaml
    accelerate launch -m training.classifier --config training/configs/noisy_classifier.yaml

Both see the x_t of the model that they will guide: noised by its schedule, and in its space, which is pixels
or a VAE's latents.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines import DDPMScheduler, TextToImagePipeline
from pipelines.drawing.text import context_length, encode_text
from training.data.augmentation import augment
from training.data.caches import cache_latents
from training.data.pictures import cache_pictures, load_splits, seed_for
from training.objectives.denoising import draw_noise, training_scheduler


class NoisedPictures:
    """The x0 of one or more splits in a pipeline's space, and their x_t by the pipeline's own schedule.

    `data` is a PictureCache or a LatentCache; `side` and `channels` are those of x_t.
    """

    def __init__(self, pipe: TextToImagePipeline, dataset: str, splits: str, cache_dir: str) -> None:
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        pictures = cache_pictures(load_splits(dataset, splits), size, cache_dir, "image", None)
        self.columns = pictures.columns
        self.data: Any = pictures if pipe.vae is None else cache_latents(pictures, pipe.vae, cache_dir)
        self.chain: DDPMScheduler = training_scheduler(pipe.scheduler)
        self.side, self.channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels

    def __len__(self) -> int:
        return len(self.data)

    def batch(
        self, indices: list[int], seed: int, step: int, rank: int, world: int,
        shift: int = 0, noised: bool = True, flip: bool = False, timestep_shift: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(x_t, t) of a micro-batch, or (x0, 0) without `noised`. eps and t come from `draw_noise`, and
        depend only on the seed, the step and the place in the global batch. Before noising, pictures in
        pixels are shifted by up to `shift`, and with `flip` each is mirrored with probability 1/2."""
        x0 = self.data.images(indices)
        shape, total = tuple(x0.shape), len(self.chain)
        eps, t = draw_noise(seed, step, shape, total, rank, world, timestep_shift=timestep_shift)
        if shift and self.channels == 3:
            generator = torch.Generator().manual_seed(seed_for(seed, "shift", step, rank))
            x0 = augment(x0, shift, 0.0, generator)
        if flip:
            generator = torch.Generator().manual_seed(seed_for(seed, "flip", step, rank))
            mirrored = torch.rand(len(x0), generator=generator) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        return (self.chain.add_noise(x0, eps, t), t) if noised else (x0, torch.zeros_like(t))


@torch.no_grad()
def embed_prompts(pipe: TextToImagePipeline, texts: list[str]) -> Tensor:
    """Pooled text (N, P) from the U-Net's text tower, l2-normalised, with as little padding as possible."""
    limit, rows = context_length(pipe.tokenizer, pipe.text_encoder), []
    for start in range(0, len(texts), 256):
        part = texts[start : start + 256]
        longest = max(len(ids) for ids in pipe.tokenizer(part, verbose=False).input_ids)
        length = min(longest, limit)
        rows.append(encode_text(pipe.tokenizer, pipe.text_encoder, part, max_length=length)[1])
    return F.normalize(torch.cat(rows).float(), dim=-1)


def text_width(pipe: TextToImagePipeline) -> int:
    """P, the width of the pooled text."""
    config = pipe.text_encoder.config
    return config.projection_dim if hasattr(pipe.text_encoder, "text_projection") else config.hidden_size
