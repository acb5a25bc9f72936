"""Attention goes over a chunk of queries at a time; and rotary positions.

In the shape descriptions `B` is the batch, `T` the sequence, `L` the tokens that may be attended to.
"""

from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 512
"""Queries whose scores, and tokens whose logits, exist at a time."""


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Attends, `(B, T, heads, head_dim)`: causally, or to where the mask `(B, 1, T, L)` lets it.

    Without a mask the scores of `CHUNK` queries exist at a time, where `CHUNK` divides `T`.
    """
    if mask is not None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
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


def rotate(x: Any, positions: Any = None, theta: float = 10000.0) -> Any:
    """Gives `(B, T, heads, head_dim)` rotary positions (Su et al., arXiv 2104.09864).

    Args:
      x: Queries or keys.
      positions: Positions `(B, T)`; by default they count from 0.
      theta: The base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half) / half)
    if positions is None:
        positions = jnp.arange(x.shape[1])[None]
    angles = positions[:, :, None, None] * frequencies
    left, right = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
