"""Projection: which gradients are compressed and how; and what `A` does to one weight.

| paper | here |
|---|---|
| `C = G Aᵀ` | `project` |
| `Ĝ = C A` | `decompress` |
| `C A A′ᵀ` | `transfer` |

In the shape descriptions `B` stands for the batch axes of a weight, `P` for its projected axes,
`r` for the rank. No axis is merged or moved: the sketch has the weight's axes, with `r` in place
of `P`, so that what is known of the weight's layout over devices holds for the rest.

Source: Hao, Cao, Mou, arXiv 2402.03293, Algorithms 1 and 2.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from flora_jax.chain import distributions, keys
from flora_jax.chain.blocks import MOST_RUNS, Block, over_blocks, runs
from flora_jax.chain.sketch import Spec
from flora_jax.sharding import manual


def sample(spec: Spec, cycle: ArrayLike) -> jax.Array:
    """Draws the whole `A` of a leaf; for looking at it, since nothing in the chain needs it whole.

    Returns:
      float32 array of shape `(B, r, P)`.
    """
    _check_prng(spec)
    indices = spec.positions(spec.projected)

    def draw(key):
        drawn = distributions.columns(spec.distribution, key, spec.rank, spec.size, indices)
        return jnp.moveaxis(drawn, -1, 0) * _scale(spec)

    for _ in spec.batch:
        draw = jax.vmap(draw)
    return draw(matrix_keys(spec, cycle))


def project(
    spec: Spec, cycle: ArrayLike, gradient: Float[Array, "*weight"]
) -> Float[Array, "*data"]:
    """Compresses a gradient: `C = G Aᵀ`, Algorithm 1, line 7.

    Contracts in the gradient's dtype with float32 sums.

    Args:
      spec: of the leaf.
      cycle: int32 scalar.
      gradient: of shape `spec.shape`.

    Returns:
      float32 array (float64 for a float64 gradient) of shape `spec.data_shape`; of parts of both
      where manual axes cut the weight.
    """

    def one(axes, key, matrix):
        accumulator = jnp.promote_types(matrix.dtype, jnp.float32)

        def add(block, data):
            columns = axes.columns(key, block, repeat=False).astype(matrix.dtype)
            slab = block.take(matrix, axes.projected[0])
            return data + jnp.einsum(
                axes.project, slab, columns, preferred_element_type=accumulator
            )

        return axes.loop(add, jnp.zeros(axes.data_shape, accumulator)) * _scale(spec)

    keys = matrix_keys(spec, cycle)
    data = _over_batch(spec, one, keys, gradient, spec.batch, data_batch(spec))
    return manual.total(data, spec.summed)


def decompress(
    spec: Spec, cycle: ArrayLike, data: Float[Array, "*data"]
) -> Float[Array, "*weight"]:
    """Estimates the gradient: `Ĝ = C A`, Algorithm 1, line 10.

    Args:
      spec: of the leaf.
      cycle: int32 scalar, that of the projection which made `data`.
      data: of shape `spec.data_shape`.

    Returns:
      Array of shape `spec.shape` and dtype `spec.dtype`.
    """
    return decompress_with(spec, matrix_keys(spec, cycle), data)


def decompress_with(spec: Spec, drawn_with: jax.Array, data: jax.Array) -> jax.Array:
    """`decompress`, given the keys of the matrices, `B`."""

    def one(axes, key, sketch):
        sketch = sketch * _scale(spec)

        def write(block, gradient):  # columns that two blocks share are written twice, alike
            columns = axes.columns(key, block).astype(sketch.dtype)
            slab = jnp.einsum(axes.decompress, sketch, columns).astype(spec.dtype)
            return block.put(gradient, slab, axes.projected[0])

        return axes.loop(write, jnp.zeros(axes.shape, spec.dtype))

    return _over_batch(spec, one, drawn_with, data, data_batch(spec), spec.batch)


def transfer(
    spec: Spec, old: ArrayLike, new: ArrayLike, data: Float[Array, "*data"]
) -> Float[Array, "*data"]:
    """Moves a sketch to another cycle's projection: `C (A A′ᵀ)`, Algorithm 2, line 9.

    The `r × r` product comes first, so that nothing of the weight's size exists.

    Args:
      spec: of the leaf.
      old: int32 scalar, the cycle whose projection made `data`.
      new: int32 scalar, the cycle it shall belong to.
      data: of shape `spec.data_shape`.

    Returns:
      Array of the shape and dtype of `data`.
    """

    def one(axes, pair, sketch):
        def add(block, product):
            left = axes.columns(pair[0], block, repeat=False)
            right = axes.columns(pair[1], block)
            over = tuple(range(len(axes.projected)))
            return product + jnp.tensordot(left, right, (over, over))

        product = axes.loop(add, jnp.zeros((spec.rank, spec.rank), jnp.float32))
        product = manual.total(product, spec.summed)
        product = (product * _scale(spec) ** 2).astype(sketch.dtype)
        moved = jnp.tensordot(sketch, product, ((axes.projected[0],), (0,)))
        return jnp.moveaxis(moved, -1, axes.projected[0])

    pairs = (matrix_keys(spec, old), matrix_keys(spec, new))
    return _over_batch(spec, one, pairs, data, data_batch(spec), data_batch(spec))


class _Axes:
    """One matrix of a leaf, its batch axes taken away: labels for einsum, and blocks of columns."""

    def __init__(self, spec: Spec):
        kept = [axis for axis in range(len(spec.shape)) if axis not in spec.batch]
        self.spec = spec
        self.shape = tuple(spec.part_shape[axis] for axis in kept)
        self.projected = tuple(kept.index(axis) for axis in spec.projected)
        labels = string.ascii_lowercase[: len(kept)]
        whole = labels
        data = "".join(
            "r" if axis == self.projected[0] else label
            for axis, label in enumerate(labels)
            if axis == self.projected[0] or axis not in self.projected
        )
        columns = "".join(labels[axis] for axis in self.projected) + "r"
        self.project = f"{whole},{columns}->{data}"
        self.decompress = f"{data},{columns}->{whole}"
        self.data_shape = tuple(
            spec.rank if axis == self.projected[0] else length
            for axis, length in enumerate(self.shape)
            if axis == self.projected[0] or axis not in self.projected
        )

    def columns(self, key: jax.Array, block: Block, repeat: bool = True) -> jax.Array:
        """Columns of a block of the first projected axis; without `repeat` zero where it repeats."""
        spec = self.spec
        indices = spec.positions(spec.projected, block.indices())
        drawn = distributions.columns(spec.distribution, key, spec.rank, spec.size, indices)
        if repeat or block.size == block.total:
            return drawn
        return jnp.where(block.fresh().reshape(-1, *[1] * (drawn.ndim - 1)), drawn, 0.0)

    def loop(self, body: Callable[[Block, Any], Any], carry: jax.Array) -> jax.Array:
        """`over_blocks` of the first projected axis."""
        total = self.shape[self.projected[0]]
        most = max(1, self.spec.block // (self.spec.rank * (self.spec.size // total)))
        if not distributions.is_columnwise(self.spec.distribution):
            most = total
        return over_blocks(total, most, body, carry)


def _over_batch(
    spec: Spec, one: Callable, drawn_with: Any, array: jax.Array, axes_in, axes_out
) -> jax.Array:
    """Applies `one(axes, key, matrix)` along the batch axes; no more than a block of `A` is drawn.

    As many matrices are looked at side by side as a batch axis has runs (see `blocks`), each with a
    smaller block of its own: where that axis is cut over devices, each looks at its own. A matrix
    whose columns must be drawn all at once is looked at alone.
    """
    apart = MOST_RUNS if distributions.is_columnwise(spec.distribution) else 1

    def over(axis: int, block: int, apart: int, drawn_with: Any, array: jax.Array) -> jax.Array:
        if axis == len(spec.batch):
            return one(_Axes(dataclasses.replace(spec, block=block)), drawn_with, array)
        inner = math.prod(array.shape[1 : len(spec.batch) - axis])
        total = array.shape[0]
        side_by_side = runs(total, apart)
        together = min(total, max(side_by_side, block // (spec.rank * spec.size * inner)))
        each = jax.vmap(
            functools.partial(over, axis + 1, max(1, block // together), apart // side_by_side)
        )

        def write(part: Block, result: jax.Array) -> jax.Array:
            keys, matrices = jax.tree.map(lambda x: part.take(x, 0), (drawn_with, array))
            return part.put(result, each(keys, matrices), 0)

        shape = jax.eval_shape(each, drawn_with, array)
        return over_blocks(total, together, write, jnp.zeros(shape.shape, shape.dtype))

    leading = tuple(range(len(spec.batch)))
    array = jnp.moveaxis(array, axes_in, leading)
    return jnp.moveaxis(over(0, spec.block, apart, drawn_with, array), leading, axes_out)


def data_batch(spec: Spec) -> tuple[int, ...]:
    """Where the batch axes are in the sketch."""
    gone = spec.projected[1:]
    return tuple(axis - sum(other < axis for other in gone) for axis in spec.batch)


def matrix_keys(spec: Spec, cycle: ArrayLike) -> jax.Array:
    """Typed keys of shape `B`: one for each matrix of the leaf."""
    _check_prng(spec)
    key = keys.leaf_key(spec.seed, spec.key_path, cycle, spec.impl)
    if spec.key_index is not None:
        key = jax.random.fold_in(key, spec.key_index)
    if not spec.batch:
        return key
    index = spec.positions(spec.batch)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index.reshape(-1)).reshape(index.shape)


def _scale(spec: Spec) -> float:
    return distributions.scale(spec.distribution, spec.rank, spec.size)


def _check_prng(spec: Spec) -> None:
    if spec.impl == "threefry2x32" and not getattr(jax.config, "jax_threefry_partitionable", True):
        raise ValueError(
            "jax_threefry_partitionable must be True, found False: projections would depend on "
            "the layout over devices"
        )
