"""ViT: patches, a class token, learned positions, layer norm first, exact GELU.

In the shape descriptions `B` is the batch, `T` the patches and the class token, `D` the width. The
layers are stacked along a first axis and run by `scan`, each one rematerialised.

Source: Dosovitskiy et al., arXiv 2010.11929.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flora_jax.models.layers import Dense, placed, stacked


@dataclass(frozen=True)
class Shape:
    """Holds the sizes of the model; the defaults are ViT-B/16's, of 224 x 224 pixels.

    Attributes:
      image: The height and width of an image, in pixels.
      patch: The height and width of a patch.
      channels: The numbers of a pixel.
      width: `D`.
      layers: The number of layers.
      heads: The heads of attention.
      hidden: The width of the feed-forward part.
      classes: The number of classes.
      dtype: The dtype of parameters and activations.
      epsilon: The number that norms add to the variance.
      remat: Whether the backward pass computes each layer again.
      bias: Whether queries, keys and values have a bias.
      sharded: The mesh axes over which `B` of the activations is sharded between the layers; a mesh must
        be in context.

    Raises:
      ValueError: The image is no multiple of the patch, or the width of the heads.
    """

    image: int = 224
    patch: int = 16
    channels: int = 3
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    classes: int = 1000
    dtype: Any = jnp.float32
    epsilon: float = 1e-12
    remat: bool = True
    bias: bool = True
    sharded: tuple[Any, ...] = ()
    model_type: ClassVar[str] = "vit"

    def __post_init__(self):
        if self.image % self.patch:
            raise ValueError(
                f"image must be a multiple of patch, found {self.image} and {self.patch}"
            )
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of the heads, found {self.width} and {self.heads}"
            )

    @property
    def length(self) -> int:
        """Returns `T`, the number of patches and the class token."""
        return (self.image // self.patch) ** 2 + 1


SHAPES = {
    "ViT-B": Shape(),
}


class Vit(nn.Module):
    """Maps images `(B, image, image, channels)` to logits `(B, classes)`."""

    shape: Shape

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        shape = self.shape
        x = patches(jnp.asarray(images, shape.dtype), shape.patch)
        x = Dense(shape.width, shape.dtype, bias=True, name="patches")(x)
        token = self.param("class_token", nn.initializers.zeros, (shape.width,), shape.dtype)
        token = jnp.broadcast_to(token, (x.shape[0], 1, shape.width))
        x = jnp.concatenate([token, x], axis=1)
        make, size = nn.initializers.normal(0.02), (x.shape[1], shape.width)
        x = x + self.param("position_embedding", make, size, shape.dtype)
        layers = stacked(Layer, shape.layers, shape.remat)
        x, _ = layers(shape, name="layers")(placed(x, *shape.sharded), None)
        x = _norm(shape, "norm")(x[:, 0])
        return Dense(shape.classes, shape.dtype, bias=True, name="head")(x)


class Layer(nn.Module):
    """Maps `(B, T, D)` to the same, in the form that `nn.scan` takes."""

    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        shape = self.shape
        dense = partial(Dense, dtype=shape.dtype, bias=True)
        y = _norm(shape, "attention_norm")(x)
        q, k, v = (
            Dense(shape.width, shape.dtype, shape.bias, name=name)(y).reshape(
                *y.shape[:-1], shape.heads, -1
            )
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + dense(shape.width, name="out")(y)
        y = dense(shape.hidden, name="up")(_norm(shape, "feed_forward_norm")(x))
        x = x + dense(shape.width, name="down")(nn.gelu(y, approximate=False))
        return placed(x, *shape.sharded), None


def patches(images: jax.Array, patch: int) -> jax.Array:
    """Turns `(B, height, width, channels)` into `(B, patches, patch * patch * channels)`, row by row."""
    b, height, width, channels = images.shape
    x = images.reshape(b, height // patch, patch, width // patch, patch, channels)
    return jnp.moveaxis(x, 2, 3).reshape(b, -1, patch * patch * channels)


def _norm(shape: Shape, name: str) -> nn.LayerNorm:
    types = {"dtype": shape.dtype, "param_dtype": shape.dtype}
    return nn.LayerNorm(shape.epsilon, name=name, **types)


def loss(model: Vit, params: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy, nats per image, of classes `(B,)`."""
    logits = jnp.asarray(model.apply({"params": params}, images), jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()
