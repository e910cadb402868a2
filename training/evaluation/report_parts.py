"""The splits that a report measures, with the pictures that its page shows."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from training.data.pictures import PictureCache
from training.evaluation.samples import first_captions

NEAR = "nearer than 95 % of unseen real pictures are"  # a share, in the report

SPLITS = {  # name on the page: name in the data set
    "seen captions": "train",
    "held-out compositions": "heldout_compositions",
    "held-out concepts": "validation",
}


@dataclass
class Part:
    """One split: its real pictures, their embeddings, and the pictures drawn for some of the captions."""

    pictures: PictureCache
    embeds: Tensor  # (N, D), of all its pictures
    numbers: list[int]  # of the real pictures whose captions are drawn
    drawn: Tensor = field(default_factory=lambda: torch.empty(0))  # (n, 3, H, W)
    drawn_embeds: Tensor = field(default_factory=lambda: torch.empty(0))  # (n, D)
    ranks: dict[str, Tensor] = field(default_factory=dict)  # of the true concepts, (n,)
    # cosine distance and number of the nearest training picture, (n,) each
    neighbours: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))

    @property
    def captions(self) -> list[str]:
        return first_captions(self.pictures, self.numbers)

    @property
    def concepts(self) -> list[str]:
        return [self.pictures.columns["concept"][i] for i in self.numbers]

    def real(self) -> Tensor:
        """(n, 3, H, W): the real pictures whose captions were drawn."""
        return self.pictures.images(self.numbers)
