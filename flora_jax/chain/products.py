"""Products: the products of one weight's gradient, or of its sketch, with `A`.

| paper | here |
|---|---|
| `A`, `r × m` | `sample` |
| `C = G Aᵀ` | `project` |
| `Ĝ = C A` | `decompress` |
| `C A A′ᵀ` | `transfer` |
| `K = A Aᵀ`, and any function of `K` and `Cᵀ C` times `C` | `times_function` |

In the descriptions of shapes `B` stands for the batch axes of a weight, `P` for its projected axes
(whose sizes multiply to `m`), and `r` for the rank. No axis is merged or moved: the sketch has the
weight's axes with `r` in the place of `P`, so that it is sharded along all other axes as the weight is.

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

from flora_jax import dtypes
from flora_jax.chain import distributions, keys
from flora_jax.chain.blocks import MOST_RUNS, Block, over_blocks, runs
from flora_jax.chain.sketch import Spec
from flora_jax.sharding import manual

PRECISION = jax.lax.Precision.HIGHEST
"""The precision of Gram matrices, whose small eigenvalues rounding to bfloat16 would drown."""


@dtypes.promoting()
def sample(spec: Spec, cycle: ArrayLike) -> jax.Array:
    """Samples all of `A` for one leaf.

    It is meant for inspection and tests: nothing in the chain has all of `A` in memory.

    Args:
      spec: The `Spec` of the leaf.
      cycle: The number of the cycle, an int32 scalar.

    Returns:
      A float32 array of shape `(B, r, P)`.
    """
    indices = spec.positions(spec.projected)

    def sample_one(key):
        columns = distributions.columns(spec.distribution, key, spec.rank, spec.size, indices)
        return jnp.moveaxis(columns, -1, 0) * _scale(spec)

    for _ in spec.batch:
        sample_one = jax.vmap(sample_one)
    return sample_one(matrix_keys(spec, cycle))


@dtypes.promoting()
def project(
    spec: Spec, cycle: ArrayLike, gradient: Float[Array, "*weight"]
) -> Float[Array, "*data"]:
    """Compresses a gradient: `C = G Aᵀ`, Algorithm 1, line 7.

    The factors are in the gradient's dtype, and the sums in float32.

    Args:
      spec: The `Spec` of the leaf.
      cycle: The number of the cycle, an int32 scalar.
      gradient: The gradient `G`, of shape `spec.shape`; where the weight is sharded over manual axes,
        the device's part of it, of shape `spec.part_shape`.

    Returns:
      The sketch `C`, a float32 array (float64 for a float64 gradient) of shape `spec.data_shape`, or
      `spec.part_data_shape` for a part.
    """

    def one(axes, key, matrix):
        accumulator = dtypes.sums(matrix.dtype)
        matrix = matrix.astype(dtypes.operands(matrix.dtype))

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
      spec: The `Spec` of the leaf.
      cycle: The number of the cycle whose projection the sketch belongs to, an int32 scalar.
      data: The sketch `C`, of shape `spec.data_shape`.

    Returns:
      The estimate `Ĝ`, an array of shape `spec.shape` and dtype `spec.dtype`.
    """
    return decompress_with(spec, matrix_keys(spec, cycle), data)


@dtypes.promoting()
def decompress_with(spec: Spec, keys: jax.Array, data: jax.Array) -> jax.Array:
    """Does what `decompress` does, given `matrix_keys` in place of the cycle."""

    def one(axes, key, sketch):
        sketch = sketch * _scale(spec)

        def write(block, gradient):  # columns in two blocks are written twice, with equal values
            columns = axes.columns(key, block).astype(sketch.dtype)
            slab = jnp.einsum(axes.decompress, sketch, columns).astype(spec.dtype)
            return block.put(gradient, slab, axes.projected[0])

        return axes.loop(write, jnp.zeros(axes.shape, spec.dtype))

    return _over_batch(spec, one, keys, data, data_batch(spec), spec.batch)


@dtypes.promoting()
def transfer(
    spec: Spec, old: ArrayLike, new: ArrayLike, data: Float[Array, "*data"]
) -> Float[Array, "*data"]:
    """Moves a sketch to another cycle's projection: `C (A A′ᵀ)`, Algorithm 2, line 9.

    The `r × r` product `A A′ᵀ` is computed first, so that nothing as large as the weight exists.

    Args:
      spec: The `Spec` of the leaf.
      old: The number of the cycle that the sketch belongs to, an int32 scalar.
      new: The number of the cycle that it is moved to, an int32 scalar.
      data: The sketch `C`, of shape `spec.data_shape`.

    Returns:
      The sketch in the new cycle, with the shape and dtype of `data`.
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


@dtypes.promoting()
def times_function(
    spec: Spec, keys: jax.Array, data: Float[Array, "*data"], function: Callable[..., jax.Array]
) -> Float[Array, "*data"]:
    """Multiplies a sketch by a matrix `r × r` that depends on the Gram matrices of the sketch and of `A`.

    Where the weight is sharded, those two are all that devices exchange.

    Args:
      spec: The `Spec` of the leaf.
      keys: The `matrix_keys` of the cycle that the sketch belongs to.
      data: The sketch `C`, of shape `spec.data_shape`.
      function: A function of `Cᵀ C` and `K = A Aᵀ`, float32 arrays of shape `(r, r)`, that returns the
        matrix. Where the rows of `A` are orthogonal, `K` is a number, `m / r`.

    Returns:
      The product, with the shape and dtype of `data`.
    """

    def one(axes, key, sketch):
        numbers = sketch.astype(dtypes.sums(sketch.dtype))
        place = axes.projected[0]
        kept = tuple(axis for axis in range(sketch.ndim) if axis != place)
        gram = jnp.tensordot(numbers, numbers, (kept, kept), precision=PRECISION)
        gram = manual.total(gram, axes.kept_names)
        factor = function(gram, _projection_gram(axes, key))
        result = jnp.tensordot(numbers, factor, ((place,), (0,)), precision=PRECISION)
        return jnp.moveaxis(result, -1, place).astype(sketch.dtype)

    return _over_batch(spec, one, keys, data, data_batch(spec), data_batch(spec))


def _projection_gram(axes: "_Axes", key: jax.Array) -> Any:
    spec = axes.spec
    if distributions.is_orthogonal(spec.distribution, spec.size):
        return spec.size / spec.rank

    def add(block, product):
        columns = axes.columns(key, block, repeat=False)
        over = tuple(range(len(axes.projected)))
        return product + jnp.tensordot(columns, columns, (over, over), precision=PRECISION)

    product = axes.loop(add, jnp.zeros((spec.rank, spec.rank), jnp.float32))
    return manual.total(product, spec.summed) * _scale(spec) ** 2


class _Axes:
    """The axes of one matrix of a leaf, without batch axes: einsum equations, and blocks of columns."""

    def __init__(self, spec: Spec):
        kept = [axis for axis in range(len(spec.shape)) if axis not in spec.batch]
        self.spec = spec
        self.shape = tuple(spec.part_shape[axis] for axis in kept)
        self.projected = tuple(kept.index(axis) for axis in spec.projected)
        self.kept_names = tuple(
            name for axis in spec.kept if spec.sharded for name in spec.sharded[axis]
        )
        labels = string.ascii_lowercase[: len(kept)]
        data = "".join(
            "r" if axis == self.projected[0] else label
            for axis, label in enumerate(labels)
            if axis == self.projected[0] or axis not in self.projected
        )
        columns = "".join(labels[axis] for axis in self.projected) + "r"
        self.project = f"{labels},{columns}->{data}"
        self.decompress = f"{data},{columns}->{labels}"
        self.data_shape = tuple(
            spec.rank if axis == self.projected[0] else length
            for axis, length in enumerate(self.shape)
            if axis == self.projected[0] or axis not in self.projected
        )

    def columns(self, key: jax.Array, block: Block, repeat: bool = True) -> jax.Array:
        """Samples a block of columns along the first projected axis.

        Without `repeat`, columns that an earlier block had are zero.
        """
        spec = self.spec
        indices = spec.positions(spec.projected, block.indices())
        sampled = distributions.columns(spec.distribution, key, spec.rank, spec.size, indices)
        if repeat or block.size == block.total:
            return sampled
        return jnp.where(block.fresh().reshape(-1, *[1] * (sampled.ndim - 1)), sampled, 0.0)

    def loop(self, body: Callable[[Block, Any], Any], carry: jax.Array) -> jax.Array:
        """Runs `over_blocks` along the first projected axis."""
        total = self.shape[self.projected[0]]
        most = max(1, self.spec.block // (self.spec.rank * (self.spec.size // total)))
        if not distributions.is_columnwise(self.spec.distribution):
            most = total
        return over_blocks(total, most, body, carry)


def _over_batch(
    spec: Spec, one: Callable, keys: Any, array: jax.Array, axes_in, axes_out
) -> jax.Array:
    """Applies `one(axes, key, matrix)` along the batch axes, with no more than a block of `A` in memory.

    As many matrices are worked on side by side as a batch axis has runs (see `blocks`), each with a
    smaller block of its own, so that where the axis is sharded each device works on its own matrices.
    A matrix whose columns must be sampled together is worked on alone.
    """
    apart = MOST_RUNS if distributions.is_columnwise(spec.distribution) else 1

    def over(axis: int, block: int, apart: int, keys: Any, array: jax.Array) -> jax.Array:
        if axis == len(spec.batch):
            return one(_Axes(dataclasses.replace(spec, block=block)), keys, array)
        inner = math.prod(array.shape[1 : len(spec.batch) - axis])
        total = array.shape[0]
        side_by_side = runs(total, apart)
        together = min(total, max(side_by_side, block // (spec.rank * spec.size * inner)))
        each = jax.vmap(
            functools.partial(over, axis + 1, max(1, block // together), apart // side_by_side)
        )

        def write(part: Block, result: jax.Array) -> jax.Array:
            some_keys, matrices = jax.tree.map(lambda x: part.take(x, 0), (keys, array))
            return part.put(result, each(some_keys, matrices), 0)

        shape = jax.eval_shape(each, keys, array)
        return over_blocks(total, together, write, jnp.zeros(shape.shape, shape.dtype))

    leading = tuple(range(len(spec.batch)))
    array = jnp.moveaxis(array, axes_in, leading)
    return jnp.moveaxis(over(0, spec.block, apart, keys, array), leading, axes_out)


def data_batch(spec: Spec) -> tuple[int, ...]:
    """Returns the positions of the batch axes in the sketch."""
    gone = spec.projected[1:]
    return tuple(axis - sum(other < axis for other in gone) for axis in spec.batch)


@dtypes.promoting()
def matrix_keys(spec: Spec, cycle: ArrayLike) -> jax.Array:
    """Returns an array of typed keys, of shape `B`: one for each matrix of the leaf."""
    key = keys.leaf_key(spec.seed, spec.key_path, cycle, spec.impl)
    if spec.key_index is not None:
        key = jax.random.fold_in(key, spec.key_index)
    layer = keys.layer(spec.path)
    if not spec.batch:
        return key if layer is None else jax.random.fold_in(key, layer)
    index = spec.positions(spec.batch)
    if layer is not None:
        index = index + layer * index.size
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index.reshape(-1)).reshape(index.shape)


def _scale(spec: Spec) -> float:
    return distributions.scale(spec.distribution, spec.rank, spec.size)
