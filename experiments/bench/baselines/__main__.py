"""This command compares Flora with its baselines, interleaved in one run on this CPU.

    python -m experiments.bench.baselines --out runs/baselines   # some fifty minutes on two cores
    python -m experiments.bench.baselines --only multisteps flora muon
    python -m experiments.bench.baselines --write                # also into docs/

There are three parts. Each finished piece is a line of `results.jsonl`, so that the same command goes on where it
stopped. *Time*: each method has a process of its own, and the methods take one micro-step in turn; ratios are to
MultiSteps over Adafactor in the same round. Bytes between micro-steps are counted from the arrays; the peak is XLA's
count for the compiled step, or what torch's allocator held. *Loss*: all methods have the same weights, batches and
tokens; for each method the table has the best of a grid of learning rates, which grows by factors of two while the
best one lies at its edge, on the first seed. The other seeds, of weights and batches, have the best one. *TPU*: the step is compiled where `libtpu` is installed. A method whose package is not
installed has a sentence that says so in its row.
"""

import dataclasses
import functools
import json
import math
import os
import platform
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from rich.console import Console

from experiments import rates
from experiments.bench import records
from experiments.bench.baselines import hbm, in_jax, page
from experiments.bench.baselines.methods import BASE, METHODS, Size
from experiments.bench.baselines.worker import Failed, Worker, missing


@dataclass(frozen=True)
class Config:
    """The settings of the comparison."""

    out: Path = Path("runs/baselines")
    """The folder of the results."""
    only: tuple[str, ...] = tuple(METHODS)
    """Short names of the methods to compare; MultiSteps + Adafactor is always among them."""
    time: Size = dataclasses.field(default_factory=lambda: Size(512, 2, 4, 128, 64))
    """Sizes of the model and the micro-step that are timed."""
    loss: Size = dataclasses.field(default_factory=lambda: Size(128, 2, 4, 64, 16))
    """Sizes of the model and the micro-step of the training runs."""
    rounds: int = 7
    """Number of timed cycles, after one that compiles."""
    optimizer_steps: int = 250
    """Number of optimizer steps in a training run."""
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Peak learning rates, as multiples of each method's own."""
    wider: int = 3
    """How often a grid may grow."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the weights and of the batches of the training runs."""
    tpu: hbm.Config = dataclasses.field(default_factory=hbm.Config)
    """What is compiled for a TPU."""
    cores: int = 0
    """Number of cores that each process may use; 0 means all. Where others work on the machine, 1 is fair: torch's
    threads wait for each other at barriers, and so for cores that others have."""
    note: str = ""
    """A sentence for the record on what else the machine did."""
    write: bool = False
    """Keep the record in docs/baselines.json, and write the page and its picture."""

    def __post_init__(self):
        for key in self.only:
            if key not in METHODS:
                raise ValueError(f"only must name some of {', '.join(METHODS)}, found {key!r}")
        if not 0 <= self.cores <= len(os.sched_getaffinity(0)):
            most = len(os.sched_getaffinity(0))
            raise ValueError(f"cores must be from 0 to {most}, found {self.cores}")
        for name in ("rounds", "optimizer_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates must be some positive numbers, found {self.rates}")

    def chosen(self) -> list[str]:
        return [key for key in METHODS if key in (BASE, *self.only)]


class Log:
    """A file of JSON lines, each with the part and the setting that it belongs to."""

    def __init__(self, file: Path):
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.lines = [json.loads(line) for line in lines]
        self.failed: dict[str, str] = {}
        """A sentence for each method that could not run. It is not kept, since the method may run next time."""

    def find(self, part: str, setting: dict[str, Any]) -> list[dict[str, Any]]:
        return [x for x in self.lines if (x["part"], x["setting"]) == (part, setting)]

    def add(self, part: str, setting: dict[str, Any], **figures: Any) -> None:
        self.lines.append({"part": part, "setting": setting, **figures})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")


def measure_time(config: Config, log: Log, console: Console) -> list[dict[str, Any]]:
    """Measures seconds and bytes of every method in one interleaved run."""
    setting = {**dataclasses.asdict(config.time), "rounds": config.rounds, "cores": config.cores}
    found = {x["method"]: x for x in log.find("time", setting)}
    if all(key in found for key in config.chosen() if not missing(key)):
        return list(found.values())
    size = config.time
    folder = config.out / f"weights-{size.width}-{size.layers}"
    in_jax.save(folder, size)
    workers: dict[str, Worker] = {}
    load = os.getloadavg()[0]

    def drop(key: str, error: Failed) -> None:
        if key == BASE:
            raise error
        log.failed[key] = str(error)
        console.print(f"{METHODS[key].name}: {error}", highlight=False)
        if key in workers:
            workers.pop(key).close()

    def ask(*command: Any) -> dict[str, Any]:
        """Asks all methods, one after the other; a method that fails is left out from here on."""
        answers = {}
        for key in list(workers):
            try:
                answers[key] = workers[key].ask(*command)
            except Failed as error:
                drop(key, error)
        return answers

    try:
        for key in config.chosen():
            try:
                workers[key] = Worker(key, size, folder, config.cores)
            except Failed as error:
                drop(key, error)
        rounds, state, step = [], {}, 0
        for round_ in range(config.rounds + 1):
            steps = []
            for place in range(size.accumulation):
                steps.append(ask("step", step))
                step += 1
                if round_ == 1 and place == 0:  # between micro-steps, all of the state there
                    state = ask("state_bytes")
            rounds.append((steps, ask("sample")))
            console.print(f"round {round_} of {config.rounds}", highlight=False)
        peaks = ask("peak_bytes")

        def of(key: str) -> list[dict[str, Any]]:
            return [
                {
                    "micro": [one[key] for one in steps[:-1]],
                    "optimizer_step": steps[-1][key],
                    "sample": sampling[key],
                }
                for steps, sampling in rounds
            ]

        for key, peak in peaks.items():
            sizes = {"state": state[key], "peak": peak}
            loads = [load, os.getloadavg()[0]]
            log.add("time", setting, method=key, **figures(of(key), of(BASE)), **sizes, load=loads)
    finally:
        for worker in workers.values():
            worker.close()
    return log.find("time", setting)


def figures(rounds: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Gives medians over the rounds after the first, and medians of the ratios to `base` in the same round."""

    def one(what: str, round_: dict[str, Any]) -> float:
        return median(round_["micro"]) if what == "micro" else round_[what]

    result: dict[str, Any] = {"first_optimizer_step": rounds[0]["optimizer_step"]}
    for what in ("micro", "optimizer_step"):
        ratios = [
            one(what, mine) / one(what, other)
            for mine, other in zip(rounds[1:], base[1:], strict=True)
        ]
        result[what] = median(one(what, round_) for round_ in rounds[1:])
        result[f"{what}_ratio"] = median(ratios)
        result[f"{what}_range"] = [min(ratios), max(ratios)]
    if rounds[0]["sample"] is not None:
        result["sample"] = median(round_["sample"] for round_ in rounds[1:])
        result["sample_share"] = median(
            round_["sample"] / one("micro", round_) for round_ in rounds[1:]
        )
    return result


def measure_loss(config: Config, log: Log, console: Console) -> list[dict[str, Any]]:
    """Trains every method at every learning rate of its grid, and gives the validation losses."""
    size = config.loss
    setting = {**dataclasses.asdict(size), "optimizer_steps": config.optimizer_steps}
    folders = {
        seed: config.out / f"weights-{size.width}-{size.layers}-{seed}" for seed in config.seeds
    }
    for seed, folder in folders.items():
        in_jax.save(folder, size, seed)
    for key in config.chosen():
        try:
            _search(config, log, console, key, folders, setting)
        except Failed as error:
            log.failed[key] = str(error)
    return log.find("loss", setting)


def _search(
    config: Config,
    log: Log,
    console: Console,
    key: str,
    folders: dict[int, Path],
    setting: dict[str, Any],
) -> None:
    """Trains one method: on the first seed at the rates of its grid, on the others at the best of them."""
    losses = {
        (x["seed"], x["rate"]): math.inf if x["loss"] is None else x["loss"]
        for x in log.find("loss", setting)
        if x["method"] == key
    }
    first, *others = config.seeds
    with ExitStack() as stack:

        @functools.cache
        def worker() -> Worker:
            opened = Worker(key, config.loss, folders[first], config.cores, config.optimizer_steps)
            return stack.enter_context(opened)

        def train(seed: int, rate: float) -> None:
            if (seed, rate) in losses:
                return
            loss = worker().ask("train", rate, folders[seed], seed)
            losses[seed, rate] = loss if math.isfinite(loss) else math.inf
            kept = loss if math.isfinite(loss) else None
            log.add("loss", setting, method=key, seed=seed, rate=rate, loss=kept)
            told = f"{METHODS[key].name}, rate {rate:g}, seed {seed}: {loss:.4f}"
            console.print(told, highlight=False)

        while True:
            found = {rate: loss for (seed, rate), loss in losses.items() if seed == first}
            rate = next_rate(METHODS[key].rate, config.rates, found, config.wider)
            if rate is None:
                break
            train(first, rate)
        for seed in others:
            train(seed, min(found, key=found.__getitem__))


def next_rate(
    middle: float, multiples: tuple[float, ...], losses: dict[float, float], wider: int
) -> float | None:
    """Gives the grid's first rate without a loss; then twice or half the best one while that is at an edge."""
    grid = [float(f"{middle * multiple:.6g}") for multiple in multiples]

    def beyond(edge: float, beside: float) -> float:
        return float(f"{edge * (2 if edge >= beside else 0.5):.6g}")

    return rates.next_rate(grid, losses, wider, beyond)


def measure_tpu(config: Config, log: Log, console: Console) -> list[dict[str, Any]]:
    """Gives the GiB that the step of every JAX method takes, compiled for a TPU."""
    if not config.tpu.model:
        return []
    if sentence := hbm.absent():
        console.print(sentence)
        return []
    setting = hbm.setting(config.tpu)
    done = {x["method"] for x in log.find("tpu", setting)}
    for key in config.chosen():
        if key in hbm.METHODS and key not in done:
            gib = hbm.gib(config.tpu, key)
            log.add("tpu", setting, method=key, gib=gib)
            console.print(f"{METHODS[key].name}: {gib} GiB", highlight=False)
    return log.find("tpu", setting)


def main(config: Config) -> None:
    console = Console(width=120)
    config.out.mkdir(parents=True, exist_ok=True)
    log = Log(config.out / "results.jsonl")
    parts = {
        "time": measure_time(config, log, console),
        "loss": measure_loss(config, log, console),
        "tpu": measure_tpu(config, log, console),
    }
    record = {
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "versions": page.versions(),
            "note": config.note,
        },
        "absent": log.failed,
        "time": page.settled(parts["time"]),
        "loss": page.settled(parts["loss"]),
        "tpu": page.settled(parts["tpu"]),
    }
    records.keep(record, config.out / "baselines.json")
    (config.out / "baselines.md").write_text(page.full(record))
    page.picture(record, config.out / "baselines")
    console.print(page.full(record), markup=False, highlight=False)
    if config.write:
        records.keep(record, page.RECORD)
        page.write()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
