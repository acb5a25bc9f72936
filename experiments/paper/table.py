"""A table: its command runs every row at every rate, and writes Markdown, CSV and a plot.

Each run appends a line to `results.jsonl`, and is not repeated: the same command goes on where it was
stopped. The first seed runs all of the grid of learning rates, which grows while the best rate lies at its edge;
each row takes the rate with the least validation loss, and the other seeds run there. Scores are of the test
side, which chooses nothing.
"""

import csv
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import tyro
from rich.console import Console
from rich.progress import Progress

from experiments import rates
from experiments.paper import files, loop, methods, plan, problem, rows
from experiments.paper.methods import Method
from experiments.paper.problem import METRIC, Sizes, Task
from experiments.paper.sizes import SIZES, Size
from experiments.paper.start import warm_start


@dataclass(frozen=True)
class Table:
    """The description of a table, which a file of this folder gives.

    Attributes:
      name: Name of the file and of the results.
      title: Title above the table.
      task: The task, unless the command names another.
      rows: Methods of the rows, by size.
      model: Model in place of the task's, by size.
      changes: Changes to fields of the model's shape.
      optimizer_steps: Number of optimizer steps at CPU size, in place of the task's.
    """

    name: str
    title: str
    task: Task
    rows: dict[Size, tuple[Method, ...]]
    model: dict[Size, str] = dataclasses.field(default_factory=dict)
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer_steps: int | None = None


@dataclass(frozen=True)
class Options:
    """The options of one command."""

    size: Size = "cpu"
    """Size of the runs: `cpu` takes minutes on two cores, `full` is the paper's."""
    task: Task | None = None
    """A task in place of the table's own."""
    data: problem.Data = "offline"
    """The data: `offline` ones come with packages, the `paper`'s are read through `datasets` and need a network."""
    model: str | None = None
    """A model in place of the table's own; `experiments.paper.problem.MODELS` lists them."""
    checkpoint: Path | None = None
    """A folder with Hugging Face weights and tokeniser to begin with; random weights by default."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the random weights, of the order of the examples, and of the projections."""
    rates: tuple[float, ...] = ()
    """Learning rates to try in place of the grid."""
    optimizer_steps: int | None = None
    """Number of optimizer steps in place of the size's own."""
    only: str = ""
    """A part of a row's name; only rows whose name has it are run."""
    out: Path | None = None
    """The folder of the results; by default runs/paper/NAME-TASK-SIZE."""
    dry_run: bool = False
    """Print the memory plan and an estimate of the time, and stop."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """The tracker that logs the losses of each run."""


def main(table: Table) -> None:
    """Runs the command of a table."""
    sentence = f"This command makes a table of the paper's experiments: {table.title}."
    options = tyro.cli(Options, description=sentence)
    try:
        make(table, options, Console())
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error


def sizes_of(table: Table, options: Options) -> Sizes:
    """Gives the sizes of the command's runs."""
    sizes = SIZES[options.size][options.task or table.task]
    changes: dict[str, Any] = {}
    if options.task in (None, table.task) and options.size in table.model:
        changes["model"] = table.model[options.size]
    if options.size == "cpu" and table.optimizer_steps:
        changes["optimizer_steps"] = table.optimizer_steps
    for name in ("model", "optimizer_steps"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    if changes.get("model", sizes.model) not in problem.MODELS:
        known = ", ".join(problem.MODELS)
        raise ValueError(f"model must be one of {known}, found {changes['model']!r}")
    return dataclasses.replace(sizes, **changes)


def make(table: Table, options: Options, console: Console) -> list[dict[str, Any]]:
    """Runs what has not been run, writes the table, and gives the results that it is made of."""
    task, sizes = options.task or table.task, sizes_of(table, options)
    chosen = [row for row in table.rows[options.size] if options.only in str(row)]
    grids = methods.RATES if options.size == "cpu" else methods.FULL_RATES
    grid = {row: options.rates or grids[methods.unit(row)] for row in chosen}
    runs = sum(len(rates) + len(options.seeds) - 1 for rates in grid.values())
    if options.dry_run:
        plan.show(table.title, task, sizes, chosen, runs, table.changes, options.size, console)
        return []
    out = options.out or Path("runs/paper") / f"{table.name}-{task}-{options.size}"
    out.mkdir(parents=True, exist_ok=True)
    start = options.checkpoint
    if sizes.warm and start is None:
        start = warm_start(task, sizes, options.data, table.changes, console)
    given = problem.make(task, sizes, options.data, start, table.changes)
    console.print(given.about, markup=False)
    budget = _budget(task, sizes, given, options, table)
    results = [line for line in files.read(out / "results.jsonl") if line["budget"] == budget]
    with Progress(console=console) as progress:
        bar = progress.add_task(table.name, total=runs)
        for row in chosen:
            trial = None
            grow = 0 if options.rates else GROW  # what a user names is all that is tried
            done = rows.tried(results, row, options.seeds[0])
            runs += len(set(done) - set(grid[row]))
            progress.advance(bar, len(done))
            for seed, rate in _order(row, grid[row], grow, options.seeds, results):
                if rate not in grid[row] and seed == options.seeds[0]:
                    runs += 1
                name = f"{row}, {rate:g}, seed {seed}"
                progress.update(bar, total=runs, advance=1, description=name)
                if rows.find(results, row, rate, seed):
                    continue
                trial = trial or loop.prepare(given, row, sizes)
                line = _run(given, trial, sizes, row, rate, seed, out, budget, options.tracker)
                files.append(out / "results.jsonl", line)
                results.append(line)
            write(out, table, options, task, sizes, given, grid, results)
    console.print((out / "table.md").read_text(), markup=False)
    console.print(f"Table, CSV and plot are in {out}.", markup=False)
    return results


GROW = 2
"""How often a row's grid may grow."""


def _order(
    row: Method,
    grid: tuple[float, ...],
    grow: int,
    seeds: tuple[int, ...],
    results: list[dict[str, Any]],
) -> Iterator[tuple[int, float]]:
    """Gives the runs of a row: the grid with the first seed, then the best rate with the others.

    The grid has the uncompressed row's best rate too, to compare there, and grows while its edge is the best. What is
    next follows from the results alone, so that a table that was interrupted goes on as it would have.
    """
    goal = rows.best_rate(results, rows.plain(row), seeds[0])
    if row != rows.plain(row) and goal is not None and goal not in grid:
        grid = (*grid, goal)
    while (
        rate := rates.next_rate(grid, rows.tried(results, row, seeds[0]), grow, beyond)
    ) is not None:
        yield seeds[0], rate
    best = rows.best_rate(results, row, seeds[0])
    assert best is not None
    for seed in seeds[1:]:
        yield seed, best


def beyond(edge: float, beside: float) -> float:
    """Gives the rate beyond the edge of a grid of 1, 3, 10, 30 ...: a tenth, or ten times, of the one beside it."""
    return float(f"{beside * (10 if edge > beside else 0.1):.3g}")


def _run(
    given: problem.Problem,
    trial: loop.Trial,
    sizes: Sizes,
    row: Method,
    rate: float,
    seed: int,
    out: Path,
    budget: str,
    tracker: str,
) -> dict[str, Any]:
    name = f"{row} rate={rate:g} seed={seed}"
    settings = {"method": dataclasses.asdict(row), "rate": rate, "seed": seed, "budget": budget}
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    states = out / "states" / digest
    start = time.perf_counter()
    with _log(tracker, out, name) as log:
        figures = loop.run(
            given, trial, sizes, rate, seed, log=log, folder=states, settings=settings
        )
    losses = figures.pop("losses")
    shutil.rmtree(states, ignore_errors=True)  # the run has ended; its line says all
    seconds = time.perf_counter() - start
    return {
        **settings,
        "figures": figures,
        "bytes": trial.nbytes._asdict(),
        "seconds": round(seconds, 2),
        "losses": losses,
    }


@contextmanager
def _log(tracker: str, out: Path, name: str) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Gives a function that logs the figures of an optimizer step."""
    if tracker == "none":
        yield lambda *_: None
    elif tracker == "wandb":
        import wandb  # pyright: ignore[reportMissingImports]  # of the extra of that name

        with wandb.init(project="flora_jax", name=name, dir=out) as run:
            yield lambda step, figures: run.log(figures, step=step)
    else:
        from tensorboardX import SummaryWriter

        with SummaryWriter(str(out / "tensorboard" / name.replace(" ", "_"))) as writer:

            def log(step: int, figures: dict[str, float]) -> None:
                for key, value in figures.items():
                    writer.add_scalar(key, value, step)

            yield log


def _budget(
    task: Task, sizes: Sizes, given: problem.Problem, options: Options, table: Table
) -> str:
    """Gives a digest that tells apart runs which are not to be compared."""
    checkpoint = options.checkpoint and str(options.checkpoint)
    parts = (files.FORMAT, task, dataclasses.asdict(sizes), given.digest, checkpoint, table.changes)
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def write(
    out: Path,
    table: Table,
    options: Options,
    task: Task,
    sizes: Sizes,
    given: problem.Problem,
    grid: dict[Method, tuple[float, ...]],
    results: list[dict[str, Any]],
) -> None:
    """Writes `table.md`, `table.csv`, `plot.png` and `plot.svg`; an interrupted write leaves a file as it was."""
    metric = METRIC[task]
    summary = rows.summarise(results, grid, options.seeds, metric)
    seconds = sum(line["seconds"] for line in results)
    command = f"python -m experiments.paper.{table.name}"
    full = f"{command} --size full --data paper"
    if task != table.task:
        command, full = f"{command} --task {task}", f"{full} --task {task}"
    if options.size == "full":
        command = full
    grids = {methods.unit(row): rates for row, rates in grid.items()}
    begin = ""
    if options.checkpoint:
        begin = f" All rows begin from the weights in `{options.checkpoint.name}`."
    elif sizes.warm:
        begin = (
            f" All rows begin from {sizes.warm} optimizer steps of uncompressed training to continue the "
            "task's sources, from their first half to their second."
        )
    about = [
        f"## {table.title}",
        "",
        f"{sizes.model}, {sizes.optimizer_steps} optimizer steps of {sizes.accumulation} micro-steps of "
        f"{sizes.batch} examples; the same batches for all rows.{begin} Mean ± standard deviation over "
        f"{len(options.seeds)} seeds at the learning rate that the first seed's validation loss chose "
        "of the grid "
        + "; ".join(
            f"{unit}: {', '.join(f'{r:g}' for r in rates)}" for unit, rates in grids.items()
        )
        + ("" if options.rates else ", which grows while its edge is the best")
        + ". *To uncompressed* is the ratio of the metric; *at its rate* the same at the uncompressed "
        f"row's learning rate, first seed. State: the optimizer's, and LoRA's factors. `{command}` "
        f"({seconds:.0f} s of training); the paper's size: `{full}`.",
        "",
        given.about,
        "",
        rows.markdown(summary, metric),
    ]
    files.replace_text(out / "table.md", "\n".join(about))
    names = list(summary[0].figures)
    with files.atomic_file(out / "table.csv") as partial, partial.open("w", newline="") as stream:
        writer = csv.writer(stream)
        errors = [f"{name} sd" for name in names]
        writer.writerow(["method", "rate", "seeds", *names, *errors, "state bytes", "peak bytes"])
        for row in summary:
            writer.writerow(
                [
                    str(row.method),
                    row.rate,
                    len(row.figures["validation"]),
                    *(row.mean(name) for name in names),
                    *(row.error(name) for name in names),
                    row.state,
                    row.peak,
                ]
            )
    rows.draw(out, table.title, summary, metric)
