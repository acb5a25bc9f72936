"""One family of decoders: RMS norm first, rotary positions, grouped-query attention.

LLaMA, SmolLM2 and Mistral are this model as it is; Qwen 2 has biases on queries, keys and values; Qwen 3 has queries and
keys normed; Phi-3 has products that share an input in one; Gemma has norms after each part as well, windows in
some of its layers, and scores and logits that are capped; Mixtral and Qwen 3 MoE have experts. Without a gate and with GELU it
is the little decoder of the experiments.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width. The layers are stacked
along a first axis and run by `scan`, each one rematerialised in the backward pass, unless the
shape says otherwise.

Source: Touvron et al., arXiv 2302.13971 and 2307.09288; Grattafiori et al., arXiv 2407.21783; Jiang et al., arXiv 2310.06825
and 2401.04088; Yang et al., arXiv 2407.10671 and 2505.09388; Gemma Team, arXiv 2408.00118 and 2503.19786; Abdin et al.,
arXiv 2404.14219.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.models.attention import Sight, attention
from flora_jax.models.cache import Cache, empty_cache, remember
from flora_jax.models.cache import places as _places
from flora_jax.models.experts import Experts
from flora_jax.models.layers import Capped, CentredNorm, Dense, Tied, placed, stacked
from flora_jax.models.loss import losses, mean_loss
from flora_jax.models.rotary import PLAIN, Rotary, rotate

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
      rotary: The rotary positions.
      local_rotary: Those of the local layers, where they are others.
      epsilon: The number that norms add to the mean square.
      tied: Whether the embedding is the head.
      head_size: The width of a head; by default the width over the heads.
      bias: Whether queries, keys and values have a bias.
      out_bias: Whether the product after attention has one.
      feed_forward_bias: Whether the products of the feed-forward part have one.
      normed_heads: Whether queries and keys of each head are normed.
      gated: Whether the activation is of a gate, which multiplies the hidden states.
      activation: A name in `ACTIVATIONS`.
      window: How many tokens back attention reaches, the query's own among them, in the local layers; None for all.
      local: Whether each layer is local; by default all are, if there is a window.
      scale: What multiplies the scores; by default one over the root of a head's width.
      score_cap: Scores become `score_cap * tanh(scores / score_cap)`, if it is given.
      logit_cap: The same of the logits.
      post_norms: Whether attention and the feed-forward part each have a norm after them as well.
      centred: Whether norms keep their scales as differences from 1.
      scaled: Whether the embedding is multiplied by the root of the width.
      fused: Whether queries, keys and values are one product, and the gate and what it multiplies another.
      experts: The number of experts; None for a feed-forward part for all.
      chosen: The experts of a token.
      normed_experts: Whether the probabilities of a token's experts sum to 1.
      model_type: The `model_type` of Hugging Face's configuration.

    Raises:
      ValueError: The heads are no multiple of the key heads, a head cannot be rotated, or `local` is not one bool
        for each layer.
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
    rotary: Rotary = PLAIN
    local_rotary: Rotary | None = None
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
    local: tuple[bool, ...] = ()
    scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    post_norms: bool = False
    centred: bool = False
    scaled: bool = False
    fused: bool = False
    experts: int | None = None
    chosen: int = 2
    normed_experts: bool = True
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
        if self.local and len(self.local) != self.layers:
            raise ValueError(
                f"local must have a bool for each of {self.layers} layers, found {len(self.local)}"
            )

    @property
    def size(self) -> int:
        """Returns the width of a head."""
        return self.head_size or self.width // self.heads

    @property
    def mixed(self) -> bool:
        """Returns whether some layers are local and others are not."""
        return self.window is not None and len(set(self.local)) > 1

    def local_at(self, layer: int) -> bool:
        """Returns whether a layer is local."""
        return self.window is not None and (self.local[layer] if self.local else True)


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
    being padding on either side. Where a sequence holds several documents, `segments` `(B, T)` has a number for each and
    `positions` `(B, T)` begin anew; tokens attend to their own document. Where only some tokens have a loss, `places`
    `(B, K)` says which, targets and weights are `(B, K)`, and no other logits are computed. With a cache (which needs `scan`) the
    result is a pair of logits and the next cache. The loss goes over a few hundred tokens at a time, so that not all
    logits exist at once.
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
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        places: jax.Array | None = None,
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
        positions, sight, cache = _places(tokens, mask, cache, positions, segments)
        x = embed(tokens)
        if shape.scaled:
            x = x * jnp.asarray(shape.width**0.5, x.dtype)
        x = placed(x, *shape.sharded[:1])
        past = None if cache is None else cache.layers
        if shape.scan:
            layers = stacked(Layer, shape.layers, shape.remat, broadcast=3)
            local = jnp.asarray(shape.local) if shape.mixed else None
            x, past = layers(shape, name="layers")(x, (past, local), index, positions, sight)
        else:
            layer = nn.remat(Layer) if shape.remat else Layer
            for i in range(shape.layers):
                own = (None, jnp.asarray(shape.local_at(i)) if shape.mixed else None)
                x, _ = layer(shape, name=f"layer_{i}")(x, own, None, positions, sight)
        head = Tied(embed) if shape.tied else Dense(shape.vocabulary, shape.dtype, name="head")
        if shape.logit_cap is not None:
            head = Capped(head, shape.logit_cap)
        x = placed(_norm(shape, "norm")(x), *shape.sharded[:1])
        if targets is not None:
            if places is not None:
                x = jnp.take_along_axis(x, places[..., None], axis=1)
            return mean_loss(losses(head, x, targets), weights)
        logits = head(x)
        return logits if cache is None else (logits, cache._replace(layers=past))


class Layer(nn.Module):
    """Maps `(B, T, D)` to the same, in the form that `nn.scan` takes.

    `own` is a pair: the layer's keys and values so far, and whether it is local where layers differ in that.
    """

    shape: Shape

    @nn.compact
    def __call__(
        self, x: jax.Array, own: Any, index: Any, positions: Any, sight: Sight
    ) -> tuple[jax.Array, Any]:
        shape = self.shape
        past, local = own
        q, k, v = _queries(shape, _norm(shape, "attention_norm")(x))
        if shape.normed_heads:
            q, k = _norm(shape, "query_norm")(q), _norm(shape, "key_norm")(k)
        length = q.shape[1] if past is None else past[0].shape[1]
        frequencies = shape.rotary.frequencies(shape.size, length)
        window = shape.window if shape.local_at(0) else None
        if local is not None:
            window = jnp.where(local, shape.window or 0, jnp.iinfo(jnp.int32).max)
        if shape.local_rotary is not None:
            others = shape.local_rotary.frequencies(shape.size, length)
            here = shape.local_at(0) if local is None else local
            frequencies = jnp.where(here, others, frequencies)
        q, k = (rotate(part, frequencies, positions, shape.rotary.magnitude) for part in (q, k))
        k, v, past = remember(past, index, k, v)
        y = attention(q, k, v, sight, window, shape.scale, shape.score_cap)
        y = _dense(shape, shape.width, "out", shape.out_bias)(y.reshape(*x.shape[:-1], -1))
        x = x + (_norm(shape, "attention_post_norm")(y) if shape.post_norms else y)
        y = _feed_forward(shape, _norm(shape, "feed_forward_norm")(x))
        x = x + (_norm(shape, "feed_forward_post_norm")(y) if shape.post_norms else y)
        return placed(x, *shape.sharded[:1]), past


def make_cache(shape: Shape, batch: int, slots: int) -> Cache:
    """Returns an empty cache with room for so many tokens."""
    return empty_cache(shape.layers, batch, slots, shape.key_heads, shape.size, shape.dtype)


def _queries(shape: Shape, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries, keys and values, `(B, T, heads, head_dim)`."""
    counts = (shape.heads, shape.key_heads, shape.key_heads)
    if shape.fused:
        y = _dense(shape, sum(counts) * shape.size, "qkv", shape.bias)(x)
        q, k, v = jnp.split(
            y, [shape.heads * shape.size, (shape.heads + shape.key_heads) * shape.size], axis=-1
        )
    else:
        q, k, v = (
            _dense(shape, heads * shape.size, name, shape.bias)(x)
            for name, heads in zip(("query", "key", "value"), counts, strict=True)
        )
    return _heads(shape, q), _heads(shape, k), _heads(shape, v)


def _feed_forward(shape: Shape, x: jax.Array) -> jax.Array:
    act, bias = ACTIVATIONS[shape.activation], shape.feed_forward_bias
    if shape.experts is not None:
        return Experts(
            shape.experts,
            shape.chosen,
            shape.hidden,
            shape.dtype,
            act,
            shape.normed_experts,
            name="experts",
        )(x)
    if shape.fused:
        gate, up = jnp.split(_dense(shape, 2 * shape.hidden, "gate_up", bias)(x), 2, axis=-1)
        y = act(gate) * up
    elif shape.gated:
        y = act(_dense(shape, shape.hidden, "gate", bias)(x))
        y = y * _dense(shape, shape.hidden, "up", bias)(x)
    else:
        y = act(_dense(shape, shape.hidden, "up", bias)(x))
    return _dense(shape, shape.width, "down", bias)(y)


def _dense(shape: Shape, features: int, name: str, bias: bool) -> Dense:
    return Dense(features, shape.dtype, bias, name=name)


def _heads(shape: Shape, x: jax.Array) -> jax.Array:
    """Splits `(B, T, heads * head_dim)` into heads, sharded where the shape names mesh axes for them."""
    x = x.reshape(*x.shape[:-1], -1, shape.size)
    return placed(x, *shape.sharded) if len(shape.sharded) > 1 else x


def _norm(shape: Shape, name: str) -> Any:
    if shape.centred:
        return CentredNorm(shape.epsilon, shape.dtype, name=name)
    return nn.RMSNorm(shape.epsilon, dtype=shape.dtype, param_dtype=shape.dtype, name=name)


def loss(model: Decoder, params: Any, windows: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy, nats per token, of `(B, T + 1)` windows."""
    return jnp.asarray(model.apply({"params": params}, windows[:, :-1], windows[:, 1:]))
