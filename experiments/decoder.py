"""The small decoder of the experiments is LLaMA's with GELU and no gate, its layers unrolled, in float32.

In the shape descriptions `B` is the batch, `T` the sequence.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.models.decoder import Decoder
from flora_jax.models.decoder import Shape as DecoderShape


@dataclass(frozen=True)
class Shape:
    """Holds the sizes of the model.

    Raises:
      ValueError: The width is no multiple of twice the heads.
    """

    vocabulary: int = 256
    width: int = 256
    layers: int = 3
    heads: int = 4

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of twice the heads, found {self.width} and {self.heads}"
            )


def model(shape: Shape, sharded: tuple[Any, ...] = ()) -> Decoder:
    """Returns the module; `sharded` are mesh axes of the batch and of the heads, which need a mesh in context."""
    return Decoder(
        DecoderShape(
            shape.vocabulary,
            shape.width,
            4 * shape.width,
            shape.layers,
            shape.heads,
            shape.heads,
            jnp.float32,
            remat=False,
            scan=False,
            sharded=sharded,
            gated=False,
            activation="gelu",
        )
    )


def loss(model: Decoder, params: Any, windows: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy, nats per token, of `(B, T + 1)` windows; all logits exist at once."""
    logits = jnp.asarray(model.apply({"params": params}, windows[:, :-1]))
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    targets = windows[:, 1:, None]
    return -jnp.take_along_axis(log_probabilities, targets, axis=-1).mean()


def sample(
    model: Any, params: Any, prompt: jax.Array, count: int, key: jax.Array, heat: float
) -> jax.Array:
    """Samples tokens one after the other, each from a window of the last `S`, as long as those of training.

    Args:
      model: The module.
      params: The model's params.
      prompt: Prompts `(B, S)`.
      count: The number of new tokens, `N`.
      key: The key of all samples.
      heat: The temperature, by which logits are divided.

    Returns:
      int32 `(B, S + N)`, the prompt first.
    """

    def step(window, key):
        logits = jnp.asarray(model.apply({"params": params}, window))[:, -1]
        token = jax.random.categorical(key, logits / heat)
        return jnp.concatenate([window[:, 1:], token[:, None]], axis=1), token

    _, tokens = jax.lax.scan(step, prompt, jax.random.split(key, count))
    return jnp.concatenate([prompt, tokens.T], axis=1)
