"""Packs examples into rows of one length, so that little is padding and documents stay apart.

In the shape descriptions, `T` is the length of a row.
"""

from typing import NamedTuple

import numpy as np

BLOCK = 2**16
"""Examples that are sorted together; within a block the long ones are placed first."""


class Store(NamedTuple):
    """Holds the examples of one side end to end.

    Attributes:
      tokens: int32, all examples' tokens.
      counts: bool, of the same length: whether the loss of predicting the token counts.
      offsets: int64, one more than examples: example `i` is `tokens[offsets[i]:offsets[i + 1]]`.
      prompts: int32: how many of an example's first tokens are its prompt, 0 for none.
    """

    tokens: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray
    prompts: np.ndarray


class Rows(NamedTuple):
    """Says which examples stand in which row.

    Attributes:
      offsets: int64, one more than rows: row `i` has `members[offsets[i]:offsets[i + 1]]`.
      members: int64: examples, in the order of their rows and of their places within.
    """

    offsets: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def plan(sizes: np.ndarray, length: int, seed: int = 0, packed: bool = True) -> Rows:
    """Returns the rows for examples of these sizes: a function of its arguments alone.

    Examples are shuffled by the seed, and in each block of them the longest comes first; each goes where
    the least space is left that it fits in. The time is proportional to the number of examples.

    Args:
      sizes: The tokens of each example, 1 to `length`.
      length: The tokens of a row.
      seed: Decides who stands with whom.
      packed: Whether a row may have several examples.

    Raises:
      ValueError: An example does not fit in a row.
    """
    if len(sizes) and not 0 < sizes.min() <= sizes.max() <= length:
        raise ValueError(
            f"examples must have 1 to {length} tokens, found {sizes.min()} to {sizes.max()}"
        )
    if not packed:
        return Rows(np.arange(len(sizes) + 1), np.arange(len(sizes)))
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    blocks = [shuffled[i : i + BLOCK] for i in range(0, len(sizes), BLOCK)]
    order = np.concatenate(
        [np.zeros(0, int), *(b[np.argsort(-sizes[b], kind="stable")] for b in blocks)]
    )
    row_of = _best_fit(sizes[order].tolist(), length)
    by_row = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of, minlength=row_of.max(initial=-1) + 1)
    return Rows(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), order[by_row])


def _best_fit(sizes: list[int], length: int) -> np.ndarray:
    """Returns the row of each size. Rows wait by the space they have left; a bit says where some wait."""
    waiting: list[list[int]] = [[] for _ in range(length + 1)]
    some, rows, row_of = 0, 0, []
    for size in sizes:
        fitting = some >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = waiting[space].pop()
            if not waiting[space]:
                some ^= 1 << space
        else:
            space, row, rows = length, rows, rows + 1
        row_of.append(row)
        if space > size:
            waiting[space - size].append(row)
            some |= 1 << (space - size)
    return np.array(row_of, np.int64)


def most_counted(store: Store, rows: Rows) -> int:
    """Returns the most tokens of any row whose loss counts; first tokens of examples, which have none, may be among them."""
    if not len(rows):
        return 0
    of_example = np.add.reduceat(store.counts, store.offsets[:-1], dtype=np.int64)
    return int(np.add.reduceat(of_example[rows.members], rows.offsets[:-1]).max())


def fill(store: Store, members: np.ndarray, length: int, pad: int) -> dict[str, np.ndarray]:
    """Returns the arrays of one row, each of shape `(T,)`.

    Args:
      store: The examples.
      members: Those of the row, in order.
      length: `T`.
      pad: The token that fills up the row, and is the target where there is none.

    Returns:
      `tokens`, int32; `targets`, int32, the next token of the same example; `weights`, float32, 1 where
      the loss counts, 0 elsewhere and at the last token of each example; `segments`, int32, 1 for the
      row's first example, 2 for its second, 0 for padding; `positions`, int32, from 0 in each example.
    """
    starts, sizes = store.offsets[members], store.offsets[members + 1] - store.offsets[members]
    total, ends = int(sizes.sum()), np.cumsum(sizes)
    positions = np.arange(total) - np.repeat(ends - sizes, sizes)
    where = np.repeat(starts, sizes) + positions
    row = {name: np.zeros(length, np.int32) for name in ("segments", "positions")}
    row |= {name: np.full(length, pad, np.int32) for name in ("tokens", "targets")}
    weights = np.zeros(length, np.float32)
    row["segments"][:total] = np.repeat(np.arange(len(members)) + 1, sizes)
    row["positions"][:total] = positions
    row["tokens"][:total] = store.tokens[where]
    predicted = max(0, total - 1)
    row["targets"][:predicted] = row["tokens"][1:total]
    weights[:predicted] = store.counts[where[1:]]
    row["targets"][ends - 1] = pad
    weights[ends - 1] = 0
    return {**row, "weights": weights}


def efficiency(sizes: np.ndarray, rows: Rows, length: int) -> float:
    """Returns the share of the rows' places that are no padding."""
    return float(sizes.sum()) / max(1, len(rows) * length)
