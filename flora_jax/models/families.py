"""Families: what all models have, a module from a shape, the shapes of its params, a loss, the shapes of a batch.

In the shape descriptions `B` is the batch, `T` the sequence.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.models import decoder, gpt2, t5, vit

MODULES: dict[type, Callable[[Any], nn.Module]] = {
    decoder.Shape: decoder.Decoder,
    gpt2.Shape: gpt2.Gpt2,
    t5.Shape: t5.T5,
    vit.Shape: vit.Vit,
}
_LOSSES: dict[type, Callable[..., jax.Array]] = {
    decoder.Decoder: decoder.loss,
    gpt2.Gpt2: gpt2.loss,
    t5.T5: t5.loss,
    vit.Vit: vit.loss,
}


def module(shape: Any) -> Any:
    """Returns the Flax module of a shape, which has it as `shape`."""
    return MODULES[type(shape)](shape)


def outline(model: Any) -> dict[str, Any]:
    """Returns the params of a module as a nested dict of `jax.ShapeDtypeStruct`; no weight is made."""
    model = module(dataclasses.replace(model.shape, sharded=()))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    given: tuple[Any, ...] = (tokens,)
    if isinstance(model, vit.Vit):
        given = batch(model, 1, 1)[:1]
    elif isinstance(model, t5.T5):
        given = (tokens, tokens)
    return jax.eval_shape(lambda *given: model.init(jax.random.key(0), *given), *given)["params"]


def loss(model: Any) -> Callable[..., jax.Array]:
    """Returns the function `(params, *batch) -> scalar`, the mean cross-entropy in nats per token, or per image.

    Its batch is as `batch` describes it.
    """
    return partial(_LOSSES[type(model)], model)


def batch(model: Any, size: int, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the shapes of what the loss takes: windows `(B, T + 1)`; of a ViT images and classes `(B,)`, whatever `T`.

    Args:
      model: The module.
      size: `B`.
      length: `T`.
    """
    if not isinstance(model, vit.Vit):
        return (jax.ShapeDtypeStruct((size, length + 1), jnp.int32),)
    shape = model.shape
    kind = (size, shape.image, shape.image, shape.channels)
    return jax.ShapeDtypeStruct(kind, shape.dtype), jax.ShapeDtypeStruct((size,), jnp.int32)
