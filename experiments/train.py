"""This command trains a byte-level language model on the standard library's source, with Flora by default.

    python3 -m experiments                       # sets itself up; under three minutes on two cores
    python -m experiments.train --optimizer multisteps --out runs/multisteps

The same command goes on from its last checkpoint. At the end it shows a table (loss, bytes of optimizer
state, peak memory, seconds) beside what accumulation without compression would take, a picture of
the curves, and text that the model wrote.
"""

import contextlib
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import decoder, optimizers, report, text
from flora_jax import make_train_step, state_shardings
from flora_jax.chain.distributions import Distribution
from flora_jax.chain.plan import tree_bytes
from flora_jax.chain.projection import Side
from flora_jax.finetune import layout
from flora_jax.finetune.checkpoints import Checkpoints
from flora_jax.finetune.stopping import Stopped, told_to_stop
from flora_jax.memory.compiled import compiled_bytes
from flora_jax.models.decoder import Decoder
from flora_jax.update.ordinary_step import ordinary_step

PROMPT = "def read(self, "
HELD_OUT = 64
STORED = {"flora": 1.545, "multisteps": 1.829}
"""Validation losses at the default settings: `python -m experiments.train --optimizer NAME`, version 0.1.0."""
STORED_BY = "measured before"
NEXT = """What to do next:
- the same without compression: python3 -m experiments --optimizer multisteps --out runs/multisteps
- all settings: .venv/bin/python -m experiments.train --help
- Flora in a training loop of your own: docs/tutorial.md"""
FREE = [
    "out",
    "checkpoint",
    "evaluate_every",
    "checkpoint_every",
    "mesh",
    "distributed",
    "coordinator",
    "processes",
    "process",
]
"""Settings that may differ when a run goes on."""


@dataclass(frozen=True)
class Config:
    """The settings of one run."""

    optimizer: optimizers.Method = "flora"
    """The optimizer: `flora` as advised, `flora_adafactor` (Adafactor after `decompress`), or MultiSteps over Adafactor
    (`multisteps`), Muon, Adam or GaLore."""
    learning_rate: float = 0.06
    """Peak of a cosine schedule over the optimizer steps."""
    matrices: float = optimizers.MATRICES
    """The same for the matrices that `flora` orthogonalizes."""
    rank: int = 64
    """Rank of Flora's and GaLore's projections."""
    distribution: Distribution = "srtt"
    """Distribution of Flora's projections."""
    side: Side = "input"
    """The side of each matrix that Flora projects."""
    resample: int | None = None
    """Number of optimizer steps that share a projection, by default 64."""
    momentum: float | None = None
    """Decay of Flora's momentum: by default that of the advised preset, and none before Adafactor."""
    optimizer_steps: int = 250
    """Number of optimizer steps."""
    accumulation: int = 4
    """Number of micro-steps in an optimizer step."""
    batch: int = 8
    """Number of windows in a micro-step."""
    length: int = 128
    """Number of bytes in a window."""
    model: decoder.Shape = field(default_factory=decoder.Shape)
    """Shape of the model."""
    seed: int = 0
    """Seed of the weights, of the batches and of the projections."""
    out: Path = Path("runs/train")
    """Folder of checkpoints, table, curves and sample."""
    checkpoint: Path | None = None
    """Folder of the checkpoints, where it is another one; all hosts of a pod must see it."""
    evaluate_every: int = 25
    """Number of optimizer steps between validations."""
    checkpoint_every: int = 100
    """Number of micro-steps between checkpoints, which are written in the background."""
    mesh: str = ""
    """A mesh such as data=4,model=2 or data=2,fsdp=4, over which batch and weights are sharded."""
    distributed: bool = False
    """Whether this is one of several processes; on TPU pods and under SLURM they find each other."""
    coordinator: str | None = None
    """HOST:PORT of the first process, where the processes cannot find each other."""
    processes: int | None = None
    """Number of processes, where they cannot find each other."""
    process: int | None = None
    """Index of this process, where they cannot find each other."""

    def __post_init__(self):
        for name in (
            "rank",
            "optimizer_steps",
            "accumulation",
            "batch",
            "length",
            "evaluate_every",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")


def settings(config: Config, corpus: text.Corpus) -> dict[str, Any]:
    """Gives the settings that must be the same when the run goes on, on every host."""
    kept = {name: value for name, value in asdict(config).items() if name not in FREE}
    return {**kept, "text": corpus.digest()}


def transformation(config: Config, method: optimizers.Method):
    """Gives the optax transformation, and Flora's projection or None."""
    return optimizers.build(
        method,
        optimizers.cosine(config.learning_rate, config.optimizer_steps),
        accumulation=config.accumulation,
        rank=config.rank,
        distribution=config.distribution,
        side=config.side,
        matrices=optimizers.cosine(config.matrices, config.optimizer_steps),
        resample=config.resample,
        momentum=config.momentum,
        skip_nonfinite=True,
        seed=config.seed,
    )


def initial_state(config: Config, method: optimizers.Method, mesh: Mesh) -> tuple[Any, Any]:
    """Makes params and the optimizer's state, each with its sharding."""
    model = decoder.model(config.model)

    def make() -> Any:
        return model.init(jax.random.key(config.seed), jnp.zeros((1, 8), jnp.int32))["params"]

    shapes = jax.eval_shape(make)
    params = jax.jit(make, out_shardings=layout.of_params(mesh, shapes))()
    tx, _ = transformation(config, method)
    return params, jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)


def sharded_model(config: Config) -> Decoder:
    """Gives the model with the shardings of its activations; it runs with the mesh in context.

    Left to itself, XLA (of jax 0.10.2, on CPUs) computes rotary positions of heads that are sharded over
    a mesh of three axes wrongly.
    """
    return decoder.model(config.model, sharded=(layout.BATCH, "model"))


def make_step(config: Config, method: optimizers.Method):
    """Gives the step `(params, opt_state, windows) -> (params, opt_state, loss)`; the first two are donated."""
    loss = partial(decoder.loss, sharded_model(config))
    tx, projection = transformation(config, method)
    if projection is not None:
        return make_train_step(loss, tx, projection)
    return ordinary_step(loss, tx)


def peak(config: Config, method: optimizers.Method, mesh: Mesh, state: tuple[Any, Any]) -> int:
    """Gives the bytes of the compiled micro-step at its worst moment, on one device."""
    windows = jax.ShapeDtypeStruct(
        (config.batch, config.length + 1), jnp.int32, sharding=layout.of_batch(mesh)
    )
    step: Any = make_step(config, method)
    with jax.set_mesh(mesh):
        return compiled_bytes(step.lower(*state, windows).compile())


def train(config: Config, console: Console) -> dict[str, Any]:
    """Trains, or goes on, and gives the figures of the final table.

    Raises:
      Stopped: The run was told to stop by SIGTERM or Ctrl-C; the state is saved.
      ValueError: The mesh does not fit, or the folder has a run of other settings.
    """
    corpus = text.load()
    console.print(
        f"Python's standard library: {len(corpus.train):,} bytes of {corpus.files[0]} files to "
        f"train on, {len(corpus.validation):,} bytes of {corpus.files[1]} others to validate."
    )
    mesh = layout.make_mesh(config.mesh)
    parts = layout.parts(mesh)
    if config.batch % parts:
        raise ValueError(f"batch must be a multiple of data x fsdp, {parts}, found {config.batch}")
    if config.model.heads % mesh.shape["model"]:
        raise ValueError(
            f"heads must be a multiple of the mesh's model={mesh.shape['model']}, found "
            f"{config.model.heads}"
        )
    model = sharded_model(config)
    checkpoints = Checkpoints(config.checkpoint or config.out, settings(config, corpus))
    params, opt_state = initial_state(config, config.optimizer, mesh)
    step_of = make_step(config, config.optimizer)
    loss_of = jax.jit(lambda params, windows: decoder.loss(model, params, windows))
    place = layout.of_batch(mesh)
    held_out = [
        layout.put(layout.of_batch(mesh, HELD_OUT), windows)
        for windows in text.held_out(corpus, config.length, HELD_OUT)
    ]

    def evaluate(params) -> float:
        with jax.set_mesh(mesh):
            return float(np.mean([float(loss_of(params, windows)) for windows in held_out]))

    batches = text.stream(corpus.train, config.seed, config.batch, config.length)
    history: dict[str, Any] = {"train": [], "validation": [], "seconds": 0.0, "losses": []}
    history["data"] = batches.get_state()
    state = {"params": params, "opt_state": opt_state}
    first, state, history = checkpoints.restore(state, history)
    params, opt_state = state["params"], state["opt_state"]
    batches.set_state(history["data"])
    for sentence in checkpoints.passed_over:
        console.print(f"Passed over {sentence}.", markup=False)
    if first:
        console.print(f"Going on from micro-step {first}.")
    else:
        history["validation"].append((0, evaluate(params)))
    total = config.optimizer_steps * config.accumulation
    tokens = config.batch * config.length
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    quiet = jax.process_index() > 0
    bar = Progress(*columns, console=console, disable=quiet)
    with (
        contextlib.closing(checkpoints),
        jax.set_mesh(mesh),
        bar as progress,
        told_to_stop() as stop,
    ):
        task = progress.add_task(config.optimizer, total=total, completed=first, figures="")
        start, losses, before = time.perf_counter(), history["losses"], history["seconds"]
        for step in range(first, total):
            windows = layout.put(place, next(batches))
            params, opt_state, loss = step_of(params, opt_state, windows)
            losses.append(loss)
            checkpoints.seal()
            history["seconds"] = seconds = before + time.perf_counter() - start
            done = step + 1
            told = stop(done)
            if done % config.accumulation == 0:
                mean = float(np.mean([float(loss) for loss in losses]))
                losses.clear()
                history["train"].append((done * tokens, mean))
                resident = f"process {report.mebibytes(psutil.Process().memory_info().rss)}"
                figures = f"loss {mean:.3f}  {done * tokens / seconds:,.0f} tokens/s  {resident}"
                progress.update(task, completed=done, figures=figures)
            if done % (config.evaluate_every * config.accumulation) == 0 or done == total:
                history["validation"].append((done * tokens, evaluate(params)))
                start, before = time.perf_counter(), seconds
            if done % config.checkpoint_every == 0 or done == total or told:
                losses[:] = [float(loss) for loss in losses]
                history["data"] = batches.get_state()
                state = {"params": params, "opt_state": opt_state}
                checkpoints.save(done, state, history)
            if told and done < total:
                raise Stopped(f"Stopped at micro-step {done}, saved; the same command goes on.")
    return {
        "unigram": text.unigram_loss(corpus),
        "initial": history["validation"][0][1],
        "final": history["validation"][-1][1],
        "seconds": history["seconds"],
        "state": tree_bytes(opt_state),
        "peak": peak(config, config.optimizer, mesh, (params, opt_state)),
        "params": tree_bytes(params),
        "history": history,
        "sample": write(config, params) if jax.process_count() == 1 else "",
    }


def write(config: Config, params) -> str:
    """Gives the text that the model writes after a prompt."""
    model = decoder.model(config.model)
    prompt = ("\n" * config.length + PROMPT).encode()[-config.length :]
    tokens = jnp.asarray(np.frombuffer(prompt, np.uint8).astype(np.int32))[None]
    sample = jax.jit(partial(decoder.sample, model, count=240, heat=0.7))
    written = sample(jax.tree.map(np.asarray, params), tokens, key=jax.random.key(config.seed))
    return bytes(np.asarray(written[0], np.uint8)).decode(errors="replace").lstrip("\n")


def stored(config: Config, other: optimizers.Method) -> str:
    """Gives the loss of another optimizer that was measured before; a dash where the settings differ."""
    default = replace(Config(), **{name: getattr(config, name) for name in (*FREE, "optimizer")})
    return f"{STORED[other]:.3f}" if config == default and other in STORED else "-"


def show(config: Config, figures: dict[str, Any], console: Console) -> None:
    """Prints and saves the table, the picture and the sample."""
    rows = [
        ("byte frequencies alone (unigram)", f"{figures['unigram']:.3f}"),
        ("this model before training", f"{figures['initial']:.3f}"),
        (f"this model, {config.optimizer}, {figures['seconds']:.0f} s", f"{figures['final']:.3f}"),
    ]
    other: optimizers.Method = "multisteps" if config.optimizer != "multisteps" else "flora"
    rows.append((f"this model, {other}, {STORED_BY}", stored(config, other)))
    losses = report.table("Validation loss, nats per byte", ["", "loss"], rows)
    mesh = layout.make_mesh(config.mesh)
    state = initial_state(config, other, mesh)
    alone = tree_bytes(jax.eval_shape(optax.adafactor(1.0).init, state[0]))
    peaks = {
        config.optimizer: figures["peak"],
        other: peak(config, other, mesh, state),
    }
    states = {config.optimizer: figures["state"], other: tree_bytes(state[1])}
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
    console.print(
        f"[bold]What it writes after[/bold] {PROMPT!r} (a model of this size and loss has learned which "
        "characters make words, and not what they mean: the text looks like Python and says nothing):"
    )
    console.print(figures["sample"], markup=False, highlight=False)
    lines = {"unigram": figures["unigram"]}
    title = f"{config.optimizer} on the standard library's source"
    report.curves(config.out, figures["history"], lines, title)
    (config.out / "sample.txt").write_text(figures["sample"])
    with (config.out / "report.txt").open("w") as file:
        Console(file=file, width=100).print(losses, memory)
    console.print(f"Curves, report and sample are in {config.out}.")
    console.print(NEXT, markup=False, highlight=False)


def _ratio(states: dict[str, int], peaks: dict[str, int], alone: int) -> tuple[str, str, str, str]:
    """Gives the ratio of the first row to the second, for each column."""
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
    if config.distributed:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    console = Console(quiet=jax.process_index() > 0)
    try:
        figures = train(config, console)
    except (ValueError, Stopped) as error:
        raise SystemExit(str(error)) from error
    if jax.process_count() == 1:
        show(config, figures, console)
    else:
        console.print(f"Validation loss {figures['initial']:.3f}, then {figures['final']:.3f}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
