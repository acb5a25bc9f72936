"""Interpreter: evaluates a function's jaxpr with some of its inputs replaced by `Weight`s.

Only operations on weights are interpreted; all others are bound unchanged. An operation that has no
rule receives the weight as a plain array, whose full gradient is then materialized, and is noted for
the plan.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from flora_jax.chain.plan import Use
from flora_jax.fused.lazy import Lazy
from flora_jax.fused.weight import Joined, Weight, expose


class Traced(NamedTuple):
    """A value during the evaluation.

    Attributes:
      value: An array, a `Weight`, or weights that are `Joined`.
      active: Whether a gradient may flow through it.
      broadcast: The operand and its `broadcast_dimensions`, where the value is that operand broadcast.
    """

    value: Any
    active: bool
    broadcast: tuple[Any, tuple[int, ...]] | None = None


@dataclasses.dataclass
class Walk:
    """One evaluation of a jaxpr, from its first equation to its last.

    Attributes:
      rules: The rules by the name of the primitive. Each is a function `(walk, equation, inputs)` that
        returns the outputs, or None where it does not apply after all.
      uses: The uses of weights seen so far, in order and without repetition.
    """

    rules: Mapping[str, Callable[["Walk", Any, list[Traced]], list[Traced] | None]]
    uses: dict[Use, None] = dataclasses.field(default_factory=dict)

    def note(self, eqn: Any, inputs: Sequence[Traced], whole: bool) -> None:
        """Adds a use of the weights among the inputs; `whole` says that a full gradient is materialized."""
        place = _place(eqn)
        for traced in inputs:
            value = traced.value
            for part in value.parts if isinstance(value, Joined) else (value,):
                if isinstance(part, Weight) and not part.looked_up:
                    self.uses.setdefault(Use(part.spec.path, eqn.primitive.name, place, whole))

    def run(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Traced]) -> list[Traced]:
        """Evaluates an open jaxpr. Its `consts` are not differentiated."""
        values: dict[Any, Traced] = {}

        def read(atom) -> Traced:
            return Traced(atom.val, False) if isinstance(atom, core.Literal) else values[atom]

        values.update(zip(jaxpr.constvars, (Traced(const, False) for const in consts), strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            with eqn.ctx.manager:  # it says which axes of a mesh are explicit there
                outs = self.step(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: Any, ins: list[Traced]) -> list[Traced]:
        """Evaluates one equation."""
        if not any(isinstance(traced.value, Weight | Joined) for traced in ins):
            return bind(eqn, ins)
        joined = any(isinstance(traced.value, Joined) for traced in ins)
        rule = self.rules.get("joined" if joined else eqn.primitive.name)
        ins = _materialized(eqn, ins)
        outs = rule(self, eqn, ins) if rule else None
        if outs is None:
            self.note(eqn, ins, whole=True)
            outs = bind(eqn, exposed(ins))
        return outs


def apply(eqn: Any, *values: Any, **changes: Any) -> Any:
    """Applies an equation's primitive to values, with some of its params changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    functions, params = params if isinstance(params, tuple) else ((), params)
    return eqn.primitive.bind(*functions, *values, **params)


def bind(eqn: Any, ins: Sequence[Traced]) -> list[Traced]:
    """Evaluates an equation on plain arrays."""
    result = apply(eqn, *(traced.value for traced in ins))
    results = result if eqn.primitive.multiple_results else [result]
    active = any(traced.active for traced in ins) and eqn.primitive.name != "stop_gradient"
    broadcast = None
    if eqn.primitive.name == "broadcast_in_dim":
        broadcast = (ins[0].value, eqn.params["broadcast_dimensions"])
    return [Traced(value, active and is_inexact(value), broadcast) for value in results]


def exposed(ins: Sequence[Traced]) -> list[Traced]:
    """Returns the same values with plain arrays in the place of weights."""
    return [
        Traced(_exposed(traced.value), True)
        if isinstance(traced.value, Weight | Joined)
        else traced
        for traced in ins
    ]


def _exposed(value: Any) -> Any:
    if isinstance(value, Joined):
        return jnp.concatenate([_exposed(part) for part in value.parts], value.axis)
    return expose(value) if isinstance(value, Weight) else value


def _materialized(eqn: Any, ins: list[Traced]) -> list[Traced]:
    """Computes `Lazy` values, unless the operation has a use for them as they are."""
    if eqn.primitive.name in _LAZY_USES:
        return ins

    def materialize(traced: Traced) -> Traced:
        weight = traced.value
        if isinstance(weight, Weight) and isinstance(weight.value, Lazy):
            weight = weight.replace(value=weight.value.materialize())
        return traced._replace(value=weight)

    return [materialize(traced) for traced in ins]


_LAZY_USES = {
    "convert_element_type",
    "dot_general",
    "scan",
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat2",
    "checkpoint",
    "cond",
}


def is_inexact(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.inexact)


def _place(eqn: Any) -> str:
    """Returns the file and line of the innermost frame that does not belong to a library."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    frames = getattr(traceback, "frames", None) or []
    for frame in frames:
        if not any(part in frame.file_name for part in _LIBRARIES):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


_LIBRARIES = ("/jax/_src/", "/jax/", "/flax/", "/equinox/", "/jaxtyping/", "/flora_jax/", "<frozen")
