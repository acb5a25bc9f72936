"""Arithmetic: scaling, sums, casts, and what leaves a weight as it is."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from flora_jax.fused.interpreter import Traced, Walk, apply, is_inexact
from flora_jax.fused.made import Made
from flora_jax.fused.rules.common import handed_on, is_kept, plain
from flora_jax.fused.weight import Weight
from flora_jax.sharding import explicit


def _mul(walk: Walk, eqn, ins):
    """A product, or a quotient with the weight above."""
    del walk
    inverse = eqn.primitive.name == "div"
    place = 0 if isinstance(ins[0].value, Weight) else 1
    if inverse and place == 1:
        return None
    scaled = _scaled(ins[place].value, ins[1 - place], inverse)
    if scaled is None:
        return None
    return handed_on(scaled.replace(value=apply(eqn, *plain(ins))))


def _scaled(weight: Weight, other: Traced, inverse: bool) -> Weight | None:
    """Tap and factors under a product with numbers that vary along the one or the other's axes."""
    if other.active or isinstance(other.value, Weight):
        return None
    numbers, ndim = jnp.asarray(other.value), weight.value.ndim
    if other.broadcast is not None:
        operand, dims = other.broadcast
        shape = [1] * numbers.ndim
        for length, dim in zip(jnp.shape(operand), dims, strict=True):
            shape[dim] = length
        numbers = jnp.asarray(operand).reshape(shape)
    numbers = numbers.reshape((1,) * (ndim - numbers.ndim) + numbers.shape)
    numbers = numbers.astype(jnp.promote_types(numbers.dtype, jnp.float32))
    if inverse:
        numbers = 1 / numbers
    projected = weight.axes("projected")
    if all(numbers.shape[axis] == 1 for axis in projected):
        return weight.replace(tap=weight.tap * numbers.astype(weight.tap.dtype))
    if any(numbers.shape[axis] != 1 for axis in range(ndim) if axis not in projected):
        return None
    lengths = [weight.value.shape[axis] for axis in projected]
    numbers = jnp.broadcast_to(numbers.reshape([numbers.shape[a] for a in projected]), lengths)
    return weight.replace(factors=numbers if weight.factors is None else weight.factors * numbers)


def _add(walk: Walk, eqn, ins):
    """A sum with something that no gradient flows to."""
    del walk
    place = 0 if isinstance(ins[0].value, Weight) else 1
    weight, other = ins[place].value, ins[1 - place]
    if other.active or isinstance(other.value, Weight):
        return None
    tap = -weight.tap if place == 1 and eqn.primitive.name == "sub" else weight.tap
    return handed_on(weight.replace(value=apply(eqn, *plain(ins)), tap=tap))


def _neg(walk: Walk, eqn, ins):
    del walk
    weight = ins[0].value
    return handed_on(weight.replace(value=apply(eqn, weight.value), tap=-weight.tap))


def _convert(walk: Walk, eqn, ins):
    weight, dtype = ins[0].value, eqn.params["new_dtype"]
    if not isinstance(weight.value, Made):
        return _same(walk, eqn, ins)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    return handed_on(weight.replace(value=weight.value.astype(dtype)))


def _same(walk: Walk, eqn, ins):
    """The value passes through the operation, alone or among others; nothing is mixed."""
    del walk
    result = apply(eqn, *plain(ins))
    if not eqn.primitive.multiple_results:
        result = [result]
    if any(is_kept(t) and not is_inexact(x) for t, x in zip(ins, result, strict=False)):
        return None
    outs = []
    for value, traced in zip(result, ins[: len(result)], strict=True):
        if not isinstance(traced.value, Weight):
            outs.append(Traced(value, traced.active))
        elif is_inexact(value):
            outs.append(Traced(traced.value.replace(value=value), True))
        else:
            outs.append(Traced(value, False))
    return outs


def _both(walk: Walk, eqn, ins):
    """The mark applies to the value and to the tap (devices that `shard_map` runs over)."""
    del walk
    weight = ins[0].value
    value, tap = apply(eqn, weight.value), apply(eqn, weight.tap)
    if eqn.primitive.multiple_results:
        (value,), (tap,) = value, tap
    return handed_on(weight.replace(value=value, tap=tap))


def _reshard(walk: Walk, eqn, ins):
    """A move between devices is the value's; the rest comes along to where axes are automatic."""
    del walk
    weight, goal = ins[0].value, eqn.params["dst_sharding"]

    def follow(array):
        if array is None or jax.typeof(array).sharding.mesh == goal.mesh:
            return array
        return explicit.put(array, NamedSharding(goal.mesh, PartitionSpec()))

    parts = ("tap", "keys", "columns", "factors")
    moved = {name: follow(getattr(weight, name)) for name in parts}
    return handed_on(weight.replace(value=apply(eqn, weight.value), place=weight.place, **moved))


def _without_gradient(walk: Walk, eqn, ins):
    del walk
    if any(map(is_kept, ins)):
        return None
    result = apply(eqn, *plain(ins))
    return [Traced(x, False) for x in (result if eqn.primitive.multiple_results else [result])]


RULES = {
    "mul": _mul,
    "div": _mul,
    "add": _add,
    "sub": _add,
    "neg": _neg,
    "copy": _same,
    "copy_p": _same,
    "convert_element_type": _convert,
    "reduce_precision": _same,
    "name": _same,
    "sharding_constraint": _same,
    "reshard": _reshard,
    "optimization_barrier": _same,
    "pvary": _both,
    "pcast": _both,
    "stop_gradient": _without_gradient,
}
