"""A run shows a table and the picture of its curves at its end."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from experiments.bench import records


def curves(folder: Path, history: dict[str, Any], lines: dict[str, float], title: str) -> None:
    """Saves training and validation loss over tokens, and level lines, as PNG and SVG."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*zip(*history["train"], strict=True), color="#9ecae1", lw=1, label="training")
    axes.plot(
        *zip(*history["validation"], strict=True), color="#08519c", marker="o", label="validation"
    )
    for (name, level), style in zip(lines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(level, color="#555555", ls=style, lw=1, label=f"{name}: {level:.2f}")
    axes.set(xlabel="tokens", ylabel="loss (nats per byte)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"curves.{suffix}", dpi=150)
    plt.close(figure)


def losses_over_rates(
    folder: Path, losses: dict[tuple[str, str], dict[float, float]], title: str
) -> None:
    """Plots final losses over learning rates, a panel for each first name and a curve for each second, as PNG and SVG."""
    panels = list(dict.fromkeys(panel for panel, _ in losses))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    names = list(dict.fromkeys(name for _, name in losses))
    colours = plt.get_cmap("viridis")(
        [0.1 + 0.75 * i / max(1, len(names) - 1) for i in range(len(names))]
    )
    for ax, panel in zip(axes[0], panels, strict=True):
        for name, colour in zip(names, colours, strict=True):
            found = losses.get((panel, name))
            if not found:
                continue
            rates, values = zip(*sorted(found.items()), strict=True)
            ax.plot(rates, values, color=colour, marker="o", ms=3, label=name)
            best = min(found, key=found.__getitem__)
            ax.plot([best], [found[best]], color=colour, marker="*", ms=13)
        ax.set(title=panel, xscale="log", xlabel="learning rate")
        ticks = sorted({rate for found in losses.values() for rate in found})[::2]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation loss (nats per byte)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    figure.suptitle(title)
    records.save_figure(figure, folder / "rates")


def table(title: str, columns: list[str], rows: list[tuple[str, ...]]) -> Table:
    """Gives a table for the terminal."""
    result = Table(title=title)
    for i, name in enumerate(columns):
        result.add_column(name, justify="right" if i else "left")
    for row in rows:
        result.add_row(*row)
    return result


def mebibytes(size: float) -> str:
    """Gives a number of bytes in MiB."""
    return f"{size / 2**20:.2f} MiB"
