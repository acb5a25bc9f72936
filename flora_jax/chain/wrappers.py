"""Wrappers: optax's transformations around a chain, found by the call stack while it is traced."""

import sys
import warnings
from collections.abc import Iterable
from types import CodeType

import jax

from flora_jax.chain.sketch import is_sketch

AFTER = "put it after flora_jax.decompress, as flora_jax.flora(None, optimizer=optax.chain({name}(...), ...))"
WAYS = {
    "apply_if_finite": "give flora_jax.flora skip_nonfinite=True in its place",
    "MultiSteps": "give flora_jax.flora accumulation_steps in its place",
    "conditionally_transform": AFTER,
    "conditionally_mask": AFTER,
}
"""What to do in place of a wrapper."""


def way(name: str) -> str:
    """Returns what to do in place of giving sketches to the transformation of this name."""
    return f"optax.{name} cannot take sketches; {WAYS.get(name, AFTER).format(name=name)}"


def refuse_sketches() -> None:
    """Raises a ValueError if one of optax's wrappers that cannot take sketches is calling."""
    for name in _calling():
        if name in WAYS:
            raise ValueError(way(name))


def refuse_states_of_sketches() -> None:
    """Raises a ValueError if a transformation before this one, in optax's chain, has put sketches into its state.

    Its state would have another structure than before, which a loop under `jax.jit` cannot carry.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if name_of(frame.f_code) == "chain":
            for state in frame.f_locals.get("new_state", ()):
                if any(map(is_sketch, jax.tree.leaves(state, is_leaf=is_sketch))):
                    name = type(state).__name__.removesuffix("State")
                    raise ValueError(
                        way("".join(f"_{c.lower()}" if c.isupper() else c for c in name)[1:])
                    )
        frame = frame.f_back


def warn_of_multisteps() -> bool:
    """Warns if `optax.MultiSteps` is calling, and returns whether it is."""
    if "MultiSteps" not in _calling():
        return False
    warnings.warn(
        "optax.MultiSteps around flora keeps an accumulator as large as the params; give flora_jax.flora "
        "accumulation_steps in its place, which accumulates sketches",
        UserWarning,
        stacklevel=3,
    )
    return True


def name_of(code: CodeType) -> str | None:
    """Returns the name of the function or class of optax that this code is in, or None."""
    parts = code.co_filename.replace("\\", "/").split("/")
    return code.co_qualname.split(".")[0] if "optax" in parts else None


def _calling() -> Iterable[str]:
    """Yields the names of optax's functions and classes on the call stack, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        if name := name_of(frame.f_code):
            yield name
        frame = frame.f_back
