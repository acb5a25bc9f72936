"""The walk over a function's jaxpr with some of its inputs replaced by `Weight`s.

Only what a weight touches is interpreted; all else is bound as it stands. An operation that has no
rule gets the weight exposed, and is noted.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from flora_jax.chain.plan import Use
from flora_jax.fused.made import Made
from flora_jax.fused.weight import Joined, Weight, expose


class Traced(NamedTuple):
    """A value on the walk.

    Attributes:
      value: an array, a `Weight` or weights `Joined`.
      active: whether the gradient may pass through it.
      broadcast: operand and `broadcast_dimensions` where it is but a broadcast one.
    """

    value: Any
    active: bool
    broadcast: tuple[Any, tuple[int, ...]] | None = None


@dataclasses.dataclass
class Walk:
    """A walk.

    Attributes:
      rules: by name of the primitive, `(walk, equation, inputs) -> outputs`, or None where the rule
        does not fit after all.
      uses: seen so far, in order and without repetition.
    """

    rules: Mapping[str, Callable[["Walk", Any, list[Traced]], list[Traced] | None]]
    uses: dict[Use, None] = dataclasses.field(default_factory=dict)

    def note(self, eqn: Any, inputs: Sequence[Traced], whole: bool) -> None:
        place = _place(eqn)
        for traced in inputs:
            value = traced.value
            for part in value.parts if isinstance(value, Joined) else (value,):
                if isinstance(part, Weight) and not part.looked_up:
                    self.uses.setdefault(Use(part.spec.path, eqn.primitive.name, place, whole))

    def run(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Traced]) -> list[Traced]:
        """Evaluates an open jaxpr; `consts` are not differentiated."""
        values: dict[Any, Traced] = {}

        def read(atom) -> Traced:
            return Traced(atom.val, False) if isinstance(atom, core.Literal) else values[atom]

        values.update(zip(jaxpr.constvars, (Traced(const, False) for const in consts), strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            with eqn.ctx.manager:  # which axes of a mesh are explicit there
                outs = self.step(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: Any, ins: list[Traced]) -> list[Traced]:
        """Evaluates an equation."""
        if not any(isinstance(traced.value, Weight | Joined) for traced in ins):
            return bind(eqn, ins)
        joined = any(isinstance(traced.value, Joined) for traced in ins)
        rule = self.rules.get("joined" if joined else eqn.primitive.name)
        ins = _made(eqn, ins)
        outs = rule(self, eqn, ins) if rule else None
        if outs is None:
            self.note(eqn, ins, whole=True)
            outs = bind(eqn, exposed(ins))
        return outs


def apply(eqn: Any, *values: Any, **changes: Any) -> Any:
    """Binds an equation's primitive to values, with some of its params changed."""
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
    """The same with arrays in place of weights."""
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


def _made(eqn: Any, ins: list[Traced]) -> list[Traced]:
    """Values that are made where they are used, made, unless the operation is such a use or leads to it."""
    if eqn.primitive.name in _MAKES_LATER:
        return ins

    def make(traced: Traced) -> Traced:
        weight = traced.value
        if isinstance(weight, Weight) and isinstance(weight.value, Made):
            weight = weight.replace(value=weight.value.value())
        return traced._replace(value=weight)

    return [make(traced) for traced in ins]


_MAKES_LATER = {
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
    """File and line of the innermost frame that is no library's."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    frames = getattr(traceback, "frames", None) or []
    for frame in frames:
        if not any(part in frame.file_name for part in _LIBRARIES):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


_LIBRARIES = ("/jax/_src/", "/jax/", "/flax/", "/equinox/", "/jaxtyping/", "/flora_jax/", "<frozen")
