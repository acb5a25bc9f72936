"""This command times the sampling of `A`, by distribution, beside the contraction that it serves.

    python -m experiments.bench.sampling

Each figure is the median of interleaved runs, as a ratio to the bare contraction `G Aᵀ` of the same run, for which
`A` has been sampled before.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments import report
from flora_jax.chain import distributions, products, projection
from flora_jax.chain.leaf_plan import leaf_plans


@dataclass(frozen=True)
class Config:
    """Sizes of the weight `(size, width)`, whose first axis is projected."""

    size: int = 1024
    """Length of the axis that is projected."""
    width: int = 1024
    """Length of the axis that is kept."""
    rank: int = 128
    """Rank of the projection."""
    runs: int = 15
    """Number of timed runs, after one that compiles."""


def main(config: Config) -> None:
    gradient = jax.random.normal(jax.random.key(1), (config.size, config.width))
    matrix = jax.random.normal(jax.random.key(2), (config.size, config.rank))
    functions = {("contraction alone", ""): jax.jit(lambda cycle, g, a: g.T @ a)}
    for distribution in distributions.DISTRIBUTIONS:
        rule = projection.Projection(config.rank, distribution=distribution, side="input")
        spec = leaf_plans(gradient, rule)[0].spec
        assert spec is not None
        functions[distribution, "sample"] = jax.jit(
            lambda cycle, g, a, spec=spec: products.sample(spec, cycle)
        )
        functions[distribution, "sample and project"] = jax.jit(
            lambda cycle, g, a, spec=spec: products.project(spec, cycle, g)
        )
    times: dict[tuple[str, str], list[float]] = {name: [] for name in functions}
    for run in range(-1, config.runs):
        for name, function in functions.items():
            start = time.perf_counter()
            function(jnp.int32(run + 1), gradient, matrix).block_until_ready()
            if run >= 0:
                times[name].append(time.perf_counter() - start)
    base = float(np.median(times["contraction alone", ""]))
    rows = [
        (
            name,
            what,
            f"{1e3 * float(np.median(spent)):.2f}",
            f"{float(np.median(spent)) / base:.2f}",
        )
        for (name, what), spent in times.items()
    ]
    title = (
        f"{config.size} x {config.width}, rank {config.rank}, float32, {jax.devices()[0].platform}"
    )
    heads = ["", "work", "ms (median)", "ratio to the contraction"]
    Console().print(report.table(title, heads, rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
