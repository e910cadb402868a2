"""Random changes to pictures that leave their content recognisable."""

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, shift: int, noise: float, generator: torch.Generator) -> Tensor:
    """Shift each picture by up to `shift` pixels on a white background and add Gaussian noise of a random
    standard deviation up to `noise`, so that the tower looks at shapes rather than at single pixels."""
    batch, _, height, width = images.shape
    if shift:
        padded = F.pad(images, [shift] * 4, value=1.0)
        offsets = torch.randint(0, 2 * shift + 1, (batch, 2), generator=generator).tolist()
        pairs = zip(padded, offsets, strict=True)
        images = torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in pairs])
    if noise:
        deviation = noise * torch.rand(batch, 1, 1, 1, generator=generator)
        images = images + deviation * torch.randn(images.shape, generator=generator)
    return images
