"""project: gradient leaves to sketches, `C = G Aᵀ` (arXiv 2402.03293, Algorithm 1, lines 5 to 7)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax.chain import products, states
from flora_jax.chain.leaf_plan import LeafPlan, leaf_plans
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import Sketch, is_sketch
from flora_jax.chain.transformation import transformation


class ProjectState(NamedTuple):
    """State of `project`.

    Attributes:
      cycle: int32 scalar, of the micro-step to come.
      micro_step: int32 scalar, micro-steps already spent in it.
    """

    cycle: Any
    micro_step: Any


def project(projection: Projection) -> optax.GradientTransformationExtraArgs:
    """Turns the gradient leaves that the plan compresses into sketches.

    Args:
      projection: the `Projection`.

    Returns:
      A transformation from a tree of gradients to the same tree with `Sketch` leaves. A leaf that
      is a `Sketch` already has its cycle set.

    Raises:
      ValueError: (on update) an incoming `Sketch` is not of the kind that would have been made.

    References:
      arXiv 2402.03293, Algorithm 1, lines 5 to 7.
    """

    def init_fn(params):
        leaf_plans(params, projection)
        return ProjectState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args

        def compress(plan: LeafPlan, leaf):
            if is_sketch(leaf):
                states.check_kind(plan, leaf)
                return Sketch(leaf.data, state.cycle, leaf.spec)
            if plan.spec is None:
                return leaf
            return Sketch(products.project(plan.spec, state.cycle, leaf), state.cycle, plan.spec)

        length = states.at(projection.resample_every, state.cycle)
        spent = state.micro_step + 1
        ends = spent >= length
        new_state = ProjectState(
            cycle=jnp.where(ends, optax.safe_increment(state.cycle), state.cycle),
            micro_step=jnp.where(ends, 0, spent),
        )
        return states.map_leaves(compress, projection, updates), new_state

    return transformation(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def cycle(opt_state: Any) -> jax.Array:
    """The cycle that the next micro-step belongs to, found anywhere in an optimizer's state.

    Raises:
      ValueError: there is no `project` in it, or more than one.
    """
    return states.only(opt_state, ProjectState, "project").cycle
