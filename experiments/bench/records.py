"""Records of measurements as JSON, and pictures, each a file that is written as a whole or not at all."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def keep(record: Any, file: Path) -> None:
    """Writes the record; a write that is interrupted leaves the file as it was."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(file)


def save_figure(figure: Any, stem: Path) -> None:
    """Saves the figure as PNG and SVG; the SVG is the same for the same figure."""
    with plt.rc_context({"svg.hashsalt": "flora_jax", "svg.fonttype": "path"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    plt.close(figure)
