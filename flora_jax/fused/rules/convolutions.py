"""Convolutions: the rule for convolutions with a kernel that is a `Weight`.

The axes of a kernel are its input channels, its output channels, and the spatial axes of its window.
"""

import dataclasses
import functools
import itertools
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax import dtypes
from flora_jax.fused.contraction import contract, sample
from flora_jax.fused.interpreter import Traced, Walk, apply
from flora_jax.fused.use import both_factors, use
from flora_jax.fused.weight import Weight

_Rule = tuple[Callable, Callable]


def _conv_general_dilated(walk: Walk, eqn, ins):
    """Convolves with a kernel.

    Its input channels, or its output channels, or its window and input channels are projected. Where the
    axes of the window are batch axes, so that each position in it has a projection of its own, the
    positions are computed one by one.
    """
    if not isinstance(ins[1].value, Weight) or isinstance(ins[0].value, Weight):
        return None
    if eqn.params["batch_group_count"] != 1:
        return None
    x, weight = ins[0].value, ins[1].value
    numbers = eqn.params["dimension_numbers"]
    output, channels, *window = numbers.rhs_spec
    projected, batch = set(weight.axes("projected")), set(weight.axes("batch"))
    if weight.adapter:
        return _adapted_convolution(walk, eqn, ins)
    dtype = dtypes.operands(x.dtype, weight.value.dtype)
    if projected == {channels, *window} and not batch:
        rule = functools.partial(_by_patch, eqn, dtype)
    elif projected in ({channels}, {output}) and batch in (set(), set(window)):
        rule = functools.partial(_by_channel, eqn, dtype)
    else:
        return None
    count = eqn.params["feature_group_count"]
    save, back = rule(weight) if count == 1 else _in_groups(eqn, rule, weight, count)
    walk.note(eqn, ins, whole=False)
    y = use(weight, (x,), lambda x, value: apply(eqn, x, value), save, back)
    return [Traced(y, True)]


def _convolve(eqn, dtype: Any, x: jax.Array, kernel: jax.Array, **changes: Any) -> jax.Array:
    """The equation's convolution in this dtype, of one group of channels."""
    changes = {"feature_group_count": 1, "preferred_element_type": None, **changes}
    return apply(eqn, x.astype(dtype), kernel.astype(dtype), **changes)


def _adapted_convolution(walk: Walk, eqn, ins):
    """Convolves with an adapter's two factors one after the other.

    This is not possible where the axes of the window are batch axes, nor for groups of channels.
    """
    x, weight = ins[0].value, ins[1].value
    numbers = eqn.params["dimension_numbers"]
    output, channels, *window = numbers.rhs_spec
    projected = set(weight.axes("projected"))
    if weight.axes("batch") or projected not in ({channels, *window}, {channels}, {output}):
        return None
    if eqn.params["feature_group_count"] != 1:
        return None
    dtype = dtypes.operands(x.dtype, weight.value.dtype)
    down, up = (factor.astype(dtype) for factor in both_factors(weight))
    in_channel, out_channel = numbers.lhs_spec[1], numbers.out_spec[1]
    if projected == {channels}:
        x_down = jnp.tensordot(x.astype(dtype), down, ((in_channel,), (0,)))
        low_rank = _convolve(eqn, dtype, jnp.moveaxis(x_down, -1, in_channel), up)
    else:
        if projected == {output}:
            kernel, last = up, down.T
        else:
            kernel, last = jnp.moveaxis(down, -1, output), up
            last = last if weight.slot < output else last.T
        middle = _convolve(eqn, dtype, x, kernel)
        low_rank = jnp.tensordot(middle, last, ((out_channel,), (0,)))
        low_rank = jnp.moveaxis(low_rank, -1, out_channel)
    walk.note(eqn, ins, whole=False)
    y = apply(eqn, x, weight.value)
    return [Traced(y + low_rank.astype(y.dtype), True)]


def _by_patch(eqn, dtype: Any, weight: Weight) -> _Rule:
    """The rule for a projected window and input channels: `A` itself is a kernel with `r` output channels."""
    numbers = eqn.params["dimension_numbers"]
    output, out_channel = numbers.rhs_spec[0], numbers.out_spec[1]

    def save(source, x):
        kernel = jnp.moveaxis(sample(weight, source, dtype), -1, output)
        return _convolve(eqn, dtype, x, kernel)

    def back(saved, source, delta):
        del source
        labels = string.ascii_lowercase[: delta.ndim]
        channel = labels[out_channel]
        goal = f"Z{channel}" if weight.slot < output else f"{channel}Z"
        equation = f"{labels.replace(channel, 'Z')},{labels}->{goal}"
        return dtypes.einsum(equation, saved, delta).reshape(weight.up.shape)

    return save, back


def _by_channel(eqn, dtype: Any, weight: Weight) -> _Rule:
    """The rule where channels are projected: a transposed convolution with `r` channels in their place."""
    numbers = eqn.params["dimension_numbers"]
    _, channels, *window = numbers.rhs_spec
    of_input = weight.slot == channels
    axis = numbers.lhs_spec[1] if of_input else numbers.out_spec[1]
    lengths = [weight.value.shape[dim] for dim in window]
    kinds = tuple("kept" if kind == "batch" else kind for kind in weight.kinds)
    each = weight.replace(kinds=kinds)
    # tuples of (place in the kernel, place in the keys, the convolution by that part of it)
    parts = [((), (), functools.partial(_convolve, eqn, dtype))]
    if weight.axes("batch"):
        order = sorted(range(len(window)), key=lambda i: window[i])
        parts = [
            (place, tuple(place[i] for i in order), _at_position(eqn, dtype, lengths, place))
            for place in itertools.product(*map(range, lengths))
        ]

    def channels_of(array, source):
        keys, columns, factors = source
        array = array.astype(dtypes.operands(array.dtype, dtype))
        return [_channels(each, (keys[at], columns, factors), array, axis) for _, at, _ in parts]

    def save(source, x):
        return channels_of(x, source) if of_input else x

    def back(saved, source, delta):
        deltas = [delta] * len(parts) if of_input else channels_of(delta, source)
        inputs = saved if of_input else [saved] * len(parts)
        shape = [1 if i in window and parts[0][0] else n for i, n in enumerate(weight.up.shape)]
        result = jnp.zeros(weight.up.shape, weight.up.dtype)
        for (place, _, conv), x, d in zip(parts, inputs, deltas, strict=True):
            kernel = jax.ShapeDtypeStruct(shape, dtype)
            (part,) = jax.linear_transpose(functools.partial(conv, x), kernel)(d.astype(dtype))
            start = [0] * result.ndim
            for dim, i in zip(window, place, strict=False):
                start[dim] = i
            result = jax.lax.dynamic_update_slice(result, part.astype(result.dtype), start)
        return result

    return save, back


def _in_groups(eqn, rule: Callable[[Weight], _Rule], weight: Weight, count: int) -> _Rule:
    """The rule of one group of channels, mapped over all of them.

    The groups share the input side of the kernel, and so its projection; each has its own part of the
    output side.
    """
    numbers = eqn.params["dimension_numbers"]
    output, in_channel, out_channel = numbers.rhs_spec[0], numbers.lhs_spec[1], numbers.out_spec[1]
    of_output = output in weight.axes("projected")

    def divided(shape):
        return tuple(n // count if axis == output and n > 1 else n for axis, n in enumerate(shape))

    def shaped(array, shape):
        return jax.ShapeDtypeStruct(shape, array.dtype)

    one = dataclasses.replace(
        weight,
        value=shaped(weight.value, divided(weight.value.shape)),
        up=shaped(weight.up, weight.up.shape if of_output else divided(weight.up.shape)),
        sharding=None,
    )
    save_one, back_one = rule(one)

    def apart(array, axis):
        shape = (*array.shape[:axis], count, -1, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(shape), axis, 0)

    def save(source, x):
        return jax.vmap(functools.partial(save_one, source))(apart(x, in_channel))

    def back(saved, source, delta):
        deltas = apart(delta, out_channel)
        if not of_output:
            parts = jax.vmap(lambda saved, delta: back_one(saved, source, delta))(saved, deltas)
            return jnp.moveaxis(parts, 0, output).reshape(weight.up.shape)
        keys, _, factors = source
        columns = weight.indices().reshape(count, -1)
        factors = None if factors is None else factors.reshape(count, -1)

        def group(saved, columns, factors, delta):
            return back_one(saved, (keys, columns, factors), delta)

        return jax.vmap(group)(saved, columns, factors, deltas).sum(0)

    return save, back


def _at_position(eqn, dtype: Any, lengths: Sequence[int], place: Sequence[int]):
    """Returns the convolution with one position of the window, `(x, kernel of spatial size 1) -> y`."""
    params = eqn.params
    padding = [(0, 0, 0)] * (len(lengths) + 2)
    spatial = params["dimension_numbers"].lhs_spec[2:]
    for i, axis in enumerate(spatial):
        low, high = params["padding"][i]
        step = params["rhs_dilation"][i]
        before, after = place[i] * step, (lengths[i] - 1 - place[i]) * step
        padding[axis] = (low - before, high - after, params["lhs_dilation"][i] - 1)
    none = {"padding": ((0, 0),) * len(lengths), "lhs_dilation": (1,) * len(lengths)}

    def conv(x, kernel):
        # padded separately: with negative padding XLA's convolution on the CPU reads beyond its input
        x = jax.lax.pad(x, jnp.zeros([], x.dtype), padding)
        return _convolve(eqn, dtype, x, kernel, **none)

    return conv


def _channels(weight: Weight, source, array, axis: int):
    """Returns an array with `r` channels in the place of those along `axis`."""
    labels = string.ascii_lowercase[: array.ndim]
    of_weight = "".join(
        labels[axis] if kind == "projected" else string.ascii_uppercase[i]
        for i, kind in enumerate(weight.kinds)
    )
    result = contract(weight, source, array, labels, of_weight)
    return jnp.moveaxis(result, -1, axis).astype(dtypes.operands(array.dtype))


RULES = {
    "conv_general_dilated": _conv_general_dilated,
}
