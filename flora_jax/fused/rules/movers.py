"""Movers: the rules for transpose, reshape, slice and the like.

They act on the value and on the up factor in the same way, provided that they keep the projected axes
together, or tell which of their indices are left.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.fused.interpreter import Traced, Walk, apply
from flora_jax.fused.rules.common import handed_on, only_first
from flora_jax.fused.weight import Kind, Weight, up_shape
from flora_jax.sharding import explicit


def after_move(
    weight: Weight, value, up, kinds: Sequence[Kind], slot: int, **changes
) -> list[Traced]:
    """Returns a weight after a move; `slot` is the axis of `up` that has the rank now."""
    kinds = tuple(kinds)
    goal = kinds.index("projected")
    if goal != slot:
        up = jnp.swapaxes(up, goal, slot)
    return handed_on(weight.replace(value=value, up=up, kinds=kinds, **changes))


def mover(rule):
    """Wraps a rule so that on a mesh with explicit axes it receives weights with a replicated up factor."""

    def free(traced: Traced) -> Traced:
        weight = traced.value
        if not isinstance(weight, Weight) or explicit.sharding_of(weight.up) is None:
            return traced
        return traced._replace(value=weight.replace(up=explicit.everywhere(weight.up)))

    return lambda walk, eqn, ins: rule(walk, eqn, [free(traced) for traced in ins])


def _per_kind(weight: Weight, move) -> dict[str, Any]:
    """Moves `keys`, `columns` and `factors` by `move(array, axes)`; `axes` are the weight's that it has."""
    projected, batch = weight.axes("projected"), weight.axes("batch")
    return dict(
        keys=move(weight.keys, batch) if batch else weight.keys,
        columns=None if weight.columns is None else move(weight.columns, projected),
        factors=None if weight.factors is None else move(weight.factors, projected),
    )


def _transpose(walk: Walk, eqn, ins):
    del walk
    weight, order = ins[0].value, eqn.params["permutation"]

    def move(array, axes):
        places = [axes.index(axis) for axis in order if axis in axes]
        return jnp.transpose(array, (*places, *range(len(axes), array.ndim)))

    moved = _per_kind(weight, move)
    if weight.columns is None and len(weight.axes("projected")) > 1:
        moved["columns"] = move(weight.indices(), weight.axes("projected"))
    return after_move(
        weight,
        apply(eqn, weight.value),
        jnp.transpose(weight.up, order),
        [weight.kinds[axis] for axis in order],
        order.index(weight.slot),
        **moved,
    )


def _reshape(walk: Walk, eqn, ins):
    del walk
    if len(ins) > 1 or eqn.params.get("dimensions") is not None:
        return None
    weight, shape = ins[0].value, eqn.params["new_sizes"]
    kinds: list[Kind] = ["kept"] * len(shape)
    for old, new in _groups(weight.value.shape, shape):
        found = {weight.kinds[axis] for axis in old if weight.value.shape[axis] > 1}
        if len(found) > 1:
            return None
        for axis in new:
            kinds[axis] = next(iter(found), "kept")
    return _reshaped(weight, apply(eqn, weight.value), kinds)


def _squeeze(walk: Walk, eqn, ins):
    del walk
    weight, gone = ins[0].value, eqn.params["dimensions"]
    kinds = [kind for axis, kind in enumerate(weight.kinds) if axis not in gone]
    return _reshaped(weight, apply(eqn, weight.value), kinds)


def _expand(walk: Walk, eqn, ins):
    del walk
    weight, added = ins[0].value, eqn.params["dimensions"]
    kinds = list(weight.kinds)
    for axis in sorted(added):
        kinds.insert(axis, "kept")
    return _reshaped(weight, apply(eqn, weight.value), kinds)


def _reshaped(weight: Weight, value, kinds: Sequence[Kind]):
    """Returns a weight after a change of shape that keeps the order of all entries."""
    if "projected" not in kinds:
        return None
    lengths = {
        kind: [n for n, other in zip(value.shape, kinds, strict=True) if other == kind]
        for kind in ("projected", "batch")
    }
    return handed_on(
        weight.replace(
            value=value,
            up=weight.up.reshape(up_shape(value.shape, kinds, weight.spec.rank)),
            keys=weight.keys.reshape(*lengths["batch"], weight.keys.shape[-1]),
            columns=_reshape_if(weight.columns, lengths["projected"]),
            factors=_reshape_if(weight.factors, lengths["projected"]),
            kinds=tuple(kinds),
        )
    )


def _reshape_if(array, shape):
    return None if array is None else array.reshape(shape)


def _groups(old: Sequence[int], new: Sequence[int]):
    """Splits two shapes of one size into the shortest groups of axes whose sizes agree."""
    i = j = 0
    while i < len(old) or j < len(new):
        first, second = i, j
        left = right = 1
        while first == i or left != right:
            if first == i and i == len(old):
                break
            if left <= right and i < len(old):
                left *= old[i]
                i += 1
            else:
                right *= new[j]
                j += 1
        if i == len(old):
            j = len(new)  # what is left has length 1
        yield range(first, i), range(second, j)


def _slice(walk: Walk, eqn, ins):
    del walk
    weight = ins[0].value
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)

    def sliced(array, axes, full=()):
        index = [
            slice(None) if axis in full else slice(starts[axis], limits[axis], strides[axis])
            for axis in axes
        ]
        return array[tuple(index)]

    moved = _per_kind(weight, sliced)
    projected = weight.axes("projected")
    if any((starts[i], limits[i], strides[i]) != (0, weight.value.shape[i], 1) for i in projected):
        moved["columns"] = sliced(weight.indices(), projected)
    up = sliced(weight.up, range(len(starts)), projected)
    return after_move(weight, apply(eqn, weight.value), up, weight.kinds, weight.slot, **moved)


def _dynamic_slice(walk: Walk, eqn, ins):
    del walk
    if not only_first(ins):
        return None
    weight, starts = ins[0].value, [traced.value for traced in ins[1:]]
    sizes = eqn.params["slice_sizes"]
    if len(starts) != len(sizes):
        return None

    def sliced(array, axes, full=()):
        first = [jnp.zeros_like(starts[axis]) if axis in full else starts[axis] for axis in axes]
        lengths = [array.shape[i] if axis in full else sizes[axis] for i, axis in enumerate(axes)]
        extra = array.ndim - len(first)
        first += [jnp.int32(0)] * extra
        lengths += list(array.shape[len(lengths) :])
        return jax.lax.dynamic_slice(array, first, lengths)

    moved = _per_kind(weight, sliced)
    projected = weight.axes("projected")
    if any(sizes[axis] != weight.value.shape[axis] for axis in projected):
        moved["columns"] = sliced(weight.indices(), projected)
    up = sliced(weight.up, range(len(sizes)), projected)
    value = apply(eqn, weight.value, *starts)
    return after_move(weight, value, up, weight.kinds, weight.slot, **moved)


def _rev(walk: Walk, eqn, ins):
    del walk
    weight, turned = ins[0].value, eqn.params["dimensions"]

    def turn(array, axes):
        return jnp.flip(array, [i for i, axis in enumerate(axes) if axis in turned])

    moved = _per_kind(weight, turn)
    projected = weight.axes("projected")
    if set(projected) & set(turned):
        moved["columns"] = turn(weight.indices(), projected)
    up = jnp.flip(weight.up, [axis for axis in turned if axis not in projected])
    return after_move(weight, apply(eqn, weight.value), up, weight.kinds, weight.slot, **moved)


def _broadcast_in_dim(walk: Walk, eqn, ins):
    del walk
    weight, shape = ins[0].value, eqn.params["shape"]
    dims = eqn.params["broadcast_dimensions"]
    if len(ins) > 1:
        return None
    for axis, dim in enumerate(dims):
        grown = weight.value.shape[axis] != shape[dim]
        if grown and weight.kinds[axis] != "kept":
            return None
    kinds: list[Kind] = ["kept"] * len(shape)
    for axis, dim in enumerate(dims):
        kinds[dim] = weight.kinds[axis]
    up = jax.lax.broadcast_in_dim(weight.up, up_shape(shape, kinds, weight.spec.rank), dims)
    return after_move(weight, apply(eqn, weight.value), up, kinds, dims[weight.slot])


def _split(walk: Walk, eqn, ins):
    del walk
    weight, axis = ins[0].value, eqn.params["axis"]
    ends = list(itertools.accumulate(eqn.params["sizes"]))[:-1]
    count = len(ends) + 1

    def split(array, axes):
        return jnp.split(array, ends, axes.index(axis)) if axis in axes else [array] * count

    parts = _per_kind(weight, split)
    if weight.kinds[axis] == "projected":
        parts["columns"] = split(weight.indices(), weight.axes("projected"))
        ups = [weight.up] * count
    else:
        ups = jnp.split(weight.up, ends, axis)
    outs = []
    for i, value in enumerate(apply(eqn, weight.value)):
        moved = {name: part[i] if isinstance(part, list) else part for name, part in parts.items()}
        outs += after_move(weight, value, ups[i], weight.kinds, weight.slot, **moved)
    return outs


def _pad(walk: Walk, eqn, ins):
    """Pads with numbers that have no gradient; columns of `A` that are padded on are zero."""
    del walk
    if not only_first(ins) or ins[1].active:
        return None
    weight, config = ins[0].value, eqn.params["padding_config"]
    if any(low < 0 or high < 0 or inner for low, high, inner in config):
        return None

    def pad(array, axes):
        widths = [config[axis][:2] for axis in axes]
        return jnp.pad(array, [*widths, *[(0, 0)] * (array.ndim - len(widths))])

    moved = _per_kind(weight, pad)
    projected = weight.axes("projected")
    if any(config[axis] != (0, 0, 0) for axis in projected):
        columns = weight.indices()
        ones = jnp.ones(columns.shape) if weight.factors is None else weight.factors
        moved.update(columns=pad(columns, projected), factors=pad(ones, projected))
    widths = [(0, 0) if axis in projected else sides[:2] for axis, sides in enumerate(config)]
    value = apply(eqn, weight.value, ins[1].value)
    return after_move(weight, value, jnp.pad(weight.up, widths), weight.kinds, weight.slot, **moved)


def _scatter(walk: Walk, eqn, ins):
    """Overwrites rows, `table.at[row].set(0)`, with numbers that have no gradient."""
    del walk
    if not only_first(ins) or ins[2].active:
        return None
    weight: Weight = ins[0].value
    indices, updates = ins[1].value, ins[2].value
    numbers = eqn.params["dimension_numbers"]
    value = apply(eqn, weight.value, indices, updates)
    if eqn.primitive.name != "scatter":  # a sum, whose other part has no gradient
        return handed_on(weight.replace(value=value))
    gone = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
    indexed = set(numbers.scatter_dims_to_operand_dims)
    stays = [axis for axis in range(weight.value.ndim) if axis not in gone]
    sizes = dict(zip(stays, (updates.shape[i] for i in numbers.update_window_dims), strict=True))

    def is_full(axis):
        return axis in sizes and axis not in indexed and sizes[axis] == weight.value.shape[axis]

    projected = weight.axes("projected")
    if all(map(is_full, (*projected, *weight.axes("batch")))):
        shape = list(updates.shape)
        for axis, place in zip(stays, numbers.update_window_dims, strict=True):
            if axis in projected:
                shape[place] = weight.up.shape[axis]
        zeros = jnp.zeros(shape, weight.up.dtype)
        up = apply(eqn, weight.up, indices, zeros)
        return handed_on(weight.replace(value=value, up=up, sharding=weight.sharding))
    others = [axis for axis in range(weight.value.ndim) if axis not in projected]
    if len(projected) == 1 and indexed == set(projected) <= gone and all(map(is_full, others)):
        columns = weight.indices()
        ones = jnp.ones(columns.shape) if weight.factors is None else weight.factors
        factors = ones.at[indices[..., 0]].set(0.0, mode="drop")
        return handed_on(weight.replace(value=value, columns=columns, factors=factors))
    return None


def _dynamic_update_slice(walk: Walk, eqn, ins):
    """Overwrites a slice with numbers that have no gradient."""
    del walk
    if not only_first(ins) or ins[1].active:
        return None
    weight, updates = ins[0].value, ins[1].value
    projected = weight.axes("projected")
    if any(
        updates.shape[axis] != weight.value.shape[axis]
        for axis in (*projected, *weight.axes("batch"))
    ):
        return None
    starts = [traced.value for traced in ins[2:]]
    shape = [weight.up.shape[i] if i in projected else n for i, n in enumerate(updates.shape)]
    up = apply(eqn, weight.up, jnp.zeros(shape, weight.up.dtype), *starts)
    value = apply(eqn, weight.value, updates, *starts)
    return handed_on(weight.replace(value=value, up=up, sharding=weight.sharding))


RULES = {
    "transpose": mover(_transpose),
    "reshape": mover(_reshape),
    "squeeze": mover(_squeeze),
    "expand_dims": mover(_expand),
    "slice": mover(_slice),
    "dynamic_slice": mover(_dynamic_slice),
    "rev": mover(_rev),
    "broadcast_in_dim": mover(_broadcast_in_dim),
    "split": mover(_split),
    "pad": mover(_pad),
    "scatter": mover(_scatter),
    "scatter-add": mover(_scatter),
    "scatter_add": mover(_scatter),
    "dynamic_update_slice": mover(_dynamic_update_slice),
}
