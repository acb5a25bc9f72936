"""What the models share: a product; attention, its cache, loss in parts.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width, `L` the slots of a cache.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from flora_jax.models import forward
from flora_jax.models.forward import CHUNK


class Dense(nn.Module):
    """`x W (+ bias)`."""

    features: int
    dtype: Any
    bias: bool = False
    init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.param("kernel", self.init, (x.shape[-1], self.features), self.dtype)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
        return y


def placed(x: jax.Array, first: Any = None, heads: Any = None) -> jax.Array:
    """Cuts the first axis and the last but one over these mesh axes; nothing without any."""
    if first is None:
        return x
    inner: list[Any] = [None] * (x.ndim - 2)
    if heads is not None:
        inner[-1] = heads
    return jax.lax.with_sharding_constraint(x, PartitionSpec(first, *inner))


class Cache(NamedTuple):
    """Keys and values of the tokens that a decoder has seen, for all its layers.

    Attributes:
      layers: trees of arrays with the layers along the first axis, as the model makes them.
      valid: `(B, L)`, which slots hold a token that may be attended to.
      filled: int32, how many slots are.
    """

    layers: Any
    valid: jax.Array
    filled: jax.Array


def empty_cache(layers: int, batch: int, slots: int, heads: int, size: int, dtype: Any) -> Cache:
    """A cache of keys and values `(layers, B, L, heads, head_dim)` with nothing in it."""
    make = lambda: jnp.zeros((layers, batch, slots, heads, size), dtype)  # noqa: E731
    return Cache((make(), make()), jnp.zeros((batch, slots), bool), jnp.int32(0))


def places(
    tokens: jax.Array, mask: jax.Array | None, cache: Cache | None
) -> tuple[jax.Array | None, jax.Array | None, Cache | None]:
    """Positions `(B, T)`, what may be attended to `(B, 1, T, L)`, and the cache with these slots marked.

    A token's position is the number of tokens before it that count, so that padding on the left moves
    nothing. Without a mask and a cache both are None: positions from 0 on, and causal attention.

    Args:
      tokens: `(B, T)`.
      mask: `(B, T)`, which tokens count; None for all.
      cache: of the tokens before.
    """
    if mask is None and cache is None:
        return None, None, None
    new = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    index, valid = jnp.int32(0), new
    if cache is not None:
        index = cache.filled
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, new, index, 1)
        cache = cache._replace(valid=valid, filled=index + tokens.shape[1])
    counts = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    positions = jax.lax.dynamic_slice_in_dim(counts, index, tokens.shape[1], 1)
    causal = jnp.arange(valid.shape[1]) <= index + jnp.arange(tokens.shape[1])[:, None]
    return positions, (causal & valid[:, None])[:, None], cache


def remember(past: Any, index: Any, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """Keys and values of all slots, these `(B, T, heads, head_dim)` among them, and the new past."""
    if past is None:
        return k, v, None
    pairs = zip(past, (k, v), strict=True)
    past = tuple(jax.lax.dynamic_update_slice_in_dim(old, new, index, 1) for old, new in pairs)
    return *past, past


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Attention of `(B, T, heads, head_dim)`: causal, or to where the mask `(B, 1, T, L)` lets it.

    Without a mask the scores of `CHUNK` queries exist at a time.
    """
    if mask is not None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    return forward.attention(q, k, v)


class Tied(nn.Module):
    """The embedding as a head."""

    table: nn.Embed
    scale: float = 1.0
    """Of the states, before."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.table.attend(x if self.scale == 1.0 else x * self.scale)


def losses(head: Any, x: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of `head(x)` for each token, of `CHUNK` tokens of each sequence at a time.

    So that a batch which is cut over devices stays cut.

    Args:
      head: module from `(B, tokens, D)` to logits.
      x: `(B, T, D)`.
      targets: `(B, T)`.
    """
    count = max(1, x.shape[1] // CHUNK)
    if x.shape[1] % count:
        count = 1

    def parts(array):
        cut = array.reshape(array.shape[0], count, -1, *array.shape[2:])
        return jnp.moveaxis(cut, 1, 0)

    def some(head, _, chunk):
        x, targets = chunk
        logits = head(x).astype(jnp.float32)
        return None, optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    scan = nn.scan(
        nn.remat(some, prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False},
    )
    return scan(head, None, (parts(x), parts(targets)))[1]


def mean_loss(losses: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Mean of `(B, T)` losses, each with its weight `(B, T)` where there are some; 0 where all are 0."""
    if weights is None:
        return losses.mean()
    weights = weights.astype(losses.dtype)
    return (losses * weights).sum() / jnp.maximum(weights.sum(), 1)
