"""T5: encoder and decoder, relative position bias, the head tied to the embedding.

Version 1.0 has ReLU; version 1.1 has gated GELU and a head of its own (`gated`, `tied=False`).

In the shape descriptions `B` is the batch, `S` and `T` the lengths of source and target, `D` the
width. The layers of each stack lie along a first axis and run by `scan`, each one rematerialised.

Source: Raffel et al., arXiv 1910.10683.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.models.cache import Cache, remember
from flora_jax.models.layers import Dense, Tied, placed, stacked
from flora_jax.models.loss import losses, mean_loss

FAR = -1e9
"""What is added to the scores of tokens that may not be attended to."""


@dataclass(frozen=True)
class Shape:
    """Holds the sizes of the model; the defaults are T5-small's.

    Attributes:
      vocabulary: The number of tokens.
      width: `D`.
      hidden: The width of the feed-forward part.
      layers: The layers of the encoder, and of the decoder unless that has its own number.
      heads: The heads of attention.
      head_size: The width of a head.
      buckets: The rows of the table of position bias.
      reach: The distance from which on positions share the last bucket.
      dtype: The dtype of parameters and activations.
      epsilon: The number that norms add to the mean square.
      gated: Whether the feed-forward part has a gate with GELU in place of ReLU.
      tied: Whether the embedding is the head.
      remat: Whether the backward pass computes each layer again.
      decoder_layers: The layers of the decoder, where there are others than the encoder's.
      sharded: The mesh axes over which `B` of the activations is sharded between the layers; a mesh must
        be in context.
    """

    vocabulary: int = 32128
    width: int = 512
    hidden: int = 2048
    layers: int = 6
    heads: int = 8
    head_size: int = 64
    buckets: int = 32
    reach: int = 128
    dtype: Any = jnp.float32
    epsilon: float = 1e-6
    gated: bool = False
    tied: bool = True
    remat: bool = True
    decoder_layers: int | None = None
    sharded: tuple[Any, ...] = ()
    model_type: ClassVar[str] = "t5"

    def count(self, decoder: bool) -> int:
        """Returns the number of layers of the encoder or of the decoder."""
        return (self.decoder_layers or self.layers) if decoder else self.layers


SHAPES = {
    "T5-small": Shape(),
    "T5-3B": Shape(
        width=1024, hidden=16384, layers=24, heads=32, head_size=128, dtype=jnp.bfloat16
    ),
}


class T5(nn.Module):
    """Maps source `(B, S)` and target `(B, T)` to logits `(B, T, vocabulary)`; with labels, to the loss.

    `weights` `(B, T)` are those of the losses; `mask` `(B, S)` says which source tokens count.
    """

    shape: Shape

    def setup(self):
        shape = self.shape
        types = {"dtype": shape.dtype, "param_dtype": shape.dtype}
        make = nn.initializers.normal(1.0)
        self.shared_embed = nn.Embed(shape.vocabulary, shape.width, embedding_init=make, **types)
        self.encoder = Stack(shape, decoder=False)
        self.decoder = Stack(shape, decoder=True)
        if shape.tied:
            self.tied_head = Tied(self.shared_embed, shape.width**-0.5)
        else:
            self.head = Dense(shape.vocabulary, shape.dtype)

    def __call__(
        self,
        source: jax.Array,
        target: jax.Array,
        labels: jax.Array | None = None,
        weights: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        memory = self.encode(source, mask)
        x, _ = self.decoder(self.shared_embed(target), memory, mask)
        head = self.tied_head if self.shape.tied else self.head
        return head(x) if labels is None else mean_loss(losses(head, x, labels), weights)

    def encode(self, source: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns the memory `(B, S, D)` of a source `(B, S)`."""
        return self.encoder(self.shared_embed(source), None, mask)[0]

    def start(
        self, source: jax.Array, mask: jax.Array | None, target: jax.Array, slots: int
    ) -> tuple[jax.Array, Cache]:
        """Does what `step` does for the first target tokens; the cache has room for so many of them.

        It holds the keys and values of the source as well.
        """
        shape, batch = self.shape, source.shape[0]
        kind = (shape.count(decoder=True), batch, slots, shape.heads, shape.head_size)
        past = ((jnp.zeros(kind, shape.dtype), jnp.zeros(kind, shape.dtype)), None)
        valid = jnp.ones(source.shape, bool) if mask is None else mask.astype(bool)
        return self._next(target, self.encode(source, mask), Cache(past, valid, jnp.int32(0)))

    def step(self, target: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns logits `(B, T, vocabulary)` of the next target tokens `(B, T)`, and the next cache."""
        return self._next(target, None, cache)

    def _next(self, target, memory, cache: Cache) -> tuple[jax.Array, Cache]:
        x = self.shared_embed(target)
        x, layers = self.decoder(x, memory, cache.valid, cache.layers, cache.filled)
        head = self.tied_head if self.shape.tied else self.head
        return head(x), cache._replace(layers=layers, filled=cache.filled + target.shape[1])


class Stack(nn.Module):
    """Runs layers, with one table of position bias for all of them, and a norm at the end."""

    shape: Shape
    decoder: bool

    def setup(self):
        shape = self.shape
        make = nn.initializers.normal(0.05)
        self.relative_bias = self.param(
            "relative_bias", make, (shape.buckets, shape.heads), shape.dtype
        )
        layers = stacked(Layer, shape.count(self.decoder), shape.remat, broadcast=4)
        self.layers = layers(shape, self.decoder)
        self.norm = _norm(shape)

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None,
        mask: jax.Array | None = None,
        past: Any = None,
        index: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Maps `(B, T, D)` to the same, and returns the new past; `mask` `(B, S)` is that of the source."""
        shape = self.shape
        slots = x.shape[1] if past is None else past[0][0].shape[2]
        first = 0 if index is None else index
        distance = jnp.arange(slots) - (first + jnp.arange(x.shape[1]))[:, None]
        buckets = bucket(distance, not self.decoder, shape.buckets, shape.reach)
        bias = jnp.moveaxis(self.relative_bias[buckets], -1, 0).astype(jnp.float32)
        if self.decoder:
            bias = jnp.where(distance > 0, FAR, bias)
        source = None
        if mask is not None:
            source = jnp.where(mask.astype(bool), 0.0, FAR)[:, None, None]
            if not self.decoder:
                bias = bias + source
        x = placed(x, *shape.sharded)
        x, past = self.layers(x, past, index, bias, memory, source)
        return placed(self.norm(x), *shape.sharded), past


def bucket(distance: jax.Array, both: bool, buckets: int, reach: int) -> jax.Array:
    """Returns buckets of key minus query positions: exact near by, logarithmic up to `reach`, then one.

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


class Layer(nn.Module):
    """Computes self-attention, cross-attention in a decoder, and the feed-forward part."""

    shape: Shape
    decoder: bool

    def setup(self):
        shape = self.shape
        inner = shape.heads * shape.head_size

        scaled = nn.initializers.variance_scaling(1 / shape.head_size, "fan_in", "normal")

        def dense(features, **options):
            return Dense(features, shape.dtype, **options)

        self.self_norm, self.feed_forward_norm = _norm(shape), _norm(shape)
        self.self_query = dense(
            inner, init=scaled
        )  # scores are not divided by the root of the size
        self.self_key, self.self_value = dense(inner), dense(inner)
        self.self_out = dense(shape.width)
        if self.decoder:
            self.cross_norm = _norm(shape)
            self.cross_query = dense(inner, init=scaled)
            self.cross_key, self.cross_value = dense(inner), dense(inner)
            self.cross_out = dense(shape.width)
        self.up, self.down = dense(shape.hidden), dense(shape.width)
        if shape.gated:
            self.gate = dense(shape.hidden)

    def __call__(self, x, past, index, bias, memory, source) -> tuple[jax.Array, Any]:
        cross: Any
        own, cross = (None, None) if past is None else past
        y = self.self_norm(x)
        k, v, own = remember(
            own, index, self._heads(self.self_key(y)), self._heads(self.self_value(y))
        )
        x = x + self.self_out(self._attend(self.self_query(y), k, v, bias))
        if self.decoder:
            if memory is not None:
                cross = self._heads(self.cross_key(memory)), self._heads(self.cross_value(memory))
            y = self.cross_query(self.cross_norm(x))
            x = x + self.cross_out(self._attend(y, cross[0], cross[1], source))
        y = self.feed_forward_norm(x)
        y = nn.gelu(self.gate(y)) * self.up(y) if self.shape.gated else nn.relu(self.up(y))
        x = placed(x + self.down(y), *self.shape.sharded)
        return x, None if past is None else (own, cross)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.shape.heads, -1)

    def _attend(self, q, k, v, bias) -> jax.Array:
        scores = jnp.einsum("bqhd,bkhd->bhqk", self._heads(q), k).astype(jnp.float32)
        weights = jax.nn.softmax(scores if bias is None else scores + bias).astype(q.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], -1)


def _norm(shape: Shape) -> nn.RMSNorm:
    return nn.RMSNorm(shape.epsilon, dtype=shape.dtype, param_dtype=shape.dtype)


def loss(model: T5, params: Any, windows: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy, nats per token, of `(B, T + 1)` windows that are source and target at once."""
    source, labels = windows[:, :-1], windows[:, 1:]
    return jnp.asarray(model.apply({"params": params}, source, source, labels))
