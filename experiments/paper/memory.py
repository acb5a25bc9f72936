"""Table 7 is the memory of a step, with and without activation checkpointing, ordinary and light.

    python -m experiments.paper.memory                  # T5-small, compiled for this machine
    python -m experiments.paper.memory --size full      # T5-3B, for TPU v5e (needs .[bench], no TPU)

One program does the micro-step and, in an optimizer step, the update; nothing runs. The light step is
`flora_jax.make_train_step`, which has fused gradients and applies updates leaf by leaf. The ordinary step
has uncompressed gradients and a tree of updates.
"""

import csv
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import track

import flora_jax
from experiments.paper import lora, methods, problem
from experiments.paper.files import atomic_file, replace_text
from experiments.paper.methods import Method
from experiments.paper.problem import Sizes
from experiments.paper.sizes import Size
from flora_jax.chain.plan import tree_bytes
from flora_jax.fused.leaves import combine
from flora_jax.memory.compiled import compiled_bytes
from flora_jax.update.ordinary_step import ordinary_step

TITLE = "7. Memory of a step"
SIZES: dict[Size, Sizes] = {
    "cpu": Sizes("T5-small", (128, 32), 1, 16, 100),
    "full": Sizes("T5-3B", (512, 128), 1, 16, 100),
}


@dataclass(frozen=True)
class Options:
    """The options of the command."""

    size: Size = "cpu"
    """Size of the model: `cpu` is compiled for this machine, `full` for TPU v5e chips."""
    rank: int = 128
    """Rank of LoRA and of Flora's projections."""
    out: Path | None = None
    """The folder of the results; by default runs/paper/memory-SIZE."""


@dataclass(frozen=True)
class Row:
    """One program.

    Attributes:
      method: The name of the method.
      step: `ordinary` or `light`.
      checkpointing: Whether activations are checkpointed.
      state: Bytes of the state.
      peak: Bytes at the worst moment; None where a chip of 95 GiB does not hold them.
    """

    method: str
    step: str
    checkpointing: bool
    state: int
    peak: int | None


def programs(sizes: Sizes, rank: int) -> Iterator[tuple[str, str, bool, Any, Any]]:
    """Gives for each program method, step, checkpointing, the function under `jit`, and the shapes it takes."""
    kinds = (
        (Method("uncompressed"), "ordinary"),
        (Method("lora", rank), "ordinary"),
        (Method("flora", rank), "ordinary"),
        (Method("flora", rank), "light"),
    )
    for remat in (False, True):
        for method, step in kinds:
            given = problem.outline("summarisation", dataclasses.replace(sizes, remat=remat))
            yield str(method), step, remat, *_program(given, method, step == "light", sizes)


def _program(given: problem.Problem, method: Method, light: bool, sizes: Sizes) -> tuple[Any, Any]:
    tx, projection = methods.build(
        method, 1e-3, accumulation=sizes.accumulation, optimizer_steps=sizes.optimizer_steps
    )
    loss = partial(given.loss, given.model)
    params = jax.eval_shape(partial(given.init, given.model, 0))
    batch = jax.eval_shape(lambda: given.train)
    if method.kind == "lora":
        adapter = lora.adapter(method.rank)
        loss = lora.apply(adapter, loss)
        held, own = lora.apart(jax.eval_shape(lambda x: lora.start(adapter, x, 0), params))

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, batch):
            held, own = params
            inner = ordinary_step(lambda own, batch: loss(combine(own, held), batch), tx)
            own, state, value = inner(own, state, batch)
            return (held, own), state, value

        return step, ((held, own), jax.eval_shape(tx.init, own), batch)
    state = jax.eval_shape(tx.init, params)
    if light and projection is not None:
        return flora_jax.make_train_step(loss, tx, projection), (params, state, batch)
    return ordinary_step(loss, tx), (params, state, batch)


def measure(step: Any, shapes: Any, size: Size) -> int | None:
    """Gives the bytes of the compiled program at its worst moment; None where no chip holds them."""
    if size == "cpu":
        return compiled_bytes(step.lower(*shapes).compile())
    from experiments.bench import topology

    for chip in ("v5e", "v5p"):
        place = NamedSharding(topology.mesh(chip), PartitionSpec())
        compiled = topology.compile_(step.lower(*topology.placed(shapes, place)))
        if compiled is not None:
            return round(compiled.gib * 2**30)
    return None


def markdown(rows: list[Row]) -> str:
    """Gives the table."""
    lines = ["| method | step | checkpointing | state, MiB | peak, MiB | ratio |", "|" + "---|" * 6]
    first = rows[0].peak
    for row in rows:
        peak = "over 95 GiB" if row.peak is None else f"{row.peak / 2**20:,.0f}"
        ratio = f"{row.peak / first:.3f}" if row.peak and first else "-"
        yes = "yes" if row.checkpointing else "no"
        state = f"{row.state / 2**20:,.0f}"
        lines.append(f"| {row.method} | {row.step} | {yes} | {state} | {peak} | {ratio} |")
    return "\n".join(lines)


def draw(file: Path, rows: list[Row], suffix: str) -> None:
    """Saves a plot of the peaks."""
    figure, axes = plt.subplots(figsize=(8, 1 + 0.4 * len(rows)), layout="constrained")
    colours = {"uncompressed": "#555555", "LoRA": "#d94801", "Flora": "#08519c"}
    for i, row in enumerate(rows):
        axes.barh(i, (row.peak or 0) / 2**30, color=colours[row.method.split()[0]])
    names = [
        f"{row.method}, {row.step}{', checkpointing' if row.checkpointing else ''}" for row in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set(xlabel="peak of a step, GiB", title=TITLE)
    figure.savefig(file, dpi=150, format=suffix)
    plt.close(figure)


def main(options: Options) -> None:
    sizes = SIZES[options.size]
    out = options.out or Path(f"runs/paper/memory-{options.size}")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for method, step, remat, compiled, shapes in track(list(programs(sizes, options.rank))):
        state = tree_bytes(shapes[1])
        rows.append(Row(method, step, remat, state, measure(compiled, shapes, options.size)))
    place = "a TPU v5e (v5p where it does not fit)" if options.size == "full" else "this CPU"
    source, target = sizes.lengths
    command = "python -m experiments.paper.memory" + (
        " --size full" if options.size == "full" else ""
    )
    text = (
        f"## {TITLE}\n\n{sizes.model}, {sizes.batch} x ({source} + {target}) tokens, accumulation over "
        f"{sizes.accumulation}, compiled for {place}: `{command}`; the compiler's own figures, "
        f"ratio to the first row.\n\n{markdown(rows)}\n"
    )
    replace_text(out / "table.md", text)
    with (
        atomic_file(out / "table.csv") as partial_file,
        partial_file.open("w", newline="") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow([field.name for field in dataclasses.fields(Row)])
        writer.writerows(dataclasses.astuple(row) for row in rows)
    for suffix in ("png", "svg"):
        with atomic_file(out / f"plot.{suffix}") as file:
            draw(file, rows, suffix)
    Console().print(text, markup=False)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
