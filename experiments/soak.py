"""This command kills a training run with SIGKILL again and again, and compares its result with an undisturbed run.

    python -m experiments.soak --kills 50

Some kills come at a random moment, others as soon as a checkpoint is being written. Each run is
started again until it ends; then the next begins, until there were enough kills. The params and the
state in the end must be those of the undisturbed run, to the last bit.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro
from rich.console import Console

from experiments import report

SMALL = {"rank": 16, "model.width": 128, "model.layers": 1, "model.heads": 2}
RUN = {
    **SMALL,
    "optimizer-steps": 40,
    "accumulation": 3,
    "batch": 2,
    "length": 32,
    "evaluate-every": 40,
    "checkpoint-every": 4,
}
STEPS = 120


@dataclass(frozen=True)
class Config:
    """The settings of the kills."""

    kills: int = 50
    """Number of kills."""
    folder: Path | None = None
    """The folder of the runs; a temporary one by default."""
    seed: int = 0
    """Seed of the moments at which runs are killed."""


@dataclass
class Tally:
    """Counts of what has happened.

    Attributes:
      kills: Number of kills.
      saving: Number of kills while a checkpoint was being written.
      runs: Number of runs that came to their end.
      differing: Number of runs with another result than the undisturbed one.
      resumed: The micro-steps at which a run went on.
    """

    kills: int = 0
    saving: int = 0
    runs: int = 0
    differing: int = 0
    resumed: list[int] = field(default_factory=list)


def start(settings: dict[str, Any], environment: dict[str, str], *flags: str, **streams: Any):
    """Starts the main job as a process of its own."""
    named = (f"--{name}={value}" for name, value in settings.items())
    command = [sys.executable, "-m", "experiments.train", *named, *flags]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stderr=subprocess.STDOUT, **streams
    )


def start_logged(out: Path, cache: Path, log: Path) -> subprocess.Popen:
    """Starts a run that writes to a log, with a cache of compiled programs."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with log.open("a") as stream:
        return start({"out": out, **RUN}, environment, stdout=stream)


def final_state(out: Path, step: int) -> Any:
    """Reads every array of a checkpoint, without this package."""
    with ocp.CheckpointManager((out / "states").absolute()) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return jax.tree.map(np.asarray, manager.restore(step, args=args)["state"])


def result(out: Path) -> list[np.ndarray]:
    """Gives params and state at the end of a run."""
    return jax.tree.leaves(final_state(out, STEPS))


def is_saving(out: Path, since: float) -> bool:
    """Says whether there is a half-written step that was begun after this time."""
    try:
        states = (out / "states").iterdir()
        return any("tmp" in path.name and path.stat().st_mtime > since for path in states)
    except FileNotFoundError:  # not begun, or finished while we looked
        return False


def kill(process: subprocess.Popen, out: Path, tally: Tally, chance: random.Random) -> bool:
    """Kills the process, half of the times while it saves; gives False where it has ended before."""
    since = time.time()
    while process.poll() is None and not is_saving(out, since):  # until it trains
        time.sleep(0.002)
    until, aimed = time.time() + chance.uniform(0, 3), chance.random() < 0.5
    while process.poll() is None and time.time() < until:
        time.sleep(0.002)
    while aimed and process.poll() is None and not is_saving(out, until):
        time.sleep(0.002)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    tally.kills += 1
    tally.saving += is_saving(out, since)
    return True


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    """Says whether all arrays are equal to the last bit."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(left, right, strict=True)
    )


def soak(config: Config, folder: Path, console: Console) -> Tally:
    """Runs and kills until there were enough kills.

    Raises:
      RuntimeError: A run ended with an error of its own.
    """
    cache, chance, tally = folder / "cache", random.Random(config.seed), Tally()
    alone = folder / "alone"
    log = folder / "alone.log"
    if start_logged(alone, cache, log).wait():
        raise RuntimeError(log.read_text())
    expected = result(alone)
    while tally.kills < config.kills:
        out, log = folder / f"run-{tally.runs}", folder / f"run-{tally.runs}.log"
        while True:
            process = start_logged(out, cache, log)
            if tally.kills < config.kills and kill(process, out, tally, chance):
                console.print(f"killed {tally.kills}, of which saving {tally.saving}")
            elif process.wait():
                raise RuntimeError(log.read_text())
            else:
                break
        lines = [line for line in log.read_text().splitlines() if line.startswith("Going on")]
        tally.resumed += [int(line.split()[-1].rstrip(".")) for line in lines]
        tally.runs += 1
        tally.differing += not same(result(out), expected)
    return tally


def main(config: Config) -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tally = soak(config, folder, console)
    resumed = tally.resumed
    rows = [
        ("kills", str(tally.kills)),
        ("of them while saving", str(tally.saving)),
        ("resumed from a checkpoint", str(len(resumed))),
        ("of them in the middle of a cycle", str(sum(step % 3 > 0 for step in resumed))),
        ("runs to the end", str(tally.runs)),
        ("of them not bit-equal", str(tally.differing)),
    ]
    console.print(report.table("Soak", ["", "times"], rows))
    if tally.differing or not resumed:
        raise SystemExit("A resumed run differs from the undisturbed one, or none was resumed.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
