"""A table: runs every row at every rate, and writes Markdown, CSV and a plot.

Each run appends a line to `results.jsonl`, and is not repeated: the same command goes on where it was
stopped. The first seed runs the whole grid of learning rates, which grows while the best lies at its edge;
each row takes the one with the least validation loss, and the other seeds run there. Scores are of the test
side, which chooses nothing.
"""

import csv
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from experiments import rates
from experiments.paper import loop, methods, plan, problem
from experiments.paper.methods import Method
from experiments.paper.problem import METRIC, Sizes, Task
from experiments.paper.sizes import SIZES, Size
from flora_jax.models.save import save

FORMAT = 1
"""Of the results: with another one, runs are done again."""


@dataclass(frozen=True)
class Table:
    """What one file of this folder says.

    Attributes:
      name: of the file and of the results.
      title: above the table.
      task: by default.
      rows: by size.
      model: in place of the task's, by size.
      changes: of fields of the model's shape.
      boundaries: at CPU size, in place of the task's.
    """

    name: str
    title: str
    task: Task
    rows: dict[Size, tuple[Method, ...]]
    model: dict[Size, str] = dataclasses.field(default_factory=dict)
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    boundaries: int | None = None


@dataclass(frozen=True)
class Options:
    """Of one command."""

    size: Size = "cpu"
    """Minutes on two CPU cores, or the paper's."""
    task: Task | None = None
    """In place of the table's own."""
    data: problem.Data = "offline"
    """Data that come with packages, or the paper's (through `datasets`; needs a network)."""
    model: str | None = None
    """In place of the table's own; `experiments.paper.problem.MODELS` lists them."""
    checkpoint: Path | None = None
    """A folder with Hugging Face weights and tokeniser to begin with; random weights by default."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = ()
    """In place of the grid."""
    boundaries: int | None = None
    """In place of the size's own."""
    only: str = ""
    """Only rows whose name has this in it."""
    out: Path | None = None
    """By default runs/paper/NAME-TASK-SIZE."""
    dry_run: bool = False
    """Print the memory plan and an estimate of the time, and stop."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"


def main(table: Table) -> None:
    """The command of a table."""
    options = tyro.cli(Options, description=table.title)
    try:
        make(table, options, Console())
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error


def sizes_of(table: Table, options: Options) -> Sizes:
    """Of the runs of this command."""
    sizes = SIZES[options.size][options.task or table.task]
    changes: dict[str, Any] = {}
    if options.task in (None, table.task) and options.size in table.model:
        changes["model"] = table.model[options.size]
    if options.size == "cpu" and table.boundaries:
        changes["boundaries"] = table.boundaries
    for name in ("model", "boundaries"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    if changes.get("model", sizes.model) not in problem.MODELS:
        known = ", ".join(problem.MODELS)
        raise ValueError(f"model must be one of {known}, found {changes['model']!r}")
    return dataclasses.replace(sizes, **changes)


def make(table: Table, options: Options, console: Console) -> list[dict[str, Any]]:
    """Runs what has not been run, and writes the table; gives the results it is made of."""
    task, sizes = options.task or table.task, sizes_of(table, options)
    rows = [row for row in table.rows[options.size] if options.only in str(row)]
    grids = methods.RATES if options.size == "cpu" else methods.FULL_RATES
    grid = {row: options.rates or grids[methods.unit(row)] for row in rows}
    runs = sum(len(rates) + len(options.seeds) - 1 for rates in grid.values())
    if options.dry_run:
        plan.show(table.title, task, sizes, rows, runs, table.changes, options.size, console)
        return []
    out = options.out or Path("runs/paper") / f"{table.name}-{task}-{options.size}"
    out.mkdir(parents=True, exist_ok=True)
    start = options.checkpoint
    if sizes.warm and start is None:
        start = warm_start(task, sizes, options.data, table.changes, console)
    given = problem.make(task, sizes, options.data, start, table.changes)
    console.print(given.about, markup=False)
    budget = _budget(task, sizes, given, options, table)
    results = [line for line in read(out / "results.jsonl") if line["budget"] == budget]
    with Progress(console=console) as progress:
        bar = progress.add_task(table.name, total=runs)
        for row in rows:
            trial = None
            grow = 0 if options.rates else GROW  # what a user names is all that is tried
            done = tried(results, row, options.seeds[0])
            runs += len(set(done) - set(grid[row]))
            progress.advance(bar, len(done))
            for seed, rate in _order(row, grid[row], grow, options.seeds, results):
                if rate not in grid[row] and seed == options.seeds[0]:
                    runs += 1
                name = f"{row}, {rate:g}, seed {seed}"
                progress.update(bar, total=runs, advance=1, description=name)
                if _find(results, row, rate, seed):
                    continue
                trial = trial or loop.prepare(given, row, sizes)
                line = _run(given, trial, sizes, row, rate, seed, out, budget, options.tracker)
                append(out / "results.jsonl", line)
                results.append(line)
            write(out, table, options, task, sizes, given, grid, results)
    console.print((out / "table.md").read_text(), markup=False)
    console.print(f"Table, CSV and plot are in {out}.", markup=False)
    return results


STARTS = Path("runs/paper/starts")
WARM_RATE = 0.03
"""Learning rate of the training before."""


def warm_start(
    task: Task, sizes: Sizes, source: problem.Data, changes: dict[str, Any], console: Console
) -> Path:
    """A checkpoint of uncompressed training to go on with the task's sources; made once for all tables."""
    sizes = dataclasses.replace(
        sizes, boundaries=sizes.warm, checkpoint_every=0, batch=2 * sizes.batch
    )
    given = problem.make(task, sizes, source, changes=changes, other=True)
    key = json.dumps([FORMAT, task, dataclasses.asdict(sizes), given.digest, changes])
    folder = STARTS / hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    if (folder / "tokenizer.json").exists():
        return folder
    console.print(f"Training to begin from: {sizes.warm} boundaries, uncompressed ...")
    ends: list[Any] = []
    given = given._replace(score=lambda _, params: ends.append(params) or {})
    trial = loop.prepare(given, Method("uncompressed"), sizes)
    figures = loop.run(given, trial, sizes, WARM_RATE, 0)
    console.print(f"Its validation loss is {figures['validation']:.3f}.")
    assert given.words is not None
    shutil.rmtree(folder, ignore_errors=True)  # without its tokeniser it was cut off
    save(folder, given.model, ends[0])
    given.words.tokenizer.save(str(folder / "tokenizer.json"))
    return folder


GROW = 2
"""How often a row's grid may grow."""


def _order(
    row: Method,
    grid: tuple[float, ...],
    grow: int,
    seeds: tuple[int, ...],
    results: list[dict[str, Any]],
) -> Iterator[tuple[int, float]]:
    """The grid with the first seed, rates beyond it while its edge is the best, the best with the others.

    In the grid is the uncompressed row's best rate too, to compare there. What is next follows from the
    results alone, so that a table that was cut off goes on as it would have.
    """
    goal = best_rate(results, plain(row), seeds[0])
    if row != plain(row) and goal is not None and goal not in grid:
        grid = (*grid, goal)
    while (rate := rates.next_rate(grid, tried(results, row, seeds[0]), grow, beyond)) is not None:
        yield seeds[0], rate
    best = best_rate(results, row, seeds[0])
    assert best is not None
    for seed in seeds[1:]:
        yield seed, best


def beyond(edge: float, beside: float) -> float:
    """Beyond the edge of a grid of 1, 3, 10, 30 ...: a tenth of, or ten times, the one beside it."""
    return float(f"{beside * (10 if edge > beside else 0.1):.3g}")


def tried(results: list[dict[str, Any]], row: Method, seed: int) -> dict[float, float]:
    """Learning rates that a row has run with a seed, least first, and the validation loss of each."""
    wanted = (dataclasses.asdict(row), seed)
    found = [line for line in results if (line["method"], line["seed"]) == wanted]
    losses = {line["rate"]: line["figures"]["validation"] for line in found}
    return {rate: math.inf if math.isnan(losses[rate]) else losses[rate] for rate in sorted(losses)}


def best_rate(results: list[dict[str, Any]], row: Method, seed: int) -> float | None:
    """Of the least validation loss; the least rate where there is no loss, None where nothing was run."""
    losses = tried(results, row, seed)
    return min(losses, key=lambda rate: losses[rate], default=None)


def _find(
    results: list[dict[str, Any]], row: Method, rate: float, seed: int
) -> dict[str, Any] | None:
    wanted = (dataclasses.asdict(row), rate, seed)
    found = (line for line in results if (line["method"], line["rate"], line["seed"]) == wanted)
    return next(found, None)


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
    """A function that logs figures of a boundary."""
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
    """Tells runs apart that are not to be compared."""
    checkpoint = options.checkpoint and str(options.checkpoint)
    parts = (FORMAT, task, dataclasses.asdict(sizes), given.digest, checkpoint, table.changes)
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def read(file: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    if not file.exists():
        return []
    lines = []
    for text in file.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # cut off while it was written; that run is done again
            continue
    return lines


def append(file: Path, line: dict[str, Any]) -> None:
    """One line more, on the disk before this returns."""
    with file.open("ab+") as stream:
        stream.seek(0, os.SEEK_END)
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(line).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


@dataclass(frozen=True)
class Row:
    """One row of a table, over seeds.

    Attributes:
      method: what was run.
      rate: the best of the grid; `edge` where it is the first or last of it.
      figures: of each, its values by seed.
      equal: the first seed's metric at the best rate of the uncompressed row; None without one.
      state, peak: bytes.
    """

    method: Method
    rate: float
    edge: bool
    figures: dict[str, list[float]]
    equal: float | None
    state: int
    peak: int

    def mean(self, name: str) -> float:
        return float(np.mean(self.figures[name]))

    def error(self, name: str) -> float:
        """Standard deviation over the seeds."""
        values = self.figures[name]
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def summarise(
    results: list[dict[str, Any]],
    grid: dict[Method, tuple[float, ...]],
    seeds: tuple[int, ...],
    metric: str,
) -> list[Row]:
    """Rows of which something has been run, in the order of the grid."""
    rows: list[Row] = []
    for method in grid:
        rate = best_rate(results, method, seeds[0])
        if rate is None:
            continue
        losses = tried(results, method, seeds[0])
        lines = [found for seed in seeds if (found := _find(results, method, rate, seed))]
        figures = {name: [line["figures"][name] for line in lines] for name in lines[0]["figures"]}
        goal = next((row for row in rows if row.method == plain(method)), None)
        at_goal = goal and _find(results, method, goal.rate, seeds[0])
        rows.append(
            Row(
                method,
                rate,
                rate in (min(losses), max(losses)),
                figures,
                at_goal["figures"][metric] if at_goal else None,
                lines[0]["bytes"]["state"],
                lines[0]["bytes"]["peak"],
            )
        )
    return rows


def plain(method: Method) -> Method:
    """The uncompressed row that a row is compared with."""
    base = "adafactor" if method.kind == "galore" else method.base
    return Method("uncompressed", momentum=method.momentum, base=base)


def worse_by(metric: str, found: float, goal: float) -> float:
    """By what part the metric is worse than the goal; below zero where it is better."""
    if goal == 0:
        return math.nan
    return found / goal - 1 if metric == "perplexity" else 1 - found / goal


def markdown(rows: list[Row], metric: str) -> str:
    """The table, and in words where Flora wins and where it does not."""
    names = [name for row in rows[:1] for name in row.figures if name != "validation"]
    heads = ["method", "rate", *names, "validation loss", "to uncompressed", "at its rate"]
    heads += ["state, MiB", "peak, MiB"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        goal = next((one for one in rows if one.method == plain(row.method)), None)
        cells = [str(row.method), f"{row.rate:g}" + (" (edge)" if row.edge else "")]
        for name in [*names, "validation"]:
            digits = 3 if name == "validation" else 2
            cells.append(f"{row.mean(name):.{digits}f} ± {row.error(name):.{digits}f}")
        if goal is None or goal.mean(metric) == 0:
            cells += ["-", "-"]
        else:
            cells.append(f"{row.mean(metric) / goal.mean(metric):.3f}")
            first = goal.figures[metric][0]
            cells.append("-" if row.equal is None or not first else f"{row.equal / first:.3f}")
        cells += [f"{row.state / 2**20:.2f}", f"{row.peak / 2**20:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + "\n".join(verdicts(rows, metric)) + "\n"


def verdicts(rows: list[Row], metric: str) -> list[str]:
    """A sentence for each row of Flora, with what it is to be compared with."""
    sentences = []
    for row in rows:
        if row.method.kind != "flora":
            continue
        if math.isnan(row.mean("validation")):
            sentences.append(f"- {row.method}: diverged, at every learning rate of the grid.")
            continue
        parts = []
        goal = next((one for one in rows if one.method == plain(row.method)), None)
        if goal is not None:
            gap = worse_by(metric, row.mean(metric), goal.mean(metric))
            within = "within" if gap <= 0.02 else "not within"
            side = "worse" if gap > 0 else "better"
            parts.append(
                f"{abs(100 * gap):.1f} % {side} than uncompressed in {metric}, {within} 2 %"
            )
        for kind, name in (("lora", "LoRA"), ("galore", "GaLore")):
            others = [one for one in rows if one.method.kind == kind]
            if not others:
                continue
            as_large = [one for one in others if one.state >= row.state] or others
            other = min(as_large, key=lambda one: one.state)
            gap = worse_by(metric, row.mean(metric), other.mean(metric))
            spread = row.error(metric) + other.error(metric)
            clear = abs(row.mean(metric) - other.mean(metric)) > spread
            word = "better" if gap < 0 else "worse"
            word += "" if clear else " (no more than the seeds differ)"
            ratio = other.state / row.state
            parts.append(
                f"{word} than {name} r={other.method.rank}, which has {ratio:.2f} times its state"
            )
        sentences.append(f"- {row.method}: {'; '.join(parts)}.")
    return sentences


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
    """`table.md`, `table.csv`, `plot.png` and `plot.svg`, each whole or as it was before."""
    metric = METRIC[task]
    rows = summarise(results, grid, options.seeds, metric)
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
            f" All rows begin from {sizes.warm} boundaries of uncompressed training to go on with the "
            "task's sources, from their first half to their second."
        )
    about = [
        f"## {table.title}",
        "",
        f"{sizes.model}, {sizes.boundaries} boundaries of {sizes.accumulation} micro-steps of "
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
        markdown(rows, metric),
    ]
    replace_text(out / "table.md", "\n".join(about))
    names = list(rows[0].figures)
    with whole_file(out / "table.csv") as partial, partial.open("w", newline="") as stream:
        writer = csv.writer(stream)
        errors = [f"{name} sd" for name in names]
        writer.writerow(["method", "rate", "seeds", *names, *errors, "state bytes", "peak bytes"])
        for row in rows:
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
    draw(out, table.title, rows, metric)


COLOURS = {"uncompressed": "#555555", "flora": "#08519c", "lora": "#d94801", "galore": "#238b45"}


def draw(out: Path, title: str, rows: list[Row], metric: str) -> None:
    """The metric of each row with its error bar, beside the bytes of its state."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1.2 + 0.4 * len(rows)), sharey=True, layout="constrained"
    )
    for i, row in enumerate(rows):
        colour = COLOURS[row.method.kind]
        left.errorbar(row.mean(metric), i, xerr=row.error(metric), fmt="o", capsize=3, color=colour)
        right.barh(i, row.state / 2**20, color=colour)
    left.set_yticks(range(len(rows)), [str(row.method) for row in rows])
    left.invert_yaxis()
    left.set(xlabel=f"{metric} (mean and standard deviation)")
    right.set(xlabel="optimizer state, MiB")
    left.grid(alpha=0.3)
    figure.suptitle(title)
    for suffix in ("png", "svg"):
        with whole_file(out / f"plot.{suffix}") as partial:
            figure.savefig(partial, dpi=150, format=suffix)
    plt.close(figure)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A file beside, which takes the place of `file` once it is written."""
    partial = file.with_name(file.name + ".partial")
    yield partial
    partial.replace(file)


def replace_text(file: Path, text: str) -> None:
    with whole_file(file) as partial:
        partial.write_text(text)
