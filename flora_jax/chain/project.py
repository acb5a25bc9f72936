"""project: compresses gradients to sketches, `C = G Aᵀ` (arXiv 2402.03293, Algorithm 1, lines 5 to 7)."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from flora_jax import dtypes
from flora_jax.chain import products, recorder, stack_axis, states, wrappers
from flora_jax.chain.leaf_plan import LeafPlan, leaf_plans
from flora_jax.chain.projection import Projection, check_projection
from flora_jax.chain.sketch import Sketch, is_sketch
from flora_jax.chain.transformation import transformation


class ProjectState(NamedTuple):
    """The state of `project`.

    Attributes:
      cycle: The number of the cycle that the next micro-step belongs to, an int32 scalar.
      micro_step: The number of micro-steps of this cycle that are already done, an int32 scalar.
    """

    cycle: Any
    micro_step: Any


def project(projection: Projection) -> optax.GradientTransformationExtraArgs:
    """Compresses each gradient `G`, `n × m`, to its sketch `C = G Aᵀ`, `n × r`.

    Leaves that the projection does not compress pass through unchanged. Leaves that are sketches
    already, as `flora_jax.value_and_grad` returns them, are checked, and their cycle is set. A sketch of
    another cycle than the state's would train the parameters on noise: it raises a ValueError, or under
    `jax.jit`, where the two cannot be compared in time, its data become NaN.

    Args:
      projection: The `Projection`, which says which leaves are compressed, and how `A` is sampled.

    Returns:
      A transformation from a tree of gradients to the same tree with `Sketch` leaves.

    Raises:
      ValueError: On `update`, an incoming `Sketch` is not the one that this projection would have
        given, or belongs to another cycle; or a gradient has another shape than its param.

    References:
      arXiv 2402.03293, Algorithm 1, lines 5 to 7.
    """

    check_projection(projection)
    warned = False

    def warn():
        nonlocal warned
        warned = warned or wrappers.warn_of_multisteps()

    def init_fn(params):
        warn()
        plans = leaf_plans(params, projection)
        _warn_of_nothing(plans)
        if said := stack_axis.sentence(plans):
            warnings.warn(said, UserWarning, stacklevel=2)
        return ProjectState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        warn()
        recorder.note_choice("projection", projection)
        if any(map(is_sketch, states.leaves(updates))):
            wrappers.refuse_sketches()
            wrappers.refuse_states_of_sketches()
        if params is not None:
            states.check_shapes("project", updates, params)

        def compress(plan: LeafPlan, leaf):
            if is_sketch(leaf):
                states.check_kind(plan, leaf)
                recorder.note(plan.path)
                return Sketch(_of_cycle(leaf, state.cycle), state.cycle, leaf.spec)
            if plan.spec is None:
                return leaf
            recorder.note(plan.path)
            if recorder.outlines():
                data = jnp.zeros(plan.spec.part_data_shape, dtypes.sums(plan.spec.dtype))
                return Sketch(data, state.cycle, plan.spec)
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
    """Returns the number of the cycle that the next micro-step belongs to.

    Args:
      opt_state: The state of an optimizer with one `project` anywhere inside.

    Returns:
      An int32 scalar, to be passed on to `flora_jax.value_and_grad`'s function.

    Raises:
      ValueError: The state has no `project` in it, or more than one.
    """
    return states.count(states.only(opt_state, ProjectState, "project").cycle)


def checked(sketches: Any, opt_state: Any) -> Any:
    """Compares the cycle of each sketch with that of `opt_state`, as `project` does, so that it need not again.

    Args:
      sketches: A tree of gradients, as `flora_jax.value_and_grad` returns it.
      opt_state: The state of an optimizer; where it has several `project` inside, nothing is compared.

    Raises:
      ValueError: A sketch belongs to another cycle.
    """
    found = states.of_kind(opt_state, ProjectState)
    if len(found) != 1:
        return sketches

    def check(leaf):
        if not is_sketch(leaf):
            return leaf
        return Sketch.unchecked(_of_cycle(leaf, states.count(found[0].cycle)), None, leaf.spec)

    return jax.tree.map(check, sketches, is_leaf=is_sketch)


def _warn_of_nothing(plans: Sequence[LeafPlan]) -> None:
    """Warns where nothing is compressed, and that is so because of the sizes of the matrices."""
    if any(plan.spec for plan in plans):
        return
    matrix = next((plan for plan in plans if plan.too_small), None)
    if matrix is not None:
        warnings.warn(
            f"nothing is compressed, neither {matrix.path!r} ({matrix.reason}) nor any other leaf: the state "
            "has as many numbers as without flora; take a smaller rank or min_dim",
            UserWarning,
            stacklevel=2,
        )


def _of_cycle(sketch: Sketch, cycle: Any) -> Any:
    """The data of a sketch; NaN where it says that it belongs to another cycle."""
    sketch = sketch.resolved()
    claimed = sketch.claimed
    if claimed is None or claimed is cycle:
        return sketch.data
    if not any(isinstance(one, jax.core.Tracer) for one in (claimed, cycle)):
        if int(claimed) != int(cycle):
            raise ValueError(
                f"{sketch.spec.path!r}: found a sketch of cycle {int(claimed)}, expected {int(cycle)}; "
                "give flora_jax.value_and_grad's function cycle=opt_state"
            )
        return sketch.data
    return jnp.where(claimed == cycle, sketch.data, jnp.nan)
