"""Trains a byte-level language model on the standard library's source, with Flora by default.

    python3 -m experiments                       # sets itself up; under three minutes on two cores
    python -m experiments.train --optimizer multisteps --out runs/multisteps

The same command goes on from its last checkpoint. At the end: a table (loss, bytes of optimizer
state, peak memory, seconds) beside what accumulation without compression would take, a picture of
the curves, and text that the model wrote.
"""

import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import tyro
from flax.training.train_state import TrainState
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import optimizers, report, text
from experiments.checkpoint import Checkpoints
from experiments.models import decoder
from flora_jax.distributions import Distribution
from flora_jax.plan import tree_bytes

PROMPT = "def read(self, "


@dataclass(frozen=True)
class Config:
    """Settings of one run."""

    optimizer: optimizers.Method = "flora"
    """flora, MultiSteps over Adafactor, or MultiSteps over GaLore."""
    learning_rate: float = 0.06
    """Peak of a cosine schedule over the boundaries."""
    rank: int = 64
    """Of Flora's and GaLore's projections."""
    distribution: Distribution = "srht"
    """Of Flora's projections."""
    shrink: bool = True
    """Scale the updates of compressed leaves by 1/sqrt(1 + variance), as advised."""
    momentum: float | None = None
    """Decay of Flora's compressed momentum; none by default."""
    boundaries: int = 250
    """Parameter updates."""
    accumulation: int = 4
    """Micro-steps to a boundary."""
    batch: int = 8
    """Windows in a micro-step."""
    length: int = 128
    """Bytes in a window."""
    model: decoder.Shape = field(default_factory=decoder.Shape)
    seed: int = 0
    out: Path = Path("runs/train")
    """Folder of checkpoints, table, curves and sample."""
    evaluate_every: int = 25
    """Boundaries between validations; each is followed by a checkpoint."""

    def __post_init__(self):
        for name in ("rank", "boundaries", "accumulation", "batch", "length", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")


def transformation(config: Config, method: optimizers.Method) -> optax.GradientTransformation:
    return optimizers.build(
        method,
        optimizers.cosine(config.learning_rate, config.boundaries),
        accumulation=config.accumulation,
        rank=config.rank,
        distribution=config.distribution,
        shrink=config.shrink,
        momentum=config.momentum,
        seed=config.seed,
    )


def initial_state(config: Config, method: optimizers.Method) -> TrainState:
    model = decoder.Decoder(config.model)
    params = model.init(jax.random.key(config.seed), jnp.zeros((1, 8), jnp.int32))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=transformation(config, method))


def compile_step(config: Config, state: TrainState):
    """The compiled micro-step: `(state, windows) -> (state, loss)`, the state donated."""
    model = decoder.Decoder(config.model)

    @partial(jax.jit, donate_argnums=0)
    def step(state, windows):
        loss, grads = jax.value_and_grad(lambda p: decoder.loss(model, p, windows))(state.params)
        return state.apply_gradients(grads=grads), loss

    windows = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.int32)
    return step.lower(state, windows).compile()


def train(config: Config, console: Console) -> dict[str, Any]:
    """Runs, or goes on; returns the figures of the final table."""
    corpus = text.load()
    console.print(
        f"Python's standard library: {len(corpus.train):,} bytes of {corpus.files[0]} files to "
        f"train on, {len(corpus.validation):,} bytes of {corpus.files[1]} others to validate."
    )
    model = decoder.Decoder(config.model)
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "evaluate_every")}
    checkpoints = Checkpoints(config.out, settings)
    state = initial_state(config, config.optimizer)
    compiled = compile_step(config, state)
    loss_of = jax.jit(lambda params, windows: decoder.loss(model, params, windows))
    held_out = [text.batch(corpus.validation, 1, i, 64, config.length) for i in range(8)]

    def evaluate(params) -> float:
        return float(np.mean([loss_of(params, windows) for windows in held_out]))

    history: dict[str, Any] = {"train": [], "validation": [], "seconds": 0.0}
    dynamic = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    first, dynamic, history = checkpoints.restore(dynamic, history)
    state = state.replace(**dynamic)
    if first:
        console.print(f"Going on from micro-step {first}.")
    else:
        history["validation"].append((0, evaluate(state.params)))
    total = config.boundaries * config.accumulation
    tokens = config.batch * config.length
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(config.optimizer, total=total, completed=first, figures="")
        start, losses = time.perf_counter(), []
        for step in range(first, total):
            windows = text.batch(corpus.train, config.seed, step, config.batch, config.length)
            state, loss = compiled(state, windows)
            losses.append(loss)
            if (step + 1) % config.accumulation:
                continue
            mean = float(np.mean(losses))
            losses.clear()
            history["train"].append(((step + 1) * tokens, mean))
            seconds = history["seconds"] + time.perf_counter() - start
            resident = report.mebibytes(psutil.Process().memory_info().rss)
            speed = (step + 1) * tokens / seconds
            figures = f"loss {mean:.3f}  {speed:,.0f} tokens/s  {resident}"
            progress.update(task, completed=step + 1, figures=figures)
            boundary = (step + 1) // config.accumulation
            if boundary % config.evaluate_every == 0 or step + 1 == total:
                history["seconds"] = seconds
                history["validation"].append(((step + 1) * tokens, evaluate(state.params)))
                dynamic = {
                    "step": jnp.asarray(state.step),
                    "params": state.params,
                    "opt_state": state.opt_state,
                }
                checkpoints.save(step + 1, dynamic, history)
                start = time.perf_counter()
    checkpoints.close()
    return {
        "unigram": text.unigram_loss(corpus),
        "initial": history["validation"][0][1],
        "final": history["validation"][-1][1],
        "seconds": history["seconds"],
        "state": tree_bytes(state.opt_state),
        "peak": report.compiled_bytes(compiled),
        "params": tree_bytes(state.params),
        "history": history,
        "sample": write(config, state.params),
    }


def write(config: Config, params) -> str:
    """Text that the model writes after a prompt."""
    model = decoder.Decoder(config.model)
    prompt = ("\n" * config.length + PROMPT).encode()[-config.length :]
    tokens = jnp.asarray(np.frombuffer(prompt, np.uint8).astype(np.int32))[None]
    draw = jax.jit(partial(decoder.sample, model, count=240, heat=0.7))
    drawn = draw(params, tokens, key=jax.random.key(config.seed))
    return bytes(np.asarray(drawn[0], np.uint8)).decode(errors="replace").lstrip("\n")


def show(config: Config, figures: dict[str, Any], console: Console) -> None:
    """Prints and saves the table, the picture and the sample."""
    rows = [
        ("byte frequencies alone (unigram)", f"{figures['unigram']:.3f}"),
        ("this model before training", f"{figures['initial']:.3f}"),
        (f"this model, {config.optimizer}, {figures['seconds']:.0f} s", f"{figures['final']:.3f}"),
    ]
    losses = report.table("Validation loss, nats per byte", ["", "loss"], rows)
    other: optimizers.Method = "multisteps" if config.optimizer != "multisteps" else "flora"
    state = initial_state(config, other)
    alone = tree_bytes(jax.eval_shape(optax.adafactor(1.0).init, state.params))
    peaks = {
        config.optimizer: figures["peak"],
        other: report.compiled_bytes(compile_step(config, state)),
    }
    states = {config.optimizer: figures["state"], other: tree_bytes(state.opt_state)}
    rows = [
        (
            name,
            report.mebibytes(states[name]),
            report.mebibytes(states[name] - alone),
            report.mebibytes(peaks[name]),
        )
        for name in states
    ]
    rows.append(_ratio(states, peaks, alone))
    title = f"Memory (parameters: {report.mebibytes(figures['params'])})"
    heads = ["", "optimizer state", "beyond Adafactor's own", "peak of a compiled micro-step"]
    memory = report.table(title, heads, rows)
    console.print(losses, memory)
    console.print(f"[bold]What it writes after[/bold] {PROMPT!r}:")
    console.print(figures["sample"], markup=False, highlight=False)
    lines = {"unigram": figures["unigram"]}
    title = f"{config.optimizer} on the standard library's source"
    report.curves(config.out, figures["history"], lines, title)
    (config.out / "sample.txt").write_text(figures["sample"])
    with (config.out / "report.txt").open("w") as file:
        Console(file=file, width=100).print(losses, memory)
    console.print(f"Curves, report and sample are in {config.out}.")


def _ratio(states: dict[str, int], peaks: dict[str, int], alone: int) -> tuple[str, str, str, str]:
    """First over second, of each column."""
    first, second = states

    def over(one: int, other: int) -> str:
        return f"{one / other:.3f}"

    return (
        f"{first} / {second}",
        over(states[first], states[second]),
        over(states[first] - alone, states[second] - alone),
        over(peaks[first], peaks[second]),
    )


def main(config: Config) -> None:
    console = Console()
    try:
        figures = train(config, console)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    show(config, figures, console)


if __name__ == "__main__":
    main(tyro.cli(Config))
