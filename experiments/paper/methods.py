"""Methods are the rows of the tables; each has an optax transformation."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax.contrib import galore

import flora_jax
from experiments.optimizers import MATRICES, OF_TRAINED, cosine
from flora_jax.chain import storage
from flora_jax.chain.flora import ADVISED, KAPPA, Preset

Base = Literal["adafactor", "adam", "sgd", "sign_sgd"]
Kind = Literal["uncompressed", "flora", "lora", "galore"]
RATES: dict[str, tuple[float, ...]] = {
    "adafactor": (0.003, 0.01, 0.03, 0.1),
    "adam": (0.001, 0.003, 0.01, 0.03),
    "sgd": (0.03, 0.1, 0.3, 1.0),
    "sign_sgd": (0.0001, 0.0003, 0.001, 0.003),
}
"""Grid of the learning rate for each base optimizer, in its own unit; it is the same for all methods."""
FULL_RATES: dict[str, tuple[float, ...]] = {
    "adafactor": (4e-4, 1e-3, 3e-3, 1e-2),
    "adam": (1e-4, 3e-4, 1e-3, 3e-3),
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "sign_sgd": (1e-5, 3e-5, 1e-4, 3e-4),
}
"""Grid of the learning rate at the paper's sizes, around the rates of the authors' scripts."""


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
      kind: Uncompressed accumulation, Flora, LoRA (its factors and all that it does not patch are
        trained), or GaLore (over Adam).
      rank: Rank of Flora, LoRA or GaLore.
      preset: Flora's settings: the paper's or the advised ones.
      momentum: Decay `β` of the momentum; None for none.
      kappa: Number of optimizer steps that share a projection of Flora; by default the preset's.
      base: The optimizer that is given gradients of full shape.
      uncompressed_embeddings: Whether Flora leaves embeddings and heads uncompressed, as LoRA does, and as the
        authors' code does with matrices of an aspect ratio above 16.
      state_dtype: Dtype of Flora's sketches between micro-steps.
    """

    kind: Kind
    rank: int = 0
    preset: Preset = "paper"
    momentum: float | None = None
    kappa: int | None = None
    base: Base = "adafactor"
    uncompressed_embeddings: bool = False
    state_dtype: storage.StateDtype = "float32"

    def __str__(self) -> str:
        names = {"uncompressed": "uncompressed", "flora": "Flora", "lora": "LoRA"}
        words = [names.get(self.kind, "GaLore")]
        if self.preset == "advised":
            words.append("(advised)")
        if self.rank:
            words.append(f"r={self.rank}")
        if self.momentum is not None:
            words.append(f"β={self.momentum:g}")
        if self.kappa is not None:
            words.append(f"κ={self.kappa}")
        if self.base != "adafactor":
            words.append(f"over {self.base}")
        if self.uncompressed_embeddings:
            words.append("uncompressed embeddings")
        if self.state_dtype != "float32":
            words.append(self.state_dtype)
        return " ".join(words)


def build(
    method: Method,
    peak: Any,
    *,
    accumulation: int,
    optimizer_steps: int,
    trained: bool = False,
    factored: int = 128,
) -> tuple[optax.GradientTransformation, flora_jax.Projection | None]:
    """Gives the transformation of a method, and Flora's projection or None.

    Args:
      method: The method.
      peak: Peak of the learning rate, a number or an array (it may be traced); a cosine goes to zero.
      accumulation: Number of micro-steps in an optimizer step.
      optimizer_steps: Number of optimizer steps in the run.
      trained: Whether the run begins from trained weights.
      factored: The smallest side that Adafactor factors, and that Flora compresses.
    """
    rate = cosine(peak, optimizer_steps)
    if method.kind == "galore":
        inner = galore(rate, rank=method.rank)
        return optax.MultiSteps(inner, accumulation).gradient_transformation(), None
    base = base_optimizer(method.base, rate, factored)
    if method.kind != "flora":
        if method.momentum is not None:
            base = optax.chain(optax.ema(method.momentum, debias=False), base)
        return optax.MultiSteps(base, accumulation).gradient_transformation(), None
    advised = method.preset == "advised"
    kappa = method.kappa or (ADVISED if advised else KAPPA if method.momentum is not None else 1)
    projection = flora_jax.Projection(
        method.rank,
        distribution="srtt" if advised else "gaussian",
        side="input" if advised else "larger",
        resample_every=accumulation * kappa,
        min_dim=factored,
        embedding="whole" if method.uncompressed_embeddings else "output",
        head="whole" if method.uncompressed_embeddings else "input",
    )
    tx = flora_jax.flora(
        cosine(OF_TRAINED if trained else MATRICES, optimizer_steps) if advised else None,
        projection=projection,
        accumulation_steps=accumulation,
        momentum=method.momentum,
        optimizer=base,
        preset=method.preset,
        state_dtype=method.state_dtype,
    )
    return tx, projection


def base_optimizer(base: Base, rate: optax.Schedule, factored: int) -> optax.GradientTransformation:
    """Gives the base optimizer."""
    if base == "adafactor":
        return optax.adafactor(rate, min_dim_size_to_factor=factored)
    return {"adam": optax.adam, "sgd": optax.sgd, "sign_sgd": optax.sign_sgd}[base](rate)


def unit(method: Method) -> str:
    """Gives the name of the method's grid of learning rates."""
    return "adam" if method.kind == "galore" else method.base


def from_cycle(opt_state: Any, first: int) -> Any:
    """Gives a fresh state of Flora whose cycles count from `first`, so that it samples other projections."""
    names = ("cycle",)

    def put(path, leaf):
        named = path and getattr(path[-1], "name", None) in names and leaf.ndim == 0
        return leaf + first if named else leaf

    return jax.tree_util.tree_map_with_path(put, opt_state)
