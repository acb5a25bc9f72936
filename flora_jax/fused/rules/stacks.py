"""Stacks: the rules for stacking several weights along a new axis, and for concatenating them."""

from collections.abc import Sequence

import jax.numpy as jnp

from flora_jax.fused.interpreter import Traced, Walk, apply, exposed
from flora_jax.fused.rules.common import handed_on
from flora_jax.fused.rules.movers import mover
from flora_jax.fused.weight import Joined, Kind, Weight


def _stack(walk: Walk, eqn, ins):
    del walk
    axis = eqn.params["axis"]
    kinds = _alike(ins)
    if kinds is None:
        return None
    return _together(eqn, ins, axis, [*kinds[:axis], "batch", *kinds[axis:]], jnp.stack)


def _concatenate(walk: Walk, eqn, ins):
    """Concatenates along axes of length 1, which is stacking; other parts stay apart until they are used."""
    del walk
    axis = eqn.params["dimension"]
    kinds = _alike(ins)
    if kinds and kinds[axis] == "kept" and ins[0].value.value.shape[axis] == 1:
        batched = [*kinds[:axis], "batch", *kinds[axis + 1 :]]
        return _together(eqn, ins, axis, batched, jnp.concatenate)
    return [Traced(Joined(tuple(traced.value for traced in ins), axis), True)]


def _joined(walk: Walk, eqn, ins):
    """Applies a cast, a transpose or a product to each part."""
    place = next(i for i, traced in enumerate(ins) if isinstance(traced.value, Joined))
    joined: Joined = ins[place].value
    ins = [exposed([t])[0] if isinstance(t.value, Weight) and t.value.looked_up else t for t in ins]
    others = [traced for i, traced in enumerate(ins) if i != place]
    if any(isinstance(traced.value, Weight | Joined) for traced in others):
        return None
    if eqn.primitive.name == "transpose":
        axis = eqn.params["permutation"].index(joined.axis)
    elif eqn.primitive.name == "convert_element_type":
        axis = joined.axis
    elif eqn.primitive.name == "dot_general":
        contracting, batch = eqn.params["dimension_numbers"]
        if joined.axis in (*contracting[place], *batch[place]):
            return None
        taken = {*contracting[place], *batch[place]}
        before = sum(i not in taken for i in range(joined.axis))
        other = others[0].value
        axis = len(batch[0]) + before
        if place == 1:
            axis += other.ndim - len(contracting[0]) - len(batch[0])
    else:
        return None
    results = []
    for part in joined.parts:
        given = [Traced(part, True) if i == place else traced for i, traced in enumerate(ins)]
        if isinstance(part, Weight):
            outs = walk.rules[eqn.primitive.name](walk, eqn, given)
            if outs is None:
                return None
            results.append(outs[0].value)
        else:
            results.append(apply(eqn, *(traced.value for traced in given)))
    if eqn.primitive.name == "dot_general":
        return [Traced(jnp.concatenate(results, axis), True)]
    return [Traced(Joined(tuple(results), axis), True)]


def _alike(ins: Sequence[Traced]) -> tuple[Kind, ...] | None:
    """Returns the kinds of axes that all inputs have, or None if they differ in more than their keys."""
    if not all(isinstance(t.value, Weight) and t.value.columns is None for t in ins):
        return None
    first = ins[0].value

    def fixed(weight: Weight):
        spec = weight.spec
        rule = (spec.rank, spec.distribution, spec.size, spec.impl, spec.block)
        shape = (weight.value.shape, weight.factors is None, weight.up.dtype)
        return rule, weight.kinds, shape, weight.adapter

    if any(fixed(t.value) != fixed(first) for t in ins) or first.factors is not None:
        return None
    return first.kinds


def _together(eqn, ins, axis: int, kinds, join):
    parts = [traced.value for traced in ins]
    value = apply(eqn, *(part.value for part in parts))
    up = join([part.up for part in parts], axis)
    keys = jnp.stack([part.keys for part in parts], kinds[:axis].count("batch"))
    return handed_on(parts[0].replace(value=value, up=up, keys=keys, kinds=tuple(kinds)))


RULES = {
    "joined": _joined,
    "stack": mover(_stack),
    "concatenate": mover(_concatenate),
}
