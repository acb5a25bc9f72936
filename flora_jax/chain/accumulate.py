"""accumulate: sums sketches over `τ` micro-steps, `C ← C + G Aᵀ` (arXiv 2402.03293, Algorithm 1).

| paper | here |
|---|---|
| `τ` | `every` |
| `C` | `AccumulateState.accumulated` |
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import dtypes
from flora_jax.chain import recorder, states, storage, wrappers
from flora_jax.chain.momentum import AtNewProjection, check_decay, mover
from flora_jax.chain.projection import Projection, check_every, check_projection
from flora_jax.chain.sketch import Every, is_sketch
from flora_jax.chain.transformation import transformation
from flora_jax.sharding import manual


class AccumulateState(NamedTuple):
    """The state of `accumulate`.

    Attributes:
      mini_step: The number of micro-steps since the last optimizer step, an int32 scalar.
      gradient_step: The number of optimizer steps so far, an int32 scalar.
      accumulated: A tree like the params. Each leaf has the shape of the sketch, or of the weight where
        it is uncompressed. With a decay it holds the momentum as well.
      inner_state: The state of the wrapped transformation.
    """

    mini_step: Any
    gradient_step: Any
    accumulated: Any
    inner_state: Any


@dataclasses.dataclass(frozen=True)
class StepsPerCycle:
    """A schedule for `resample_every` that gives cycles of `count` optimizer steps where `every` is a schedule.

    Cycle `c` has `Σ every(g)` micro-steps, summed over the `count` optimizer steps `g` from `c · count` on.

    Attributes:
      every: The schedule of the micro-steps in an optimizer step, as in `accumulate`.
      count: The number of optimizer steps in a cycle.
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
    decay: float = 0.0,
    at_new_projection: AtNewProjection = "reset",
) -> optax.GradientTransformationExtraArgs:
    """Sums the gradients of several micro-steps, then takes one optimizer step with the sum.

    It does for trees of sketches and uncompressed gradients what `optax.MultiSteps` does for trees of
    gradients: on the micro-step that completes an optimizer step, the sum is passed to `inner`; on all
    others the updates are zero. With `decay` the accumulator is the momentum as well: after an optimizer
    step its sketches are multiplied by `β` where they would be set to zero. To leave out micro-steps with a NaN or an infinity, put
    `skip_nonfinite` around the entire chain.

    Args:
      inner: The transformation that runs on each optimizer step, usually
        `optax.chain(decompress(), optimizer)`.
      every: The number of micro-steps in an optimizer step: an int, or a schedule, a function of the
        number of the optimizer step.
      projection: The `Projection` of the `project` that comes before, or None where nothing is
        compressed.
      use_grad_mean: Whether `inner` receives the mean of the micro-steps' gradients rather than their
        sum.
      accumulator_dtype: The dtype of the sum between micro-steps: `float32`, `float64`, or, rounded at
        random, `bfloat16`, `int8` or `int4`.
      decay: The decay `β`, at least 0 and below 1: `inner` receives `M ← β M + C` for each sketch `C`, the
        mean of the micro-steps. Uncompressed gradients have no momentum here.
      at_new_projection: What becomes of `M` when a new `A` is sampled, as in `momentum`.

    Returns:
      A transformation with the state `AccumulateState`.

    Raises:
      ValueError: An argument is not valid, or the cycles of `projection` would end inside an optimizer
        step. On `update`, at trace time: a leaf does not fit the state.

    References:
      arXiv 2402.03293, Algorithm 1.
    """
    every = check_every("every", every)
    storage.check("accumulator_dtype", accumulator_dtype)
    if projection is not None:
        check_projection(projection)
        check_cycles(projection.resample_every, every, "every")
    check_decay(decay)
    decays = isinstance(decay, jax.Array) or decay > 0
    if projection is None and not isinstance(decay, jax.Array) and decays:
        raise ValueError(
            f"projection must be given beside decay={decay!r}, which is that of sketches, found None"
        )
    move = mover(at_new_projection)
    inner = optax.with_extra_args_support(inner)
    warned = projection is not None  # then project warns

    def warn():
        nonlocal warned
        warned = warned or wrappers.warn_of_multisteps()

    def init_fn(params):
        warn()
        return AccumulateState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            accumulated=states.zeros(params, projection, accumulator_dtype),
            inner_state=inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        warn()
        recorder.note_choice("accumulation_steps", every)
        length = states.at(every, state.gradient_step)
        sketches = states.map_leaves(states.expected("accumulate", projection), projection, updates)
        states.check_fits("accumulate", sketches, state.accumulated)
        numbers = states.numbers(sketches)
        old = states.load(
            state.accumulated, projection, sketches, (state.gradient_step, state.mini_step)
        )
        with dtypes.promoting():
            weight = 1.0 / length if use_grad_mean else 1.0
            sums = jax.tree.map(lambda old, new: old + weight * new, old, numbers)
        following = optax.safe_increment(state.gradient_step)

        def optimizer_step(sums, inner_state):
            total = states.with_numbers(sketches, sums)
            result, inner_state = inner.update(total, inner_state, params, **extra_args)
            return result, inner_state, kept_after(sums)

        def kept_after(sums):
            empty = partial(states.zeros, updates, projection, accumulator_dtype)
            cycles = [leaf.cycle for leaf in states.leaves(sketches) if is_sketch(leaf)]
            if not cycles or not decays:
                return empty()

            def kept(moved, sums):
                if moved and at_new_projection == "reset":
                    return empty()  # rounding zeros would be work for the compiler
                with dtypes.promoting():
                    left = jax.tree.map(
                        lambda leaf, data: decay * data if is_sketch(leaf) else None,
                        sketches,
                        sums,
                        is_leaf=is_sketch,
                    )
                if moved:
                    left = move(sketches, cycles[0], cycles[0] + 1, left)
                counts = (following, jnp.zeros_like(state.mini_step))
                return states.store(left, projection, sketches, accumulator_dtype, counts)

            assert projection is not None  # there are sketches
            ends = _ends_cycle(projection.resample_every, every, state.gradient_step)
            return manual.switch(ends, (partial(kept, False), partial(kept, True)), sums)

        result_shape, _, _ = jax.eval_shape(optimizer_step, sums, state.inner_state)

        def no_step(sums, inner_state):
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result_shape)
            counts = (state.gradient_step, state.mini_step + 1)
            kept = states.store(sums, projection, sketches, accumulator_dtype, counts)
            return zeros, inner_state, kept

        is_step = state.mini_step + 1 >= length
        result, inner_state, kept = manual.switch(
            is_step, (no_step, optimizer_step), sums, state.inner_state
        )
        return result, AccumulateState(
            mini_step=jnp.where(is_step, 0, state.mini_step + 1),
            gradient_step=jnp.where(is_step, following, state.gradient_step),
            accumulated=kept,
            inner_state=inner_state,
        )

    return transformation(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def _ends_cycle(resample_every: Every, every: Every, gradient_step: Any) -> Any:
    """Returns whether the cycle ends with this optimizer step; `check_cycles` has seen both numbers."""
    if isinstance(resample_every, int) and isinstance(every, int):
        count = resample_every // every
    else:
        count = resample_every.count if isinstance(resample_every, StepsPerCycle) else 1
    return (gradient_step + 1) % count == 0


def has_updated(opt_state: Any) -> jax.Array:
    """Returns whether the last micro-step completed an optimizer step, so that the parameters changed.

    Args:
      opt_state: The state of an optimizer with at most one `accumulate` anywhere inside.

    Returns:
      A bool scalar. It is always True where nothing is accumulated.

    Raises:
      ValueError: The state has more than one `accumulate` in it.
    """
    if not states.of_kind(opt_state, AccumulateState):
        return jnp.asarray(True)
    state = states.only(opt_state, AccumulateState, "accumulate")
    mini_step, gradient_step = map(states.count, (state.mini_step, state.gradient_step))
    return jnp.logical_and(mini_step == 0, gradient_step > 0)


def check_cycles(resample_every: Every, every: Every, name: str) -> None:
    """Raises a ValueError unless each cycle is an integer number of optimizer steps.

    Args:
      resample_every: The number of micro-steps in a cycle.
      every: The number of micro-steps in an optimizer step.
      name: The name that the user knows `every` by.
    """
    if isinstance(resample_every, int) and isinstance(every, int):
        fits = resample_every % every == 0
    else:
        fits = resample_every == every or (
            isinstance(resample_every, StepsPerCycle) and resample_every.every == every
        )
    if not fits:
        raise ValueError(
            f"resample_every must be a multiple of {name}={every!r}, found {resample_every!r}: the "
            "projection would change inside an accumulation"
        )
