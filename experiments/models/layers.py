"""What the models share: a product; attention and loss in parts.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

CHUNK = 512
"""Tokens whose logits, and whose attention scores, exist at a time."""


class Dense(nn.Module):
    """`x W (+ bias)`, in one dtype."""

    features: int
    dtype: Any
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        make, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
        y = x @ self.param("kernel", make, (x.shape[-1], self.features), self.dtype)
        if self.bias:
            y = y + self.param("bias", zeros, (self.features,), self.dtype)
        return y


def placed(x: jax.Array, first: Any = None, heads: Any = None) -> jax.Array:
    """Cuts the first axis and the last but one over these mesh axes; nothing without any."""
    if first is None:
        return x
    inner: list[Any] = [None] * (x.ndim - 2)
    if heads is not None:
        inner[-1] = heads
    return jax.lax.with_sharding_constraint(x, PartitionSpec(first, *inner))


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions on `(B, T, heads, head_dim)` (Su et al., arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    left, right = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of `(B, T, heads, head_dim)`; the scores of `CHUNK` queries exist at a time."""
    count = q.shape[1] // CHUNK
    if count < 2 or q.shape[1] % CHUNK:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    @jax.checkpoint
    def some(i, q):
        mask = i * CHUNK + jnp.arange(CHUNK)[:, None] >= jnp.arange(k.shape[1])
        return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])

    queries = jnp.moveaxis(q.reshape(q.shape[0], count, CHUNK, *q.shape[2:]), 1, 0)
    results = jax.lax.map(lambda pair: some(*pair), (jnp.arange(count), queries))
    return jnp.moveaxis(results, 0, 1).reshape(q.shape)


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
