"""Common: what the rules share, the inputs of an operation as arrays, and the weights among them."""

from collections.abc import Sequence
from typing import Any

from flora_jax.fused.interpreter import Traced
from flora_jax.fused.weight import Weight


def plain(ins: Sequence[Traced]) -> list[Any]:
    """Returns the inputs as arrays, of which the weights have no gradient."""
    return [t.value.value if isinstance(t.value, Weight) else t.value for t in ins]


def handed_on(weight: Weight) -> list[Traced]:
    """Returns a weight as the only output of an operation."""
    return [Traced(weight, True)]


def is_adapted(traced: Traced) -> bool:
    """Returns whether it is a weight with an adapter, of which the value is only a part."""
    return isinstance(traced.value, Weight) and traced.value.adapter


def only_first(ins: Sequence[Traced]) -> bool:
    """Returns whether no input but the first is a weight."""
    return not any(isinstance(traced.value, Weight) for traced in ins[1:])
