"""T5: encoder and decoder, relative position bias, ReLU, the head tied to the embedding.

In the shape descriptions `B` is the batch, `S` and `T` the lengths of source and target, `D` the
width. The layers of each stack lie along a first axis and run by `scan`, each one rematerialised.

Source: Raffel et al., arXiv 1910.10683.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import Dense, losses


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are T5-small's."""

    vocabulary: int = 32128
    width: int = 512
    hidden: int = 2048
    layers: int = 6
    heads: int = 8
    head_size: int = 64
    buckets: int = 32
    reach: int = 128
    dtype: Any = jnp.float32


SHAPES = {
    "T5-small": Shape(),
    "T5-3B": Shape(
        width=1024, hidden=16384, layers=24, heads=32, head_size=128, dtype=jnp.bfloat16
    ),
}


class T5(nn.Module):
    """Source `(B, S)` and target `(B, T)` to logits `(B, T, vocabulary)`; with labels, to the loss."""

    shape: Shape

    @nn.compact
    def __call__(self, source, target, labels=None) -> jax.Array:
        shape = self.shape
        types = {"dtype": shape.dtype, "param_dtype": shape.dtype}
        embed = nn.Embed(shape.vocabulary, shape.width, name="shared_embed", **types)
        memory = Stack(shape, decoder=False, name="encoder")(embed(source), None)
        x = Stack(shape, decoder=True, name="decoder")(embed(target), memory)
        head = Head(embed, shape.width**-0.5)
        return head(x) if labels is None else losses(head, x, labels).mean()


class Head(nn.Module):
    """The embedding as a head, on scaled states."""

    table: nn.Embed
    scale: float

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.table.attend(x * self.scale)


class Stack(nn.Module):
    """Layers, with one table of position bias for all of them, and a norm at the end."""

    shape: Shape
    decoder: bool

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array | None) -> jax.Array:
        shape = self.shape
        table = self.param(
            "relative_bias", nn.initializers.normal(0.05), (shape.buckets, shape.heads), shape.dtype
        )
        distance = jnp.arange(x.shape[1]) - jnp.arange(x.shape[1])[:, None]
        places = bucket(distance, not self.decoder, shape.buckets, shape.reach)
        bias = jnp.moveaxis(table[places], -1, 0).astype(jnp.float32)
        if self.decoder:
            bias = jnp.where(distance > 0, -1e9, bias)
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=shape.layers,
        )
        x, _ = layers(shape, name="layers")(x, bias, memory)
        return _norm(shape, "norm")(x)


class Layer(nn.Module):
    """Self-attention, cross-attention where there is a memory, and the feed-forward part."""

    shape: Shape

    @nn.compact
    def __call__(self, x, bias, memory) -> tuple[jax.Array, None]:
        shape = self.shape

        def dense(features, name):
            return Dense(features, shape.dtype, name=name)

        def attend(name, x, memory, bias):
            inner = shape.heads * shape.head_size
            q, k, v = (
                dense(inner, f"{name}_{part}")(y).reshape(*y.shape[:-1], shape.heads, -1)
                for part, y in (("query", x), ("key", memory), ("value", memory))
            )
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32)
            weights = jax.nn.softmax(scores if bias is None else scores + bias).astype(x.dtype)
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
            return dense(shape.width, f"{name}_out")(y.reshape(*y.shape[:2], inner))

        y = _norm(shape, "self_norm")(x)
        x = x + attend("self", y, y, bias)
        if memory is not None:
            x = x + attend("cross", _norm(shape, "cross_norm")(x), memory, None)
        y = nn.relu(dense(shape.hidden, "up")(_norm(shape, "feed_forward_norm")(x)))
        return x + dense(shape.width, "down")(y), None


def bucket(distance: jax.Array, both: bool, buckets: int, reach: int) -> jax.Array:
    """Buckets of key minus query positions: exact near by, logarithmic up to `reach`, then one.

    `both` directions (encoder) have half of the buckets each; else only the past has any.
    """
    result = jnp.zeros_like(distance)
    if both:
        buckets //= 2
        result = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = -jnp.minimum(distance, 0)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(distance, 1) / exact) / jnp.log(reach / exact) * (buckets - exact)
    far = jnp.minimum(exact + far.astype(jnp.int32), buckets - 1)
    return result + jnp.where(distance < exact, distance, far)


def _norm(shape: Shape, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(name=name, dtype=shape.dtype, param_dtype=shape.dtype)


def loss(model: T5, params: Any, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats per token, of `(B, T + 1)` windows that are source and target at once."""
    source, labels = windows[:, :-1], windows[:, 1:]
    return jnp.asarray(model.apply({"params": params}, source, source, labels))
