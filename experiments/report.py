"""A run shows a table and the picture of its curves at its end."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table


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
