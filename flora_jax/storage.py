"""Storage: how the numbers of a state are kept between micro-steps.

`float32` (and `float64`) as they are; `bfloat16` and `int8` with stochastic rounding, so that
what is kept is an unbiased estimate of what was put there and small additions are not lost.
`int8` has one float32 scale for each 128 numbers along the last axis; arrays of fewer than 4096
numbers stay in float32.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

StateDtype = Literal["float32", "float64", "bfloat16", "int8"]
BLOCK = 128
MIN_SIZE = 4096


class Quantized(NamedTuple):
    """Block-wise int8.

    Attributes:
      values: int8, of the shape of the array.
      scales: float32, the last axis divided by 128, rounded up.
    """

    values: Any
    scales: Any


def is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def check(name: str, dtype: Any) -> None:
    """Raises ValueError unless `dtype` is one that states can be kept in."""
    if dtype not in ("float32", "float64", "bfloat16", "int8"):
        raise ValueError(f"{name} must be one of float32, float64, bfloat16, int8, found {dtype!r}")


def nbytes(dtype: StateDtype, shape: tuple[int, ...]) -> int:
    """Bytes that an array of this shape takes."""
    size = math.prod(shape)
    if _quantizes(dtype, shape):
        return size + 4 * math.prod(shape[:-1]) * -(-shape[-1] // BLOCK)
    return size * {"float64": 8, "bfloat16": 2}.get(dtype, 4)


def zeros(dtype: StateDtype, shape: tuple[int, ...]) -> Any:
    """A kept zero of this shape."""
    if _quantizes(dtype, shape):
        scales = (*shape[:-1], -(-shape[-1] // BLOCK))
        return Quantized(jnp.zeros(shape, jnp.int8), jnp.zeros(scales, jnp.float32))
    return jnp.zeros(shape, jnp.float32 if dtype == "int8" else dtype)


def load(kept: Any) -> jax.Array:
    """The numbers as float32 (float64 if kept so)."""
    if not is_quantized(kept):
        return kept.astype(jnp.promote_types(kept.dtype, jnp.float32))
    scales = jnp.repeat(kept.scales, BLOCK, axis=-1)[..., : kept.values.shape[-1]]
    return kept.values.astype(jnp.float32) * scales


def store(dtype: StateDtype, array: jax.Array, key: jax.Array) -> Any:
    """Keeps the numbers; `key` serves the stochastic rounding."""
    if _quantizes(dtype, array.shape):
        return _quantize(array, key)
    if dtype == "bfloat16":
        return _round_bfloat16(array, key)
    return array.astype(jnp.float32 if dtype == "int8" else dtype)


def _quantizes(dtype: StateDtype, shape: tuple[int, ...]) -> bool:
    return dtype == "int8" and math.prod(shape) >= MIN_SIZE


def _quantize(array: jax.Array, key: jax.Array) -> Quantized:
    *lead, last = array.shape
    array = array.astype(jnp.float32)
    blocks = jnp.pad(array, [(0, 0)] * len(lead) + [(0, -last % BLOCK)])
    blocks = blocks.reshape(*lead, -1, BLOCK)
    scales = jnp.max(jnp.abs(blocks), axis=-1) / 127.0
    steps = blocks / jnp.where(scales > 0, scales, 1.0)[..., None]
    steps = steps.reshape(*lead, -1)[..., :last]
    up = jax.random.uniform(key, array.shape, jnp.float32)
    values = jnp.clip(jnp.floor(steps + up), -127, 127)
    return Quantized(values.astype(jnp.int8), scales)


def _round_bfloat16(array: jax.Array, key: jax.Array) -> jax.Array:
    """Adds uniform bits below bfloat16's last and cuts; inf and NaN are left alone."""
    array = array.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    noise = jax.random.bits(key, array.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(array), rounded, array).astype(jnp.bfloat16)
