"""This command adapts a model by LoRA, its variants, Flora, or in full, and prints one table.

    python -m experiments.adapt                          # all methods; some ten minutes on two cores
    python -m experiments.adapt --task summarisation
    python -m experiments.adapt --methods full lora flora --budget 0.5
    python -m experiments.adapt --methods lora-pro --rates 0.003 0.01

In the task *language* a decoder is first trained on Python's standard library (or taken from `--base`, where a run
left it), then adapted to the source of JAX, which it has not seen. That source has the licence Apache-2.0, comes with
the package, and is split by file like the first. In *summarisation* a T5 that has learnt to continue docstrings is
adapted to give their first lines, as in the paper's tables, and scored by ROUGE.

Every method but full training has the largest rank whose trained numbers and optimizer state, beyond the model itself,
fit the same budget of bytes. Each has the best of the few learning rates that are tried. Times are medians, with all
methods in turn in one process; temporaries are the compiled gradient's, the saved activations for the most part.
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments import report
from experiments.adapt.config import Config
from experiments.adapt.language import language
from experiments.adapt.method import Run, build, largest_rank, train
from experiments.adapt.summarisation import summarisation

TASKS = {"language": language, "summarisation": summarisation}


def seconds(config: Config, runs: dict[str, Run], params: Any, batch: Any) -> dict[str, float]:
    """Gives the median seconds of a step of each method, run in turn."""
    steps = {name: jax.jit(run.step) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(config.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(params, runs[name].state, jnp.int32(1), batch))
            if round_:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in times.items()}


def compare(config: Config, console: Console) -> tuple[float, list[dict[str, Any]]]:
    """Gives the loss before the adaptation, and the figures of each method."""
    task = TASKS[config.task](config, console)
    params, first = task.params, task.batch(0)
    before = task.validation(params)
    console.print(f"{task.about}; loss {before:.3f} before.", highlight=False, markup=False)
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    for method in config.methods:
        rank = largest_rank(config, task, method)
        tried = {}
        for rate in config.rates:
            runs[method] = build(config, task, method, rank, rate)
            after, _ = train(runs[method], params, task.batch, config.steps)
            tried[rate] = task.validation(after), after
        rate = min(tried, key=lambda rate: np.nan_to_num(tried[rate][0], nan=np.inf))
        loss, after = tried[rate]
        memory = jax.jit(runs[method].gradient).lower(params, first).compile().memory_analysis()
        assert memory is not None, "XLA gives no memory analysis on this backend"
        rows.append(
            {
                "method": method,
                "rank": rank,
                "trained": runs[method].trained,
                "extra": runs[method].extra,
                "temporaries": memory.temp_size_in_bytes,
                "rate": rate,
                "loss": loss,
                "figures": task.score(after),
            }
        )
        console.print(f"{method}: rank {rank}, loss {loss:.3f} at {rate}")
    times = seconds(config, runs, params, first)
    for row in rows:
        row["seconds"] = times[row["method"]]
    return before, rows


def show(config: Config, before: float, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints the table, and writes it where the settings name a file."""
    first = rows[0]
    cells = [
        (
            row["method"],
            str(row["rank"] or "-"),
            f"{row['trained']:,}",
            report.mebibytes(row["extra"]),
            f"{row['temporaries'] / first['temporaries']:.3f}",
            f"{row['seconds'] / first['seconds']:.3f}",
            f"{row['rate']:g}",
            f"{row['loss']:.3f}",
            *(f"{figure:.2f}" for figure in row["figures"].values()),
        )
        for row in rows
    ]
    heads = [
        "method",
        "rank",
        "trained",
        "and state",
        "temporaries",
        "step time",
        "rate",
        "validation loss",
        *first["figures"],
    ]
    size = f" x {config.length} bytes" if config.task == "language" else " docstrings"
    title = (
        f"Adapted in {config.steps} steps of {config.batch}{size}, from "
        f"{before:.3f}; {config.budget:g} MiB; temporaries and time over {first['method']}'s"
    )
    shown = report.table(title, heads, cells)
    console.print(shown)
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with config.out.open("w") as file:
            Console(file=file, width=120).print(shown)


def main(config: Config) -> None:
    console = Console(width=120)
    try:
        before, rows = compare(config, console)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    show(config, before, rows, console)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
