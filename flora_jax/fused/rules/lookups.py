"""Lookups: the rule for taking rows of a weight, or matrices of a stack, by index."""

import jax
import jax.numpy as jnp

from flora_jax.fused.interpreter import Walk, apply
from flora_jax.fused.rules.common import only_first
from flora_jax.fused.rules.movers import after_move, mover
from flora_jax.fused.weight import Kind, Weight


def _gather(walk: Walk, eqn, ins):
    """Takes rows by index, `table[tokens]`, or matrices of a stack, `experts[ids]`.

    The projected axes must not be indexed or sliced; batch axes must be taken whole, or by index alone.
    """
    if not only_first(ins):
        return None
    weight, indices = ins[0].value, ins[1].value
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    gone = set(numbers.collapsed_slice_dims) | set(numbers.operand_batching_dims)
    batch = weight.axes("batch")
    indexed = tuple(  # where a slice is the whole axis, an index can but be zero
        axis
        for axis in numbers.start_index_map
        if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
        or sizes[axis] != weight.value.shape[axis]
    )
    by_batch = (
        bool(indexed) and set(indexed) <= set(batch) and all(sizes[axis] == 1 for axis in indexed)
    )
    for axis in (*weight.axes("projected"), *batch):
        if by_batch and axis in indexed:
            continue
        if axis in gone or axis in indexed or sizes[axis] != weight.value.shape[axis]:
            return None
    value = apply(eqn, weight.value, indices)
    kinds: list[Kind] = ["batch" if by_batch else "kept"] * value.ndim
    stays = [axis for axis in range(weight.value.ndim) if axis not in gone]
    for axis, place in zip(stays, numbers.offset_dims, strict=True):
        kinds[place] = weight.kinds[axis]
    sizes = [
        n if weight.kinds[axis] != "projected" else weight.up.shape[axis]
        for axis, n in enumerate(sizes)
    ]
    fills = eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    filled = (
        {"fill_value": 0} if fills else {}
    )  # what is filled in is no part of the factors' product
    up = apply(eqn, weight.up, indices, slice_sizes=tuple(sizes), **filled)
    slot = numbers.offset_dims[stays.index(weight.slot)]
    if by_batch:
        keys = _keys_taken(weight, indices, indexed, numbers, stays, kinds)
        return after_move(weight, value, up, kinds, slot, keys=keys)
    walk.note(eqn, ins, whole=False)
    return after_move(weight, value, up, kinds, slot, looked_up=True)


def _keys_taken(weight: Weight, indices: jax.Array, indexed, numbers, stays, kinds) -> jax.Array:
    """The keys of matrices that were taken by index, along the batch axes of the result in their order."""
    batch = weight.axes("batch")
    places = [batch.index(axis) for axis in indexed]
    keys = jnp.moveaxis(weight.keys, places, range(len(places)))
    columns = [numbers.start_index_map.index(axis) for axis in indexed]
    at = tuple(
        jnp.clip(indices[..., column], 0, keys.shape[i] - 1) for i, column in enumerate(columns)
    )
    taken = keys[
        at
    ]  # axes of the indices, then the batch axes that were taken whole, then the words
    sources: dict[int, int | None] = {}
    left = iter(range(indices.ndim - 1, taken.ndim - 1))
    for axis, place in zip(stays, numbers.offset_dims, strict=True):
        if weight.kinds[axis] == "batch":
            sources[place] = None if axis in indexed else next(left)
    new = iter(range(indices.ndim - 1))
    order = [
        sources[axis] if axis in sources else next(new)
        for axis, kind in enumerate(kinds)
        if kind == "batch"
    ]
    moved = jnp.transpose(taken, (*(i for i in order if i is not None), taken.ndim - 1))
    return jnp.expand_dims(moved, [i for i, source in enumerate(order) if source is None])


RULES = {
    "gather": mover(_gather),
}
