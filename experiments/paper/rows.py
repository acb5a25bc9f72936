"""Rows of a table: the results over seeds, and what they say as Markdown, as sentences and as a plot."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.paper.files import atomic_file
from experiments.paper.methods import Method


def tried(results: list[dict[str, Any]], row: Method, seed: int) -> dict[float, float]:
    """Gives the learning rates that a row has run with a seed, least first, and the validation loss of each."""
    wanted = (dataclasses.asdict(row), seed)
    found = [line for line in results if (line["method"], line["seed"]) == wanted]
    losses = {line["rate"]: line["figures"]["validation"] for line in found}
    return {rate: math.inf if math.isnan(losses[rate]) else losses[rate] for rate in sorted(losses)}


def best_rate(results: list[dict[str, Any]], row: Method, seed: int) -> float | None:
    """Gives the rate of the least validation loss: the least rate where no loss is finite, None where nothing was run."""
    losses = tried(results, row, seed)
    return min(losses, key=lambda rate: losses[rate], default=None)


def find(
    results: list[dict[str, Any]], row: Method, rate: float, seed: int
) -> dict[str, Any] | None:
    """Gives the result of one run, or None where it was not run."""
    wanted = (dataclasses.asdict(row), rate, seed)
    found = (line for line in results if (line["method"], line["rate"], line["seed"]) == wanted)
    return next(found, None)


@dataclass(frozen=True)
class Row:
    """One row of a table, over seeds.

    Attributes:
      method: The method that was run.
      rate: The best learning rate of the grid.
      edge: Whether that rate is the first or the last that was tried.
      figures: The values of each figure, by seed.
      equal: The first seed's metric at the best rate of the uncompressed row; None without one.
      state: Bytes of the state.
      peak: Bytes of the compiled cycle at its worst moment.
    """

    method: Method
    rate: float
    edge: bool
    figures: dict[str, list[float]]
    equal: float | None
    state: int
    peak: int

    def mean(self, name: str) -> float:
        """Mean of a figure over the seeds."""
        return float(np.mean(self.figures[name]))

    def error(self, name: str) -> float:
        """Standard deviation of a figure over the seeds."""
        values = self.figures[name]
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def summarise(
    results: list[dict[str, Any]],
    grid: dict[Method, tuple[float, ...]],
    seeds: tuple[int, ...],
    metric: str,
) -> list[Row]:
    """Gives the rows of which something has been run, in the order of the grid."""
    rows: list[Row] = []
    for method in grid:
        rate = best_rate(results, method, seeds[0])
        if rate is None:
            continue
        losses = tried(results, method, seeds[0])
        lines = [found for seed in seeds if (found := find(results, method, rate, seed))]
        figures = {name: [line["figures"][name] for line in lines] for name in lines[0]["figures"]}
        goal = next((row for row in rows if row.method == plain(method)), None)
        at_goal = goal and find(results, method, goal.rate, seeds[0])
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
    """Gives the uncompressed row that a row is compared with."""
    base = "adafactor" if method.kind == "galore" else method.base
    return Method("uncompressed", momentum=method.momentum, base=base)


def worse_by(metric: str, found: float, goal: float) -> float:
    """Gives the part by which the metric is worse than the goal; it is below zero where it is better."""
    if goal == 0:
        return math.nan
    return found / goal - 1 if metric == "perplexity" else 1 - found / goal


def markdown(rows: list[Row], metric: str) -> str:
    """Gives the table, and sentences that say where Flora wins and where it does not."""
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
    """Gives a sentence for each row of Flora, which compares it with the uncompressed row, LoRA and GaLore."""
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


COLOURS = {"uncompressed": "#555555", "flora": "#08519c", "lora": "#d94801", "galore": "#238b45"}


def draw(out: Path, title: str, rows: list[Row], metric: str) -> None:
    """Saves a plot of each row's metric with its error bar, beside the bytes of its state."""
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
        with atomic_file(out / f"plot.{suffix}") as partial:
            figure.savefig(partial, dpi=150, format=suffix)
    plt.close(figure)
