"""Leaf operations: what is done to the sketch of one leaf as a single operation of a jaxpr.

`apply_gradients` traces an optimizer, and evaluates it leaf by leaf and slice by slice along a stack. What
a transformation does by `LeafOperation` it finds there in one piece, whose slices have slices of the keys.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from flora_jax.chain import products
from flora_jax.chain.sketch import Spec

_tracing = contextvars.ContextVar("tracing", default=False)


@contextlib.contextmanager
def as_one_operation() -> Iterator[None]:
    """Makes each `LeafOperation` one equation of the jaxprs that are traced inside this context."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


class LeafOperation:
    """A function `(spec, keys, data, **settings) -> array` of the sketch of one leaf, with its `matrix_keys`.

    Attributes:
      function: The function. Each matrix along the batch axes is treated by itself. The settings are
        hashable.
      expands: Whether the result has the axes of the weight, rather than those of the sketch.
      primitive: The operation that stands for it; it is traced and never run.
    """

    def __init__(self, name: str, function: Callable[..., jax.Array], *, expands: bool):
        self.function, self.expands = function, expands
        self.primitive = core.Primitive(name)
        self.primitive.def_abstract_eval(self._shape)
        _OPERATIONS[self.primitive.name] = self

    def __call__(self, spec: Spec, cycle: Any, data: jax.Array, **settings: Any) -> jax.Array:
        """Applies the function, given the cycle in place of the keys."""
        if _tracing.get():
            return self.primitive.bind(jnp.asarray(cycle), data, spec=spec, **settings)
        return self.function(spec, products.matrix_keys(spec, cycle), data, **settings)

    def _shape(self, cycle, data, *, spec, **settings):
        def call(cycle, data):
            return self.function(spec, products.matrix_keys(spec, cycle), data, **settings)

        return jax.make_jaxpr(call)(cycle, data).out_avals[0]


_OPERATIONS: dict[str, LeafOperation] = {}


def of(equation: Any) -> LeafOperation | None:
    """Returns the operation that an equation of a jaxpr is, or None."""
    return _OPERATIONS.get(equation.primitive.name)


def run(equation: Any, cycle: Any, data: jax.Array) -> jax.Array:
    """Applies the operation that an equation of a jaxpr is."""
    settings = dict(equation.params)
    return _OPERATIONS[equation.primitive.name](settings.pop("spec"), cycle, data, **settings)


def run_with(equation: Any, spec: Spec, keys: jax.Array, data: jax.Array) -> jax.Array:
    """Applies the operation that an equation of a jaxpr is to a part of the leaf, with a `Spec` and keys of its own."""
    settings = {k: v for k, v in equation.params.items() if k != "spec"}
    return _OPERATIONS[equation.primitive.name].function(spec, keys, data, **settings)
