"""Bytes of HBM that the step of each JAX method takes on a TPU v5e chip, from its compiler.

bfloat16, layers under `scan` with remat, micro-step and boundary in one program, as in
`experiments.bench.memory`, which says how GaLore is compiled.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flora_jax
from experiments import optimizers
from experiments.bench import memory
from experiments.bench.peers import in_jax


@dataclass(frozen=True)
class Config:
    """What is compiled."""

    model: str = "LLaMA-350M"
    """A name that `experiments.bench.memory` knows; empty: nothing is compiled."""
    length: int = 1024


def _paper(model: Any, loss_of: Callable):
    projection = flora_jax.Projection(128, resample_every=memory.STEPS)
    tx = flora_jax.flora(1e-3, projection=projection, accumulation_steps=memory.STEPS)
    return tx, optimizers.ordinary_step(partial(loss_of, model), tx).lower


METHODS = {
    "multisteps": memory.METHODS["MultiSteps + Adafactor"],
    "flora": memory.flora(128),
    "flora-paper": _paper,
    "galore": memory.METHODS["MultiSteps + GaLore, rank 128, at least"],
    "muon": memory.multisteps(in_jax.muon(1e-3)),
}


def absent() -> str | None:
    """A sentence where nothing can be compiled, or None."""
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed (extra `bench`)"


def gib(config: Config, key: str) -> float | None:
    """At the worst moment; None where a v5p chip, of 95 GiB, does not hold it."""
    given = memory.Config(model=config.model, length=config.length)
    for chip in ("v5e", "v5p"):
        if program := memory.measure(given, METHODS[key], chip):
            return program.gib
    return None


def setting(config: Config) -> dict[str, Any]:
    return {**dataclasses.asdict(config), "rank": 128, "accumulation": memory.STEPS}
