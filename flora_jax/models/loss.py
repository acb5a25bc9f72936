"""The loss of a language model goes over a chunk of tokens at a time.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flora_jax.models.attention import chunks, join, split


def losses(head: Any, x: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the cross-entropy of `head(x)` for each token, `(B, T)`, over a chunk of tokens of each sequence at a time.

    Chunks are taken of each sequence, so that a batch that is sharded over devices stays so.

    Args:
      head: A module from `(B, tokens, D)` to logits.
      x: The last states, `(B, T, D)`.
      targets: The tokens that come next, `(B, T)`.
    """
    count, size = chunks(x.shape[1])

    def some(head, _, chunk):
        x, targets = chunk
        logits = head(x).astype(jnp.float32)
        return None, optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    scan = nn.scan(
        nn.remat(some, prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False},
    )
    parts = split(x, count, size), split(targets, count, size)
    return join(scan(head, None, parts)[1], x.shape[1])


def mean_loss(losses: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Returns the mean of `(B, T)` losses, each with its weight `(B, T)` where there are some; 0 where all are 0."""
    if weights is None:
        return losses.mean()
    weights = weights.astype(losses.dtype)
    return (losses * weights).sum() / jnp.maximum(weights.sum(), 1)
