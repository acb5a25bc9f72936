"""Rounding: to bfloat16 or to integers at random, up or down, so that the mean is the number itself.

Source: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv 1502.02551, Section 3.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from flora_jax import bits as random
from flora_jax.paths import hash_words

Rounding = Literal["nearest", "stochastic"]


def check(rounding: str) -> None:
    """Raises a ValueError for what is no `Rounding`."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', found {rounding!r}")


def key_of(opt_state: Any) -> random.Words:
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
    key = 0, 0
    for count in counts:
        key = random.fold(key, count)
    return key


def of_leaf(key: random.Words, path: str) -> random.Words:
    """Returns a key of its own for the leaf of this name."""
    for word in hash_words(path):
        key = random.fold(key, word)
    return key


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


def up(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts positive float32 numbers to `dtype`, to one that is not smaller; zero and NaN stay."""
    if dtype == jnp.float32:
        return jnp.nextafter(x, jnp.where(x > 0, jnp.inf, x))
    near = x.astype(dtype)
    return jnp.where(
        near.astype(x.dtype) < x, jnp.nextafter(near, jnp.full_like(near, jnp.inf)), near
    )


def to_integers(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds numbers to one of the two integers beside each, with the mean of the number; the dtype stays.

    Args:
      x: A float32 array, of numbers below 2²³ in size.
      bits: Random uint32 numbers, of which the upper 24 bits are used.
    """
    return jnp.floor(x + random.uniform(bits))


def applied(param: Any, update: Any, bits: Any) -> jax.Array:
    """Returns `param + update`; for a bfloat16 param rounded to it with the random bits."""
    if param.dtype != jnp.bfloat16:
        return (param + update).astype(param.dtype)
    return to_bfloat16(param.astype(jnp.float32) + update.astype(jnp.float32), bits)
