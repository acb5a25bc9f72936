"""Who is compared, and sizes: what a process of JAX and one of torch must agree on.

A micro-step is one forward and one backward pass; each `accumulation` of them, at a boundary, the
parameters change. Every method begins from the same weights, a LLaMA in float32 on bytes, sees the same
batches, and has the same schedule: ten boundaries of warm-up, then a cosine to zero.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from experiments import text

BASE = "multisteps"
"""What ratios are taken against."""
OURS = "flora"


class Method(NamedTuple):
    """One row.

    Attributes:
      name: in tables.
      framework: whose process runs it.
      rate: the middle of its grid of peak learning rates.
      packages: what must be installed for it, as pip calls it.
    """

    name: str
    framework: Literal["jax", "torch"]
    rate: float
    packages: tuple[str, ...] = ()


TORCH = ("torch", "transformers")
METHODS = {
    BASE: Method("MultiSteps + Adafactor (optax)", "jax", 0.03),
    OURS: Method("Flora, born compressed, advised", "jax", 0.06),
    "flora-input": Method("Flora, born compressed, advised, input side", "jax", 0.06),
    "flora-paper": Method("Flora, the paper's, ordinary gradients", "jax", 0.03),
    "galore": Method("MultiSteps + GaLore (optax.contrib)", "jax", 0.01),
    "muon": Method("MultiSteps + Muon (optax.contrib)", "jax", 0.01),
    "torch": Method("torch: accumulated gradients + Adafactor", "torch", 0.03, TORCH),
    "torch-flora": Method(
        "torch: flora-opt", "torch", 0.03, (*TORCH, "flora-opt", "accelerate", "bitsandbytes")
    ),
    "torch-galore": Method(
        "torch: galore-torch", "torch", 0.01, (*TORCH, "galore-torch", "bitsandbytes")
    ),
    "torch-apollo": Method(
        "torch: apollo-torch", "torch", 0.01, (*TORCH, "apollo-torch", "bitsandbytes")
    ),
}
PROJECTION_GAP = 200
"""Boundaries between two subspaces, of GaLore and APOLLO: their own default."""


@dataclass(frozen=True)
class Size:
    """Of the model and of a micro-step."""

    width: int = 256
    """A multiple of 16, at least 128, below which nothing is compressed."""
    layers: int = 2
    batch: int = 4
    length: int = 128
    rank: int = 64
    accumulation: int = 4
    """Micro-steps to a boundary."""

    def __post_init__(self):
        least = {"width": 128, "accumulation": 2}
        for name, value in vars(self).items():
            if value < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, found {value}")
        if self.width % 16:
            raise ValueError(f"width must be a multiple of 16, found {self.width}")
        if self.rank > self.width:
            raise ValueError(f"rank must be at most the width {self.width}, found {self.rank}")

    def windows(self, corpus: text.Corpus, step: int) -> np.ndarray:
        """Of micro-step `step`, int32 `(batch, length + 1)`."""
        return text.batch(corpus.train, 0, step, self.batch, self.length)

    def held_out(self, corpus: text.Corpus) -> list[np.ndarray]:
        """The same for every run."""
        return [text.batch(corpus.validation, 1, i, 64, self.length) for i in range(8)]
