"""Owners: which leaf each value of an optimizer's program belongs to, so that leaves can be evaluated one by one.

An array belongs to the leaf whose param or gradient it is computed from. A single number passes that on to no
one: what several leaves need of each other, such as the squares that a global norm is the sum of, is computed
first. A `cond` over arrays of several leaves is both of its branches, and a choice between their results.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.chain import leaf_operations
from flora_jax.fused.program import Atom, Const, Node, Var, flatten
from flora_jax.sharding import manual


class NotLeafWise(Exception):
    """Raised where a value is computed from arrays of several leaves, whose numbers are its argument."""


@dataclasses.dataclass
class Owners:
    """The owners of the values of a program.

    Attributes:
      nodes: The operations, with the `cond`s over several leaves replaced.
      of: The numbers of the leaves whose arrays a value is computed from. Values that belong to none are left
        out.
    """

    nodes: list[Node]
    of: dict[Var, frozenset[int]]

    @classmethod
    def find(
        cls, nodes: Sequence[Node], params: Sequence[Sequence[Var]], names: Sequence[str]
    ) -> "Owners":
        """Returns the owners of all values, given the arrays of each param, and its name."""
        owners = cls([], {})
        for i, arrays in enumerate(params):
            owners.of.update({var: frozenset([i]) for var in arrays if not _single(var)})
        index = {name: i for i, name in enumerate(names)}
        for node in nodes:
            owners._visit(node, index)
        return owners

    def _visit(self, node: Node, index: Mapping[str, int]) -> None:
        arrays = (var for var in node.variables() if not _single(var))
        owner = frozenset().union(*(self.of.get(var, frozenset()) for var in arrays))
        if leaf_operations.of(node.eqn):
            owner = frozenset([index[node.eqn.params["spec"].path]])
        if len(owner) > 1 and node.name == "cond":
            for part in as_choice(node):
                self._visit(part, index)
            return
        self.nodes.append(node)
        if owner:
            self.of.update(dict.fromkeys(node.outs, owner))

    def foreign(
        self, maker: Mapping[Var, Node], goals: Sequence[Atom], leaf: int | None, known: Any
    ) -> list[Var]:
        """Returns the single numbers of other leaves that the goals of a leaf are computed from.

        Args:
          maker: The operation that computes each value.
          goals: The values to compute.
          leaf: The number of the leaf, or None for goals that belong to none.
          known: The values that are known already.

        Raises:
          NotLeafWise: An array of another leaf is needed, or a number computed from arrays of several.
        """
        found: dict[Var, None] = {}
        seen: set[Var] = set()
        stack = [goal for goal in goals if isinstance(goal, Var)]
        while stack:
            var = stack.pop()
            if var in seen or var in known:
                continue
            seen.add(var)
            owner = self.of.get(var, frozenset())
            if owner - {leaf}:
                if len(owner) > 1 or not _single(var):
                    raise NotLeafWise(owner)
                found[var] = None
            else:
                stack += maker[var].variables()
        return list(found)


def _single(var: Var) -> bool:
    return math.prod(var.shape) == 1


def as_choice(cond: Node) -> list[Node]:
    """Returns the operations of all branches of a `cond`, and the choice between their results."""
    which, *operands = cond.ins
    branches = [
        flatten(branch.jaxpr, branch.consts, operands) for branch in cond.eqn.params["branches"]
    ]
    nodes = [node for found, _ in branches for node in found]
    for out, *cases in zip(cond.outs, *(outs for _, outs in branches), strict=True):
        known = [_typed(case, out) for case in cases]
        nodes.append(Node(CHOICE, [which, *known], [out]))
    return nodes


def _typed(case: Atom, out: Var) -> Atom:
    return Const(jnp.asarray(case.value, out.aval.dtype)) if isinstance(case, Const) else case


def _choose(which: Any, *cases: Any) -> jax.Array:
    return jax.lax.select_n(*manual.alike([jnp.asarray(which), *cases]))


CHOICE: Any = SimpleNamespace(
    primitive=SimpleNamespace(
        name="select_n", multiple_results=False, get_bind_params=dict, bind=_choose
    ),
    params={},
)
"""An equation for `Node`: `jax.lax.select_n` of arrays that may vary over different manual axes."""
