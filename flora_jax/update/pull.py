"""Pull: the derivative of a part of a function, with what it keeps from the forward pass apart from what can be had again."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from flora_jax.fused.interpreter import is_inexact
from flora_jax.fused.program import JITS, Atom, Values, Var, flatten, needed
from flora_jax.update.schedule import Schedule, run


def zeros_for(value: Any) -> Any:
    """Returns the cotangent of an array through which nothing flows back."""
    if is_inexact(value):
        return jnp.zeros_like(value)
    return np.zeros(jnp.shape(value), dtypes.float0)


class Pull:
    """The derivative of one operation at some inputs.

    Attributes:
      outs: What the operation returned.
    """

    def __init__(self, fun: Callable, given: Sequence[Any], active: Sequence[bool]):
        """Differentiates a function from a list to a list, at a list of which some are active."""

        def of(*moving):
            return fun(_filled(given, active, moving))

        self.outs, pull = jax.vjp(of, *itertools.compress(given, active))
        self.leaves, self.structure = jax.tree.flatten(pull)

    def without(self, values: Mapping[int, Any]) -> None:
        """Forgets arrays that can be had again, given by their `id`, each with what `pull` is to be given for it."""
        self.leaves = [
            Again(values[id(leaf)]) if id(leaf) in values else leaf for leaf in self.leaves
        ]

    def pull(self, cotangents: Sequence[Any], again: Callable[[Any], Any]) -> list[Any]:
        """Returns the cotangents of the active inputs, given those of the outputs; None stands for zero.

        Args:
          cotangents: The cotangents.
          again: The function that gives an array that was forgotten.
        """
        leaves = [again(leaf.what) if isinstance(leaf, Again) else leaf for leaf in self.leaves]
        cotangents = [
            zeros_for(out) if cotangent is None else cotangent
            for out, cotangent in zip(self.outs, cotangents, strict=True)
        ]
        return list(jax.tree.unflatten(self.structure, leaves)(cotangents))


@dataclasses.dataclass(frozen=True)
class Again:
    """Stands for an array that is computed again."""

    what: Any


class Layer:
    """The body of a scan with its derivative, as a program.

    Attributes:
      inputs: The inputs of the body.
      outs: Its outputs.
      residuals: The arrays that the derivative consists of.
      kept: Those of them that the backward pass cannot compute again from the inputs that it has.
    """

    def __init__(
        self,
        body: Callable[[list[Any]], list[Any]],
        inputs: Sequence[Any],
        active: Sequence[bool],
        wanted: Sequence[bool],
        again: Sequence[bool],
    ):
        """Traces the body.

        Args:
          body: A function from a list to a list of arrays.
          inputs: Arrays like those that it will be given.
          active: Which of them are differentiated.
          wanted: Which outputs have cotangents.
          again: Which inputs are there in the backward pass too.
        """
        self.structure: Any = None
        self.fixed: list[Any] = []

        def forward(*given):
            def of(*moving):
                outs = body(_filled(given, active, moving))
                return list(itertools.compress(outs, wanted)), outs

            _, pull, outs = jax.vjp(of, *itertools.compress(given, active), has_aux=True)
            leaves, self.structure = jax.tree.flatten(pull)
            self.fixed = [None if _is_array(leaf) else leaf for leaf in leaves]
            return outs, [leaf for leaf in leaves if _is_array(leaf)]

        closed, shapes = jax.make_jaxpr(forward, return_shape=True)(*inputs)
        self.inputs = [Var(aval) for aval in closed.in_avals]
        nodes, outs = flatten(closed.jaxpr, closed.consts, self.inputs, JITS)
        self.maker = {out: node for node in nodes for out in node.outs}
        count = len(shapes[0])
        self.outs, self.residuals = outs[:count], outs[count:]
        late: set[Var] = {var for var, flag in zip(self.inputs, again, strict=True) if not flag}
        for node in nodes:
            if late.intersection(node.variables()):
                late.update(node.outs)
        self.kept: list[Var] = list(
            dict.fromkeys(x for x in self.residuals if isinstance(x, Var) and x in late)
        )

    def forward(self, given: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Returns the outputs of the body, and what is to be kept."""
        values = self._values(dict(zip(self.inputs, given, strict=True)))
        compute(values, [*self.outs, *self.kept])
        return [values(out) for out in self.outs], [values(x) for x in self.kept]

    def pull(
        self,
        given: Sequence[Any],
        kept: Sequence[Any],
        cotangents: Sequence[Any],
        weights: int,
        complete: Callable[[dict[int, Any], list[Any]], list[Any]],
    ) -> list[Any]:
        """Computes the cotangents of the active inputs, each weight's as early as can be.

        Args:
          given: The inputs, where they are there in the backward pass; None in the place of others.
          kept: What was kept.
          cotangents: Those of the wanted outputs.
          weights: The number of weights, which are the first inputs.
          complete: What is done with the cotangents of weights, as in `Schedule.run`.

        Returns:
          The cotangents of the other active inputs.
        """
        args, structure = jax.tree.flatten((list(given), list(kept), list(cotangents)))
        schedule = Schedule(
            lambda *args: self._pull(*jax.tree.unflatten(structure, args)),
            args,
            weights,
            len(cotangents),
        )
        return schedule.run(args, complete)

    def _pull(self, given: Sequence[Any], kept: Sequence[Any], cotangents: list[Any]) -> list[Any]:
        known = {var: x for var, x in zip(self.inputs, given, strict=True) if x is not None}
        values = self._values({**known, **dict(zip(self.kept, kept, strict=True))})
        compute(values, self.residuals)
        computed = map(values, self.residuals)
        leaves = [next(computed) if fixed is None else fixed for fixed in self.fixed]
        return list(jax.tree.unflatten(self.structure, leaves)(cotangents))

    def _values(self, known: dict[Var, Any]) -> Values:
        values = Values([], known)
        values.maker = self.maker
        return values


def compute(values: Values, goals: Sequence[Atom]) -> None:
    """Computes variables."""
    for node in needed(values.maker, goals, values.known):
        run(node, values.known)


def _filled(given: Sequence[Any], active: Sequence[bool], moving: Sequence[Any]) -> list[Any]:
    """Returns a list with those that are active in the place of the old ones."""
    fresh = iter(moving)
    return [next(fresh) if flag else x for x, flag in zip(given, active, strict=True)]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)
