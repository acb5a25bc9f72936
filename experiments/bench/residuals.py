"""This command shows what the backward pass holds: temporaries of the compiled gradient, by rank and side.

    python -m experiments.bench.residuals

The model is a LLaMA without remat, so that every activation that is needed is kept. It is compiled for one TPU v5e,
which needs `libtpu`; nothing runs. Temporaries are all that the program holds besides its arguments and
results: the saved activations, and scratch space. The results are counted separately.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

import flora_jax
from experiments import report
from experiments.bench import setting, topology
from flora_jax.models import decoder
from flora_jax.models.families import outline


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the batch."""

    width: int = 1024
    """Width of the model."""
    layers: int = 8
    """Number of layers."""
    batch: int = 4
    """Number of windows."""
    length: int = 512
    """Number of tokens in a window."""
    ranks: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Ranks of the projections to compare."""


def main(config: Config) -> None:
    model = setting.small(config.width, config.layers, remat=False)
    loss = partial(decoder.loss, model)
    place = NamedSharding(topology.mesh(), PartitionSpec())
    params = outline(model)
    params = topology.placed(params, place)
    windows = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.int32, sharding=place)

    def figures(gradient):
        compiled = jax.jit(gradient).lower(params, windows).compile().memory_analysis()
        assert compiled is not None, "the compiler gives no memory analysis"
        return compiled.temp_size_in_bytes / 2**20, compiled.output_size_in_bytes / 2**20

    base = figures(jax.value_and_grad(loss))
    rows = [("ordinary", "-", "-", f"{base[0]:.0f}", "1.000", f"{base[1]:.0f}")]
    for side in ("input", "output"):
        for rank in config.ranks:
            projection = flora_jax.Projection(rank, side=side, distribution="srht")
            fused = partial(flora_jax.value_and_grad(loss, projection), cycle=0)
            held, results = figures(fused)
            row = (f"{held:.0f}", f"{held / base[0]:.3f}", f"{results:.0f}")
            rows.append(("fused", side, str(rank), *row))
    heads = ["gradient", "side", "rank", "temporaries, MiB", "ratio", "results, MiB"]
    Console(width=100).print(report.table("What the backward pass holds", heads, rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
