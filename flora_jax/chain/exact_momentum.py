"""exact_momentum: the present gradient as it is, on top of a momentum that is kept as a sketch.

| paper | here |
|---|---|
| `M ← β M + (1 − β) G Aᵀ` | the state, `n × r` |
| | the update, `β M A + (1 − β) G`, with the `M` of the step before |
"""

from typing import Any, NamedTuple

import jax
import optax

from flora_jax.chain import states
from flora_jax.chain.decompress import decompress
from flora_jax.chain.momentum import momentum
from flora_jax.chain.project import project
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import Sketch, is_sketch
from flora_jax.chain.storage import StateDtype
from flora_jax.chain.transformation import transformation


class ExactMomentumState(NamedTuple):
    """The state of `exact_momentum`.

    Attributes:
      project: A `ProjectState`.
      momentum: A `MomentumState`.
    """

    project: Any
    momentum: Any


def exact_momentum(
    decay: float, projection: Projection, *, dtype: StateDtype = "float32"
) -> optax.GradientTransformationExtraArgs:
    """Returns `(1 − β) G` plus an estimate of the momentum before it, which is kept as a sketch.

    A sketch of a gradient has an error as large as the gradient's part outside of the projection. Here the present
    gradient, which counts the most, has none; it needs gradients that exist, and so it is meant for
    `flora_jax.make_train_step(..., update="backward")`, where each exists for a moment. When a new projection is sampled,
    the momentum begins anew. Leaves that the projection does not compress pass through unchanged.

    Args:
      decay: The decay `β`, at least 0 and below 1.
      projection: The `Projection` of the momentum, whose `resample_every` counts optimizer steps.
      dtype: The dtype of the state, as `flora_jax.momentum` has it.

    Returns:
      A `GradientTransformationExtraArgs`, whose updates are ordinary gradients.

    Raises:
      ValueError: An argument is not valid; on `update`, a gradient is a sketch.

    References:
      arXiv 2402.03293, Algorithm 2; the authors' JAX code updates layer by layer like this.
    """
    first = project(projection)
    second = momentum(
        decay,
        projection=projection,
        dtype=dtype,
        at_new_projection="reset",
        compressed_only=True,
    )
    third = decompress()

    def init_fn(params):
        return ExactMomentumState(first.init(params), second.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        if any(map(is_sketch, states.leaves(updates))):
            raise ValueError("exact_momentum must be given ordinary gradients, found sketches")
        sketches, projecting = first.update(updates, state.project, params, **extra_args)
        moments, moving = second.update(sketches, state.momentum, params, **extra_args)

        def before(moment, sketch):
            if not is_sketch(moment):
                return moment
            return Sketch(moment.data - (1 - decay) * sketch.data, moment.cycle, moment.spec)

        past = jax.tree.map(before, moments, sketches, is_leaf=is_sketch)
        kinds = jax.tree.map(is_sketch, past, is_leaf=is_sketch)
        past, _ = third.update(past, optax.EmptyState())
        updates = jax.tree.map(
            lambda compressed, old, now: old + (1 - decay) * now if compressed else now,
            kinds,
            past,
            updates,
        )
        return updates, ExactMomentumState(projecting, moving)

    return transformation(optax.GradientTransformationExtraArgs(init_fn, update_fn))
