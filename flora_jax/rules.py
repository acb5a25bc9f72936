"""What each primitive does with a `Weight`: one rule for each, by the primitive's name.

- Movers (transpose, reshape, slice, gather of rows, …) act on the value and on the tap alike, so
  long as they leave the projected axes together or say which of their indices are left.
- Uses (dot_general, convolution) end the way of a weight in a plain array.
- Control flow is entered.

A rule gives None where it does not fit; the weight is then exposed.
"""

import functools
import itertools
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from flora_jax import explicit
from flora_jax import weight as weights
from flora_jax.interpreter import Traced, Walk, apply, exposed, is_inexact
from flora_jax.made import Made
from flora_jax.sharding import first_axis_dropped
from flora_jax.weight import Joined, Kind, Weight, tap_shape


def _values(ins: Sequence[Traced]) -> list[Any]:
    """The inputs as arrays that carry no gradient for weights."""
    return [t.value.value if isinstance(t.value, Weight) else t.value for t in ins]


def _active(weight: Weight) -> list[Traced]:
    return [Traced(weight, True)]


def _kept(traced: Traced) -> bool:
    """Whether it is an adapted weight, whose value alone is not all of it."""
    return isinstance(traced.value, Weight) and traced.value.kept


def _only_first(ins: Sequence[Traced]) -> bool:
    return not any(isinstance(traced.value, Weight) for traced in ins[1:])


# ---- movers ----


def _moved(weight: Weight, value, tap, kinds: Sequence[Kind], slot: int, **changes) -> list[Traced]:
    """A weight after a move; `slot` is where the tap's rank has come to."""
    kinds = tuple(kinds)
    goal = kinds.index("projected")
    if goal != slot:
        tap = jnp.swapaxes(tap, goal, slot)
    return _active(weight.replace(value=value, tap=tap, kinds=kinds, **changes))


def _mover(rule):
    """A mover, which on a mesh of explicit axes gets weights whose tap lies whole everywhere."""

    def free(traced: Traced) -> Traced:
        weight = traced.value
        if not isinstance(weight, Weight) or explicit.place(weight.tap) is None:
            return traced
        return traced._replace(value=weight.replace(tap=explicit.everywhere(weight.tap)))

    return lambda walk, eqn, ins: rule(walk, eqn, [free(traced) for traced in ins])


def _per_kind(weight: Weight, move) -> dict[str, Any]:
    """Moves `keys`, `columns` and `factors`: `move(array, axes)`, `axes` being those it has."""
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
    return _moved(
        weight,
        apply(eqn, weight.value),
        jnp.transpose(weight.tap, order),
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
    """After a change of shape alone: everything keeps its order."""
    if "projected" not in kinds:
        return None
    lengths = {
        kind: [n for n, other in zip(value.shape, kinds, strict=True) if other == kind]
        for kind in ("projected", "batch")
    }
    return _active(
        weight.replace(
            value=value,
            tap=weight.tap.reshape(tap_shape(value.shape, kinds, weight.spec.rank)),
            keys=weight.keys.reshape(*lengths["batch"], weight.keys.shape[-1]),
            columns=_reshape_if(weight.columns, lengths["projected"]),
            factors=_reshape_if(weight.factors, lengths["projected"]),
            kinds=tuple(kinds),
        )
    )


def _reshape_if(array, shape):
    return None if array is None else array.reshape(shape)


def _groups(old: Sequence[int], new: Sequence[int]):
    """Cuts two shapes of one size into the shortest runs of axes of equal size."""
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

    def cut(array, axes, whole=()):
        index = [
            slice(None) if axis in whole else slice(starts[axis], limits[axis], strides[axis])
            for axis in axes
        ]
        return array[tuple(index)]

    moved = _per_kind(weight, cut)
    projected = weight.axes("projected")
    if any((starts[i], limits[i], strides[i]) != (0, weight.value.shape[i], 1) for i in projected):
        moved["columns"] = cut(weight.indices(), projected)
    tap = cut(weight.tap, range(len(starts)), projected)
    return _moved(weight, apply(eqn, weight.value), tap, weight.kinds, weight.slot, **moved)


def _dynamic_slice(walk: Walk, eqn, ins):
    del walk
    if not _only_first(ins):
        return None
    weight, starts = ins[0].value, [traced.value for traced in ins[1:]]
    sizes = eqn.params["slice_sizes"]
    if len(starts) != len(sizes):
        return None

    def cut(array, axes, whole=()):
        first = [jnp.zeros_like(starts[axis]) if axis in whole else starts[axis] for axis in axes]
        lengths = [array.shape[i] if axis in whole else sizes[axis] for i, axis in enumerate(axes)]
        extra = array.ndim - len(first)
        first += [jnp.int32(0)] * extra
        lengths += list(array.shape[len(lengths) :])
        return jax.lax.dynamic_slice(array, first, lengths)

    moved = _per_kind(weight, cut)
    projected = weight.axes("projected")
    if any(sizes[axis] != weight.value.shape[axis] for axis in projected):
        moved["columns"] = cut(weight.indices(), projected)
    tap = cut(weight.tap, range(len(sizes)), projected)
    value = apply(eqn, weight.value, *starts)
    return _moved(weight, value, tap, weight.kinds, weight.slot, **moved)


def _rev(walk: Walk, eqn, ins):
    del walk
    weight, turned = ins[0].value, eqn.params["dimensions"]

    def turn(array, axes):
        return jnp.flip(array, [i for i, axis in enumerate(axes) if axis in turned])

    moved = _per_kind(weight, turn)
    projected = weight.axes("projected")
    if set(projected) & set(turned):
        moved["columns"] = turn(weight.indices(), projected)
    tap = jnp.flip(weight.tap, [axis for axis in turned if axis not in projected])
    return _moved(weight, apply(eqn, weight.value), tap, weight.kinds, weight.slot, **moved)


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
    tap = jax.lax.broadcast_in_dim(weight.tap, tap_shape(shape, kinds, weight.spec.rank), dims)
    return _moved(weight, apply(eqn, weight.value), tap, kinds, dims[weight.slot])


def _gather(walk: Walk, eqn, ins):
    """Rows by index, `table[tokens]`: the projected and batch axes must come along whole."""
    if not _only_first(ins):
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
        n if weight.kinds[axis] != "projected" else weight.tap.shape[axis]
        for axis, n in enumerate(sizes)
    ]
    tap = apply(eqn, weight.tap, indices, slice_sizes=tuple(sizes))
    slot = numbers.offset_dims[stays.index(weight.slot)]
    walk.note(eqn, ins, whole=False)
    return _moved(weight, value, tap, kinds, slot, looked_up=True)


def _split(walk: Walk, eqn, ins):
    del walk
    weight, axis = ins[0].value, eqn.params["axis"]
    ends = list(itertools.accumulate(eqn.params["sizes"]))[:-1]
    count = len(ends) + 1

    def cut(array, axes):
        return jnp.split(array, ends, axes.index(axis)) if axis in axes else [array] * count

    parts = _per_kind(weight, cut)
    if weight.kinds[axis] == "projected":
        parts["columns"] = cut(weight.indices(), weight.axes("projected"))
        taps = [weight.tap] * count
    else:
        taps = jnp.split(weight.tap, ends, axis)
    outs = []
    for i, value in enumerate(apply(eqn, weight.value)):
        moved = {name: part[i] if isinstance(part, list) else part for name, part in parts.items()}
        outs += _moved(weight, value, taps[i], weight.kinds, weight.slot, **moved)
    return outs


def _stack(walk: Walk, eqn, ins):
    del walk
    axis = eqn.params["axis"]
    kinds = _alike(ins)
    if kinds is None:
        return None
    return _together(eqn, ins, axis, [*kinds[:axis], "batch", *kinds[axis:]], jnp.stack)


def _concatenate(walk: Walk, eqn, ins):
    """Of axes of length 1, which is what stacking is; else the parts stay apart until they are used."""
    del walk
    axis = eqn.params["dimension"]
    kinds = _alike(ins)
    if kinds and kinds[axis] == "kept" and ins[0].value.value.shape[axis] == 1:
        batched = [*kinds[:axis], "batch", *kinds[axis + 1 :]]
        return _together(eqn, ins, axis, batched, jnp.concatenate)
    return [Traced(Joined(tuple(traced.value for traced in ins), axis), True)]


def _joined(walk: Walk, eqn, ins):
    """Casts, transposes and products of each part."""
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
    """The kinds that all inputs have, if they differ in the key alone."""
    if not all(isinstance(t.value, Weight) and t.value.columns is None for t in ins):
        return None
    first = ins[0].value

    def fixed(weight: Weight):
        spec = weight.spec
        rule = (spec.rank, spec.distribution, spec.size, spec.impl, spec.block)
        shape = (weight.value.shape, weight.factors is None, weight.tap.dtype)
        return rule, weight.kinds, shape, weight.kept

    if any(fixed(t.value) != fixed(first) for t in ins) or first.factors is not None:
        return None
    return first.kinds


def _together(eqn, ins, axis: int, kinds, join):
    parts = [traced.value for traced in ins]
    value = apply(eqn, *(part.value for part in parts))
    tap = join([part.tap for part in parts], axis)
    keys = jnp.stack([part.keys for part in parts], kinds[:axis].count("batch"))
    return _active(parts[0].replace(value=value, tap=tap, keys=keys, kinds=tuple(kinds)))


# ---- scaling, casts, and what leaves a weight as it is ----


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
    return _active(scaled.replace(value=apply(eqn, *_values(ins))))


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
    return _active(weight.replace(value=apply(eqn, *_values(ins)), tap=tap))


def _neg(walk: Walk, eqn, ins):
    del walk
    weight = ins[0].value
    return _active(weight.replace(value=apply(eqn, weight.value), tap=-weight.tap))


def _convert(walk: Walk, eqn, ins):
    weight, dtype = ins[0].value, eqn.params["new_dtype"]
    if not isinstance(weight.value, Made):
        return _same(walk, eqn, ins)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    return _active(weight.replace(value=weight.value.astype(dtype)))


def _same(walk: Walk, eqn, ins):
    """The value passes through the operation, alone or among others; nothing is mixed."""
    del walk
    result = apply(eqn, *_values(ins))
    if not eqn.primitive.multiple_results:
        result = [result]
    if any(_kept(t) and not is_inexact(x) for t, x in zip(ins, result, strict=False)):
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
    return _active(weight.replace(value=value, tap=tap))


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
    return _active(weight.replace(value=apply(eqn, weight.value), place=weight.place, **moved))


def _without_gradient(walk: Walk, eqn, ins):
    del walk
    if any(map(_kept, ins)):
        return None
    result = apply(eqn, *_values(ins))
    return [Traced(x, False) for x in (result if eqn.primitive.multiple_results else [result])]


# ---- uses ----


def _dot_general(walk: Walk, eqn, ins):
    if all(isinstance(traced.value, Weight) for traced in ins):
        looked_up = [traced.value.looked_up for traced in ins]
        if not any(looked_up):
            return None
        ins = list(ins)
        place = looked_up.index(True)
        (ins[place],) = exposed([ins[place]])
    place = 0 if isinstance(ins[0].value, Weight) else 1
    weight, x = ins[place].value, ins[1 - place].value
    contracting, batch = eqn.params["dimension_numbers"]
    letters = iter(string.ascii_letters.replace("Z", "").replace("Y", ""))
    labels = [[""] * weight.value.ndim, [""] * x.ndim]
    if place == 1:
        labels.reverse()
    for pairs in (contracting, batch):
        for left, right in zip(*pairs, strict=True):
            labels[0][left] = labels[1][right] = next(letters)
    labels = ["".join(label or next(letters) for label in side) for side in labels]
    shared = "".join(labels[0][axis] for axis in batch[0])
    summed = {labels[0][axis] for axis in contracting[0]}
    free = ["".join(c for c in side if c not in summed and c not in shared) for side in labels]
    of_y = shared + free[0] + free[1]

    def product(x, value):
        return apply(eqn, *((value, x) if place == 0 else (x, value)))

    y = weights.multiply(weight, x, product, (labels[1 - place], labels[place], of_y))
    if y is None:
        return None
    walk.note(eqn, ins, whole=False)
    return [Traced(y, True)]


def _conv_general_dilated(walk: Walk, eqn, ins):
    """Kernels whose input channels, output channels, or taps and input channels are projected.

    Taps that are batch axes, each with a projection of its own, go one by one.
    """
    if not isinstance(ins[1].value, Weight) or isinstance(ins[0].value, Weight):
        return None
    if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
        return None
    x, weight = ins[0].value, ins[1].value
    numbers = eqn.params["dimension_numbers"]
    output, channels, *taps = numbers.rhs_spec
    projected, batch = set(weight.axes("projected")), set(weight.axes("batch"))
    if weight.kept:
        return _adapted_convolution(walk, eqn, ins)
    if projected == {channels, *taps} and not batch:
        save, back = _by_patch(eqn, weight)
    elif projected in ({channels}, {output}) and batch in (set(), set(taps)):
        save, back = _by_channel(eqn, weight)
    else:
        return None
    walk.note(eqn, ins, whole=False)
    y = weights.use(weight, (x,), lambda x, value: apply(eqn, x, value), save, back)
    return [Traced(y, True)]


def _adapted_convolution(walk: Walk, eqn, ins):
    """The two factors one after another; taps that are batch axes have no such order."""
    x, weight = ins[0].value, ins[1].value
    numbers = eqn.params["dimension_numbers"]
    output, channels, *taps = numbers.rhs_spec
    projected = set(weight.axes("projected"))
    if weight.axes("batch") or projected not in ({channels, *taps}, {channels}, {output}):
        return None
    down, tap = (factor.astype(x.dtype) for factor in weights.both_factors(weight))
    in_channel, out_channel = numbers.lhs_spec[1], numbers.out_spec[1]
    if projected == {channels}:
        x_down = jnp.moveaxis(jnp.tensordot(x, down, ((in_channel,), (0,))), -1, in_channel)
        low_rank = apply(eqn, x_down, tap)
    else:
        if projected == {output}:
            kernel, last = tap, down.T
        else:
            kernel, last = jnp.moveaxis(down, -1, output), tap
            last = last if weight.slot < output else last.T
        middle = apply(eqn, x, kernel)
        low_rank = jnp.tensordot(middle, last, ((out_channel,), (0,)))
        low_rank = jnp.moveaxis(low_rank, -1, out_channel)
    walk.note(eqn, ins, whole=False)
    y = apply(eqn, x, weight.value)
    return [Traced(y + low_rank.astype(y.dtype), True)]


def _by_patch(eqn, weight: Weight):
    """`A` itself is the kernel that gives `r` channels."""
    numbers = eqn.params["dimension_numbers"]
    output, out_channel = numbers.rhs_spec[0], numbers.out_spec[1]

    def save(source, x):
        kernel = jnp.moveaxis(weights.draw(weight, source), -1, output)
        return apply(eqn, x, kernel.astype(x.dtype))

    def back(kept, source, delta):
        del source
        labels = string.ascii_lowercase[: delta.ndim]
        channel = labels[out_channel]
        goal = f"Z{channel}" if weight.slot < output else f"{channel}Z"
        equation = f"{labels.replace(channel, 'Z')},{labels}->{goal}"
        sums = jnp.promote_types(delta.dtype, jnp.float32)
        product = jnp.einsum(equation, kept, delta, preferred_element_type=sums)
        return product.reshape(weight.tap.shape)

    return save, back


def _by_channel(eqn, weight: Weight):
    """The transposed convolution with `r` channels in place of the projected ones."""
    numbers = eqn.params["dimension_numbers"]
    _, channels, *taps = numbers.rhs_spec
    of_input = weight.slot == channels
    axis = numbers.lhs_spec[1] if of_input else numbers.out_spec[1]
    lengths = [weight.value.shape[tap] for tap in taps]
    kinds = tuple("kept" if kind == "batch" else kind for kind in weight.kinds)
    each = weight.replace(kinds=kinds)
    # tuples of (place in the kernel, place in the keys, the convolution by that part of it)
    parts = [((), (), functools.partial(apply, eqn))]
    if weight.axes("batch"):
        order = sorted(range(len(taps)), key=lambda i: taps[i])
        parts = [
            (place, tuple(place[i] for i in order), _one_tap(eqn, lengths, place))
            for place in itertools.product(*map(range, lengths))
        ]

    def channels_of(array, source):
        keys, columns, factors = source
        return [_channels(each, (keys[at], columns, factors), array, axis) for _, at, _ in parts]

    def save(source, x):
        return channels_of(x, source) if of_input else x

    def back(kept, source, delta):
        deltas = [delta] * len(parts) if of_input else channels_of(delta, source)
        inputs = kept if of_input else [kept] * len(parts)
        shape = [1 if i in taps and parts[0][0] else n for i, n in enumerate(weight.tap.shape)]
        whole = jnp.zeros(weight.tap.shape, weight.tap.dtype)
        for (place, _, conv), x, d in zip(parts, inputs, deltas, strict=True):
            kernel = jax.ShapeDtypeStruct(shape, x.dtype)
            (part,) = jax.linear_transpose(functools.partial(conv, x), kernel)(d)
            start = [0] * whole.ndim
            for tap, i in zip(taps, place, strict=False):
                start[tap] = i
            whole = jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), start)
        return whole

    return save, back


def _one_tap(eqn, lengths: Sequence[int], place: Sequence[int]):
    """The convolution by one tap, `(x, kernel of spatial size 1) -> y`."""
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
        # padded apart: XLA's convolution on the CPU reads beyond its input where padding is negative
        return apply(eqn, jax.lax.pad(x, jnp.zeros([], x.dtype), padding), kernel, **none)

    return conv


def _channels(weight: Weight, source, array, axis: int):
    """An array with `r` channels in place of those along `axis`."""
    labels = string.ascii_lowercase[: array.ndim]
    of_weight = "".join(
        labels[axis] if kind == "projected" else string.ascii_uppercase[i]
        for i, kind in enumerate(weight.kinds)
    )
    result = weights.contract(weight, source, array, labels, of_weight)
    return jnp.moveaxis(result, -1, axis).astype(array.dtype)


# ---- control flow ----


def _inline(walk: Walk, eqn, ins):
    """`jit` and its like: the body becomes part of what is around it."""
    params = eqn.params
    body = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    ins = _constrained(ins, params.get("in_shardings"))
    outs = walk.run(body.jaxpr, body.consts, ins)
    return _constrained(outs, params.get("out_shardings"))


def _constrained(traced: Sequence[Traced], shardings: Any) -> list[Traced]:
    def constrain(one: Traced, sharding: Any) -> Traced:
        if not isinstance(sharding, jax.sharding.Sharding):
            return one
        if isinstance(one.value, Weight) and isinstance(one.value.value, Made):
            return one
        if not isinstance(one.value, Weight):
            return one._replace(value=jax.lax.with_sharding_constraint(one.value, sharding))
        value = jax.lax.with_sharding_constraint(one.value.value, sharding)
        return one._replace(value=one.value.replace(value=value))

    if shardings is None:
        return list(traced)
    return [constrain(one, sharding) for one, sharding in zip(traced, shardings, strict=True)]


class _Body:
    """A jaxpr as a function of plain values and weights; all that comes out is plain."""

    def __init__(self, walk: Walk, jaxpr, consts, active: Sequence[bool]):
        self.walk, self.jaxpr, self.consts, self.active = walk, jaxpr, consts, active
        self.outs_active: list[bool] = []

    def __call__(self, *values):
        ins = [Traced(v, flag) for v, flag in zip(values, self.active, strict=True)]
        outs = exposed(self.walk.run(self.jaxpr, self.consts, ins))
        self.outs_active = [traced.active for traced in outs]
        return [traced.value for traced in outs]


def _remat(walk: Walk, eqn, ins):
    params = eqn.params
    body = _Body(walk, params["jaxpr"], (), [traced.active for traced in ins])
    run = jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])
    outs = run(*(traced.value for traced in ins))
    return [Traced(x, flag) for x, flag in zip(outs, body.outs_active, strict=True)]


def _scan(walk: Walk, eqn, ins):
    """Weights as constants, and as slices along an axis that is not projected."""
    params = eqn.params
    consts, carried = _scan_counts(params)
    carried += consts
    body = params["jaxpr"]
    outer, first, slices = (
        list(part) for part in (ins[:consts], ins[consts:carried], ins[carried:])
    )

    def expose(traced: Traced) -> Traced:
        walk.note(eqn, [traced], whole=True)
        return exposed([traced])[0]

    for i, traced in enumerate(first):  # what each step hands on as it was is a constant
        if body.jaxpr.outvars[i] is not body.jaxpr.invars[consts + i]:
            first[i] = expose(traced)
    fixed = [isinstance(traced.value, Weight) for traced in first]
    for i, traced in enumerate(slices):
        if not isinstance(traced.value, Weight):
            continue
        if traced.value.kinds[0] == "projected":
            slices[i] = expose(traced)
        elif traced.value.kinds[0] == "kept" and isinstance(traced.value.value, Made):
            value = traced.value.value.value()
            slices[i] = traced._replace(value=traced.value.replace(value=value))
    active = any(traced.active for traced in ins)
    flags = [traced.active for traced in outer] + [active] * (len(first) + len(slices))
    run = _Body(walk, body.jaxpr, body.consts, flags)

    def step(carry, xs):
        carry = iter(carry)
        given = [one.value if f else next(carry) for one, f in zip(first, fixed, strict=True)]
        unstacked = [_first_index_taken(x, y.value) for x, y in zip(xs, slices, strict=True)]
        outs = run(*(traced.value for traced in outer), *given, *unstacked)
        handed = [out for out, f in zip(outs, fixed, strict=False) if not f]
        return handed, outs[len(first) :]

    carry, ys = jax.lax.scan(
        step,
        [traced.value for traced, f in zip(first, fixed, strict=True) if not f],
        [_by_first_axis(traced.value) for traced in slices],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        _split_transpose=params.get("_split_transpose", False),
    )
    carry = iter(carry)
    results = [
        one if f else Traced(next(carry), active) for one, f in zip(first, fixed, strict=True)
    ]
    return results + [Traced(y, active and is_inexact(y)) for y in ys]


def _scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried."""
    if "ft_in" in params:  # JAX 0.12
        consts, carry, _ = (len(list(group)) for group in params["ft_in"].unpack())
        return consts, carry
    return params["num_consts"], params["num_carry"]


def _by_first_axis(x: Any) -> Any:
    """What `scan` cuts: a weight's arrays that have its first axis."""
    if not isinstance(x, Weight):
        return x
    return (x.value, x.tap, x.keys if x.kinds[0] == "batch" else None)


def _first_index_taken(cut: Any, stacked: Any) -> Any:
    if not isinstance(stacked, Weight):
        return cut
    value, tap, keys = cut
    keys = stacked.keys if keys is None else keys
    kinds, place = stacked.kinds[1:], first_axis_dropped(stacked.place)
    return stacked.replace(value=value, tap=tap, keys=keys, kinds=kinds, place=place)


def _cond(walk: Walk, eqn, ins):
    if isinstance(ins[0].value, Weight):
        return None
    active = [traced.active for traced in ins[1:]]
    branches = [
        _Body(walk, branch.jaxpr, branch.consts, active) for branch in eqn.params["branches"]
    ]
    outs = jax.lax.switch(ins[0].value, branches, *(traced.value for traced in ins[1:]))
    return [Traced(x, is_inexact(x)) for x in outs]


def _shard_map(walk: Walk, eqn, ins):
    """Each array of a weight is cut as the weight's axes that it has are."""
    params = eqn.params
    body = _Body(walk, params["jaxpr"], (), [traced.active for traced in ins])

    def specs(traced: Traced, spec):
        weight = traced.value
        if not isinstance(weight, Weight):
            return spec
        entries = (*spec, *[None] * (weight.value.ndim - len(spec)))

        def of(axes, extra=0):
            return jax.sharding.PartitionSpec(*(entries[axis] for axis in axes), *[None] * extra)

        projected = weight.axes("projected")
        tap = [None if axis in projected else entry for axis, entry in enumerate(entries)]
        return weight.replace(
            value=spec,
            tap=jax.sharding.PartitionSpec(*tap),
            keys=of(weight.axes("batch"), 1),
            columns=of(projected),
            factors=None if weight.factors is None else of(projected),
        )

    values = [
        traced.value.replace(columns=traced.value.indices(), place=None)
        if isinstance(traced.value, Weight)
        else traced.value
        for traced in ins
    ]
    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs(t, s) for t, s in zip(ins, params["in_specs"], strict=True)),
        out_specs=list(params["out_specs"]),
        axis_names=set(params.get("newly_manual_axes") or params["manual_axes"]),
        check_vma=params["check_vma"],
    )
    return [Traced(x, is_inexact(x)) for x in mapped(*values)]


RULES = {
    "joined": _joined,
    "transpose": _mover(_transpose),
    "reshape": _mover(_reshape),
    "squeeze": _mover(_squeeze),
    "expand_dims": _mover(_expand),
    "slice": _mover(_slice),
    "dynamic_slice": _mover(_dynamic_slice),
    "rev": _mover(_rev),
    "broadcast_in_dim": _mover(_broadcast_in_dim),
    "gather": _mover(_gather),
    "split": _mover(_split),
    "stack": _mover(_stack),
    "concatenate": _mover(_concatenate),
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
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
    "jit": _inline,
    "pjit": _inline,
    "closed_call": _inline,
    "core_call": _inline,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "cond": _cond,
    "shard_map": _shard_map,
}
