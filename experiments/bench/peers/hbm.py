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
from experiments.bench import memory
from experiments.bench.peers import in_jax
from experiments.bench.peers.methods import Size
from flora_jax.update.ordinary_step import ordinary_step

RANK = 128


@dataclass(frozen=True)
class Config:
    """What is compiled."""

    model: str = "LLaMA-350M"
    """A name that `experiments.bench.memory` knows; empty: nothing is compiled."""
    length: int = 1024


def _flora(key: str, loss: Callable):
    """As on the CPU, at rank 128."""
    size = Size(rank=RANK, accumulation=memory.STEPS)
    tx, projection = in_jax.build(key, size, 1e-3, in_jax.LONG)
    assert projection is not None
    if key == "flora-paper":
        return tx, ordinary_step(loss, tx).lower
    step: Any = flora_jax.make_train_step(loss, tx, projection)
    return tx, step.lower


METHODS = {
    "multisteps": memory.METHODS["MultiSteps + Adafactor"],
    **{key: partial(_flora, key) for key in ("flora", "flora-input", "flora-paper")},
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
    return {**dataclasses.asdict(config), "rank": RANK, "accumulation": memory.STEPS}
