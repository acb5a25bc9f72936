"""The cache of keys and values that a decoder keeps while it writes.

In the shape descriptions `B` is the batch, `T` the sequence, `L` the slots of a cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.models.attention import Sight


class Cache(NamedTuple):
    """Holds keys and values of the tokens that a decoder has seen, for all its layers.

    Attributes:
      layers: Trees of arrays with the layers along the first axis, as the model makes them.
      valid: `(B, L)`, which slots hold a token that may be attended to.
      filled: int32, how many slots are filled.
    """

    layers: Any
    valid: jax.Array
    filled: jax.Array


def empty_cache(layers: int, batch: int, slots: int, heads: int, size: int, dtype: Any) -> Cache:
    """Returns a cache of keys and values `(layers, B, L, heads, head_dim)` with nothing in it."""
    make = lambda: jnp.zeros((layers, batch, slots, heads, size), dtype)  # noqa: E731
    return Cache((make(), make()), jnp.zeros((batch, slots), bool), jnp.int32(0))


def places(
    tokens: jax.Array,
    mask: jax.Array | None,
    cache: Cache | None,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array | None, Sight, Cache | None]:
    """Returns positions `(B, T)`, what may be attended to, and the cache with these slots marked.

    A token's position is the number of tokens before it that count, so that padding on the left moves
    nothing, unless positions are given. Without all of them they are None, which is from 0 on.

    Args:
      tokens: The new tokens, `(B, T)`.
      mask: `(B, T)`, which of them count; None for all.
      cache: The cache of the tokens before, if there is one.
      positions: Positions `(B, T)`, as where a sequence holds several documents.
      segments: The document of each token, `(B, T)`.
    """
    if mask is None and cache is None:
        return positions, Sight(segments=segments), None
    new = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    index, valid = jnp.int32(0), new
    if cache is not None:
        index = cache.filled
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, new, index, 1)
        cache = cache._replace(valid=valid, filled=index + tokens.shape[1])
    if positions is None:
        counts = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        positions = jax.lax.dynamic_slice_in_dim(counts, index, tokens.shape[1], 1)
    return positions, Sight(index, valid, segments), cache


def remember(past: Any, index: Any, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """Returns keys and values of all slots, these `(B, T, heads, head_dim)` among them, and the new past.

    Args:
      past: Keys and values of a layer so far, as `empty_cache` has them; None without a cache.
      index: The slot of the first of the new tokens.
      k: The new tokens' keys.
      v: The new tokens' values.
    """
    if past is None:
        return k, v, None
    pairs = zip(past, (k, v), strict=True)
    past = tuple(jax.lax.dynamic_update_slice_in_dim(old, new, index, 1) for old, new in pairs)
    return *past, past
