"""GPT-2: layer norm first, learned positions, GELU by tanh, the head tied to the embedding.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width. The layers are stacked
along a first axis and run by `scan`, each one rematerialised in the backward pass.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.models.attention import Sight, attention
from flora_jax.models.cache import Cache, empty_cache, remember
from flora_jax.models.cache import places as _places
from flora_jax.models.layers import Dense, Tied, placed, stacked
from flora_jax.models.loss import losses, mean_loss


@dataclass(frozen=True)
class Shape:
    """Holds the sizes of the model; the defaults are GPT-2's.

    Attributes:
      vocabulary: The number of tokens.
      positions: The longest sequence.
      width: `D`.
      layers: The number of layers.
      heads: The heads of attention.
      dtype: The dtype of parameters and activations.
      epsilon: The number that norms add to the variance.
      remat: Whether the backward pass computes each layer again.
      inner: The width of the feed-forward part; by default four times `D`.
      sharded: The mesh axes over which `B` of the activations is sharded between the layers; a mesh must
        be in context.

    Raises:
      ValueError: The width is no multiple of the heads.
    """

    vocabulary: int = 50257
    positions: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    dtype: Any = jnp.float32
    epsilon: float = 1e-5
    remat: bool = True
    inner: int | None = None
    sharded: tuple[Any, ...] = ()
    model_type: ClassVar[str] = "gpt2"

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of the heads, found {self.width} and {self.heads}"
            )

    @property
    def hidden(self) -> int:
        """Returns the width of the feed-forward part."""
        return self.inner or 4 * self.width


SHAPES = {
    "GPT-2": Shape(),
    "GPT-2-XL": Shape(width=1600, layers=48, heads=25, dtype=jnp.bfloat16),
}


class Gpt2(nn.Module):
    """Maps tokens `(B, T)` to logits `(B, T, vocabulary)`; with targets `(B, T)`, to the mean loss.

    `weights` `(B, T)` are those of the losses; `mask` `(B, T)` says which tokens count, the others
    being padding on either side. `positions` and `segments` `(B, T)` are those of a sequence that holds several
    documents, and `places` `(B, K)` are those of targets and weights `(B, K)`, where only some tokens have a loss. With a cache the result is a pair of logits and the next cache.
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
        types = {"dtype": shape.dtype, "param_dtype": shape.dtype}
        wte = nn.Embed(shape.vocabulary, shape.width, name="wte", **types)
        wpe = nn.Embed(shape.positions, shape.width, name="wpe", **types)
        index = None if cache is None else cache.filled
        positions, sight, cache = _places(tokens, mask, cache, positions, segments)
        x = wte(tokens) + wpe(jnp.arange(tokens.shape[1]) if positions is None else positions)
        layers = stacked(Layer, shape.layers, shape.remat, broadcast=2)
        past = None if cache is None else cache.layers
        x, past = layers(shape, name="layers")(placed(x, *shape.sharded), past, index, sight)
        x = placed(nn.LayerNorm(shape.epsilon, name="norm", **types)(x), *shape.sharded)
        if targets is not None:
            if places is not None:
                x = jnp.take_along_axis(x, places[..., None], axis=1)
            return mean_loss(losses(Tied(wte), x, targets), weights)
        logits = wte.attend(x)
        return logits if cache is None else (logits, cache._replace(layers=past))


class Layer(nn.Module):
    """Maps `(B, T, D)` to the same, in the form that `nn.scan` takes."""

    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, past: Any, index: Any, sight: Sight) -> tuple[jax.Array, Any]:
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
        x = x + dense(shape.width, "out")(attention(q, k, v, sight).reshape(x.shape))
        y = nn.gelu(dense(shape.hidden, "up")(norm("feed_forward_norm")(x)))
        return placed(x + dense(shape.width, "down")(y), *shape.sharded), past


def make_cache(shape: Shape, batch: int, slots: int) -> Cache:
    """Returns an empty cache with room for so many tokens."""
    size = shape.width // shape.heads
    return empty_cache(shape.layers, batch, slots, shape.heads, size, shape.dtype)


def loss(model: Gpt2, params: Any, windows: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy, nats per token, of `(B, T + 1)` windows."""
    return jnp.asarray(model.apply({"params": params}, windows[:, :-1], windows[:, 1:]))
