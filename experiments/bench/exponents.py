"""Exponents of growth: how a quantity grows along an axis, as a table and as a picture, from a kept record.

A record is a list of lines, each with an axis, the point `x` on it, a method, and the quantities measured there. Along
an axis `y = c x^p` is fitted by least squares of the logarithms, and `p` is the exponent.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.bench import records
from experiments.bench.baselines.methods import METHODS

KEYS = ("multisteps", "flora", "exact", "galore", "muon")
PAINTS = ("#555555", "#08519c", "#6baed6", "#d95f0e", "#31a354")
COLOURS: dict[str, str] = dict(zip(KEYS, PAINTS, strict=True))
QUANTITIES = {
    "state": "state, bytes",
    "flops": "FLOPs of a cycle",
    "seconds": "CPU seconds of a cycle",
    "sent": "bytes sent in a micro-step",
}
AXES = ("width", "layers", "rank", "accumulation", "devices")


def exponent(xs: Any, ys: Any) -> float:
    """Gives `p` of `y = c x^p`, by least squares of the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def told(xs: Any, ys: Any) -> str:
    """Gives the exponent with two digits, and no sign on a zero."""
    return f"{round(exponent(xs, ys), 2) + 0.0:.2f}"


def curves(lines: list[dict[str, Any]], axis: str, what: str) -> dict[str, tuple[Any, Any]]:
    """Gives the points of each method, sorted; only positive ones have a place on logarithmic axes."""
    result = {}
    for key in KEYS:
        points = sorted(
            (line["x"], line[what])
            for line in lines
            if line["axis"] == axis and line["method"] == key and line.get(what, 0) > 0
        )
        if len(points) > 1:
            result[key] = tuple(zip(*points, strict=True))
    return result


def text(lines: list[dict[str, Any]]) -> str:
    """Gives the exponents as Markdown, with a row for each axis and quantity."""
    names = [METHODS[key].name for key in KEYS]
    middle = lines[0]["setting"]["middle"]
    rows = [
        "## Growth\n",
        "The table has the exponents `p` of `y = c x^p`, fitted to the points of the picture (`python -m "
        f"experiments.bench.growth --write`), around width {middle['width']}, {middle['layers']} layers, rank "
        f"{middle['rank']}, {middle['batch']} x {middle['length']} bytes, {middle['accumulation']} micro-steps. Over "
        "devices the figures are those of one device, in the program that includes the optimizer step; the devices are "
        "virtual, so no time is measured on them.\n",
        "![Growth, on logarithmic axes](growth.svg)\n",
        "| over | of | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(KEYS),
    ]
    for axis in AXES:
        for what, name in QUANTITIES.items():
            found = curves(lines, axis, what)
            if found:
                cells = [told(*found[key]) if key in found else "–" for key in KEYS]
                rows.append(f"| {axis} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def picture(lines: list[dict[str, Any]], stem: Path) -> None:
    """Saves a picture with a column for each axis, a row for each quantity, and the exponents, as PNG and SVG."""
    figure, panels = plt.subplots(3, len(AXES), figsize=(14, 8), layout="constrained")
    for column, axis in enumerate(AXES):
        last = "sent" if axis == "devices" else "seconds"
        for row, what in enumerate(("state", "flops", last)):
            axes = panels[row, column]
            found = curves(lines, axis, what)
            if not found:
                axes.set_axis_off()
                continue
            for key, (xs, ys) in found.items():
                axes.loglog(
                    xs, ys, "o-", ms=3.5, lw=1.2, color=COLOURS[key], label=METHODS[key].name
                )
            _scale(axes, sorted({line["x"] for line in lines if line["axis"] == axis}))
            _label_ends(axes, found)
            if column == 0 or what == "sent":
                axes.set_ylabel(QUANTITIES[what], fontsize=9)
            if row == 0:
                axes.set_title(axis + (": of one device" if axis == "devices" else ""), fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(KEYS), frameon=False, fontsize=9
    )
    records.save_figure(figure, stem)


def _scale(axes: Any, points: list[int]) -> None:
    """Puts ticks at the points, and makes the vertical axis a decade long at least."""
    axes.set(xscale="log", yscale="log", xlim=(0.85 * points[0], 1.18 * points[-1]))
    axes.set_xticks(points, [str(x) for x in points])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    wider = max(1.0, (12 / (high / low)) ** 0.5)
    axes.set_ylim(low / wider, high * wider)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _label_ends(axes: Any, found: dict[str, tuple[Any, Any]]) -> None:
    """Writes the exponents on the right, as high as the curves end, moved apart where these meet."""
    low, high = np.log(axes.get_ylim())
    places = {key: (np.log(ys[-1]) - low) / (high - low) for key, (_, ys) in found.items()}
    lowest = 0.0
    for key in sorted(places, key=lambda key: places[key]):
        place = max(places[key], lowest)
        lowest = place + 0.075
        axes.text(
            1.02,
            place,
            told(*found[key]),
            color=COLOURS[key],
            fontsize=8,
            va="center",
            transform=axes.transAxes,
        )
