"""stack_axis: an axis that looks like one of stacked layers, where a sketch would run across it.

Layers that are stacked along an axis between the two sides of a matrix, as MaxText's are, look like heads to a rule that knows shapes
alone: the layers would share one sketch, and training gets worse without a word.
"""

import collections
import math
from collections.abc import Sequence

from flora_jax.chain.leaf_plan import LeafPlan

MOST = 0.5
"""The share of the matrices that must have an axis of equal length at the same place."""


def stack_axis(plans: Sequence[LeafPlan]) -> tuple[int, int] | None:
    """Returns an axis and its length, if a sketch runs across it and it looks like one of stacked layers; else None.

    It does where more than half of all matrices have an axis of the same length at the same place, and some merge it with
    a longer axis into one side, or have it as a side where a longer axis is a batch axis (more layers than `min_dim`). Windows of convolutions do not.

    Args:
      plans: The plans of all leaves.
    """
    matrices = [plan for plan in plans if plan.spec is not None and plan.kind == "matrix"]
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    for plan in matrices:
        if len(plan.shape) > 2:
            counts.update(enumerate(plan.shape))
    for (axis, length), count in counts.most_common():
        if count > max(1, MOST * len(matrices)) and any(_merges(x, axis, length) for x in matrices):
            return axis, length
    return None


def sentence(plans: Sequence[LeafPlan]) -> str:
    """Returns what to say of such an axis, naming the first weight that merges it; empty where there is none."""
    found = stack_axis(plans)
    if found is None:
        return ""
    axis, length = found
    first = next(plan for plan in plans if _merges(plan, axis, length))
    return (
        f"{first.path!r} of shape {first.shape} gets one sketch across its axis {axis}, whose length {length} most matrices have "
        "there: if these are stacked layers, name the sides by weight_dimension_numbers, or by "
        "flora_jax.trainers.axis_names, so that each layer has a sketch of its own"
    )


def _merges(plan: LeafPlan, axis: int, length: int) -> bool:
    """Returns whether an axis is merged with a longer one, of the first axis only where there are four; or is a side beside longer batch axes."""
    spec, shape = plan.spec, plan.shape
    if spec is None or axis >= len(shape) or shape[axis] != length or math.prod(shape) == 0:
        return False
    window = len(shape) == 4 and shape[0] == shape[1] and axis < 2
    if window or (axis == 0 and len(shape) < 4):
        return False
    sides = (spec.projected, spec.kept)
    side = next((side for side in sides if axis in side), ())
    others = spec.batch if len(side) == 1 else side
    return bool(side) and length * 2 <= max((shape[other] for other in others), default=0)
