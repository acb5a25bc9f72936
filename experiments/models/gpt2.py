"""GPT-2: layer norm first, learned positions, GELU by tanh, the head tied to the embedding.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width. The layers are stacked
along a first axis and run by `scan`, each one rematerialised in the backward pass.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import Dense, attention, losses


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are GPT-2's."""

    vocabulary: int = 50257
    positions: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    dtype: Any = jnp.float32


SHAPES = {
    "GPT-2": Shape(),
    "GPT-2-XL": Shape(width=1600, layers=48, heads=25, dtype=jnp.bfloat16),
}


class Gpt2(nn.Module):
    """Tokens `(B, T)` to logits `(B, T, vocabulary)`; with targets `(B, T)`, to the mean loss."""

    shape: Shape

    @nn.compact
    def __call__(self, tokens: jax.Array, targets: jax.Array | None = None) -> jax.Array:
        shape = self.shape
        types = {"dtype": shape.dtype, "param_dtype": shape.dtype}
        wte = nn.Embed(shape.vocabulary, shape.width, name="wte", **types)
        wpe = nn.Embed(shape.positions, shape.width, name="wpe", **types)
        x = wte(tokens) + wpe(jnp.arange(tokens.shape[1]))
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=shape.layers,
        )
        x, _ = layers(shape, name="layers")(x, None)
        x = nn.LayerNorm(1e-5, name="norm", **types)(x)
        return wte.attend(x) if targets is None else losses(Tied(wte), x, targets).mean()


class Tied(nn.Module):
    """The embedding as a head."""

    table: nn.Embed

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.table.attend(x)


class Layer(nn.Module):
    """`(B, T, D)` to the same, in the form that `nn.scan` takes."""

    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        shape = self.shape

        def dense(features, name):
            return Dense(features, shape.dtype, bias=True, name=name)

        def norm(name):
            return nn.LayerNorm(1e-5, name=name, dtype=shape.dtype, param_dtype=shape.dtype)

        y = norm("attention_norm")(x)
        q, k, v = (
            part.reshape(*part.shape[:-1], shape.heads, -1)
            for part in jnp.split(dense(3 * shape.width, "qkv")(y), 3, axis=-1)
        )
        x = x + dense(shape.width, "out")(attention(q, k, v).reshape(x.shape))
        y = nn.gelu(dense(4 * shape.width, "up")(norm("feed_forward_norm")(x)))
        return x + dense(shape.width, "down")(y), None


def loss(model: Gpt2, params: Any, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats per token, of `(B, T + 1)` windows."""
    return jnp.asarray(model.apply({"params": params}, windows[:, :-1], windows[:, 1:]))
