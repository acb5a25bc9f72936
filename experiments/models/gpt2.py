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

from experiments.models.layers import (
    Cache,
    Dense,
    Tied,
    attention,
    empty_cache,
    losses,
    mean_loss,
    places,
    remember,
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are GPT-2's."""

    vocabulary: int = 50257
    positions: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    dtype: Any = jnp.float32
    epsilon: float = 1e-5
    remat: bool = True


SHAPES = {
    "GPT-2-test": Shape(1024, 256, 128, 2, 4),
    "GPT-2": Shape(),
    "GPT-2-XL": Shape(width=1600, layers=48, heads=25, dtype=jnp.bfloat16),
}


class Gpt2(nn.Module):
    """Tokens `(B, T)` to logits `(B, T, vocabulary)`; with targets `(B, T)`, to the mean loss.

    `weights` `(B, T)` are those of the losses; `mask` `(B, T)` says which tokens count, the others
    being padding on either side. With a cache the result is a pair of logits and the next cache.
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
        types = {"dtype": shape.dtype, "param_dtype": shape.dtype}
        wte = nn.Embed(shape.vocabulary, shape.width, name="wte", **types)
        wpe = nn.Embed(shape.positions, shape.width, name="wpe", **types)
        index = None if cache is None else cache.filled
        positions, mask, cache = places(tokens, mask, cache)
        x = wte(tokens) + wpe(jnp.arange(tokens.shape[1]) if positions is None else positions)
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False) if shape.remat else Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=shape.layers,
        )
        past = None if cache is None else cache.layers
        x, past = layers(shape, name="layers")(x, past, index, mask)
        x = nn.LayerNorm(shape.epsilon, name="norm", **types)(x)
        if targets is not None:
            return mean_loss(losses(Tied(wte), x, targets), weights)
        logits = wte.attend(x)
        return logits if cache is None else (logits, cache._replace(layers=past))


class Layer(nn.Module):
    """`(B, T, D)` to the same, in the form that `nn.scan` takes."""

    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, past: Any, index: Any, mask: Any) -> tuple[jax.Array, Any]:
        shape = self.shape

        def dense(features, name):
            return Dense(features, shape.dtype, bias=True, name=name)

        def norm(name):
            return nn.LayerNorm(
                shape.epsilon, name=name, dtype=shape.dtype, param_dtype=shape.dtype
            )

        y = norm("attention_norm")(x)
        q, k, v = (
            part.reshape(*part.shape[:-1], shape.heads, -1)
            for part in jnp.split(dense(3 * shape.width, "qkv")(y), 3, axis=-1)
        )
        k, v, past = remember(past, index, k, v)
        x = x + dense(shape.width, "out")(attention(q, k, v, mask).reshape(x.shape))
        y = nn.gelu(dense(4 * shape.width, "up")(norm("feed_forward_norm")(x)))
        return x + dense(shape.width, "down")(y), past


def make_cache(shape: Shape, batch: int, slots: int) -> Cache:
    """An empty cache with room for so many tokens."""
    size = shape.width // shape.heads
    return empty_cache(shape.layers, batch, slots, shape.heads, size, shape.dtype)


def loss(model: Gpt2, params: Any, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats per token, of `(B, T + 1)` windows."""
    return jnp.asarray(model.apply({"params": params}, windows[:, :-1], windows[:, 1:]))
