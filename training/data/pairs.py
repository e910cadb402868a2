"""The same pictures at two sizes, for training and measuring upsamplers."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from training.data.pictures import PictureCache, cache_pictures, load_pictures

BLUR_KERNEL = 7  # pixels of the small picture: three standard deviations of the widest blur to each side


@dataclass
class Pairs:
    """The same pictures at two sizes, in the same order."""

    large: PictureCache
    small: PictureCache

    def __len__(self) -> int:
        return len(self.large)

    def crops(self, indices: list[int], side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random square crops, each mirrored with probability 1/2: (B, 3, side, side) from the large
        pictures, and (B, 3, h, h), with h = side / scale, from the same place in the small ones. Both in [-1,
        1]."""
        large, small = self.large.images(indices), self.small.images(indices)
        scale = large.shape[-1] // small.shape[-1]
        h, room = side // scale, small.shape[-1] - side // scale + 1
        corners = torch.randint(0, room, (len(indices), 2), generator=generator).tolist()
        mirror = torch.rand(len(indices), generator=generator) < 0.5

        def cut(pictures: Tensor, unit: int, side: int) -> Tensor:
            places = zip(pictures, corners, strict=True)
            return torch.stack([p[:, unit * i :, unit * j :][:, :side, :side] for p, (i, j) in places])

        x, y = cut(large, scale, side), cut(small, 1, h)
        x[mirror], y[mirror] = x[mirror].flip(-1), y[mirror].flip(-1)
        return x, y


def load_pairs(
    dataset: str, low_dataset: str, split: str, resolution: int, low_resolution: int, cache_dir: str
) -> Pairs:
    """The split at both sizes.

    Raises:
        ValueError: the data sets differ in anything but size.
    """

    def load(name: str, side: int) -> PictureCache:
        return cache_pictures(load_pictures(name, split), side, cache_dir, "image", "caption")

    large, small = load(dataset, resolution), load(low_dataset, low_resolution)
    for column in ("hexcode", "style", "caption"):
        if large.columns.get(column) != small.columns.get(column) or len(large) != len(small):
            raise ValueError(
                f"low_dataset must hold the pictures of {dataset!r} in their order, and {low_dataset!r} does "
                f"not ({column} differs): build both with training.emoji, alike but for --resolution"
            )
    return Pairs(large, small)


def blur(y: Tensor, max_blur: float, generator: torch.Generator) -> Tensor:
    """Blur each picture with probability 1/2, by a Gaussian whose random standard deviation is at most
    `max_blur` pixels."""
    widths = ((torch.rand(len(y), generator=generator) * 2 - 1) * max_blur).tolist()  # below 0: no blur
    pairs = zip(y, widths, strict=True)
    return torch.stack([gaussian_blur(p, [BLUR_KERNEL] * 2, [w] * 2) if w > 0.1 else p for p, w in pairs])
