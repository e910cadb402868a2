"""Streamed pictures: data sets that are read in order and never held in memory as a whole.

Shuffling works as follows. The order of the files (shards) is redrawn for each epoch. Up to ten files at a
time are read in turn into a buffer of `buffer_size` rows, and rows leave it in random order. No row therefore
comes much before its place, and pictures that are close together in a file stay roughly together: write the
files in random order. All draws depend on (seed, epoch) alone.

Every process reads the whole stream and decodes only its own slice of each global batch, so batches do not
depend on the number of processes. The position in the stream is (epoch, rows read). A resumed run rereads its
epoch up to that position without decoding, and sees the same batches as if it had never stopped.
"""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from training.data.pictures import PictureCache, draw_row, find_columns, index_captions, is_caption, seed_for

logger = logging.getLogger(__name__)


class PictureStream:
    """An endless iterator over micro-batches of a `datasets.IterableDataset`, each a small PictureCache.

    A picture that cannot be read or has no caption is named in a warning and replaced by another picture of
    the same batch, so that what the other processes see does not change.

    Raises:
        ValueError: while iterating, if the stream is empty, a column is missing, or a whole batch cannot be
            read; with `strict`, also for any picture that cannot be read or has no caption.
    """

    def __init__(
        self, data: Any, batch_size: int, seed: int = 0, rank: int = 0, num_processes: int = 1, *,
        resolution: int = 64, image_column: str = "image", caption_column: str | None = None,
        center_crop: bool = True, strict: bool = False, buffer_size: int = 1000,
    ):  # fmt: skip
        self.data, self.batch_size, self.seed = data.decode(False), batch_size, seed
        self.rank, self.num_processes, self.buffer_size = rank, num_processes, buffer_size
        self.resolution, self.center_crop, self.strict = resolution, center_crop, strict
        self.asked = image_column, caption_column
        self.epoch, self.position = 0, 0  # rows of this epoch already used by earlier batches

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def __iter__(self) -> Iterator[PictureCache]:
        rows = self.rows()
        while True:
            batch = [next(rows) for _ in range(self.batch_size * self.num_processes)]
            mine = batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            made = self.decode([(position, row) for _, position, row in mine])
            self.epoch, self.position = batch[-1][0], batch[-1][1] + 1
            yield made

    def rows(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """(epoch, index in the epoch, undecoded row) from the current position on, epoch after epoch."""
        first = self.position
        for epoch in itertools.count(self.epoch):
            seed = seed_for(self.seed, "stream", epoch) % 2**32
            shuffled = self.data.shuffle(seed=seed, buffer_size=self.buffer_size)
            position = -1
            for position, row in enumerate(shuffled):
                if position >= first:
                    yield epoch, position, row
            if position < 0:
                raise ValueError("the data set is empty")
            first = 0

    def decode(self, rows: list[tuple[int, dict[str, Any]]]) -> PictureCache:
        pixels, texts = [], []
        for number, row in rows:
            image_column, caption_column = find_columns(list(row), *self.asked)
            caption = row.get("captions", row[caption_column])
            try:
                if not is_caption(caption):
                    raise ValueError(f"{row.get('__key__', f'row {number}')} has no caption")
                pixels.append(draw_row(row, number, image_column, self.resolution, self.center_crop))
                texts.append(caption)
            except ValueError as error:
                if self.strict:
                    raise
                logger.warning("%s; another picture of the batch takes its place", error)
        if not pixels:
            raise ValueError(f"none of {len(rows)} pictures of the stream can be read")
        pixels, texts = (list(itertools.islice(itertools.cycle(own), len(rows))) for own in (pixels, texts))
        return PictureCache(np.stack(pixels), *index_captions(texts), {})

    def head(self, count: int) -> PictureCache:
        """The first pictures of the unshuffled stream, for validation."""
        rows = list(enumerate(self.data.take(count)))
        if not rows:
            raise ValueError("the data set is empty")
        return self.decode(rows)
