"""Blocks: a loop over an axis of which no more than some indices are looked at a time.

A block is a part of each of several equal runs of the axis, side by side. Where the axis is cut over
devices, and their number divides that of the runs, every block has a part of each device's own, and
nothing moves between them; a block of neighbours would lie on one device alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.sharding import manual

MOST_RUNS = 256


class Block(NamedTuple):
    """Indices of a block.

    Attributes:
      total: length of the axis.
      runs: equal parts of it.
      start: int or int32 scalar, where in each run the block begins.
      length: indices of each run in it.
      first: those before this one, in each run, were in the block before as well.
    """

    total: int
    runs: int
    start: Any
    length: int
    first: Any

    @property
    def size(self) -> int:
        return self.runs * self.length

    def indices(self) -> jax.Array:
        """int32, `(size,)`."""
        starts = jnp.arange(self.runs, dtype=jnp.int32)[:, None] * (self.total // self.runs)
        return (starts + self.start + jnp.arange(self.length, dtype=jnp.int32)).reshape(-1)

    def fresh(self) -> jax.Array:
        """bool, `(size,)`: which indices were in no block before."""
        within = self.start + jnp.arange(self.length) >= self.first
        return jnp.tile(within, self.runs)

    def take(self, array: jax.Array, axis: int) -> jax.Array:
        """The block's part of an array along this axis."""
        if self.size == self.total:
            return array
        if self.runs == 1:  # XLA copies what it has to look at in another shape
            return jax.lax.dynamic_slice_in_dim(array, self.start, self.length, axis)
        part = jax.lax.dynamic_slice_in_dim(
            self._cut(array, axis), self.start, self.length, axis + 1
        )
        return part.reshape(*array.shape[:axis], self.size, *array.shape[axis + 1 :])

    def put(self, array: jax.Array, part: jax.Array, axis: int) -> jax.Array:
        """The array with the block's part of it replaced."""
        if self.size == self.total:
            return part
        if self.runs == 1:
            return jax.lax.dynamic_update_slice_in_dim(array, part, self.start, axis)
        shape = (*array.shape[:axis], self.runs, self.length, *array.shape[axis + 1 :])
        cut, part = self._cut(array, axis), part.reshape(shape)
        written = jax.lax.dynamic_update_slice_in_dim(cut, part, self.start, axis + 1)
        return written.reshape(array.shape)

    def _cut(self, array: jax.Array, axis: int) -> jax.Array:
        run = self.total // self.runs
        return array.reshape(*array.shape[:axis], self.runs, run, *array.shape[axis + 1 :])


def runs(total: int, most: int) -> int:
    """Into how many equal runs an axis is cut for blocks of so many indices: a power of two."""
    count = 1
    while 2 * count <= min(MOST_RUNS, most) and total % (2 * count) == 0:
        count *= 2
    return count


def over_blocks(total: int, most: int, body: Callable[[Block, Any], Any], carry: Any) -> Any:
    """Runs `carry = body(block, carry)` until every index was in a block.

    The last block is drawn back so that it fits; `Block.fresh` tells what it repeats.

    Args:
      total: length of the axis.
      most: indices of a block; at least one of each run.
      body: of a block and the carry.
      carry: tree of arrays.
    """
    if most >= total:
        return body(Block(total, 1, 0, total, 0), carry)
    count = runs(total, most)
    run, step = total // count, max(1, most // count)

    def visit(i, carry):
        return body(Block(total, count, jnp.minimum(i * step, run - step), step, i * step), carry)

    return manual.fori_loop(0, -(-run // step), visit, carry)
