"""Bits: random uint32 numbers, a hash of a key and of each entry's place.

It costs a few integer operations per entry that XLA fuses with what uses them, no memory, and depends on no layout over devices.
The bits of `jax.random` cost some ten times as much, and a key of their own costs a compiler seventy operations.

The key has 64 bits, two uint32 numbers; `words` takes them from a key of `jax.random`. `fold` gives independent keys, as
`jax.random.fold_in` does.

Source: the mixing function is the one that Chris Wellons found by search, `lowbias32` (hash-prospector, in the public domain).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.tracing import once

Words = tuple[Any, Any]
"""A key: two uint32 arrays of the same shape, or two Python ints, which are folded with ints on the host."""


def words(key: Any) -> Words:
    """Returns the key that a typed key of `jax.random` is, of any shape; a longer one is folded to two words."""
    first, second, *rest = jnp.moveaxis(jax.random.key_data(key), -1, 0)
    found = first, second
    for word in rest:
        found = fold(found, word)
    return found


def fold(key: Words, number: Any) -> Words:
    """Returns a key of its own for each number, an int, or an array of integers that broadcasts with the key."""
    first, second = key
    if all(isinstance(word, int) for word in (first, second, number)):
        first = _on_host(first ^ number)
        return first, _on_host(second + first)
    return _fold(_unsigned(first), _unsigned(second), _unsigned(number))


def at(key: Words, number: jax.Array) -> jax.Array:
    """Returns a uint32 for each number, an array of integers that broadcasts with the key."""
    first, second = key
    return _at(_unsigned(first), _unsigned(second), _unsigned(number))


def random(
    key: Words, shape: Sequence[int], axis: int | None = None, index: Any = None
) -> jax.Array:
    """Returns a uint32 for each entry of an array.

    Args:
      key: A key without axes.
      shape: The shape of the array.
      axis: An axis along which each index has a key of its own, folded in; None for one key.
      index: The indices along this axis that the array has, an int32 array; None for all.
    """
    if axis is not None:
        index = jnp.arange(shape[axis]) if index is None else index
        place = [1] * len(shape)
        place[axis] = shape[axis]
        key = fold(key, index.reshape(place))
    number = jnp.zeros((), jnp.uint32)
    others = [i for i in range(len(shape)) if i != axis]
    for at_, i in enumerate(others):
        stride = math.prod(shape[j] for j in others[at_ + 1 :]) % 2**32
        number = number + jax.lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(stride)
    return at(key, number)


def uniform(random: jax.Array) -> jax.Array:
    """Returns the upper 24 bits of uint32 numbers as float32 numbers of at least 0 and below 1."""
    return (random >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _unsigned(number: Any) -> Any:
    if isinstance(number, int):
        return np.uint32(number & _MASK)
    return number if number.dtype == jnp.uint32 else number.astype(jnp.uint32)


@once
def _fold(first: jax.Array, second: jax.Array, number: jax.Array) -> Words:
    first = _mixed(first ^ number)
    return first, _mixed(second + first)


@once
def _at(first: jax.Array, second: jax.Array, number: jax.Array) -> jax.Array:
    return _mixed(_mixed(number ^ first) + second)


def _mixed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(_FACTORS[0])
    x = (x ^ (x >> 15)) * jnp.uint32(_FACTORS[1])
    return x ^ (x >> 16)


def _on_host(x: int) -> int:
    x &= _MASK
    x = (x ^ (x >> 16)) * _FACTORS[0] & _MASK
    x = (x ^ (x >> 15)) * _FACTORS[1] & _MASK
    return x ^ (x >> 16)


_MASK = 2**32 - 1
_FACTORS = 0x7FEB352D, 0x846CA68B
