"""This command draws the picture of the idea that README and docs show: docs/idea.svg.

python -m experiments.idea
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from experiments.bench import records

FILE = Path(__file__).resolve().parent.parent / "docs" / "idea"
DARK, LIGHT, GREY = "#08519c", "#9ecae1", "#d9d9d9"


def box(axes, x, y, width, height, colour, text, told, above=False):
    axes.add_patch(Rectangle((x, y - height / 2), width, height, facecolor=colour, lw=0))
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=15, style="italic")
    side, place = (1, "bottom") if above else (-1, "top")
    end = y + side * (height / 2 + 0.13)
    axes.text(x + width / 2, end, told, ha="center", va=place, fontsize=10)


def sign(axes, x, y, text):
    axes.text(x, y, text, ha="center", va="center", fontsize=15)


def arrow(axes, start, end):
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "#555555"})


def main() -> None:
    figure, axes = plt.subplots(figsize=(10, 3.3))
    axes.set(xlim=(0, 18.4), ylim=(-1.95, 2.9))
    axes.axis("off")
    box(axes, 0.1, 0, 2.6, 2.2, GREY, "G", "gradient, n × m:\nnever kept")
    sign(axes, 3.25, 0, "×")
    box(axes, 3.8, 0, 0.6, 2.6, LIGHT, "Aᵀ", "random, m × r:\nsampled from a key", above=True)
    sign(axes, 5.0, 0, "=")
    box(axes, 5.6, 0, 0.6, 2.2, DARK, "", "sketch,\nn × r")
    axes.text(5.9, 0, "C", ha="center", va="center", fontsize=15, style="italic", color="white")
    axes.text(3.3, 2.6, "in the backward pass of each micro-batch", ha="center", fontsize=11)
    arrow(axes, (6.5, 0), (8.1, 0))
    axes.text(7.3, 0.25, "+", ha="center", fontsize=15)
    box(axes, 8.3, 0, 0.6, 2.2, DARK, "", "their sum: all\nthat is kept")
    axes.text(8.6, 0, "ΣC", ha="center", va="center", fontsize=13, style="italic", color="white")
    arrow(axes, (9.2, 0), (10.8, 0))
    axes.text(13.9, 2.6, "once per optimizer step, a layer at a time", ha="center", fontsize=11)
    box(axes, 11.0, 0, 0.6, 2.2, DARK, "", "orthogonalized,\nn × r")
    sign(axes, 12.2, 0, "×")
    box(axes, 12.8, 0, 2.6, 0.6, LIGHT, "A", "sampled again\nfrom the same key")
    arrow(axes, (15.6, 0), (16.6, 0))
    axes.text(17.5, 0, "update\nof the\nweight", ha="center", va="center", fontsize=11)
    records.save_figure(figure, FILE)
    print(f"{FILE}.svg")


if __name__ == "__main__":
    main()
