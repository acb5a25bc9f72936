"""A decoder-only transformer: RMS norm first, rotary positions, GELU, untied head.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import placed
from flora_jax.models.forward import rotate


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    vocabulary: int = 256
    width: int = 256
    layers: int = 3
    heads: int = 4
    cut: tuple[Any, ...] = ()
    """Mesh axes of `B` and of the heads, between and inside the layers; needs a mesh in context."""

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of twice the heads, found {self.width} and {self.heads}"
            )


class Decoder(nn.Module):
    """Tokens `(B, T)` to logits `(B, T, vocabulary)`."""

    shape: Shape

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.shape.vocabulary, self.shape.width, name="embed")(tokens)
        x = placed(x, *self.shape.cut[:1])
        for i in range(self.shape.layers):
            x = Block(self.shape, name=f"layer_{i}")(x)
        return _dense(self.shape.vocabulary, "head")(nn.RMSNorm(name="norm")(x))


class Block(nn.Module):
    """Attention and a feed-forward part, each with a residual; `(B, T, D)` to the same."""

    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, heads = self.shape.width, self.shape.heads
        y = nn.RMSNorm(name="attention_norm")(x)
        q, k, v = (
            placed(_dense(width, name)(y).reshape(*y.shape[:-1], heads, -1), *self.shape.cut)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + _dense(width, "out")(y.reshape(x.shape))
        y = nn.RMSNorm(name="feed_forward_norm")(x)
        x = x + _dense(width, "down")(nn.gelu(_dense(4 * width, "up")(y)))
        return placed(x, *self.shape.cut[:1])


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, name=name)


def _logits(model: Decoder, params, tokens: jax.Array) -> jax.Array:
    return jnp.asarray(model.apply({"params": params}, tokens))


def loss(model: Decoder, params, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats per token, of `(B, T + 1)` windows."""
    logits = _logits(model, params, windows[:, :-1])
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    targets = windows[:, 1:, None]
    return -jnp.take_along_axis(log_probabilities, targets, axis=-1).mean()


def sample(model: Decoder, params, prompt: jax.Array, count: int, key: jax.Array, heat: float):
    """Continues `(B, T)` tokens by `count`, each drawn at temperature `heat`; a window slides."""

    def step(window, key):
        logits = _logits(model, params, window)[:, -1]
        token = jax.random.categorical(key, logits / heat)
        return jnp.concatenate([window[:, 1:], token[:, None]], axis=1), token

    _, tokens = jax.lax.scan(step, prompt, jax.random.split(key, count))
    return jnp.concatenate([prompt, tokens.T], axis=1)
