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
from flora_jax.fused.lazy import Lazy, materialized
from flora_jax.fused.use import expose, merged
from flora_jax.fused.weight import Joined, Weight


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
                    reason = reason_of(eqn.primitive.name) if whole else ""
                    self.uses.setdefault(
                        Use(part.spec.path, eqn.primitive.name, place, whole, reason)
                    )

    def run(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        inputs: Sequence[Traced],
        wanted: Sequence[bool] | None = None,
    ) -> list[Traced]:
        """Evaluates an open jaxpr.

        Args:
          jaxpr: The jaxpr.
          consts: The values of its `constvars`, which are not differentiated.
          inputs: The inputs.
          wanted: Which outputs are differentiated; by default all.
        """
        useful = _useful(jaxpr, [True] * len(jaxpr.outvars) if wanted is None else wanted)
        values: dict[Any, Traced] = {}

        def read(atom) -> Traced:
            return Traced(atom.val, False) if isinstance(atom, core.Literal) else values[atom]

        values.update(zip(jaxpr.constvars, (Traced(const, False) for const in consts), strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            with eqn.ctx.manager:  # it says which axes of a mesh are explicit there
                ins = [read(atom) for atom in eqn.invars]
                outs = self.step(eqn, ins) if useful.intersection(eqn.outvars) else idle(eqn, ins)
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: Any, ins: list[Traced]) -> list[Traced]:
        """Evaluates one equation."""
        if not any(isinstance(traced.value, Weight | Joined) for traced in ins):
            return bind(eqn, ins)
        name = eqn.primitive.name
        joined = any(isinstance(traced.value, Joined) for traced in ins)
        rule = self.rules.get("joined" if joined and name not in _BODIES else name)
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


def idle(eqn: Any, ins: Sequence[Traced]) -> list[Traced]:
    """Evaluates an equation through whose outputs no gradient flows, so that it is no use of a weight."""

    def value(x: Any) -> Any:
        if isinstance(x, Joined):
            return jnp.concatenate([value(part) for part in x.parts], x.axis)
        if not isinstance(x, Weight):
            return x
        return merged(x) if x.adapter else materialized(x.value)

    result = apply(eqn, *(value(traced.value) for traced in ins))
    return [Traced(x, False) for x in (result if eqn.primitive.multiple_results else [result])]


def _useful(jaxpr: Any, wanted: Sequence[bool]) -> set[Any]:
    """The variables of a jaxpr from which a gradient may flow back: those that lead to a wanted output."""
    useful = {
        atom
        for atom, flag in zip(jaxpr.outvars, wanted, strict=True)
        if flag and not isinstance(atom, core.Literal)
    }
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name in _FLAT:
            continue
        if any(out in useful and is_inexact(out.aval) for out in eqn.outvars):
            useful.update(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
    return useful


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
    dtype = value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
    return jnp.issubdtype(dtype, jnp.inexact)


def _place(eqn: Any) -> str:
    """Returns the file and line of the innermost frame that does not belong to a library."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    frames = getattr(traceback, "frames", None) or []
    for frame in frames:
        if not any(part in frame.file_name for part in _LIBRARIES):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


_LIBRARIES = ("/jax/_src/", "/jax/", "/flax/", "/equinox/", "/jaxtyping/", "/flora_jax/", "<frozen")

_BODIES = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "scan", "cond"}
"""Operations whose bodies are evaluated, which may be given weights that are `Joined`."""
_FLAT = {"stop_gradient", "round", "floor", "ceil", "sign"}
"""Operations whose derivative is zero, besides those whose results are no floats."""


def reason_of(primitive: str) -> str:
    """Why a use of this primitive has no rule that never materializes the full gradient."""
    for reason, names in _REASONS.items():
        if primitive in names:
            return reason
    return "there is no rule for this operation"


_REASONS = {
    "the derivative of an elementwise function needs the gradient of each element": (
        *("integer_pow", "square", "sqrt", "rsqrt", "cbrt", "pow", "exp", "exp2", "log", "log1p"),
        *("expm1", "tanh", "logistic", "sin", "cos", "tan", "erf", "abs", "max", "min", "clamp"),
    ),
    "the other factor has a gradient, or varies along both sides of the matrix": ("mul", "div"),
    "the mask varies along both sides of the matrix": ("select_n",),
    "a sum over elements gives each of them the same gradient, which is then combined with others": (
        *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum"),
    ),
    "both factors are compressed weights, or some of the projected axes are summed over and others not": (
        "dot_general",
    ),
    "it merges projected axes with others, or splits them": ("reshape", "broadcast_in_dim"),
    "rows are taken along the projected side": ("gather", "dynamic_slice"),
    "rows are overwritten with something that has a gradient, or along the projected side": (
        *("scatter", "scatter-add", "scatter_add", "dynamic_update_slice"),
    ),
    "its backward function does not make the weight's cotangent as a product of two arrays": (
        *("custom_vjp_call", "custom_vjp_call_jaxpr"),
    ),
    "a weight that each step changes, or that is sliced along the projected side": ("scan",),
    "a loop may use it any number of times": ("while",),
}
