"""Blocks: a loop over an axis that works on a limited number of indices at a time.

The axis is divided into several equal runs, and a block is a part of each run, side by side. Where the
axis is sharded over devices, and their number divides that of the runs, every block has indices of
every device, so that nothing moves between devices. A block of neighbouring indices would be on one
device alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.sharding import manual

MOST_RUNS = 256


class Block(NamedTuple):
    """The indices of a block.

    Attributes:
      total: The length of the axis.
      runs: The number of equal runs that the axis is divided into.
      start: The index within each run at which the block begins, an int or an int32 scalar.
      length: The number of indices that the block has of each run.
      first: The first index within each run that no earlier block had.
    """

    total: int
    runs: int
    start: Any
    length: int
    first: Any

    @property
    def size(self) -> int:
        """The number of indices in the block."""
        return self.runs * self.length

    def indices(self) -> jax.Array:
        """Returns the indices of the block along the axis, an int32 array of shape `(size,)`."""
        starts = jnp.arange(self.runs, dtype=jnp.int32)[:, None] * (self.total // self.runs)
        return (starts + self.start + jnp.arange(self.length, dtype=jnp.int32)).reshape(-1)

    def fresh(self) -> jax.Array:
        """Returns which of the indices were in no earlier block, a bool array of shape `(size,)`."""
        within = self.start + jnp.arange(self.length) >= self.first
        return jnp.tile(within, self.runs)

    def take(self, array: jax.Array, axis: int) -> jax.Array:
        """Returns the block's part of an array along this axis."""
        if self.size == self.total:
            return array
        if self.runs == 1:  # no reshape, for which XLA may make a copy
            return jax.lax.dynamic_slice_in_dim(array, self.start, self.length, axis)
        part = jax.lax.dynamic_slice_in_dim(
            self._in_runs(array, axis), self.start, self.length, axis + 1
        )
        return part.reshape(*array.shape[:axis], self.size, *array.shape[axis + 1 :])

    def put(self, array: jax.Array, part: jax.Array, axis: int) -> jax.Array:
        """Returns the array with the block's part of it replaced."""
        if self.size == self.total:
            return part
        if self.runs == 1:
            return jax.lax.dynamic_update_slice_in_dim(array, part, self.start, axis)
        shape = (*array.shape[:axis], self.runs, self.length, *array.shape[axis + 1 :])
        divided, part = self._in_runs(array, axis), part.reshape(shape)
        written = jax.lax.dynamic_update_slice_in_dim(divided, part, self.start, axis + 1)
        return written.reshape(array.shape)

    def _in_runs(self, array: jax.Array, axis: int) -> jax.Array:
        run = self.total // self.runs
        return array.reshape(*array.shape[:axis], self.runs, run, *array.shape[axis + 1 :])


def runs(total: int, most: int) -> int:
    """Returns the number of equal runs of an axis, a power of two, for blocks of at most `most` indices."""
    count = 1
    while 2 * count <= min(MOST_RUNS, most) and total % (2 * count) == 0:
        count *= 2
    return count


def over_blocks(total: int, most: int, body: Callable[[Block, Any], Any], carry: Any) -> Any:
    """Runs `carry = body(block, carry)` until every index has been in a block.

    All blocks have the same size, so the last one may begin earlier and repeat indices of the one
    before; `Block.fresh` says which.

    Args:
      total: The length of the axis.
      most: The largest number of indices in a block.
      body: A function of a block and the carry that returns the new carry.
      carry: The initial carry, a pytree of arrays.

    Returns:
      The carry after the last block.
    """
    if most >= total:
        return body(Block(total, 1, 0, total, 0), carry)
    count = runs(total, most)
    run, step = total // count, max(1, most // count)

    def visit(i, carry):
        return body(Block(total, count, jnp.minimum(i * step, run - step), step, i * step), carry)

    return manual.fori_loop(0, -(-run // step), visit, carry)
