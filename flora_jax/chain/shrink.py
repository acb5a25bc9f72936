"""shrink: the updates of compressed leaves, shortened by what their estimate is too long."""

import optax

from flora_jax.chain import states
from flora_jax.chain.leaf_plan import LeafPlan
from flora_jax.chain.projection import Projection


def shrink(projection: Projection) -> optax.GradientTransformation:
    """Scales the updates of compressed leaves by `1/√(1 + v)`; goes after the base optimizer.

    `v` is the relative variance of the leaf's estimate (`Spec.variance`). The estimate is `√(1 + v)`
    times longer than the gradient, and the multiple of it that is nearest to the gradient is
    `1/(1 + v)`. An optimizer that divides by the root mean square has taken one of the two roots
    already; this takes the other. (One such factor for each row, from the running second moments of
    the estimate, was measured to be worse than one for the matrix.) Nothing happens to a leaf that is left whole, nor at `v = 0`.

    Args:
      projection: that of the chain.
    """

    def update_fn(updates, state, params=None):
        del params

        def scale(plan: LeafPlan, leaf):
            return leaf * (1 + plan.spec.variance) ** -0.5 if plan.spec else leaf

        return states.map_leaves(scale, projection, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)
