"""scale_by_shape: makes one learning rate serve orthogonalized updates of all shapes and ranks."""

import math

import optax

from flora_jax.chain import states
from flora_jax.chain.leaf_plan import LeafPlan
from flora_jax.chain.projection import Projection, check_projection


def scale_by_shape(projection: Projection) -> optax.GradientTransformation:
    """Multiplies the updates of compressed matrices by `√max(1, outputs / inputs) · (d / r)^(1/4)`. It goes after `decompress`.

    Here `d` is the smaller side of the matrix and `r` the rank. An orthogonalized update has a spectral norm
    of 1, and a root mean square in proportion to `√r`. The first factor, that of Muon, bounds the change of a
    layer's outputs relative to its inputs. The second is between an equal spectral norm and an equal root mean
    square for all ranks; with it the best learning rate was measured to be the same at d/4 to d/32, and that of
    Muon, for which it is 1. The updates of all other leaves stay as they are.

    Args:
      projection: The `Projection` of the chain.

    Returns:
      A transformation without state.

    References:
      Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    check_projection(projection)

    def update_fn(updates, state, params=None):
        del params

        def scale(plan: LeafPlan, leaf):
            return leaf * factor(plan) if plan.spec and plan.kind == "matrix" else leaf

        return states.map_leaves(scale, projection, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def factor(plan: LeafPlan) -> float:
    """Returns the factor for a compressed matrix."""
    spec = plan.spec
    assert spec is not None
    kept = math.prod(spec.shape[axis] for axis in spec.kept)
    outputs, inputs = (kept, spec.size) if plan.side == "input" else (spec.size, kept)
    return max(1.0, outputs / inputs) ** 0.5 * (min(kept, spec.size) / spec.rank) ** 0.25
