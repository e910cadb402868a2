"""Pictures from a stream: data sets that are read in order and never held as a whole.

What shuffling means here: the order of the files (shards) is drawn anew for each epoch; up to ten of them are
read in turn into a buffer of `buffer_size` rows, which leave it in random order. So no row comes much before
its place, and pictures that lie together in a file stay roughly together: write the files in random order.
All draws depend on (seed, epoch) alone.

Every process reads the whole stream and decodes only its own slice of each global batch, so that batches do
not depend on the number of processes. The place in the stream is (epoch, rows read): a resumed run reads its
epoch again up to there, without decoding, and sees the same batches as if it had never stopped.
"""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from training.data.pictures import PictureCache, draw_row, find_columns, index_captions, is_caption, seed_for

logger = logging.getLogger(__name__)


class PictureStream:
    """Micro-batches of a `datasets.IterableDataset`, each a small PictureCache of its own, without end.

    Rows without a caption are left out. A picture that cannot be read is named in a warning and another of
    the same batch takes its place, so that what the other processes see does not change.

    Raises:
        ValueError: while iterating, when the stream is empty, lacks a column, or a whole batch cannot be
            read; with `strict` for each picture that cannot be read or has no caption.
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
        self.epoch, self.position = 0, 0  # rows of the epoch that earlier batches have used

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
        """(epoch, place in it, undecoded row) from the present place on, epoch after epoch."""
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
