"""Stopping: a run hears that it shall stop, and all of its processes stop at one step."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """The run was told to stop, and has saved its state."""


@contextlib.contextmanager
def told_to_stop() -> Iterator[Callable[[int], bool]]:
    """Gives a function that says whether to stop after so many micro-steps; all processes ask it after each.

    SIGTERM, the notice before a preemption, and Ctrl-C are heard. Of several processes it is enough
    that one hears: JAX, which has its own handler of SIGTERM there, lets all agree on a micro-step.
    """
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        handlers, stop = {}, lambda _: False
    elif jax.process_count() > 1:
        handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        stop = multihost_utils.reached_preemption_sync_point
    else:
        handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), lambda n, _: told.append(n))
        stop = lambda _: bool(told)  # noqa: E731
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
