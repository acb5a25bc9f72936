"""Steps are timed in turn, in one process, so that what else the machine does meets all of them alike."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp


def seconds(
    steps: Mapping[str, tuple[Any, Any, Any]], batch: tuple[Any, ...], rounds: int, kinds: int = 1
) -> dict[str, list[float]]:
    """Gives the median seconds of each step.

    Args:
      steps: For each name a step `(params, state, *batch) -> (params, state, loss)`, which may overwrite what it gets,
        its params, which are copied, and its state.
      batch: What all steps are given.
      rounds: The number of times that a step of each kind is timed, after one that is not.
      kinds: The number of steps that take turns in what they do, such as micro-steps with and without an optimizer step.

    Returns:
      For each name the medians of each kind.
    """
    held = {
        name: (step, jax.tree.map(jnp.copy, params), state)
        for name, (step, params, state) in steps.items()
    }
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(kinds)] for name in held}
    for count in range(kinds * (rounds + 1)):
        for name, (step, params, state) in held.items():
            start = time.perf_counter()
            params, state, _ = jax.block_until_ready(step(params, state, *batch))
            if count >= kinds:  # the first ones compile
                found[name][count % kinds].append(time.perf_counter() - start)
            held[name] = (step, params, state)
    return {name: [median(one) for one in each] for name, each in found.items()}
