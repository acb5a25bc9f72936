"""Custom derivatives: the rule for `jax.custom_vjp` functions that take a weight, such as fused kernels.

The user's backward function is traced, and not run as it stands: where it makes the weight's cotangent as a
product of two arrays, the one that has the projected axes is contracted with `Aᵀ` first, so that the product is
the sketch. All else that it computes is left as it is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.fused.contraction import contract, contracted_labels, outer
from flora_jax.fused.interpreter import Traced, Walk, apply
from flora_jax.fused.program import Node, Values, Var, flatten
from flora_jax.fused.weight import Weight

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class _Product(NamedTuple):
    """The product that makes a weight's cotangent.

    Attributes:
      node: The `dot_general`.
      labels: The einsum labels of its two factors.
      of_weight: The labels of the cotangent.
      place: Which factor has the projected axes.
    """

    node: Node
    labels: tuple[str, str]
    of_weight: str
    place: int


def _custom_vjp(walk: Walk, eqn, ins):
    places = [i for i, traced in enumerate(ins) if isinstance(traced.value, Weight)]
    if len(places) != 1 or ins[places[0]].value.adapter or ins[places[0]].value.differentiated:
        return None
    (place,) = places
    weight: Weight = ins[place].value
    others = tuple(traced.value for i, traced in enumerate(ins) if i != place)
    floats = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in others]

    def call(given: tuple, value: Any, fixed: tuple) -> list[Any]:
        given_left, fixed_left = iter(given), iter(fixed)
        mixed = [next(given_left) if flag else next(fixed_left) for flag in floats]
        return apply(eqn, *mixed[:place], value, *mixed[place:])

    def pulled(given, value, fixed, deltas):
        return jax.vjp(lambda given, value: call(given, value, fixed), given, value)[1](deltas)

    given = tuple(x for x, flag in zip(others, floats, strict=True) if flag)
    fixed = tuple(x for x, flag in zip(others, floats, strict=True) if not flag)
    outs = jax.eval_shape(call, given, weight.value, fixed)
    traced = jax.make_jaxpr(pulled)(given, weight.value, fixed, outs)
    nodes, _, products = _opened(traced)
    if _product(weight, nodes, products) is None:
        return None

    @jax.custom_vjp
    def run(given, value, up, source, fixed):
        del up, source
        return call(given, value, fixed)

    def forward(given, value, up, source, fixed):
        del up
        result, pull = jax.vjp(lambda given, value: call(given, value, fixed), given, value)
        return result, (pull, source)

    def backward(residuals, deltas):
        pull, source = residuals
        closed = jax.make_jaxpr(pull)(deltas)
        nodes, inputs, outs = _opened(closed)
        values = Values(nodes, dict(zip(inputs, jax.tree.leaves(deltas), strict=True)))
        product = _product(weight, nodes, outs)
        assert product is not None, (
            "the backward function is not what it was when it was first traced"
        )
        factors = [values(atom) for atom in product.node.ins]
        labels, of_weight = list(product.labels), product.of_weight
        at = product.place
        precision = product.node.eqn.params["precision"]
        precision = None if isinstance(precision, tuple) else precision
        of_contracted = contracted_labels(weight, labels[at], of_weight)
        factors[at] = contract(
            weight, source, factors[at], labels[at], of_weight, precision
        ).astype(factors[at].dtype)
        labels[at] = of_contracted
        sketch = outer(weight, factors[0], labels[0], factors[1], labels[1], of_weight, precision)
        of_given = tuple(values(atom) for atom in outs[:-1])
        return of_given, None, sketch.astype(weight.up.dtype), None, None

    run.defvjp(forward, backward)
    source = (weight.keys, weight.columns, weight.factors)
    walk.note(eqn, ins, whole=False)
    result = run(given, weight.value, weight.up, source, fixed)
    return [Traced(x, True) for x in result]


def _opened(closed: Any) -> tuple[list[Node], list[Var], list[Any]]:
    inputs = [Var(aval) for aval in closed.in_avals]
    nodes, outs = flatten(closed.jaxpr, closed.consts, inputs)
    return nodes, inputs, outs


def _product(weight: Weight, nodes: list[Node], outs: list[Any]) -> _Product | None:
    """Finds the product behind the last output, through transposes and casts; None where there is no such."""
    maker = {out: node for node in nodes for out in node.outs}
    atom, order = outs[-1], list(range(weight.value.ndim))
    while isinstance(atom, Var) and atom in maker:
        node = maker[atom]
        if node.name == "transpose":
            order = [node.eqn.params["permutation"][axis] for axis in order]
        elif node.name == "dot_general":
            return _labelled(weight, node, order)
        elif node.name not in ("convert_element_type", "copy", "copy_p"):
            return None
        atom = node.ins[0]
    return None


def _labelled(weight: Weight, node: Node, order: list[int]) -> _Product | None:
    contracting, batch = node.eqn.params["dimension_numbers"]
    letters = iter(_LETTERS)
    ndims = [
        len(atom.shape) if isinstance(atom, Var) else jnp.ndim(atom.value) for atom in node.ins
    ]
    labels = [[""] * ndim for ndim in ndims]
    for pairs in (contracting, batch):
        for left, right in zip(*pairs, strict=True):
            labels[0][left] = labels[1][right] = next(letters)
    named = ["".join(label or next(letters) for label in side) for side in labels]
    shared = "".join(named[0][axis] for axis in batch[0])
    summed = {named[0][axis] for axis in contracting[0]}
    free = [[c for c in side if c not in summed and c not in shared] for side in named]
    result = [*shared, *free[0], *free[1]]
    of_weight = "".join(result[axis] for axis in order)
    projected = {of_weight[axis] for axis in weight.axes("projected")}
    for place in (0, 1):
        if projected <= set(free[place]):
            return _Product(node, (named[0], named[1]), of_weight, place)
    return None


RULES = {
    "custom_vjp_call": _custom_vjp,
    "custom_vjp_call_jaxpr": _custom_vjp,
}
