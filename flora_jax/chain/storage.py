"""Storage: the dtypes in which a state keeps its numbers between micro-steps.

`float32` and `float64` keep the numbers as they are. `bfloat16`, `int8` and `int4` round stochastically, so
that what is kept is an unbiased estimate of what was stored, and small additions are not lost. `int8` and `int4`
have one float32 scale for each 128 numbers along the last axis, and keep arrays of fewer than 4096
numbers in float32. XLA packs two numbers in int4 into a byte. Complex numbers are kept as they are in every state.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from flora_jax import dtypes, rounding

StateDtype = Literal["float32", "float64", "bfloat16", "int8", "int4"]
LARGEST = {"int8": 127, "int4": 7}
"""The largest integer of a dtype of integers; the smallest is its negative."""
BLOCK = 128
MIN_SIZE = 4096


class Quantized(NamedTuple):
    """An array of integers with a scale for each block of 128, or a tree of values with a tree of scales.

    Attributes:
      values: The int8 or int4 values, of the array's shape; float32 for an array of fewer than 4096 numbers.
      scales: The float32 scales, with the last axis divided by 128 and rounded up; of shape `(1,)` for
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


def nbytes(dtype: StateDtype, shape: tuple[int, ...], of: Any = "float32") -> int:
    """Returns the number of bytes that numbers of this shape, and of the dtype `of`, take in this dtype on a device."""
    if kept := unrounded(dtype, of):
        return dtypes.nbytes(shape, kept) + (4 if dtype in LARGEST else 0)
    if dtype in LARGEST:
        values = dtypes.nbytes(shape, dtype if _quantizes(shape) else "float32")
        return values + dtypes.nbytes(_scales_shape(shape), "float32")
    return dtypes.nbytes(shape, dtype)


def zeros(dtype: StateDtype, shape: tuple[int, ...], of: Any = "float32") -> Any:
    """Returns zeros of this shape, and of the dtype `of`, as they are kept in this dtype."""
    if kept := unrounded(dtype, of):
        array = jnp.zeros(shape, kept)
        return Quantized(array, jnp.zeros((1,), jnp.float32)) if dtype in LARGEST else array
    if dtype not in LARGEST:
        return jnp.zeros(shape, dtype)
    values = jnp.zeros(shape, dtype if _quantizes(shape) else jnp.float32)
    return Quantized(values, jnp.zeros(_scales_shape(shape), jnp.float32))


@dtypes.promoting()
def load(kept: Any) -> jax.Array:
    """Returns the numbers in float32, or in float64 or a complex dtype if they are kept so."""
    if not is_quantized(kept):
        return kept.astype(jnp.promote_types(kept.dtype, jnp.float32))
    if kept.values.dtype.name not in LARGEST:
        return kept.values
    scales = jnp.repeat(kept.scales, BLOCK, axis=-1)[..., : kept.values.shape[-1]]
    return kept.values.astype(jnp.float32) * scales


@dtypes.promoting()
def store(dtype: StateDtype, array: jax.Array, key: Any) -> Any:
    """Returns the numbers as they are kept in this dtype; `key` is for the stochastic rounding, None where there is none."""
    if kept := unrounded(dtype, array.dtype):
        array = array.astype(kept)
        return Quantized(array, jnp.zeros((1,), jnp.float32)) if dtype in LARGEST else array
    if dtype in LARGEST:
        if _quantizes(array.shape):
            return _quantize(dtype, array, key)
        return Quantized(array.astype(jnp.float32), jnp.zeros((1,), jnp.float32))
    if dtype == "bfloat16":
        bits = rounding.random_bits(key, array.shape)
        return rounding.to_bfloat16(array.astype(jnp.float32), bits)
    return array.astype(dtype)


def transposed(dtype: StateDtype, kept: list[Any], structure: Any) -> Any:
    """Puts the kept leaves into a tree, and for integers into a tree of values beside a tree of scales.

    So each leaf of a state is an array where a parameter is an array, as Flax NNX requires.
    """
    if dtype in LARGEST:  # of a tree without leaves as well, which stands for any params in optax
        pairs = ([one[i] for one in kept] for i in range(2))
        return Quantized(*(jax.tree.unflatten(structure, part) for part in pairs))
    return jax.tree.unflatten(structure, kept)


@dtypes.promoting()
def load_tree(kept: Any) -> Any:
    """Loads all numbers of a tree that `transposed` returned."""
    if is_quantized(kept):
        return jax.tree.map(lambda values, scales: load(Quantized(values, scales)), *kept)
    return jax.tree.map(load, kept)


def _quantizes(shape: tuple[int, ...]) -> bool:
    return bool(shape) and math.prod(shape) >= MIN_SIZE


def _scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], -(-shape[-1] // BLOCK)) if _quantizes(shape) else (1,)


def _quantize(dtype: StateDtype, array: jax.Array, key: jax.Array) -> Quantized:
    largest = LARGEST[dtype]
    *lead, last = array.shape
    array = array.astype(jnp.float32)
    blocks = jnp.pad(array, [(0, 0)] * len(lead) + [(0, -last % BLOCK)])
    blocks = blocks.reshape(*lead, -1, BLOCK)
    scales = jnp.max(jnp.abs(blocks), axis=-1) / largest
    # XLA's maximum may drop a NaN, and a block that has one must not load as finite numbers
    scales = jnp.where(jnp.all(jnp.isfinite(blocks), axis=-1), scales, jnp.nan)
    steps = blocks / jnp.where(scales > 0, scales, 1.0)[..., None]
    steps = steps.reshape(*lead, -1)[..., :last]
    rounded = rounding.to_integers(steps, rounding.random_bits(key, array.shape))
    values = jnp.clip(rounded, -largest, largest)
    return Quantized(values.astype(dtype), scales)
