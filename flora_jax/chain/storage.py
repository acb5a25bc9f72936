"""Storage: the dtypes in which a state keeps its numbers between micro-steps.

`float32` and `float64` keep the numbers as they are. `bfloat16`, `int8` and `int4` round at random, so
that what is kept is an unbiased estimate of what was stored, and small additions are not lost. Both have one scale
for each 128 numbers along the last axis, `int4`, whose error is felt, one for each 64 along the axis of the rank, where that is not the last one:
there a projection has made the numbers alike, and TPUs, whose registers have 128 numbers of the last axis, cut the others without a copy. Arrays of fewer than 4096
numbers are kept in float32. XLA packs two numbers in int4 into a byte. Complex numbers are kept as they are in every state.

Integers are rounded with subtractive dither: a random number below one step is added before the rounding, sampled again when the integers
are loaded, and taken off. The error is then uniform within half a step and independent of the numbers; its variance is half
the mean of that of stochastic rounding. The key is made of the counts in the state. Where the state is read on another
manual mesh, or by another mode of update, the numbers that are taken off are others; there is no bias then either, and the variance is three times as
large, once.

Sources: Schuchman, "Dither signals and their effect on quantization noise", IEEE Transactions on Communication Technology, 1964; of
gradients, Abdi and Fekri, arXiv 1904.01197.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from flora_jax import bits, dtypes, rounding

StateDtype = Literal["float32", "float64", "bfloat16", "int8", "int4"]


class Format(NamedTuple):
    """How numbers are kept as integers.

    Attributes:
      largest: The largest integer; the smallest is `-largest - 1`.
      block: The number of integers along the axis of the rank that share a scale.
      scales: The dtype of the scales.
    """

    largest: int
    block: int
    scales: str


LAST = 128
"""The number of integers along the last axis that share a scale."""
INTEGERS = {"int8": Format(127, LAST, "float32"), "int4": Format(7, 64, "bfloat16")}
MIN_SIZE = 4096


class Quantized(NamedTuple):
    """An array of integers with a scale for each block, or a tree of values with a tree of scales.

    Attributes:
      values: The int8 or int4 values, of the array's shape; float32 for an array of fewer than 4096 numbers.
      scales: The scales, with one axis divided by the size of a block and rounded up; of shape `(1,)` for
        an array of fewer than 4096 numbers.
    """

    values: Any
    scales: Any


def is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def check(name: str, dtype: Any) -> None:
    """Raises a ValueError unless `dtype` is one that states can be kept in."""
    if dtype not in get_args(StateDtype):
        raise ValueError(
            f"{name} must be one of {', '.join(get_args(StateDtype))}, found {dtype!r}"
        )


@dtypes.promoting()
def unrounded(dtype: StateDtype, of: Any) -> Any:
    """Returns the complex dtype in which numbers of the dtype `of` are kept; None where they are real."""
    if not jnp.issubdtype(of, jnp.complexfloating):
        return None
    return jnp.promote_types(of, jnp.float64 if dtype == "float64" else jnp.float32)


def nbytes(
    dtype: StateDtype, shape: tuple[int, ...], of: Any = "float32", rank_axis: int | None = None
) -> int:
    """Returns the number of bytes that numbers of this shape, and of the dtype `of`, take in this dtype on a device."""
    if kept := unrounded(dtype, of):
        scale = dtypes.nbytes((1,), INTEGERS[dtype].scales) if dtype in INTEGERS else 0
        return dtypes.nbytes(shape, kept) + scale
    if dtype in INTEGERS:
        values = dtypes.nbytes(shape, dtype if _quantizes(shape) else "float32")
        return values + dtypes.nbytes(
            _scales_shape(dtype, shape, rank_axis), INTEGERS[dtype].scales
        )
    return dtypes.nbytes(shape, dtype)


def zeros(
    dtype: StateDtype, shape: tuple[int, ...], of: Any = "float32", rank_axis: int | None = None
) -> Any:
    """Returns zeros of this shape, and of the dtype `of`, as they are kept in this dtype."""
    if kept := unrounded(dtype, of):
        array = jnp.zeros(shape, kept)
        return _without_scales(dtype, array) if dtype in INTEGERS else array
    if dtype not in INTEGERS:
        return jnp.zeros(shape, dtype)
    if not _quantizes(shape):
        return _without_scales(dtype, jnp.zeros(shape, jnp.float32))
    scales = jnp.zeros(_scales_shape(dtype, shape, rank_axis), INTEGERS[dtype].scales)
    return Quantized(jnp.zeros(shape, dtype), scales)


@dtypes.promoting()
def load(kept: Any, key: Any, rank_axis: int | None = None) -> jax.Array:
    """Returns the numbers in float32, or in float64 or a complex dtype if they are kept so, given the rest that `store` was given."""
    if not is_quantized(kept):
        return kept.astype(jnp.promote_types(kept.dtype, jnp.float32))
    if kept.values.dtype.name not in INTEGERS:
        return kept.values
    shape = kept.values.shape
    axis, block = _blocks(kept.values.dtype.name, shape, rank_axis)
    scales = jnp.repeat(kept.scales.astype(jnp.float32), block, axis=axis)
    scales = jax.lax.slice_in_dim(scales, 0, shape[axis], axis=axis)
    return (kept.values.astype(jnp.float32) + _dither(key, shape)) * scales


@dtypes.promoting()
def store(dtype: StateDtype, array: jax.Array, key: Any, rank_axis: int | None = None) -> Any:
    """Returns the numbers as they are kept in this dtype.

    Args:
      dtype: The dtype of the state.
      array: The numbers.
      key: A key for the rounding; None where there is none.
      rank_axis: The axis of a sketch's rank; None for what is no sketch.
    """
    if kept := unrounded(dtype, array.dtype):
        array = array.astype(kept)
        return _without_scales(dtype, array) if dtype in INTEGERS else array
    if dtype in INTEGERS:
        if _quantizes(array.shape):
            return _quantize(dtype, array, key, rank_axis)
        return _without_scales(dtype, array.astype(jnp.float32))
    if dtype == "bfloat16":
        return rounding.to_bfloat16(array.astype(jnp.float32), bits.random(key, array.shape))
    return array.astype(dtype)


def transposed(dtype: StateDtype, kept: list[Any], structure: Any) -> Any:
    """Puts the kept leaves into a tree, and for integers into a tree of values beside a tree of scales.

    So each leaf of a state is an array where a parameter is an array, as Flax NNX requires.
    """
    if dtype in INTEGERS:  # of a tree without leaves as well, which stands for any params in optax
        pairs = ([one[i] for one in kept] for i in range(2))
        return Quantized(*(jax.tree.unflatten(structure, part) for part in pairs))
    return jax.tree.unflatten(structure, kept)


def separated(kept: Any, structure: Any) -> list[Any]:
    """Returns the kept leaves of a tree that `transposed` returned."""
    if is_quantized(kept):
        return list(map(Quantized, *map(structure.flatten_up_to, kept)))
    return structure.flatten_up_to(kept)


def _quantizes(shape: tuple[int, ...]) -> bool:
    return bool(shape) and math.prod(shape) >= MIN_SIZE


def _blocks(dtype: str, shape: tuple[int, ...], rank_axis: int | None) -> tuple[int, int]:
    """Returns the axis that is cut into blocks, and the number of integers in a block."""
    last = len(shape) - 1
    along_rank = INTEGERS[dtype].block != LAST and rank_axis not in (None, last)
    axis = rank_axis if along_rank and rank_axis is not None else last
    return axis, min(INTEGERS[dtype].block if along_rank else LAST, max(1, shape[axis]))


def _scales_shape(
    dtype: StateDtype, shape: tuple[int, ...], rank_axis: int | None
) -> tuple[int, ...]:
    if not _quantizes(shape):
        return (1,)
    axis, block = _blocks(dtype, shape, rank_axis)
    return (*shape[:axis], -(-shape[axis] // block), *shape[axis + 1 :])


def _without_scales(dtype: StateDtype, array: jax.Array) -> Quantized:
    return Quantized(array, jnp.zeros((1,), INTEGERS[dtype].scales))


def _quantize(
    dtype: StateDtype, array: jax.Array, key: bits.Words, rank_axis: int | None
) -> Quantized:
    largest, _, of_scales = INTEGERS[dtype]
    axis, block = _blocks(dtype, array.shape, rank_axis)
    length, ahead, behind = array.shape[axis], array.shape[:axis], array.shape[axis + 1 :]
    array = array.astype(jnp.float32)
    blocks = jnp.pad(array, [(0, -length % block if i == axis else 0) for i in range(array.ndim)])
    blocks = blocks.reshape(*ahead, -1, block, *behind)
    scales = jnp.max(jnp.abs(blocks), axis + 1) / (
        largest + 0.5
    )  # the dither's mean is half a step
    # XLA's maximum may drop a NaN, and a block that has one must not load as finite numbers
    scales = jnp.where(jnp.all(jnp.isfinite(blocks), axis + 1), scales, jnp.nan)
    scales = rounding.up(scales, of_scales)
    steps = blocks / jnp.expand_dims(
        jnp.where(scales > 0, scales.astype(jnp.float32), 1.0), axis + 1
    )
    steps = jax.lax.slice_in_dim(steps.reshape(*ahead, -1, *behind), 0, length, axis=axis)
    values = jnp.round(steps - _dither(key, array.shape))
    values = jnp.clip(values, -largest - 1, largest)
    return Quantized(values.astype(dtype), scales)


def _dither(key: bits.Words, shape: tuple[int, ...]) -> jax.Array:
    """Returns random numbers between 0 and 1, in float32, that are taken off before rounding and added after it."""
    return bits.uniform(bits.random(key, shape))
