"""The methods that are compared, and the sizes: what a process of JAX and one of torch must agree on.

A micro-step is one forward and one backward pass; on every `accumulation`-th one, the optimizer step, the
parameters change. Every method begins from the same weights, a LLaMA in float32 on bytes, sees the same
batches, and has the same schedule: ten optimizer steps of warm-up, then a cosine to zero. Exact gradients, which are
updated inside the backward pass, are not accumulated: each of their micro-steps is an optimizer step.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from experiments import text

BASE = "multisteps"
"""The method that ratios are taken against."""
OURS = "flora"


class Method(NamedTuple):
    """One row of the tables.

    Attributes:
      name: The name in tables.
      framework: The framework whose process runs it.
      rate: The middle of its grid of peak learning rates.
      packages: Packages that must be installed for it, as pip calls them.
      ours: Whether it is a method of this library, and no baseline.
    """

    name: str
    framework: Literal["jax", "torch"]
    rate: float
    packages: tuple[str, ...] = ()
    ours: bool = False


TORCH = ("torch", "transformers")
METHODS = {
    BASE: Method("MultiSteps + Adafactor (optax)", "jax", 0.03),
    OURS: Method("Flora, fused, advised", "jax", 0.06, ours=True),
    "flora-int8": Method("Flora, advised, int8, backward pass", "jax", 0.06, ours=True),
    "flora-int4": Method(
        "Flora, advised, int4, 8 times the rank, backward pass", "jax", 0.06, ours=True
    ),
    "flora-larger": Method("Flora, fused, advised, larger side", "jax", 0.06, ours=True),
    "flora-paper": Method("Flora, the paper's, ordinary gradients", "jax", 0.03, ours=True),
    "exact": Method("Exact gradients, Adafactor", "jax", 0.03, ours=True),
    "exact-muon": Method("Exact gradients, orthogonalized, no state", "jax", 0.02, ours=True),
    "exact-int8": Method("Exact gradients, Adafactor, int8 weights", "jax", 0.03, ours=True),
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
    "torch-q-galore": Method(
        "torch, int8 weights: q-galore-torch",
        "torch",
        0.01,
        (*TORCH, "q-galore-torch", "bitsandbytes"),
    ),
    "torch-q-apollo": Method(
        "torch, int8 weights: apollo-torch", "torch", 0.01, (*TORCH, "apollo-torch", "bitsandbytes")
    ),
}
EXACT = ("exact", "exact-muon", "exact-int8")
"""Those that accumulate nothing."""
INSIDE = ("flora-int8", "flora-int4", *EXACT)
"""Those that update each weight inside the backward pass."""
INT8 = ("exact-int8",)
"""Those of JAX that keep the weights of the layers in int8."""
PROJECTION_GAP = 200
"""Number of optimizer steps between two subspaces of GaLore and APOLLO, which is their own default."""


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of a micro-step."""

    width: int = 256
    """Width of the model: a multiple of 16 and at least 128, since nothing narrower is compressed."""
    layers: int = 2
    """Number of layers."""
    batch: int = 4
    """Number of windows in a micro-step."""
    length: int = 128
    """Number of bytes in a window."""
    rank: int = 64
    """Rank of the projections."""
    accumulation: int = 4
    """Number of micro-steps in an optimizer step."""

    def __post_init__(self):
        least = {"width": 128, "accumulation": 2}
        for name, value in vars(self).items():
            if value < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, found {value}")
        if self.width % 16:
            raise ValueError(f"width must be a multiple of 16, found {self.width}")
        if self.rank > self.width:
            raise ValueError(f"rank must be at most the width {self.width}, found {self.rank}")

    def windows(self, corpus: text.Corpus, step: int, seed: int = 0) -> np.ndarray:
        """Gives the windows of micro-step `step`, int32 `(batch, length + 1)`."""
        return text.batch(corpus.train, seed, step, self.batch, self.length)

    def held_out(self, corpus: text.Corpus) -> list[np.ndarray]:
        """Gives the validation windows, which are the same for every run."""
        return text.held_out(corpus, self.length)
