"""Program: a jaxpr as a flat list of operations, which can be evaluated in part and in any order."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from flora_jax.fused.interpreter import apply

JITS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
"""Calls that mean nothing but their bodies."""
REMATS = {"checkpoint": "jaxpr", "remat2": "jaxpr"}
"""Parts that are computed again; they are their bodies, once nothing is differentiated any more."""
CALLS = {
    **JITS,
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
"""Calls that are their bodies where nothing is differentiated."""


class Var:
    """The result of an operation, or an input of the program. Variables are compared by identity."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any):
        self.aval = aval

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aval.shape


@dataclasses.dataclass(frozen=True, eq=False)
class Const:
    """A value that is known when the program is traced."""

    value: Any


Atom = Var | Const


@dataclasses.dataclass(eq=False)
class Node:
    """One operation: an equation of a jaxpr, with its inputs and outputs."""

    eqn: Any
    ins: list[Atom]
    outs: list[Var]

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    def variables(self) -> list[Var]:
        return [atom for atom in self.ins if isinstance(atom, Var)]

    def run(self, values: Sequence[Any]) -> list[Any]:
        result = apply(self.eqn, *values)
        return list(result) if self.eqn.primitive.multiple_results else [result]


class Held(Node):
    """The inputs of a part that is computed again, which XLA must not take for what was computed before."""

    @staticmethod
    def of(eqn: Any, ins: Sequence[Atom]) -> "Held":
        avals = [atom.aval if isinstance(atom, Var) else jax.typeof(atom.value) for atom in ins]
        return Held(eqn, list(ins), list(map(Var, avals)))

    def run(self, values: Sequence[Any]) -> list[Any]:
        return list(jax.lax.optimization_barrier(list(values)))


def flatten(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Atom], calls: Mapping[str, str] = CALLS
) -> tuple[list[Node], list[Atom]]:
    """Returns the operations of a jaxpr, with the bodies of `calls` inlined, and what the jaxpr returns."""
    known: dict[Any, Atom] = dict(zip(jaxpr.constvars, map(Const, consts), strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    nodes: list[Node] = []

    def read(atom) -> Atom:
        return Const(atom.val) if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in calls:
            body = eqn.params[calls[eqn.primitive.name]]
            if eqn.primitive.name in REMATS:
                body = core.ClosedJaxpr(body, ())
                if eqn.params["differentiated"] and np.any(eqn.params["prevent_cse"]):
                    held = Held.of(eqn, ins)
                    nodes.append(held)
                    ins = [*held.outs]
            inner, outs = flatten(body.jaxpr, body.consts, ins, calls)
            nodes += inner
        else:
            outs = [Var(var.aval) for var in eqn.outvars]
            nodes.append(Node(eqn, ins, outs))
        known.update(zip(eqn.outvars, outs, strict=True))
    return nodes, [read(atom) for atom in jaxpr.outvars]


class Values:
    """The values of variables, each computed when it is first needed."""

    def __init__(self, nodes: Sequence[Node], known: dict[Var, Any]):
        self.known = dict(known)
        self.maker = {out: node for node in nodes for out in node.outs}

    def __call__(self, atom: Atom) -> Any:
        if isinstance(atom, Const):
            return atom.value
        if atom not in self.known:
            for node in needed(self.maker, [atom], self.known):
                outs = node.run([self(a) for a in node.ins])
                self.known.update(zip(node.outs, outs, strict=True))
        return self.known[atom]


def needed(maker: dict[Var, Node], goals: Sequence[Atom], known: Any) -> list[Node]:
    """Returns the operations that compute the goals from what is known, in an order in which they can run."""
    order: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = []

    def push(atom: Atom) -> None:
        if isinstance(atom, Var) and atom not in known and id(maker[atom]) not in seen:
            stack.append((maker[atom], False))

    for goal in goals:
        push(goal)
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                for atom in node.ins:
                    push(atom)
    return order
