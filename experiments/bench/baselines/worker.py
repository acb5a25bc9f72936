"""Each method runs in a process of its own, so that frameworks do not meet, and works only when it is asked.

The process that asks does so with one method at a time, so that what is timed has the machine to
itself as far as this command goes.
"""

import importlib.metadata
import logging
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from experiments import text
from experiments.bench.baselines.methods import METHODS, Size


class Failed(Exception):
    """A method cannot run here; the message is one sentence for its row."""


def missing(key: str) -> str | None:
    """Gives a sentence on the package that a method lacks, or None."""
    for package in METHODS[key].packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed (extra `baselines`)"
    return None


def open_run(key: str, size: Size, folder: Path, optimizer_steps: int | None = None) -> Any:
    """Opens the method, of either framework, on the weights in `folder`."""
    limit = {} if optimizer_steps is None else {"optimizer_steps": optimizer_steps}
    if METHODS[key].framework == "torch":
        from experiments.bench.baselines import in_torch

        return in_torch.Run(key, size, folder, **limit)
    from experiments.bench.baselines import in_jax

    return in_jax.Run(key, size, folder, **limit)


def train(
    run: Any,
    size: Size,
    corpus: text.Corpus,
    optimizer_steps: int,
    rate: float,
    folder: Path,
    seed: int,
) -> float:
    """Trains for so many accumulated steps at this peak learning rate, and gives the validation loss, nats per byte.

    The weights in `folder` are those that it begins from, and `seed` is that of the batches.
    """
    run.reset(rate, folder)
    for i in range(optimizer_steps * size.accumulation):
        run.step(size.windows(corpus, i, seed))
    return float(np.mean([run.evaluate(windows) for windows in size.held_out(corpus)]))


class Worker:
    """A context manager: a child process with one open run, on so many cores (0 means all)."""

    def __init__(
        self, key: str, size: Size, folder: Path, cores: int = 0, optimizer_steps: int | None = None
    ):
        if sentence := missing(key):
            raise Failed(sentence)
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, key, size, folder, cores, optimizer_steps)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        try:
            self._answer()
        except Failed:
            self.close()
            raise

    def ask(self, command: str, *arguments: Any) -> Any:
        """Gives the child's answer to `step`, `sample`, `state_bytes`, `peak_bytes` or `train`."""
        self.connection.send((command, *arguments))
        return self._answer()

    def close(self) -> None:
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            fine, answer = self.connection.recv()
        except EOFError:
            raise Failed("its process ended without an answer") from None
        if not fine:
            raise Failed(answer)
        return answer


def _serve(
    connection: Connection,
    key: str,
    size: Size,
    folder: Path,
    cores: int,
    optimizer_steps: int | None,
) -> None:
    if cores:  # before a framework counts them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler talks
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that nobody uses here
    corpus = text.load()
    run: Any = None
    command: tuple[Any, ...] = ("open",)
    while True:
        try:
            match command:
                case ("open",):
                    run, answer = open_run(key, size, folder, optimizer_steps), None
                case ("step", step):
                    windows, start = size.windows(corpus, step), time.perf_counter()
                    run.step(windows)
                    answer = time.perf_counter() - start
                case ("sample",):
                    start = time.perf_counter()
                    sampled = run.sample()
                    answer = time.perf_counter() - start if sampled else None
                case ("train", *arguments):
                    answer = train(run, size, corpus, optimizer_steps or 1, *arguments)
                case ("state_bytes",):
                    answer = run.state_bytes()
                case ("peak_bytes",):
                    answer = run.peak_bytes(size.windows(corpus, 0))
                case _:
                    raise ValueError(f"command must be one that a worker knows, found {command}")
            connection.send((True, answer))
        except Exception as error:
            connection.send(
                (False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            )
        try:
            command = connection.recv()
        except EOFError:
            return
