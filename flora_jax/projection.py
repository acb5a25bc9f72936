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
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args, no_type_check

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from flora_jax import distributions, keys, manual
from flora_jax.blocks import MOST_RUNS, Block, over_blocks, runs
from flora_jax.sketch import Every, Spec

Side = Literal["input", "output", "larger"]
Embedding = Literal["output", "whole", "matrix"]
Head = Literal["input", "whole", "matrix"]


class DimensionNumbers(NamedTuple):
    """Which axes of a weight are the two sides of a matrix, after optax's convention.

    All axes that are named in neither are batch axes: each index along them (a layer stacked by
    `scan`, an expert, a head, a tap of a convolution) is a matrix with a projection of its own.

    Attributes:
      reduction_axis: axis or axes of the input side.
      output_axis: axis or axes of the output side.
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


@no_type_check  # wrong values get a sentence of their own, below
@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """Which leaves are compressed, on which side, to which rank, and how `A` is drawn.

    Attributes:
      rank: rows of `A`: an int, a fraction (0, 1) of the smaller side of each matrix, or a
        function of the leaf's path and shape that gives an int.
      distribution: `gaussian` (entries N(0, 1/r), the paper's), `rademacher` (±1/√r), `orthonormal`
        (rows scaled by √(m/r); exact when r = m), `srht` (subsampled randomised Hadamard transform).
      side: which side of the matrix is projected away; `larger` takes the input side of a square.
      resample_every: micro-steps of a cycle; an int, or a schedule of the cycle.
      seed: int.
      min_dim: both sides of a matrix must have at least so many rows for it to be compressed.
      mask: pytree of bools (or a prefix of one), or a function of the params that gives it, as in
        `optax.masked`; False leaves a leaf whole.
      select: function of path and shape; False leaves a leaf whole.
      weight_dimension_numbers: a `DimensionNumbers` (optax's own are taken as well) for all leaves
        of two or more axes, a pytree of them with None where the rule below holds, or a function
        of the params that gives it. Without it the last two axes are the matrix, `(input, output)`,
        and all before are batch axes; where those two are smaller than `min_dim`, the array is cut
        in two where the smaller part is largest: `(embed, heads, head_dim)` is embed × (heads · head_dim).
      embedding: what is done to lookup tables: `output` projects each row, so that rows which did
        not occur keep a gradient of zero; `whole` leaves them whole; `matrix` has no rule of its own.
      is_embedding: function of path and shape. By default a table of two axes whose path names it
        so (`embed…`, `wte`, `wpe`).
      head: what is done to the matrix that gives the logits: `input` projects its input side, whichever is
        larger, so that the gradients of the classes are not mixed: projecting the vocabulary away costs
        far more loss than the bytes it saves; `whole` leaves it whole; `matrix` has no rule of its own.
      is_head: function of path and shape. By default a matrix of two axes whose path names it so
        (`head`, `lm_head`, `unembed…`, `logits…`, `output_projection`, `classifier`).
      stacked: function of the path that gives None, or the path and index of this layer in the
        stacked form of the model; layers so told draw what the stacked ones draw.
      prng: name of the PRNG implementation. With others than `threefry2x32` (`rbg` is faster on TPU)
        values may differ between layouts over devices.
      block: largest number of entries of `A` that is held at a time, per weight.
      partition_specs: pytree of `PartitionSpec` (or a prefix of one, None for whole), or a function of
        the params that gives it: how weights are cut inside `jax.shard_map`, where the arrays do not
        tell. Each device then draws its own part of the one `A`. Without it a part counts as a weight.
    """

    rank: int | float | Callable[[str, tuple[int, ...]], int]
    _: dataclasses.KW_ONLY
    distribution: distributions.Distribution = "gaussian"
    side: Side = "larger"
    resample_every: Every = 1
    seed: int = 0
    min_dim: int = 128
    mask: Any = None
    select: Callable[[str, tuple[int, ...]], bool] | None = None
    weight_dimension_numbers: Any = None
    embedding: Embedding = "output"
    is_embedding: Callable[[str, tuple[int, ...]], bool] | None = None
    head: Head = "input"
    is_head: Callable[[str, tuple[int, ...]], bool] | None = None
    stacked: Callable[[str], tuple[str, int] | None] | None = None
    prng: str = "threefry2x32"
    block: int = 2**22
    partition_specs: Any = None

    def __post_init__(self):
        _check_rank(self.rank)
        _check_choice("distribution", self.distribution, distributions.DISTRIBUTIONS)
        _check_choice("side", self.side, get_args(Side))
        _check_choice("embedding", self.embedding, get_args(Embedding))
        _check_choice("head", self.head, get_args(Head))
        check_every("resample_every", self.resample_every)
        for name, least in (("min_dim", 1), ("block", 1)):
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, found {value!r}")
        if not _is_int(self.seed):
            raise ValueError(f"seed must be an int, found {_describe(self.seed)}")


def check_every(name: str, every: Any) -> None:
    """Raises ValueError unless `every` is an int of at least 1 or a schedule."""
    if callable(every):
        return
    if not _is_int(every) or every < 1:
        raise ValueError(
            f"{name} must be an int of at least 1 or a schedule, found {_describe(every)}"
        )


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


def _check_rank(rank: Any) -> None:
    if callable(rank) or (_is_int(rank) and rank >= 1):
        return
    if isinstance(rank, float) and 0 < rank < 1:
        return
    hint = ""
    if isinstance(rank, jax.Array):
        hint = "; under optax.inject_hyperparams name it in static_args"
    raise ValueError(
        "rank must be an int of at least 1, a fraction between 0 and 1, or a function of path and "
        f"shape, found {_describe(rank)}{hint}"
    )


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, found {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(value: Any) -> str:
    return "a jax.Array" if isinstance(value, jax.Array) else repr(value)
