"""accumulate: `C ← C + G Aᵀ` over `τ` micro-steps (arXiv 2402.03293, Algorithm 1)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax.chain import states, storage
from flora_jax.chain.projection import Projection, check_every
from flora_jax.chain.sketch import Every
from flora_jax.chain.transformation import transformation
from flora_jax.sharding import manual


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      mini_step: int32 scalar, micro-steps since the last boundary.
      gradient_step: int32 scalar, boundaries so far.
      accumulated: tree of the params; each leaf of the sketch's shape, or the weight's own.
      inner_state: of the wrapped transformation.
    """

    mini_step: Any
    gradient_step: Any
    accumulated: Any
    inner_state: Any


@dataclasses.dataclass(frozen=True)
class StepsPerCycle:
    """A schedule for `resample_every`: cycles of `count` boundaries, when `every` is a schedule.

    Cycle `c` has `Σ every(g)` micro-steps, over the gradient steps `g` from `c · count` on.
    """

    every: Callable[[Any], Any]
    count: int

    def __call__(self, cycle):
        steps = jnp.asarray(cycle) * self.count + jnp.arange(self.count, dtype=jnp.int32)
        return jnp.sum(jax.vmap(self.every)(steps))


def accumulate(
    inner: optax.GradientTransformation,
    every: Every,
    *,
    projection: Projection | None = None,
    use_grad_mean: bool = True,
    accumulator_dtype: storage.StateDtype = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Sums micro-steps and gives the sum to `inner` at each boundary; zero updates in between.

    What `optax.MultiSteps` is to gradients, for trees of sketches and whole leaves. A micro-step that
    is not finite is left out by `skip_nonfinite` around the whole chain.

    Args:
      inner: what runs at a boundary, usually `optax.chain(decompress(), optimizer)`.
      every: micro-steps to a boundary: an int, or a schedule of the gradient step.
      projection: that of the `project` before it. None where nothing is compressed.
      use_grad_mean: mean of the micro-steps, else their sum.
      accumulator_dtype: `float32`, `float64`, or, rounded stochastically, `bfloat16` or `int8`.

    Raises:
      ValueError: a wrong argument; cycles of `projection` that would end inside one accumulation;
        (on update, at trace time) a leaf that does not fit the state.

    References:
      arXiv 2402.03293, Algorithm 1.
    """
    check_every("every", every)
    storage.check("accumulator_dtype", accumulator_dtype)
    if projection is not None:
        _check_cycles(projection.resample_every, every)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return AccumulateState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            accumulated=states.zeros(params, projection, accumulator_dtype),
            inner_state=inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        length = states.at(every, state.gradient_step)
        weight = 1.0 / length if use_grad_mean else 1.0
        sketches = states.map_leaves(states.expected("accumulate", projection), projection, updates)
        numbers = states.numbers(sketches)
        sums = jax.tree.map(
            lambda old, new: old + weight * new, storage.load_tree(state.accumulated), numbers
        )

        def boundary(sums, inner_state):
            whole = states.with_numbers(sketches, sums)
            result, inner_state = inner.update(whole, inner_state, params, **extra_args)
            kept = states.zeros(updates, projection, accumulator_dtype)
            return result, inner_state, kept

        result_shape, _, _ = jax.eval_shape(boundary, sums, state.inner_state)

        def between(sums, inner_state):
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result_shape)
            count = (state.gradient_step, state.mini_step)
            kept = states.store(sums, projection, sketches, accumulator_dtype, count)
            return zeros, inner_state, kept

        is_boundary = state.mini_step + 1 >= length
        result, inner_state, kept = manual.switch(
            is_boundary, (between, boundary), sums, state.inner_state
        )
        return result, AccumulateState(
            mini_step=jnp.where(is_boundary, 0, state.mini_step + 1),
            gradient_step=jnp.where(
                is_boundary, optax.safe_increment(state.gradient_step), state.gradient_step
            ),
            accumulated=kept,
            inner_state=inner_state,
        )

    return transformation(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def has_updated(opt_state: Any) -> jax.Array:
    """Whether the last micro-step was a boundary; always, where nothing is accumulated.

    Raises:
      ValueError: there is more than one `accumulate` in it.
    """
    if not states.of_kind(opt_state, AccumulateState):
        return jnp.asarray(True)
    state = states.only(opt_state, AccumulateState, "accumulate")
    return jnp.logical_and(state.mini_step == 0, state.gradient_step > 0)


def _check_cycles(resample_every: Every, every: Every) -> None:
    """A cycle must be a whole number of accumulations."""
    if isinstance(resample_every, int) and isinstance(every, int):
        fits = resample_every % every == 0
    else:
        fits = resample_every == every or (
            isinstance(resample_every, StepsPerCycle) and resample_every.every == every
        )
    if not fits:
        raise ValueError(
            f"resample_every must be a multiple of every={every!r}, found {resample_every!r}: the "
            "projection would change inside an accumulation"
        )
