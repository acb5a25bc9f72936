"""Lookups: the rule for taking rows of a weight by index."""

from flora_jax.fused.interpreter import Walk, apply
from flora_jax.fused.rules.common import only_first
from flora_jax.fused.rules.movers import after_move, mover
from flora_jax.fused.weight import Kind


def _gather(walk: Walk, eqn, ins):
    """Takes rows by index, `table[tokens]`. The projected axes and batch axes must not be indexed or sliced."""
    if not only_first(ins):
        return None
    weight, indices = ins[0].value, ins[1].value
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    gone = set(numbers.collapsed_slice_dims) | set(numbers.operand_batching_dims)
    for axis in (*weight.axes("projected"), *weight.axes("batch")):
        moved = axis in gone or axis in numbers.start_index_map
        if moved or sizes[axis] != weight.value.shape[axis]:
            return None
    value = apply(eqn, weight.value, indices)
    kinds: list[Kind] = ["kept"] * value.ndim
    stays = [axis for axis in range(weight.value.ndim) if axis not in gone]
    for axis, place in zip(stays, numbers.offset_dims, strict=True):
        kinds[place] = weight.kinds[axis]
    sizes = [
        n if weight.kinds[axis] != "projected" else weight.up.shape[axis]
        for axis, n in enumerate(sizes)
    ]
    up = apply(eqn, weight.up, indices, slice_sizes=tuple(sizes))
    slot = numbers.offset_dims[stays.index(weight.slot)]
    walk.note(eqn, ins, whole=False)
    return after_move(weight, value, up, kinds, slot, looked_up=True)


RULES = {
    "gather": mover(_gather),
}
