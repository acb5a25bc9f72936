"""Before a table starts: bytes of each row, chips that they take, and the time."""

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
"""bfloat16 FLOPs a second of a TPU v5e chip, and the part of them that the estimate takes."""
CHIPS = (1, 2, 4, 8, 16)
TRIED = 3
"""Boundaries that the estimate for a CPU runs."""


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
        basis = f"from {TRIED} boundaries of the first row on this machine, without evaluation"
    console.print(
        f"{runs} runs of {sizes.boundaries} boundaries: some {_time(seconds)} each, "
        f"{_time(runs * seconds)} in all, {basis}."
    )


def needed(parts: loop.Program) -> int | None:
    """The fewest of `CHIPS` TPU v5e chips that hold it, weights cut over them, as compiled.

    0 where all are too few; None without the package `libtpu`.
    """
    if importlib.util.find_spec("libtpu") is None:
        return None
    from jax.sharding import NamedSharding, PartitionSpec

    from experiments.bench import topology
    from experiments.bench.memory import largest_axis

    for chips in CHIPS:
        mesh = topology.mesh("v5e", (chips,))

        def cut(tree, mesh=mesh, chips=chips):
            return jax.tree.map(lambda x: NamedSharding(mesh, largest_axis(x.shape, chips)), tree)

        whole = partial(jax.tree.map, lambda _, mesh=mesh: NamedSharding(mesh, PartitionSpec()))
        params, state, batch, rate = parts.shapes
        places = (cut(params), cut(state), whole(batch), whole(rate))
        shapes = [topology.placed(*pair) for pair in zip(parts.shapes, places, strict=True)]
        compiled = topology.compile_(parts.cycle.lower(*shapes))
        if compiled is not None and compiled.fits:
            return chips
    return 0


def flops(given: problem.Problem, sizes: Sizes) -> float:
    """Of the products with weights in one run: 6 a parameter and token, 8 with checkpointing."""
    params = jax.eval_shape(partial(given.init, given.model, 0))
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    source, length = sizes.lengths
    tokens = source + length
    if not tokens:
        tokens = (given.model.shape.image // given.model.shape.patch) ** 2 + 1
    per = 8 if sizes.remat else 6
    return per * float(count) * tokens * sizes.batch * sizes.accumulation * sizes.boundaries


def measured(given: problem.Problem, row: Method, sizes: Sizes) -> float:
    """Seconds of a run on this machine."""
    trial = loop.prepare(given, row, sizes)
    params, state = trial.start(0)
    many = {name: np.stack([x] * sizes.accumulation) for name, x in given.train.items()}
    rate = np.float32(1e-3)
    params, state, losses = jax.block_until_ready(trial.cycle(params, state, many, rate))
    start = time.perf_counter()
    for _ in range(TRIED):
        params, state, losses = trial.cycle(params, state, many, rate)
    losses.block_until_ready()
    return (time.perf_counter() - start) / TRIED * sizes.boundaries


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
