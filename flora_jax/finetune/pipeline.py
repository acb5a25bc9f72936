"""Reads packed rows in batches, shuffled and without end or in order and once, by `grain`.

In the shape descriptions, `B` is the rows of a batch that one process reads, and `T` the length of a row.
"""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from flora_jax.finetune.packing import Rows, Store, fill

Batch = dict[str, np.ndarray]


class Source:
    """Gives the arrays of each row by its number, as `grain` asks for them."""

    def __init__(self, store: Store, rows: Rows, length: int, pad: int):
        self._store, self._rows, self._length, self._pad = store, rows, length, pad

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        first, last = self._rows.offsets[index], self._rows.offsets[index + 1]
        return fill(self._store, self._rows.members[first:last], self._length, self._pad)

    def padding(self) -> Batch:
        """Returns a row of padding only."""
        return fill(self._store, self._rows.members[:0], self._length, self._pad)


def endless(source: Source, size: int, seed: int, shard: tuple[int, int]) -> Any:
    """Returns an iterator of shuffled batches, each epoch in another order.

    Args:
      source: The rows, at least one.
      size: The rows of a batch over all processes.
      seed: Decides the order.
      shard: The process and their number: process `i` of `k` reads every `k`-th row of a batch from its
        `i`-th, and no others.

    Returns:
      An iterator of dicts of arrays `(B, T)` with `get_state()`, which JSON can hold, and `set_state`.
    """
    index, count = shard
    rows = grain.MapDataset.source(source).shuffle(seed=seed % 2**32).repeat()[index::count]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    return iter(rows.to_iter_dataset(options).batch(size // count, drop_remainder=True))


def once(source: Source, size: int, shard: tuple[int, int]) -> Iterator[Batch]:
    """Returns all rows once, in order; the last batch is filled up with padding of weight 0.

    Args:
      source: The rows.
      size: As in `endless`.
      shard: As in `endless`.
    """
    index, count = shard
    for start in range(0, len(source), size):
        numbers = range(start + index, start + size, count)
        rows = [source[i] if i < len(source) else source.padding() for i in numbers]
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
