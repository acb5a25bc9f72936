"""What the rules share: the inputs of an operation as arrays, and the weights among them."""

from collections.abc import Sequence
from typing import Any

from flora_jax.fused.interpreter import Traced
from flora_jax.fused.weight import Weight


def plain(ins: Sequence[Traced]) -> list[Any]:
    """The inputs as arrays that carry no gradient for weights."""
    return [t.value.value if isinstance(t.value, Weight) else t.value for t in ins]


def handed_on(weight: Weight) -> list[Traced]:
    return [Traced(weight, True)]


def is_kept(traced: Traced) -> bool:
    """Whether it is an adapted weight, whose value alone is not all of it."""
    return isinstance(traced.value, Weight) and traced.value.kept


def only_first(ins: Sequence[Traced]) -> bool:
    return not any(isinstance(traced.value, Weight) for traced in ins[1:])
