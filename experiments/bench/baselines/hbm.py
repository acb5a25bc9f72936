"""The compiler says how many bytes of HBM the step of each JAX method takes on a TPU v5e chip.

Parameters are bfloat16, the layers are under `scan` with remat, and one program does the micro-step and the optimizer
step, as in `experiments.bench.memory`, which says how GaLore is compiled.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flora_jax
from experiments.bench import memory
from experiments.bench.baselines import in_jax
from experiments.bench.baselines.methods import INSIDE, INT8, Size
from experiments.bench.baselines.methods import METHODS as ALL
from flora_jax.update.ordinary_step import ordinary_step

RANK = 128


@dataclass(frozen=True)
class Config:
    """The model and the micro-step that are compiled."""

    model: str = "LLaMA-350M"
    """The name of a model that `experiments.bench.memory` knows; where it is empty nothing is compiled."""
    length: int = 1024
    """Number of tokens in a window."""


def _flora(key: str, loss: Callable):
    """Gives what makes the state of the transformation that runs on the CPU, at rank 128, and a function that lowers its step."""
    size = Size(rank=RANK, accumulation=memory.STEPS)
    tx, projection = in_jax.build(key, size, 1e-3, in_jax.LONG)
    if key in INSIDE:
        inside = in_jax.inside(key, loss, tx)
        return inside.init, inside.lower
    assert projection is not None
    if key == "flora-paper":
        return memory.of_params(tx), ordinary_step(loss, tx).lower
    step: Any = flora_jax.make_train_step(loss, tx, projection)
    return memory.of_params(tx), step.lower


METHODS = {
    "multisteps": memory.METHODS["MultiSteps + Adafactor"],
    **{key: partial(_flora, key) for key, method in ALL.items() if method.ours},
    "galore": memory.METHODS["MultiSteps + GaLore, rank 128, at least"],
    "muon": memory.METHODS["MultiSteps + Muon"],
}


def absent() -> str | None:
    """Gives a sentence that says why nothing can be compiled, or None."""
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed (extra `bench`)"


def gib(config: Config, key: str) -> float | None:
    """Gives the GiB of HBM at the worst moment, or None where a v5p chip, which has 95 GiB, does not hold the step."""
    given = memory.Config(model=config.model, length=config.length)
    for chip in ("v5e", "v5p"):
        if program := memory.measure(given, METHODS[key], chip, key in INT8):
            return program.gib
    return None


def setting(config: Config) -> dict[str, Any]:
    return {**dataclasses.asdict(config), "rank": RANK, "accumulation": memory.STEPS}
