"""This command compares time of the micro-steps with and without an optimizer step, by method.

    python -m experiments.bench.optimizer_step

The model is a LLaMA in float32 with layers under `scan`, and an optimizer step is every second micro-step. All methods run in
turn in one process; times are medians, as ratios to Adafactor after `decompress` with `srht` projections, which was the
advised preset before sketches were orthogonalized. Bytes of state are beside them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import tyro
from rich.console import Console

import flora_jax
from experiments import optimizers, report
from experiments.bench import interleaved, setting
from flora_jax.chain.distributions import Distribution
from flora_jax.chain.plan import tree_bytes
from flora_jax.models import decoder
from flora_jax.update.ordinary_step import ordinary_step

EVERY = 2
"""Number of micro-steps in an optimizer step."""


@dataclass(frozen=True)
class Config(setting.Sizes):
    """Sizes of the model and of a micro-step."""

    part: int = 4
    """The rank is the width divided by this."""
    rounds: int = 9
    """Number of timed optimizer steps, after one that compiles."""


@dataclass(frozen=True)
class Row:
    """One method."""

    method: optimizers.Method
    distribution: Distribution = "srtt"
    nesterov: bool = False


ROWS = {
    "Adafactor after decompress, srht": Row("flora_adafactor", "srht"),
    "orthogonalized, srtt": Row("flora"),
    "orthogonalized, srtt, Nesterov": Row("flora", nesterov=True),
    "orthogonalized, orthonormal": Row("flora", "orthonormal"),
    "orthogonalized, gaussian": Row("flora", "gaussian"),
    "uncompressed Adafactor": Row("multisteps"),
    "uncompressed Muon": Row("muon"),
}


def main(config: Config) -> None:
    model, params, windows = config.started(jnp.float32, **setting.VARIANTS["scan"])
    loss = partial(decoder.loss, model)
    held: dict[str, tuple[Any, Any, Any]] = {}
    for name, row in ROWS.items():
        tx, projection = optimizers.build(
            row.method,
            1e-3,
            accumulation=EVERY,
            rank=config.width // config.part,
            distribution=row.distribution,
            embedding="whole",
            head="whole",
            nesterov=row.nesterov,
        )
        step: Any = ordinary_step(loss, tx)
        if projection is not None:
            step = flora_jax.make_train_step(loss, tx, projection)
        held[name] = (step, params, tx.init(params))
    times = interleaved.seconds(held, (windows,), config.rounds, EVERY)
    base, size = next(iter(held)), tree_bytes(params)
    rows = [
        (
            name,
            *(f"{times[name][kind]:.3f}" for kind in range(EVERY)),
            *(f"{times[name][kind] / times[base][kind]:.3f}" for kind in range(EVERY)),
            f"{tree_bytes(state) / size:.3f}",
        )
        for name, (_, _, state) in held.items()
    ]
    heads = [
        "method",
        "micro-step, s",
        "with an optimizer step, s",
        "ratio",
        "ratio",
        "state / params",
    ]
    title = f"{config}, rank d/{config.part}"
    Console(width=120).print(report.table(title, heads, rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
