"""Experts: feed-forward parts of which a router chooses a few for each token.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width, `E` the experts, `F` the width inside one.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.models.layers import Dense


class Experts(nn.Module):
    """Maps `(B, T, D)` to the sum of the chosen experts' results, each times its probability.

    Tokens are sorted by expert, and `jax.lax.ragged_dot` multiplies each run of them by its expert's matrix; no token is
    dropped. There is no loss for balance, as in torch's `transformers` unless `output_router_logits` asks for one.

    Attributes:
      count: `E`.
      chosen: The experts of a token.
      hidden: `F`.
      dtype: The dtype of parameters and activations.
      act: The activation of the gate.
      normed: Whether the probabilities of the chosen ones are divided by their sum.
    """

    count: int
    chosen: int
    hidden: int
    dtype: Any
    act: Callable[[jax.Array], jax.Array]
    normed: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, width = x.shape, x.shape[-1]
        x = x.reshape(-1, width)
        scores = Dense(self.count, self.dtype, name="router")(x)
        probabilities = jax.nn.softmax(scores.astype(jnp.float32))
        best, experts = jax.lax.top_k(probabilities, self.chosen)
        if self.normed:
            best = best / best.sum(-1, keepdims=True)
        order = jnp.argsort(experts.reshape(-1), stable=True)
        sizes = jnp.bincount(experts.reshape(-1), length=self.count).astype(jnp.int32)
        tokens = order // self.chosen
        make = nn.initializers.lecun_normal(batch_axis=0)

        def product(name: str, x: jax.Array, features: int) -> jax.Array:
            kernel = self.param(name, make, (self.count, x.shape[-1], features), self.dtype)
            return jax.lax.ragged_dot(x, kernel, sizes)

        inputs = x[tokens]
        y = self.act(product("gate", inputs, self.hidden)) * product("up", inputs, self.hidden)
        y = product("down", y, width) * best.reshape(-1)[order, None].astype(y.dtype)
        return jnp.zeros_like(x).at[tokens].add(y).reshape(shape)
