"""Products: the rules for `dot_general` and `ragged_dot`, whose results are plain arrays."""

import string

import jax
import jax.numpy as jnp

from flora_jax import dtypes
from flora_jax.fused.contraction import sample
from flora_jax.fused.interpreter import Traced, Walk, apply, exposed
from flora_jax.fused.use import both_factors, multiply, use
from flora_jax.fused.weight import Weight


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

    precision = eqn.params["precision"]
    if isinstance(
        precision, tuple
    ):  # of the left and the right factor; the sketch takes the higher
        precision = max(precision, key=lambda one: getattr(one, "value", 0) or 0)
    y = multiply(weight, x, product, (labels[1 - place], labels[place], of_y), precision)
    if y is None:
        return None
    walk.note(eqn, ins, whole=False)
    return [Traced(y, True)]


def _ragged_dot(walk: Walk, eqn, ins):
    """Multiplies the rows of each group by the group's matrix, as a mixture of experts does.

    The matrices are stacked along a batch axis, the first.
    """
    if not isinstance(ins[1].value, Weight) or any(
        isinstance(traced.value, Weight) for traced in (ins[0], *ins[2:])
    ):
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracting, batch = numbers.dot_dimension_numbers
    x, weight, rest = ins[0].value, ins[1].value, [traced.value for traced in ins[2:]]
    plain = (
        (tuple(contracting[0]), tuple(contracting[1])) == ((1,), (1,))
        and not batch[0]
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )
    if not plain or weight.kinds not in (
        ("batch", "projected", "kept"),
        ("batch", "kept", "projected"),
    ):
        return None
    dtype = dtypes.operands(x.dtype, weight.value.dtype)

    def ragged(x, matrices, rest):
        types = {"preferred_element_type": None}
        return apply(eqn, x.astype(dtype), matrices.astype(dtype), *rest, **types)

    if weight.adapter:
        down, up = both_factors(weight)  # of shapes (groups, P, r) and that of the sketch
        pair = (down, up) if weight.slot == 1 else (up, jnp.swapaxes(down, 1, 2))
        y = apply(eqn, x, weight.value, *rest)
        change = ragged(ragged(x, pair[0], rest), pair[1], rest)
        walk.note(eqn, ins, whole=False)
        return [Traced(y + change.astype(y.dtype), True)]

    def of_input(source, x, *rest):
        return ragged(x, sample(weight, source, dtype), rest), rest

    def back_input(saved, source, delta):
        del source
        x_down, rest = saved
        up = jax.ShapeDtypeStruct(weight.up.shape, dtype)
        return jax.linear_transpose(lambda up: ragged(x_down, up, rest), up)(delta.astype(dtype))[0]

    def back_output(saved, source, delta):
        x, rest = saved
        delta = ragged(delta, sample(weight, source, dtype), rest)
        up = jax.ShapeDtypeStruct(weight.up.shape, dtype)
        return jax.linear_transpose(lambda up: ragged(x, up, rest), up)(delta)[0]

    by_input = weight.slot == 1
    y = use(
        weight,
        (x, *rest),
        lambda x, *given: apply(eqn, x, given[-1], *given[:-1]),
        of_input if by_input else lambda source, x, *rest: (x, rest),
        back_input if by_input else back_output,
    )
    walk.note(eqn, ins, whole=False)
    return [Traced(y, True)]


RULES = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
}
