"""Layers that the models share: a product, the embedding as a head, a stack under `scan`.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


class Dense(nn.Module):
    """Computes `x W (+ bias)`."""

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


class Tied(nn.Module):
    """Maps states `(B, T, D)` to logits by the embedding.

    Attributes:
      table: The embedding.
      scale: The states are multiplied by this before.
    """

    table: nn.Embed
    scale: float = 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.table.attend(x if self.scale == 1.0 else x * self.scale)


class Capped(nn.Module):
    """Maps states to the logits of another head, kept between `-cap` and `cap` by `cap * tanh(logits / cap)`."""

    head: nn.Module
    cap: float

    def __call__(self, x: jax.Array) -> jax.Array:
        logits = jnp.asarray(self.head(x))  # pyright: ignore[reportCallIssue]
        return self.cap * jnp.tanh(logits / self.cap)


class CentredNorm(nn.Module):
    """Is an RMS norm whose scale is kept as its difference from 1, as Gemma's checkpoints have it.

    Attributes:
      epsilon: The number that is added to the mean square.
      dtype: The dtype of the scale and of the result.
    """

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],), self.dtype)
        x = nn.RMSNorm(self.epsilon, use_scale=False, dtype=jnp.float32, name="unscaled")(x)
        return (x * (1 + scale.astype(jnp.float32))).astype(self.dtype)


def stacked(layer: Any, count: int, remat: bool, broadcast: int = 0) -> Any:
    """Returns a module class of so many layers, one after the other, with their params along a first axis.

    Args:
      layer: A module class whose call takes the states and, where `broadcast` is given, what each layer
        has of its own and then what all layers share; it returns the new states and what it hands out.
      count: The number of layers.
      remat: Whether the backward pass computes each layer again, so that only the states between layers
        are kept.
      broadcast: The number of arguments that all layers share.
    """
    layer = nn.remat(layer, prevent_cse=False) if remat else layer
    own: dict[str, Any] = {"in_axes": (0, *(nn.broadcast,) * broadcast)} if broadcast else {}
    return nn.scan(
        layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=count, **own
    )


def placed(x: jax.Array, batch: Any = None, heads: Any = None) -> jax.Array:
    """Returns `x` sharded over axes of the mesh in context; as it is where none are named.

    Args:
      x: An array with the batch as its first axis.
      batch: Mesh axes of the first axis.
      heads: Mesh axes of the last axis but one.
    """
    if batch is None:
        return x
    inner: list[Any] = [None] * (x.ndim - 2)
    if heads is not None:
        inner[-1] = heads
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch, *inner))
