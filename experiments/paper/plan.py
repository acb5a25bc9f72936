"""The plan of a table says before it starts how many bytes and chips each row takes, and how much time."""

import importlib.util
import time
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments import report
from experiments.paper import loop, problem
from experiments.paper.methods import Method
from experiments.paper.problem import Sizes, Task

PEAK, PART = 197e12, 0.4
"""FLOPs per second of a TPU v5e chip in bfloat16, and the part of them that the estimate takes."""
CHIPS = (1, 2, 4, 8, 16)
"""Numbers of chips that are tried."""
TRIED = 3
"""Number of optimizer steps that the estimate for a CPU runs."""


def show(
    title: str,
    task: Task,
    sizes: Sizes,
    rows: list[Method],
    runs: int,
    changes: dict[str, Any],
    size: str,
    console: Console,
) -> None:
    """Prints the plan; nothing is trained, and no data are read."""
    given = problem.outline(task, sizes, changes)
    lines, most = [], 1
    for row in rows:
        parts = loop.program(given, row, sizes)
        nbytes = parts.nbytes()
        cells = [str(row), report.mebibytes(nbytes.params), report.mebibytes(nbytes.state)]
        if size == "full":
            chips = needed(parts)
            most = max(most, chips or 1)
            cells.append("needs .[bench]" if chips is None else str(chips) if chips else "over 16")
        lines.append(tuple(cells))
    heads = ["method", "parameters", "state"]
    heads += ["TPU v5e chips"] if size == "full" else []
    console.print(report.table(f"{title}: {sizes.model}", heads, lines))
    if size == "full":
        seconds = flops(given, sizes) / (PEAK * PART * most)
        basis = f"at {PART:.0%} of {most} TPU v5e chip(s), without evaluation"
    else:
        seconds = measured(given, rows[0], sizes)
        basis = f"from {TRIED} optimizer steps of the first row on this machine, without evaluation"
    console.print(
        f"{runs} runs of {sizes.optimizer_steps} optimizer steps: some {_time(seconds)} each, "
        f"{_time(runs * seconds)} in all, {basis}."
    )


def needed(parts: loop.Program) -> int | None:
    """Gives the fewest of `CHIPS` TPU v5e chips that hold the compiled program, with weights sharded over them.

    Returns:
      The number of chips: 0 where all are too few, None without the package `libtpu`.
    """
    if importlib.util.find_spec("libtpu") is None:
        return None
    from jax.sharding import NamedSharding, PartitionSpec

    from experiments.bench import topology
    from experiments.bench.memory import largest_axis

    for chips in CHIPS:
        mesh = topology.mesh("v5e", (chips,))

        def sharded(tree, mesh=mesh, chips=chips):
            return jax.tree.map(lambda x: NamedSharding(mesh, largest_axis(x.shape, chips)), tree)

        replicated = partial(
            jax.tree.map, lambda _, mesh=mesh: NamedSharding(mesh, PartitionSpec())
        )
        params, state, batch, rate = parts.shapes
        places = (sharded(params), sharded(state), replicated(batch), replicated(rate))
        shapes = [topology.placed(*pair) for pair in zip(parts.shapes, places, strict=True)]
        compiled = topology.compile_(parts.cycle.lower(*shapes))
        if compiled is not None and compiled.fits:
            return chips
    return 0


def flops(given: problem.Problem, sizes: Sizes) -> float:
    """Counts FLOPs of products with weights in one run: 6 for a parameter and token, 8 with checkpointing."""
    params = jax.eval_shape(partial(given.init, given.model, 0))
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    source, length = sizes.lengths
    tokens = source + length
    if not tokens:
        tokens = (given.model.shape.image // given.model.shape.patch) ** 2 + 1
    per = 8 if sizes.remat else 6
    return per * float(count) * tokens * sizes.batch * sizes.accumulation * sizes.optimizer_steps


def measured(given: problem.Problem, row: Method, sizes: Sizes) -> float:
    """Gives the seconds of a run on this machine, from a few optimizer steps."""
    trial = loop.prepare(given, row, sizes)
    params, state = trial.start(0)
    many = {name: np.stack([x] * sizes.accumulation) for name, x in given.train.items()}
    rate = np.float32(1e-3)
    params, state, losses = jax.block_until_ready(trial.cycle(params, state, many, rate))
    start = time.perf_counter()
    for _ in range(TRIED):
        params, state, losses = trial.cycle(params, state, many, rate)
    losses.block_until_ready()
    return (time.perf_counter() - start) / TRIED * sizes.optimizer_steps


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
