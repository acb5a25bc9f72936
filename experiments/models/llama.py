"""LLaMA: RMS norm first, rotary positions, SwiGLU, grouped-query attention, an untied head.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width. The layers are stacked
along a first axis and run by `scan`, each one rematerialised in the backward pass, unless the
shape says otherwise.

Source: Touvron et al., arXiv 2302.13971 and 2307.09288.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import Dense, attention, losses, placed, rotate


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are LLaMA-7B's."""

    vocabulary: int = 32000
    width: int = 4096
    hidden: int = 11008
    layers: int = 32
    heads: int = 32
    key_heads: int = 32
    dtype: Any = jnp.bfloat16
    remat: bool = True
    scan: bool = True
    cut: tuple[Any, ...] = ()
    """Mesh axes of `B` of the activations between layers; needs a mesh in context."""


SHAPES = {
    "LLaMA-7B": Shape(),
    "LLaMA-13B": Shape(width=5120, hidden=13824, layers=40, heads=40, key_heads=40),
    "LLaMA-70B": Shape(width=8192, hidden=28672, layers=80, heads=64, key_heads=8),
    "LLaMA-60M": Shape(width=512, hidden=1376, layers=8, heads=8, key_heads=8),
    "LLaMA-350M": Shape(width=1024, hidden=2736, layers=24, heads=16, key_heads=16),
}


class Llama(nn.Module):
    """Tokens `(B, T)` to logits `(B, T, vocabulary)`; with targets `(B, T)`, to the mean loss.

    The loss goes over a few hundred tokens at a time, so that not all logits exist at once.
    """

    shape: Shape

    @nn.compact
    def __call__(self, tokens: jax.Array, targets: jax.Array | None = None) -> jax.Array:
        shape = self.shape
        x = nn.Embed(
            shape.vocabulary,
            shape.width,
            dtype=shape.dtype,
            param_dtype=shape.dtype,
            name="embed",
        )(tokens)
        x = placed(x, *shape.cut)
        layer = nn.remat(Layer, prevent_cse=False) if shape.remat else Layer
        if shape.scan:
            layers = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=shape.layers,
            )
            x, _ = layers(shape, name="layers")(x, None)
        else:
            for i in range(shape.layers):
                x, _ = layer(shape, name=f"layer_{i}")(x, None)
        head = Dense(shape.vocabulary, shape.dtype, name="head")
        x = placed(_norm(shape, "norm")(x), *shape.cut)
        return head(x) if targets is None else losses(head, x, targets).mean()


class Layer(nn.Module):
    """`(B, T, D)` to the same, in the form that `nn.scan` takes."""

    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        shape = self.shape
        size = shape.width // shape.heads
        y = _norm(shape, "attention_norm")(x)
        q = _dense(shape, shape.width, "query")(y).reshape(*y.shape[:-1], shape.heads, size)
        k, v = (
            _dense(shape, shape.key_heads * size, name)(y).reshape(
                *y.shape[:-1], shape.key_heads, size
            )
            for name in ("key", "value")
        )
        y = attention(rotate(q), rotate(k), v)
        x = x + _dense(shape, shape.width, "out")(y.reshape(x.shape))
        y = _norm(shape, "feed_forward_norm")(x)
        gate, up = (_dense(shape, shape.hidden, name)(y) for name in ("gate", "up"))
        x = x + _dense(shape, shape.width, "down")(nn.silu(gate) * up)
        return placed(x, *shape.cut), None


def _dense(shape: Shape, features: int, name: str) -> Dense:
    return Dense(features, shape.dtype, name=name)


def _norm(shape: Shape, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(dtype=shape.dtype, param_dtype=shape.dtype, name=name)


def loss(model: Llama, params: Any, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats per token, of `(B, T + 1)` windows."""
    return jnp.asarray(model.apply({"params": params}, windows[:, :-1], windows[:, 1:]))
