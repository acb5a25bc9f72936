"""What a run shows: its plan, a log for TensorBoard, a plot, and a table at the end."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tensorboardX import SummaryWriter

from flora_jax.finetune.settings import OTHERS, Settings
from flora_jax.finetune.sizes import Sizes
from flora_jax.memory.estimate import GIB

REPORT = "report.json"


def plan(settings: Settings, kind: str, size: Sizes, room: int | None, steps: int) -> Table:
    """Returns a table of the bytes of each part on each device."""
    rank = f", rank {settings.ranked}" if settings.ranked else ""
    tokens = settings.rows * settings.length * settings.accumulated
    title = (
        f"{kind} by {settings.method}{rank}: {steps} steps of {settings.accumulated} x {settings.rows} x "
        f"{settings.length} = {tokens:,} tokens"
    )
    devices = f"each of {jax.device_count()} devices" if jax.device_count() > 1 else "the device"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column(f"GiB on {devices} ({jax.devices()[0].device_kind})")
    table.add_column("", justify="right")
    names = {
        "params": "weights",
        "state": "optimizer state, sketches, adapter",
        "batch": "batch",
        "temporaries": "activations, gradients, buffers",
    }
    for name, value in size._asdict().items():
        table.add_row(names[name], f"{value / GIB:.3f}")
    table.add_row("[bold]in all, as compiled[/]", f"[bold]{size.total / GIB:.3f}[/]")
    if room is not None:
        table.add_row("there is", f"{room / GIB:.3f}")
    rates = f"rate {settings.peak:g}, {settings.schedule}"
    if settings.method in ("flora", "exact-muon", "muon"):
        rates += f"; {settings.other_rate or OTHERS:g} for embeddings and norms"
    table.caption = rates
    return table


class Log:
    """Writes the curves of a run.

    Args:
      folder: The folder of the run.
      console: Where validations are printed.
    """

    def __init__(self, folder: Path, console: Console):
        self.folder, self.console = folder, console
        self.first = jax.process_index() == 0
        self.writer: Any = None

    def begin(self, history: dict[str, Any], first: int) -> None:
        """Opens the log; a run that goes on adds to it after its step `first`."""
        if self.first:
            self.writer = SummaryWriter(
                str(self.folder / "logs"), purge_step=first + 1 if first else None
            )
        if not first and history["validation"]:
            self.validation(0, history["validation"][0][1])

    def step(self, step: int, loss: float, speed: float) -> None:
        """Writes the loss and the tokens a second of an optimizer step."""
        if self.writer is not None:
            self.writer.add_scalar("loss/train", loss, step)
            self.writer.add_scalar("tokens per second", speed, step)

    def validation(self, step: int, loss: float) -> None:
        """Writes and prints a validation loss."""
        if self.writer is not None:
            self.writer.add_scalar("loss/validation", loss, step)
        self.console.print(f"Validation loss {loss:.4f} at step {step}.", highlight=False)

    def end(self, settings: Settings, figures: dict[str, Any]) -> None:
        """Writes report.json, the plot and the table."""
        if self.writer is not None:
            self.writer.close()
        curves(self.folder, figures)
        partial = self.folder / (REPORT + ".partial")
        partial.write_text(json.dumps(figures, indent=2))
        os.replace(partial, self.folder / REPORT)
        if figures["after"] is not None:
            self.console.print(table(settings, figures))
        for answer in figures["answers"]:
            self.console.print(answers(answer))
        self.console.print(
            f"The model is in {settings.out}; curves, report, logs and checkpoints in {settings.run}.",
            highlight=False,
            markup=False,
        )


def table(settings: Settings, figures: dict[str, Any]) -> Table:
    """Returns the table of loss and perplexity before and after."""
    result = Table(title="Validation", box=box.SIMPLE_HEAD)
    for name in ("", "loss", "perplexity"):
        result.add_column(name, justify="right" if name else "left")
    result.add_row(
        "the model before", f"{figures['before']:.4f}", f"{math.exp(figures['before']):.2f}"
    )
    result.add_row(
        f"after {figures['steps']} steps of {settings.method}",
        f"{figures['after']:.4f}",
        f"{math.exp(figures['after']):.2f}",
    )
    planned = sum(figures["planned"].values()) / GIB
    result.caption = f"nats a token; {figures['tokens']:,} tokens in {figures['seconds']:,.0f} s, {planned:.2f} GiB on a device"
    return result


def answers(answer: dict[str, str]) -> Table:
    """Returns a table of a prompt, what the data has after it, and what the model writes before and after."""
    result = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
    result.add_column(no_wrap=True, style="bold")
    result.add_column(overflow="fold")
    for name, key in (
        ("prompt", "prompt"),
        ("data", "goal"),
        ("before", "text"),
        ("after", "after"),
    ):
        result.add_row(name, escape(answer[key]))
    return result


def curves(folder: Path, figures: dict[str, Any]) -> None:
    """Saves training and validation loss over tokens."""
    history = figures["history"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    if history["train"]:
        axes.plot(*zip(*history["train"], strict=True), color="#9ecae1", lw=1, label="training")
    if history["validation"]:
        points = list(zip(*history["validation"], strict=True))
        axes.plot(*points, color="#08519c", marker="o", label="validation")
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title=figures["method"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(folder / "loss.svg")
