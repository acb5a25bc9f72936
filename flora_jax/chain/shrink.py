"""shrink: shortens the updates of compressed leaves, since an estimate `C A` is longer than its gradient."""

from collections.abc import Collection

import optax

from flora_jax.chain import states
from flora_jax.chain.leaf_plan import LeafPlan
from flora_jax.chain.projection import Projection, check_projection

KINDS = ("matrix", "embedding", "head")


def shrink(projection: Projection, kinds: Collection[str] = KINDS) -> optax.GradientTransformation:
    """Scales the updates of compressed leaves by `1/√(1 + v)`. It goes after the base optimizer.

    Here `v` is the relative variance of the leaf's estimate, `Spec.variance`. The estimate is
    `√(1 + v)` times longer than the gradient, and the multiple of it that is nearest to the gradient
    has the factor `1/(1 + v)`. An optimizer that divides by the root mean square has already applied
    one of the two factors `1/√(1 + v)`; this transformation applies the other. (A factor for each row,
    from the running second moments of the estimate, was measured to be worse than one for the matrix.)
    The updates of uncompressed leaves stay as they are.

    Args:
      projection: The `Projection` of the chain.
      kinds: The kinds of compressed leaves whose updates are scaled, as in `LeafPlan.kind`.

    Returns:
      A transformation without state.
    """
    check_projection(projection)

    def update_fn(updates, state, params=None):
        del params

        def scale(plan: LeafPlan, leaf):
            if plan.spec is None or plan.kind not in kinds:
                return leaf
            return leaf * (1 + plan.spec.variance) ** -0.5

        return states.map_leaves(scale, projection, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)
