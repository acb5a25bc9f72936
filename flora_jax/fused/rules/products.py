"""Products: the rule for `dot_general`, whose result is a plain array."""

import string

from flora_jax.fused import weight as weights
from flora_jax.fused.interpreter import Traced, Walk, apply, exposed
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
    y = weights.multiply(weight, x, product, (labels[1 - place], labels[place], of_y), precision)
    if y is None:
        return None
    walk.note(eqn, ins, whole=False)
    return [Traced(y, True)]


RULES = {
    "dot_general": _dot_general,
}
