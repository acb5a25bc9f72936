"""Arithmetic: the rules for scaling, sums, casts, and operations that leave a weight as it is."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from flora_jax import dtypes
from flora_jax.fused.interpreter import Traced, Walk, apply, exposed, is_inexact
from flora_jax.fused.lazy import Lazy
from flora_jax.fused.rules.common import handed_on, is_adapted, plain
from flora_jax.fused.weight import Weight
from flora_jax.sharding import explicit


def _complex_up(up: jax.Array, value: jax.Array) -> jax.Array:
    """Returns the up factor, complex where the value has become so; JAX takes the real part on the way back."""
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        return up.astype(jnp.promote_types(up.dtype, jnp.complex64))
    return up


def _mul(walk: Walk, eqn, ins):
    """Multiplies a weight by numbers, or divides it by them."""
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
    """Scales the up factor, or the columns of `A`, by numbers that vary along the axes of that one only."""
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
    numbers = numbers.astype(dtypes.sums(numbers.dtype))
    if inverse:
        numbers = 1 / numbers
    projected = weight.axes("projected")
    if all(numbers.shape[axis] == 1 for axis in projected):
        up = _complex_up(weight.up, weight.value)
        return weight.replace(up=up * numbers.astype(up.dtype))
    if any(numbers.shape[axis] != 1 for axis in range(ndim) if axis not in projected):
        return None
    lengths = [weight.value.shape[axis] for axis in projected]
    numbers = jnp.broadcast_to(numbers.reshape([numbers.shape[a] for a in projected]), lengths)
    return weight.replace(factors=numbers if weight.factors is None else weight.factors * numbers)


def _add(walk: Walk, eqn, ins):
    """Adds something else, which may have a gradient of its own: a product beside the weight, another weight."""
    place = 0 if isinstance(ins[0].value, Weight) else 1
    weight, other = ins[place].value, ins[1 - place]
    if isinstance(other.value, Weight):
        walk.note(eqn, [other], whole=True)
        (other,) = exposed([other])
    if jnp.shape(other.value) != weight.value.shape:
        return None
    up = -weight.up if place == 1 and eqn.primitive.name == "sub" else weight.up
    values = (weight.value, other.value) if place == 0 else (other.value, weight.value)
    differentiated = weight.differentiated or other.active
    value = apply(eqn, *values)
    return handed_on(weight.replace(value=value, up=up, differentiated=differentiated))


def _select_n(walk: Walk, eqn, ins):
    """Selects between a weight and numbers, by a mask that varies along one side of the matrix only."""
    del walk
    which, *cases = ins
    places = [i for i, traced in enumerate(cases) if isinstance(traced.value, Weight)]
    if isinstance(which.value, Weight) or len(cases) != 2 or len(places) != 1:
        return None
    (place,) = places
    if cases[1 - place].active:
        return None

    def mask(array):
        return (jnp.asarray(array) == place).astype(jnp.float32)

    broadcast = which.broadcast and (mask(which.broadcast[0]), which.broadcast[1])
    scaled = _scaled(cases[place].value, Traced(mask(which.value), False, broadcast), False)
    if scaled is None:
        return None
    return handed_on(scaled.replace(value=apply(eqn, *plain(ins))))


def _neg(walk: Walk, eqn, ins):
    del walk
    weight = ins[0].value
    return handed_on(weight.replace(value=apply(eqn, weight.value), up=-weight.up))


def _convert(walk: Walk, eqn, ins):
    weight, dtype = ins[0].value, eqn.params["new_dtype"]
    if not isinstance(weight.value, Lazy):
        return _same(walk, eqn, ins)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    return handed_on(weight.replace(value=weight.value.astype(dtype)))


def _same(walk: Walk, eqn, ins):
    """Applies an operation that returns its inputs unmixed, with a weight among them."""
    del walk
    result = apply(eqn, *plain(ins))
    if not eqn.primitive.multiple_results:
        result = [result]
    if any(is_adapted(t) and not is_inexact(x) for t, x in zip(ins, result, strict=False)):
        return None
    outs = []
    for value, traced in zip(result, ins[: len(result)], strict=True):
        if not isinstance(traced.value, Weight):
            outs.append(Traced(value, traced.active))
        elif is_inexact(value):
            up = _complex_up(traced.value.up, value)
            outs.append(
                Traced(
                    traced.value.replace(value=value, up=up, sharding=traced.value.sharding), True
                )
            )
        else:
            outs.append(Traced(value, False))
    return outs


def _both(walk: Walk, eqn, ins):
    """Marks both the value and the up factor as varying over devices of a `shard_map`."""
    del walk
    weight = ins[0].value
    value, up = apply(eqn, weight.value), apply(eqn, weight.up)
    if eqn.primitive.multiple_results:
        (value,), (up,) = value, up
    return handed_on(weight.replace(value=value, up=up))


def _reshard(walk: Walk, eqn, ins):
    """Reshards the value; the other arrays follow where the new mesh has other axis types."""
    del walk
    weight, goal = ins[0].value, eqn.params["dst_sharding"]

    def follow(array):
        if array is None or jax.typeof(array).sharding.mesh == goal.mesh:
            return array
        return explicit.put(array, NamedSharding(goal.mesh, PartitionSpec()))

    parts = ("up", "keys", "columns", "factors")
    moved = {name: follow(getattr(weight, name)) for name in parts}
    return handed_on(
        weight.replace(value=apply(eqn, weight.value), sharding=weight.sharding, **moved)
    )


def _without_gradient(walk: Walk, eqn, ins):
    del walk
    if any(map(is_adapted, ins)):
        return None
    result = apply(eqn, *plain(ins))
    return [Traced(x, False) for x in (result if eqn.primitive.multiple_results else [result])]


RULES = {
    "mul": _mul,
    "div": _mul,
    "add": _add,
    "sub": _add,
    "add_any": _add,
    "neg": _neg,
    "select_n": _select_n,
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
