"""This command counts the bytes of optimizer state for LLaMA models, from shapes alone.

    python -m experiments.bench.state

The figures are exact: the states are those that `init` makes, by `jax.eval_shape`. Accumulation is over 16
micro-steps, and parameters are bfloat16.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

import flora_jax
from experiments import report

LLAMA = {  # layers, width, feed-forward width (Touvron et al., arXiv 2302.13971)
    "LLaMA-7B": (32, 4096, 11008),
    "LLaMA-13B": (40, 5120, 13824),
}
VOCABULARY = 32000


@dataclass(frozen=True)
class Config:
    """The ranks to compare."""

    ranks: tuple[int, ...] = (128, 256)
    """Ranks of the projections."""


def shapes(layers: int, width: int, hidden: int):
    """Gives the parameter tree as shapes, with layers stacked as `scan` has them."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    square = {name: array(layers, width, width) for name in ("query", "key", "value", "out")}
    wide = {name: array(layers, width, hidden) for name in ("gate", "up")}
    rest = {"down": array(layers, hidden, width), "norms": array(layers, 2, width)}
    ends = {"norm": array(width), "head": array(width, VOCABULARY)}
    return {"embed": array(VOCABULARY, width), "layers": {**square, **wide, **rest}, **ends}


def main(config: Config) -> None:
    rows = []
    for name, sizes in LLAMA.items():
        params = shapes(*sizes)
        for rank in config.ranks:
            rule = flora_jax.Projection(rank, resample_every=16)
            plan = flora_jax.plan(params, rule, accumulation_steps=16)
            uncompressed = plan.state_bytes["MultiSteps + Adafactor"]
            for method, size in plan.state_bytes.items():
                if method != "Adafactor alone" and (method in ("Flora", "GaLore") or rank == 128):
                    title = f"{method}, rank {rank}" if method in ("Flora", "GaLore") else method
                    rows.append((name, title, f"{size / 2**30:.2f}", f"{size / uncompressed:.3f}"))
    heads = ["model", "state", "GiB", "ratio to MultiSteps"]
    Console(width=100).print(report.table("Optimizer state", heads, rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
