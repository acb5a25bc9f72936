"""Recorder: which leaves the transformations of a chain compress, and with which settings, found by tracing the chain."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import optax

from flora_jax.chain.projection import Projection

_paths: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("paths", default=None)
_choices: contextvars.ContextVar[list[tuple[str, Any]] | None] = contextvars.ContextVar(
    "choices", default=None
)
_outlines = contextvars.ContextVar("outlines", default=False)


def note(path: str) -> None:
    """Records that `project` or `decompress` handles the sketch of this leaf."""
    paths = _paths.get()
    if paths is not None:
        paths.add(path)


def note_choice(name: str, value: Any) -> None:
    """Records a setting of a transformation of the chain."""
    choices = _choices.get()
    if choices is not None:
        choices.append((name, value))


def outlines() -> bool:
    """Returns whether only shapes matter, so that nothing need be multiplied by `A`."""
    return _outlines.get()


@contextlib.contextmanager
def recording(outlines: bool = False) -> Iterator[set[str]]:
    """Yields the set to which the leaves are added that are handled inside this context.

    Args:
      outlines: Whether only the shapes of what is traced inside matter.
    """
    paths: set[str] = set()
    tokens = _paths.set(paths), _outlines.set(outlines)
    try:
        yield paths
    finally:
        _paths.reset(tokens[0])
        _outlines.reset(tokens[1])


def compressed(
    tx: optax.GradientTransformation, opt_state: Any, params: Any, **extra_args: Any
) -> set[str]:
    """Returns the names of the leaves that `tx` compresses where it is given ordinary gradients."""
    update = optax.with_extra_args_support(tx).update
    with recording(outlines=True) as paths:
        jax.eval_shape(
            lambda grads, state, params: update(grads, state, params, **extra_args),
            params,
            opt_state,
            params,
        )
    return paths


def restricted(
    projection: Projection, tx: optax.GradientTransformation, opt_state: Any, params: Any
) -> Projection:
    """Returns the projection for the leaves alone that `tx` compresses, such as those that `optax.multi_transform` gives to flora."""
    paths, own = compressed(tx, opt_state, params), projection.select

    def select(path: str, shape: tuple[int, ...]) -> bool:
        return path in paths and (own is None or own(path, shape))

    return dataclasses.replace(projection, select=select)


def settings(tx: optax.GradientTransformation, params: Any) -> tuple[Any, Any]:
    """Returns the projection of a chain, and the number of micro-steps in an optimizer step, or its schedule.

    Args:
      tx: A chain with at most one `project` and one `accumulate`.
      params: Params that it is for, or their shapes.

    Returns:
      The `Projection`, or None where nothing projects; the number, 1 where nothing accumulates.

    Raises:
      ValueError: There are two different ones of either.
    """
    choices: list[tuple[str, Any]] = []
    token = _choices.set(choices)
    try:
        compressed(tx, jax.eval_shape(tx.init, params), params)
    finally:
        _choices.reset(token)
    found = []
    for kind, default in (("projection", None), ("accumulation_steps", 1)):
        own = [value for name, value in choices if name == kind]
        if any(value != own[0] for value in own):
            raise ValueError(f"a chain must have one {kind}, found {len(own)}")
        found.append(own[0] if own else default)
    return found[0], found[1]
