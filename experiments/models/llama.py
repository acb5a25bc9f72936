"""LLaMA: RMS norm first, rotary positions, SwiGLU, grouped-query attention, a head of its own or tied.

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

from experiments.models.layers import (
    Cache,
    Dense,
    Tied,
    attention,
    empty_cache,
    losses,
    mean_loss,
    placed,
    places,
    remember,
)
from flora_jax.models.forward import rotate


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
    theta: float = 10000.0
    """Base of the rotary frequencies."""
    epsilon: float = 1e-6
    tied: bool = False
    """Whether the embedding is the head."""
    head_size: int | None = None
    """By default the width over the heads."""

    @property
    def size(self) -> int:
        return self.head_size or self.width // self.heads


SHAPES = {
    "LLaMA-test": Shape(1024, 128, 384, 2, 4, 2, jnp.float32),
    "LLaMA-7B": Shape(),
    "LLaMA-13B": Shape(width=5120, hidden=13824, layers=40, heads=40, key_heads=40),
    "LLaMA-70B": Shape(width=8192, hidden=28672, layers=80, heads=64, key_heads=8),
    "LLaMA-60M": Shape(width=512, hidden=1376, layers=8, heads=8, key_heads=8),
    "LLaMA-350M": Shape(width=1024, hidden=2736, layers=24, heads=16, key_heads=16),
}


class Llama(nn.Module):
    """Tokens `(B, T)` to logits `(B, T, vocabulary)`; with targets `(B, T)`, to the mean loss.

    `weights` `(B, T)` are those of the losses; `mask` `(B, T)` says which tokens count, the others
    being padding on either side. With a cache (which needs `scan`) the result is a pair of logits and
    the next cache. The loss goes over a few hundred tokens at a time, so that not all logits exist
    at once.
    """

    shape: Shape

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        targets: jax.Array | None = None,
        weights: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        shape = self.shape
        embed = nn.Embed(
            shape.vocabulary,
            shape.width,
            dtype=shape.dtype,
            param_dtype=shape.dtype,
            name="embed",
        )
        index = None if cache is None else cache.filled
        positions, mask, cache = places(tokens, mask, cache)
        x = placed(embed(tokens), *shape.cut)
        layer = nn.remat(Layer, prevent_cse=False) if shape.remat else Layer
        past = None if cache is None else cache.layers
        if shape.scan:
            layers = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, *(nn.broadcast,) * 3),  # pyright: ignore[reportArgumentType]
                length=shape.layers,
            )
            x, past = layers(shape, name="layers")(x, past, index, positions, mask)
        else:
            for i in range(shape.layers):
                x, _ = layer(shape, name=f"layer_{i}")(x, None, None, positions, mask)
        head = Tied(embed) if shape.tied else Dense(shape.vocabulary, shape.dtype, name="head")
        x = placed(_norm(shape, "norm")(x), *shape.cut)
        if targets is not None:
            return mean_loss(losses(head, x, targets), weights)
        logits = head(x)
        return logits if cache is None else (logits, cache._replace(layers=past))


class Layer(nn.Module):
    """`(B, T, D)` to the same, in the form that `nn.scan` takes."""

    shape: Shape

    @nn.compact
    def __call__(
        self, x: jax.Array, past: Any, index: Any, positions: Any, mask: Any
    ) -> tuple[jax.Array, Any]:
        shape = self.shape
        y = _norm(shape, "attention_norm")(x)
        q, k, v = (
            _dense(shape, heads * shape.size, name)(y).reshape(*y.shape[:-1], heads, shape.size)
            for name, heads in (
                ("query", shape.heads),
                ("key", shape.key_heads),
                ("value", shape.key_heads),
            )
        )
        q, k = (rotate(part, positions, shape.theta) for part in (q, k))
        k, v, past = remember(past, index, k, v)
        y = attention(q, k, v, mask).reshape(*x.shape[:-1], -1)
        x = x + _dense(shape, shape.width, "out")(y)
        y = _norm(shape, "feed_forward_norm")(x)
        gate, up = (_dense(shape, shape.hidden, name)(y) for name in ("gate", "up"))
        x = x + _dense(shape, shape.width, "down")(nn.silu(gate) * up)
        return placed(x, *shape.cut), past


def make_cache(shape: Shape, batch: int, slots: int) -> Cache:
    """An empty cache with room for so many tokens."""
    return empty_cache(shape.layers, batch, slots, shape.key_heads, shape.size, shape.dtype)


def _dense(shape: Shape, features: int, name: str) -> Dense:
    return Dense(features, shape.dtype, name=name)


def _norm(shape: Shape, name: str) -> nn.RMSNorm:
    types = {"dtype": shape.dtype, "param_dtype": shape.dtype}
    return nn.RMSNorm(shape.epsilon, name=name, **types)


def loss(model: Llama, params: Any, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats per token, of `(B, T + 1)` windows."""
    return jnp.asarray(model.apply({"params": params}, windows[:, :-1], windows[:, 1:]))
