"""Convolutions: the rule for convolutions with a kernel that is a `Weight`.

The axes of a kernel are its input channels, its output channels, and the spatial axes of its window.
"""

import functools
import itertools
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flora_jax.fused import weight as weights
from flora_jax.fused.interpreter import Traced, Walk, apply
from flora_jax.fused.weight import Weight


def _conv_general_dilated(walk: Walk, eqn, ins):
    """Convolves with a kernel.

    Its input channels, or its output channels, or its window and input channels are projected. Where the
    axes of the window are batch axes, so that each position in it has a projection of its own, the
    positions are computed one by one.
    """
    if not isinstance(ins[1].value, Weight) or isinstance(ins[0].value, Weight):
        return None
    if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
        return None
    x, weight = ins[0].value, ins[1].value
    numbers = eqn.params["dimension_numbers"]
    output, channels, *window = numbers.rhs_spec
    projected, batch = set(weight.axes("projected")), set(weight.axes("batch"))
    if weight.adapter:
        return _adapted_convolution(walk, eqn, ins)
    if projected == {channels, *window} and not batch:
        save, back = _by_patch(eqn, weight)
    elif projected in ({channels}, {output}) and batch in (set(), set(window)):
        save, back = _by_channel(eqn, weight)
    else:
        return None
    walk.note(eqn, ins, whole=False)
    y = weights.use(weight, (x,), lambda x, value: apply(eqn, x, value), save, back)
    return [Traced(y, True)]


def _adapted_convolution(walk: Walk, eqn, ins):
    """Convolves with an adapter's two factors one after the other.

    This is not possible where the axes of the window are batch axes.
    """
    x, weight = ins[0].value, ins[1].value
    numbers = eqn.params["dimension_numbers"]
    output, channels, *window = numbers.rhs_spec
    projected = set(weight.axes("projected"))
    if weight.axes("batch") or projected not in ({channels, *window}, {channels}, {output}):
        return None
    down, up = (factor.astype(x.dtype) for factor in weights.both_factors(weight))
    in_channel, out_channel = numbers.lhs_spec[1], numbers.out_spec[1]
    if projected == {channels}:
        x_down = jnp.moveaxis(jnp.tensordot(x, down, ((in_channel,), (0,))), -1, in_channel)
        low_rank = apply(eqn, x_down, up)
    else:
        if projected == {output}:
            kernel, last = up, down.T
        else:
            kernel, last = jnp.moveaxis(down, -1, output), up
            last = last if weight.slot < output else last.T
        middle = apply(eqn, x, kernel)
        low_rank = jnp.tensordot(middle, last, ((out_channel,), (0,)))
        low_rank = jnp.moveaxis(low_rank, -1, out_channel)
    walk.note(eqn, ins, whole=False)
    y = apply(eqn, x, weight.value)
    return [Traced(y + low_rank.astype(y.dtype), True)]


def _by_patch(eqn, weight: Weight):
    """The rule for a projected window and input channels: `A` itself is a kernel with `r` output channels."""
    numbers = eqn.params["dimension_numbers"]
    output, out_channel = numbers.rhs_spec[0], numbers.out_spec[1]

    def save(source, x):
        kernel = jnp.moveaxis(weights.sample(weight, source), -1, output)
        return apply(eqn, x, kernel.astype(x.dtype))

    def back(saved, source, delta):
        del source
        labels = string.ascii_lowercase[: delta.ndim]
        channel = labels[out_channel]
        goal = f"Z{channel}" if weight.slot < output else f"{channel}Z"
        equation = f"{labels.replace(channel, 'Z')},{labels}->{goal}"
        sums = jnp.promote_types(delta.dtype, jnp.float32)
        product = jnp.einsum(equation, saved, delta, preferred_element_type=sums)
        return product.reshape(weight.up.shape)

    return save, back


def _by_channel(eqn, weight: Weight):
    """The rule where channels are projected: a transposed convolution with `r` channels in their place."""
    numbers = eqn.params["dimension_numbers"]
    _, channels, *window = numbers.rhs_spec
    of_input = weight.slot == channels
    axis = numbers.lhs_spec[1] if of_input else numbers.out_spec[1]
    lengths = [weight.value.shape[dim] for dim in window]
    kinds = tuple("kept" if kind == "batch" else kind for kind in weight.kinds)
    each = weight.replace(kinds=kinds)
    # tuples of (place in the kernel, place in the keys, the convolution by that part of it)
    parts = [((), (), functools.partial(apply, eqn))]
    if weight.axes("batch"):
        order = sorted(range(len(window)), key=lambda i: window[i])
        parts = [
            (place, tuple(place[i] for i in order), _at_position(eqn, lengths, place))
            for place in itertools.product(*map(range, lengths))
        ]

    def channels_of(array, source):
        keys, columns, factors = source
        return [_channels(each, (keys[at], columns, factors), array, axis) for _, at, _ in parts]

    def save(source, x):
        return channels_of(x, source) if of_input else x

    def back(saved, source, delta):
        deltas = [delta] * len(parts) if of_input else channels_of(delta, source)
        inputs = saved if of_input else [saved] * len(parts)
        shape = [1 if i in window and parts[0][0] else n for i, n in enumerate(weight.up.shape)]
        result = jnp.zeros(weight.up.shape, weight.up.dtype)
        for (place, _, conv), x, d in zip(parts, inputs, deltas, strict=True):
            kernel = jax.ShapeDtypeStruct(shape, x.dtype)
            (part,) = jax.linear_transpose(functools.partial(conv, x), kernel)(d)
            start = [0] * result.ndim
            for dim, i in zip(window, place, strict=False):
                start[dim] = i
            result = jax.lax.dynamic_update_slice(result, part.astype(result.dtype), start)
        return result

    return save, back


def _at_position(eqn, lengths: Sequence[int], place: Sequence[int]):
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
        return apply(eqn, jax.lax.pad(x, jnp.zeros([], x.dtype), padding), kernel, **none)

    return conv


def _channels(weight: Weight, source, array, axis: int):
    """Returns an array with `r` channels in the place of those along `axis`."""
    labels = string.ascii_lowercase[: array.ndim]
    of_weight = "".join(
        labels[axis] if kind == "projected" else string.ascii_uppercase[i]
        for i, kind in enumerate(weight.kinds)
    )
    result = weights.contract(weight, source, array, labels, of_weight)
    return jnp.moveaxis(result, -1, axis).astype(array.dtype)


RULES = {
    "conv_general_dilated": _conv_general_dilated,
}
