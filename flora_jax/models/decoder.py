"""LLaMA and its family: decoders with RMS norm first, rotary positions, grouped-query attention.

Mistral is the same model; Qwen 2 has biases on queries, keys and values; Qwen 3 has queries and keys normed.
Without a gate and with GELU it is the little decoder of the experiments.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width. The layers are stacked
along a first axis and run by `scan`, each one rematerialised in the backward pass, unless the
shape says otherwise.

Source: Touvron et al., arXiv 2302.13971 and 2307.09288; Jiang et al., arXiv 2310.06825; Yang et al., arXiv
2407.10671 and 2505.09388.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.models.attention import attention, rotate
from flora_jax.models.cache import Cache, empty_cache, places, remember
from flora_jax.models.layers import Dense, Tied, placed, stacked
from flora_jax.models.loss import losses, mean_loss

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": nn.silu, "gelu": nn.gelu}
"""Activations of the feed-forward part; GELU is the one by tanh."""


@dataclass(frozen=True)
class Shape:
    """Says of which sizes and parts the model is; the defaults are LLaMA-7B's.

    Attributes:
      vocabulary: The number of tokens.
      width: `D`.
      hidden: The width of the feed-forward part.
      layers: The number of layers.
      heads: The heads of the queries.
      key_heads: The heads of keys and values, each for as many heads of queries.
      dtype: The dtype of parameters and activations.
      remat: Whether the backward pass computes each layer again.
      scan: Whether layers are stacked and run by `scan`; else each has params of its own.
      sharded: Mesh axes over which activations are sharded: those of `B`, between the layers, and where
        given those of the heads, inside them. A mesh must be in context.
      theta: The base of the rotary frequencies.
      epsilon: The number that norms add to the mean square.
      tied: Whether the embedding is the head.
      head_size: The width of a head; by default the width over the heads.
      bias: Whether queries, keys and values have a bias.
      out_bias: Whether the product after attention has one.
      feed_forward_bias: Whether the products of the feed-forward part have one.
      normed_heads: Whether queries and keys of each head are normed.
      gated: Whether the activation is of a gate, which multiplies the hidden states.
      activation: A name in `ACTIVATIONS`.
      window: The tokens that attention reaches back to, where it does not reach all. Longer sequences are
        refused, since attention here is over all tokens.
      model_type: The `model_type` of Hugging Face's configuration.

    Raises:
      ValueError: The heads are no multiple of the key heads, or a head cannot be rotated.
    """

    vocabulary: int = 32000
    width: int = 4096
    hidden: int = 11008
    layers: int = 32
    heads: int = 32
    key_heads: int = 32
    dtype: Any = jnp.bfloat16
    remat: bool = True
    scan: bool = True
    sharded: tuple[Any, ...] = ()
    theta: float = 10000.0
    epsilon: float = 1e-6
    tied: bool = False
    head_size: int | None = None
    bias: bool = False
    out_bias: bool = False
    feed_forward_bias: bool = False
    normed_heads: bool = False
    gated: bool = True
    activation: Literal["silu", "gelu"] = "silu"
    window: int | None = None
    model_type: str = "llama"

    def __post_init__(self):
        if self.heads % self.key_heads:
            raise ValueError(
                f"heads must be a multiple of the key heads, found {self.heads} and {self.key_heads}"
            )
        if self.size < 2 or self.size % 2:
            raise ValueError(
                f"the width of a head must be even, for rotary positions, found {self.size}"
            )

    @property
    def size(self) -> int:
        """Returns the width of a head."""
        return self.head_size or self.width // self.heads


SHAPES = {
    "LLaMA-60M": Shape(width=512, hidden=1376, layers=8, heads=8, key_heads=8),
    "LLaMA-350M": Shape(width=1024, hidden=2736, layers=24, heads=16, key_heads=16),
    "LLaMA-7B": Shape(),
    "LLaMA-13B": Shape(width=5120, hidden=13824, layers=40, heads=40, key_heads=40),
    "LLaMA-70B": Shape(width=8192, hidden=28672, layers=80, heads=64, key_heads=8),
}


class Decoder(nn.Module):
    """Maps tokens `(B, T)` to logits `(B, T, vocabulary)`; with targets `(B, T)`, to the mean loss.

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
        length = tokens.shape[1] if cache is None else cache.valid.shape[1]
        if shape.window is not None and length > shape.window:
            raise ValueError(
                f"a sequence must have at most {shape.window} tokens, the window of this model's "
                f"attention, found {length}"
            )
        embed = nn.Embed(
            shape.vocabulary,
            shape.width,
            dtype=shape.dtype,
            param_dtype=shape.dtype,
            name="embed",
        )
        index = None if cache is None else cache.filled
        positions, mask, cache = places(tokens, mask, cache)
        x = placed(embed(tokens), *shape.sharded[:1])
        past = None if cache is None else cache.layers
        if shape.scan:
            layers = stacked(Layer, shape.layers, shape.remat, broadcast=3)
            x, past = layers(shape, name="layers")(x, past, index, positions, mask)
        else:
            layer = nn.remat(Layer) if shape.remat else Layer
            for i in range(shape.layers):
                x, _ = layer(shape, name=f"layer_{i}")(x, None, None, positions, mask)
        head = Tied(embed) if shape.tied else Dense(shape.vocabulary, shape.dtype, name="head")
        x = placed(_norm(shape, "norm")(x), *shape.sharded[:1])
        if targets is not None:
            return mean_loss(losses(head, x, targets), weights)
        logits = head(x)
        return logits if cache is None else (logits, cache._replace(layers=past))


class Layer(nn.Module):
    """Maps `(B, T, D)` to the same, in the form that `nn.scan` takes."""

    shape: Shape

    @nn.compact
    def __call__(
        self, x: jax.Array, past: Any, index: Any, positions: Any, mask: Any
    ) -> tuple[jax.Array, Any]:
        shape = self.shape
        y = _norm(shape, "attention_norm")(x)
        q, k, v = (
            _heads(shape, Dense(heads * shape.size, shape.dtype, shape.bias, name=name)(y))
            for name, heads in (
                ("query", shape.heads),
                ("key", shape.key_heads),
                ("value", shape.key_heads),
            )
        )
        if shape.normed_heads:
            q, k = _norm(shape, "query_norm")(q), _norm(shape, "key_norm")(k)
        q, k = (rotate(part, positions, shape.theta) for part in (q, k))
        k, v, past = remember(past, index, k, v)
        y = attention(q, k, v, mask).reshape(*x.shape[:-1], -1)
        x = x + Dense(shape.width, shape.dtype, shape.out_bias, name="out")(y)
        y = _norm(shape, "feed_forward_norm")(x)

        def dense(features: int, name: str) -> Dense:
            return Dense(features, shape.dtype, shape.feed_forward_bias, name=name)

        act = ACTIVATIONS[shape.activation]
        if shape.gated:
            gate, up = (dense(shape.hidden, name)(y) for name in ("gate", "up"))
            y = act(gate) * up
        else:
            y = act(dense(shape.hidden, "up")(y))
        x = x + dense(shape.width, "down")(y)
        return placed(x, *shape.sharded[:1]), past


def make_cache(shape: Shape, batch: int, slots: int) -> Cache:
    """Returns an empty cache with room for so many tokens."""
    return empty_cache(shape.layers, batch, slots, shape.key_heads, shape.size, shape.dtype)


def _heads(shape: Shape, x: jax.Array) -> jax.Array:
    """Splits `(B, T, heads * head_dim)` into heads, sharded where the shape names mesh axes for them."""
    x = x.reshape(*x.shape[:-1], -1, shape.size)
    return placed(x, *shape.sharded) if len(shape.sharded) > 1 else x


def _norm(shape: Shape, name: str) -> nn.RMSNorm:
    types = {"dtype": shape.dtype, "param_dtype": shape.dtype}
    return nn.RMSNorm(shape.epsilon, name=name, **types)


def loss(model: Decoder, params: Any, windows: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy, nats per token, of `(B, T + 1)` windows."""
    return jnp.asarray(model.apply({"params": params}, windows[:, :-1], windows[:, 1:]))
