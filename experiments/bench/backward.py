"""This command compares the time of a step that updates in the backward pass with that of an ordinary one.

    python -m experiments.bench.backward

The model is a LLaMA, every step is an optimizer step, all run in turn in one process, and times are medians. The first table is
of where the update is, under Adafactor in float32; the second of how bfloat16 weights are kept and rounded; the third of what is
done with the exact gradient. CPUs have no arithmetic in bfloat16, so only ratios within a table mean something.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax
import tyro
from rich.console import Console

import flora_jax
from experiments import report
from experiments.bench import interleaved, setting
from flora_jax.models import decoder
from flora_jax.rounding import Rounding
from flora_jax.update.ordinary_step import ordinary_step

WEIGHTS: dict[str, tuple[bool, Rounding]] = {
    "bfloat16": (False, "nearest"),
    "bfloat16, stochastic": (False, "stochastic"),
    "int8, stochastic": (True, "stochastic"),
}


@dataclass(frozen=True)
class Config(setting.Sizes):
    """Sizes of the model and of a step."""

    rounds: int = 9
    """Number of timed steps, after one that compiles."""


def adafactor() -> optax.GradientTransformation:
    return optax.adafactor(optax.constant_schedule(1e-3))


def compare(config: Config, title: str, build: Any, dtype: Any, variant: dict) -> None:
    """Prints a table of steps; `build` gives them by name, from the loss and the params."""
    model, params, windows = config.started(dtype, **variant)
    steps = build(partial(decoder.loss, model), params, windows)
    found = interleaved.seconds(steps, (windows,), config.rounds)
    (base,) = next(iter(found.values()))
    rows = [(name, f"{one:.3f}", f"{one / base:.3f}") for name, (one,) in found.items()]
    heads = ["step", "seconds", "ratio"]
    Console(width=100).print(report.table(title, heads, rows))


def where(loss: Any, params: Any, windows: Any) -> dict[str, tuple[Any, Any, Any]]:
    del windows
    tx = adafactor()
    return {
        "ordinary": (ordinary_step(loss, tx), params, tx.init(params)),
        "in the backward pass": (
            flora_jax.make_train_step(loss, tx, update="backward"),
            params,
            tx.init(params),
        ),
    }


def weights(loss: Any, params: Any, windows: Any) -> dict[str, tuple[Any, Any, Any]]:
    found = {}
    for name, (quantized, rounding) in WEIGHTS.items():
        step: Any = flora_jax.make_train_step(
            loss, adafactor(), update="backward", rounding=rounding
        )
        own = flora_jax.to_int8(params) if quantized else params
        found[name] = (step, own, step.init(own, windows))
    return found


def gradients(config: Config):
    def build(loss: Any, params: Any, windows: Any) -> dict[str, tuple[Any, Any, Any]]:
        rows = {
            "Adafactor": adafactor(),
            "orthogonalized, no state": flora_jax.sketched_muon(1e-3),
            "orthogonalized, three iterations": flora_jax.sketched_muon(1e-3, iterations=3),
            "orthogonalized, two blocks": flora_jax.sketched_muon(1e-3, block=config.width // 2),
            "orthogonalized, momentum d/4": flora_jax.sketched_muon(1e-3, rank=config.width // 4),
            "Muon (optax)": optax.contrib.muon(1e-3),
        }
        found = {}
        for name, tx in rows.items():
            step: Any = flora_jax.make_train_step(loss, tx, update="backward")
            found[name] = (step, params, step.init(params, windows))
        return found

    return build


def main(config: Config) -> None:
    size = f"{config.layers} layers, {config}"
    for name, variant in setting.VARIANTS.items():
        compare(config, f"{name}, float32, {size}", where, jnp.float32, variant)
    scan = setting.VARIANTS["scan and remat"]
    compare(config, f"weights, {size}", weights, jnp.bfloat16, scan)
    compare(config, f"gradients, float32, {size}", gradients(config), jnp.float32, scan)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
