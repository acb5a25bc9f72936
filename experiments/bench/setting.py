"""The benchmarks share a LLaMA of few layers on bytes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.models import decoder

VARIANTS = {
    "unrolled": {"scan": False, "remat": False},
    "scan": {"scan": True, "remat": False},
    "scan and remat": {"scan": True, "remat": True},
}
"""How layers follow each other, by name: fields of the model's shape."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model that is timed, and of a step."""

    width: int = 512
    """Width of the model that is timed."""
    layers: int = 4
    """Number of layers."""
    batch: int = 8
    """Number of windows in a step."""
    length: int = 128
    """Number of tokens in a window."""

    def __str__(self) -> str:
        return f"width {self.width}, {self.batch} x {self.length} tokens"

    def started(self, dtype: Any, **variant: Any) -> tuple[decoder.Decoder, Any, jax.Array]:
        """Gives a model with such layers, its params and windows of random bytes, int32 `(batch, length + 1)`."""
        model = small(self.width, self.layers, dtype=dtype, **variant)
        random = np.random.default_rng(0)
        windows = jnp.asarray(random.integers(0, 256, (self.batch, self.length + 1)), jnp.int32)
        return model, jax.jit(model.init)(jax.random.key(0), windows[:, :8])["params"], windows


def small(width: int, layers: int, **others: Any) -> decoder.Decoder:
    """Gives a LLaMA with a vocabulary of bytes; `others` are further fields of its shape."""
    shape = decoder.Shape(
        vocabulary=256,
        width=width,
        hidden=4 * width,
        layers=layers,
        heads=8,
        key_heads=8,
        **others,
    )
    return decoder.Decoder(shape)
