"""Rounding: to bfloat16 or to integers at random, up or down, so that the mean is the number itself.

The random bits are a hash of each entry's index and of a key. It costs a few integer operations per entry that XLA fuses with the
rounding, no memory, and depends on no layout over devices. (The bits of `jax.random` cost some ten times as much, which
shows in the time of a small step.)

Source: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv 1502.02551, Section 3; the mixing function is the one that
Chris Wellons found by search, `lowbias32` (hash-prospector, in the public domain).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

Rounding = Literal["nearest", "stochastic"]


def check(rounding: str) -> None:
    """Raises a ValueError for what is no `Rounding`."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', found {rounding!r}")


def key_of(opt_state: Any) -> Key[Array, ""]:
    """Returns a key for the next update, made of all counts in an optimizer's state.

    Raises:
      ValueError: There is no count in it.
    """
    counts = [
        leaf
        for leaf in jax.tree.leaves(opt_state)
        if hasattr(leaf, "dtype")
        and jnp.ndim(leaf) == 0
        and jnp.issubdtype(leaf.dtype, jnp.integer)
    ]
    if not counts:
        raise ValueError(
            "rounding='stochastic' needs a count of the steps in opt_state, found none; give tx a schedule as its "
            "learning rate, as in optax.sgd(optax.constant_schedule(0.1))"
        )
    key = jax.random.key(0, impl="threefry2x32")
    for count in counts:
        key = jax.random.fold_in(key, count)
    return key


def random_bits(key: Any, shape: Sequence[int], axis: int | None = None, index: Any = None) -> Any:
    """Returns a uint32 for each entry of an array.

    Args:
      key: A typed key.
      shape: The shape of the array.
      axis: An axis along which each index has a key of its own, folded in; None for one key.
      index: The indices along this axis that the array has, an int32 array; None for all.
    """
    if axis is not None:
        index = jnp.arange(shape[axis]) if index is None else index
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    words = jax.random.key_data(key)
    place = [1] * len(shape)
    if axis is not None:
        place[axis] = shape[axis]
    first, second = (words[..., i].reshape(place) for i in (0, 1))
    number = jnp.zeros((), jnp.uint32)
    others = [i for i in range(len(shape)) if i != axis]
    for at, i in enumerate(others):
        stride = math.prod(shape[j] for j in others[at + 1 :]) % 2**32
        number = number + jax.lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(stride)
    return _mixed(_mixed(number ^ first) + second)


def _mixed(x: Any) -> Any:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds float32 numbers to one of the two bfloat16 numbers beside each.

    The probability of each is such that the mean is the number. What is bfloat16 already stays, as do infinities and NaN;
    a finite number stays finite.

    Args:
      x: A float32 array.
      bits: Random uint32 numbers, of which the upper 16 bits are used.
    """
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = (raw + (bits >> 16)) & jnp.uint32(0xFFFF0000)
    down = raw & jnp.uint32(0xFFFF0000)
    up = jnp.where((up & jnp.uint32(0x7F800000)) == jnp.uint32(0x7F800000), down, up)
    rounded = jax.lax.bitcast_convert_type(up, jnp.float32).astype(jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def to_integers(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds numbers to one of the two integers beside each, with the mean of the number; the dtype stays.

    Args:
      x: A float32 array, of numbers below 2²³ in size.
      bits: Random uint32 numbers, of which the upper 24 bits are used.
    """
    uniform = (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    return jnp.floor(x + uniform)


def applied(param: Any, update: Any, bits: Any) -> jax.Array:
    """Returns `param + update`; for a bfloat16 param rounded to it with the random bits."""
    if param.dtype != jnp.bfloat16:
        return (param + update).astype(param.dtype)
    return to_bfloat16(param.astype(jnp.float32) + update.astype(jnp.float32), bits)
