"""The links of the chain: project, accumulate, momentum, decompress.

| paper | here |
|---|---|
| Algorithm 1, `C ← C + G Aᵀ` over `τ` micro-steps | `project`, then `accumulate(..., every=τ)` |
| Algorithm 2, `M ← β M + (1 − β) G Aᵀ`, transferred each `κ` steps | `project`, then `momentum(β)` |
| `G̃ = C A`, given to the base optimizer | `decompress` |

`accumulate` and `momentum` see numbers only, and optax gives their `init` nothing but params: the
projection is named to them again, so that they know the sketches' shapes before the first one
comes. A sketch that is not of the kind it says is refused at trace time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import boundary, explicit, keys, manual, storage
from flora_jax import projection as projections
from flora_jax.plan import LeafPlan, leaf_plans
from flora_jax.projection import Projection, check_every
from flora_jax.sketch import Every, Sketch, is_sketch


class ProjectState(NamedTuple):
    """State of `project`.

    Attributes:
      cycle: int32 scalar, of the micro-step to come.
      micro_step: int32 scalar, micro-steps already spent in it.
    """

    cycle: Any
    micro_step: Any


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


class MomentumState(NamedTuple):
    """State of `momentum`.

    Attributes:
      count: int32 scalar, updates so far.
      cycle: int32 scalar, whose projection made the sketches below.
      momentum: tree of the params; each leaf of the sketch's shape, or the weight's own.
    """

    count: Any
    cycle: Any
    momentum: Any


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """A schedule for `resample_every`: cycles of `count` boundaries, when `every` is a schedule.

    Cycle `c` has `Σ every(g)` micro-steps, over the gradient steps `g` from `c · count` on.
    """

    every: Callable[[Any], Any]
    count: int

    def __call__(self, cycle):
        steps = jnp.asarray(cycle) * self.count + jnp.arange(self.count, dtype=jnp.int32)
        return jnp.sum(jax.vmap(self.every)(steps))


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
                _check_kind(plan, leaf)
                return Sketch(leaf.data, state.cycle, leaf.spec)
            if plan.spec is None:
                return leaf
            return Sketch(projections.project(plan.spec, state.cycle, leaf), state.cycle, plan.spec)

        length = _at(projection.resample_every, state.cycle)
        spent = state.micro_step + 1
        ends = spent >= length
        new_state = ProjectState(
            cycle=jnp.where(ends, optax.safe_increment(state.cycle), state.cycle),
            micro_step=jnp.where(ends, 0, spent),
        )
        return _map_leaves(compress, projection, updates), new_state

    return explicit.link(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def decompress() -> optax.GradientTransformation:
    """Turns sketches back into gradient leaves, `C A`; other leaves pass.

    After it stands any optax optimizer, which sees an unbiased estimate of the gradient.

    Raises:
      ValueError: (on update) a sketch whose cycle no `project` has set.

    References:
      arXiv 2402.03293, Algorithm 1, line 10; Algorithm 2, line 14.
    """

    def update_fn(updates, state, params=None):
        del params

        def expand(leaf):
            if not is_sketch(leaf):
                return leaf
            if leaf.cycle is None:
                raise ValueError(
                    f"{leaf.spec.path!r}: decompress found a sketch without a cycle, expected one "
                    "that flora_jax.project has passed on"
                )
            return boundary.decompress(leaf.spec, leaf.cycle, leaf.data)

        return jax.tree.map(expand, updates, is_leaf=is_sketch), state

    return explicit.link(optax.GradientTransformation(optax.init_empty_state, update_fn))


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
            accumulated=_zeros(params, projection, accumulator_dtype),
            inner_state=inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        length = _at(every, state.gradient_step)
        weight = 1.0 / length if use_grad_mean else 1.0
        sketches = _map_leaves(_expect("accumulate", projection), projection, updates)
        numbers = _numbers(sketches)
        sums = jax.tree.map(
            lambda old, new: old + weight * new, storage.load_tree(state.accumulated), numbers
        )

        def boundary(sums, inner_state):
            whole = _with_numbers(sketches, sums)
            result, inner_state = inner.update(whole, inner_state, params, **extra_args)
            kept = _zeros(updates, projection, accumulator_dtype)
            return result, inner_state, kept

        result_shape, _, _ = jax.eval_shape(boundary, sums, state.inner_state)

        def between(sums, inner_state):
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result_shape)
            count = (state.gradient_step, state.mini_step)
            kept = _store(sums, projection, sketches, accumulator_dtype, count)
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

    return explicit.link(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def momentum(
    decay: float,
    *,
    projection: Projection | None = None,
    dtype: storage.StateDtype = "float32",
) -> optax.GradientTransformationExtraArgs:
    """First moment of the gradient, kept as a sketch: `M ← β M + (1 − β) C`.

    When the incoming sketches are of another cycle, `M` is transferred to it first.

    Args:
      decay: `β`, at least 0 and below 1.
      projection: that of the `project` before it. None where nothing is compressed.
      dtype: of the state; see `accumulate`.

    Raises:
      ValueError: a wrong argument; (on update, at trace time) a leaf that does not fit the state.

    References:
      arXiv 2402.03293, Algorithm 2.
    """
    _check_decay(decay)
    storage.check("dtype", dtype)

    def init_fn(params):
        count, cycle = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)  # two, to be donated
        return MomentumState(count, cycle, _zeros(params, projection, dtype))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        sketches = _map_leaves(_expect("momentum", projection), projection, updates)
        cycles = [leaf.cycle for leaf in _leaves(sketches) if is_sketch(leaf)]
        cycle = cycles[0] if cycles else state.cycle
        kept = storage.load_tree(state.momentum)

        def move(leaf, data):
            if not is_sketch(leaf):
                return data
            return projections.transfer(leaf.spec, state.cycle, cycle, data)

        moved = manual.switch(
            cycle == state.cycle,
            (
                lambda tree: jax.tree.map(move, sketches, tree, is_leaf=is_sketch),
                lambda tree: tree,
            ),
            kept,
        )
        mixed = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, moved, _numbers(sketches)
        )
        result = _with_numbers(sketches, mixed)
        stored = _store(mixed, projection, sketches, dtype, (state.count,))
        return result, MomentumState(optax.safe_increment(state.count), cycle, stored)

    return explicit.link(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Leaves out each micro-step whose gradients have a NaN or an infinity, as if it had not been.

    `optax.apply_if_finite` without its limit, for sketches as well: the update is zero, and the state
    of `inner` stays as it was.

    Args:
      inner: the whole chain, so that every count in it stays with the others.

    Returns:
      A transformation with the state of `optax.apply_if_finite`; `total_notfinite` counts.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        count = jnp.zeros([], jnp.int32)
        return optax.ApplyIfFiniteState(count, jnp.array(True), jnp.copy(count), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        finite = jnp.array(True)
        for leaf in jax.tree.leaves(_numbers(updates)):
            finite &= jnp.all(jnp.isfinite(leaf))
        finite = manual.everywhere(finite)

        def proceed(inner_state):
            return inner.update(updates, inner_state, params, **extra_args)

        shapes, _ = jax.eval_shape(proceed, state.inner_state)

        def skip(inner_state):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), inner_state

        result, inner_state = manual.switch(finite, (skip, proceed), state.inner_state)
        bad = optax.safe_increment(state.notfinite_count)
        total = optax.safe_increment(state.total_notfinite)
        return result, optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, bad),
            last_finite=finite,
            total_notfinite=jnp.where(finite, state.total_notfinite, total),
            inner_state=inner_state,
        )

    return explicit.link(optax.GradientTransformationExtraArgs(init_fn, update_fn))


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

        return _map_leaves(scale, projection, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def cycle(opt_state: Any) -> jax.Array:
    """The cycle that the next micro-step belongs to, found anywhere in an optimizer's state.

    Raises:
      ValueError: there is no `project` in it, or more than one.
    """
    return _find(opt_state, ProjectState, "project").cycle


def has_updated(opt_state: Any) -> jax.Array:
    """Whether the last micro-step was a boundary; always, where nothing is accumulated.

    Raises:
      ValueError: there is more than one `accumulate` in it.
    """
    if not _states(opt_state, AccumulateState):
        return jnp.asarray(True)
    state = _find(opt_state, AccumulateState, "accumulate")
    return jnp.logical_and(state.mini_step == 0, state.gradient_step > 0)


def _check_decay(decay: Any) -> None:
    if not isinstance(decay, jax.Array) and not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1, found {decay!r}")


def _states(opt_state: Any, kind: type) -> list[Any]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def _find(opt_state: Any, kind: type, link: str) -> Any:
    found = _states(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold the state of one flora_jax.{link}, found {len(found)}"
        )
    return found[0]


def _at(every: Every, step: Any) -> Any:
    return every(step) if callable(every) else every


def _check_cycles(resample_every: Every, every: Every) -> None:
    """A cycle must be a whole number of accumulations."""
    if isinstance(resample_every, int) and isinstance(every, int):
        fits = resample_every % every == 0
    else:
        fits = resample_every == every or (
            isinstance(resample_every, Boundaries) and resample_every.every == every
        )
    if not fits:
        raise ValueError(
            f"resample_every must be a multiple of every={every!r}, found {resample_every!r}: the "
            "projection would change inside an accumulation"
        )


def _check_kind(plan: LeafPlan, leaf: Sketch) -> None:
    if plan.spec == leaf.spec:
        return
    if plan.spec is None:
        raise ValueError(
            f"{plan.path!r}: found a sketch, expected a whole gradient, since the leaf is not "
            f"compressed ({plan.reason})"
        )
    for field in dataclasses.fields(plan.spec):
        found, expected = getattr(leaf.spec, field.name), getattr(plan.spec, field.name)
        if found != expected:
            raise ValueError(
                f"{plan.path!r}: found a sketch of {field.name} {found!r}, expected {expected!r}"
            )


def _expect(link: str, projection: Projection | None) -> Callable[[LeafPlan, Any], Any]:
    """A check that what comes in fits the state of `link`."""

    def check(plan: LeafPlan, leaf):
        if is_sketch(leaf) and projection is None:
            raise ValueError(
                f"{plan.path!r}: {link} found a sketch, expected a whole gradient; give {link} the "
                "projection that flora_jax.project has"
            )
        if is_sketch(leaf):
            _check_kind(plan, leaf)
        elif plan.spec is not None:
            raise ValueError(
                f"{plan.path!r}: {link} found a whole gradient, expected a sketch; put "
                "flora_jax.project with the same projection before it"
            )
        return leaf

    return check


def _map_leaves(visit: Callable, projection: Projection | None, updates: Any) -> Any:
    """Maps `visit(plan, leaf)` over the gradient leaves, sketches being leaves."""
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_sketch)
    plans = _plans(updates, projection)
    visited = [visit(plan, leaf) for plan, leaf in zip(plans, leaves, strict=True)]
    return jax.tree.unflatten(structure, visited)


def _plans(tree: Any, projection: Projection | None) -> list[LeafPlan]:
    return leaf_plans(tree, projection or Projection(rank=1, mask=False))


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=is_sketch)


def _numbers(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.data if is_sketch(leaf) else leaf, tree, is_leaf=is_sketch
    )


def _with_numbers(sketches: Any, numbers: Any) -> Any:
    """Puts numbers in the places of those of `sketches`; whole leaves keep their dtype."""

    def put(leaf, data):
        if is_sketch(leaf):
            return Sketch(data, leaf.cycle, leaf.spec)
        return data.astype(leaf.dtype)

    return jax.tree.map(put, sketches, numbers, is_leaf=is_sketch)


def _zeros(tree: Any, projection: Projection | None, dtype: storage.StateDtype) -> Any:
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_sketch)
    plans = _plans(tree, projection)
    zeros = [storage.zeros(dtype, plan.data_shape) for plan, _ in zip(plans, leaves, strict=True)]
    return storage.transposed(zeros, structure)


def _store(
    numbers: Any,
    projection: Projection | None,
    sketches: Any,
    dtype: storage.StateDtype,
    counts: tuple[Any, ...],
) -> Any:
    """Keeps each leaf, rounded under a key of its own where the dtype is narrow."""
    if dtype in ("float32", "float64"):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), numbers)
    leaves, structure = jax.tree.flatten(numbers)
    seed = projection.seed if projection else 0
    kept = []
    for plan, leaf in zip(_plans(sketches, projection), leaves, strict=True):
        key = keys.leaf_key(seed, f"rounding/{plan.path}", counts[0])
        for count in counts[1:]:
            key = jax.random.fold_in(key, count)
        kept.append(storage.store(dtype, leaf, key))
    return storage.transposed(kept, structure)
