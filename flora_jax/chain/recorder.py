"""Recorder: which leaves the transformations of a chain compress, found by tracing the chain."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import optax

from flora_jax.chain.projection import Projection

_paths: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("paths", default=None)
_outlines = contextvars.ContextVar("outlines", default=False)


def note(path: str) -> None:
    """Records that `project` or `decompress` handles the sketch of this leaf."""
    paths = _paths.get()
    if paths is not None:
        paths.add(path)


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
