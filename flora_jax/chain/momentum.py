"""momentum: the first moment as a sketch, transferred every `κ` steps (arXiv 2402.03293, Algorithm 2).

| paper | here |
|---|---|
| `M`, `n × r` | `MomentumState.momentum` |
| `β` | `decay` |
| `κ` | `Projection.resample_every` |
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from flora_jax import dtypes
from flora_jax.chain import products, states, storage
from flora_jax.chain.projection import Projection, check_projection
from flora_jax.chain.sketch import is_sketch
from flora_jax.chain.transformation import transformation
from flora_jax.sharding import manual

AtNewProjection = Literal["transfer", "shorten", "reset"]
"""What is done to a momentum when its projection changes: see `momentum`."""


class MomentumState(NamedTuple):
    """The state of `momentum`.

    Attributes:
      count: The number of updates so far, an int32 scalar.
      cycle: The number of the cycle whose projections the sketches belong to, an int32 scalar.
      momentum: A tree like the params. Each leaf has the shape of the sketch, or of the weight where it
        is uncompressed.
    """

    count: Any
    cycle: Any
    momentum: Any


def momentum(
    decay: float,
    *,
    projection: Projection | None = None,
    dtype: storage.StateDtype = "float32",
    nesterov: bool = False,
    at_new_projection: AtNewProjection = "transfer",
    compressed_only: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the first moment of the gradient as a sketch: `M ← β M + (1 − β) G Aᵀ`.

    When the incoming sketches belong to another cycle, `M` is transferred to their projection first,
    `M ← M A A′ᵀ`, unless `at_new_projection` says otherwise.

    Args:
      decay: The decay `β`, at least 0 and below 1.
      projection: The `Projection` of the `project` that comes before, or None where nothing is
        compressed.
      dtype: The dtype of the state, with the meaning of `accumulator_dtype` in `accumulate`.
      nesterov: Whether to pass on `β M + (1 − β) G Aᵀ` in place of `M`, as Nesterov's momentum does.
      at_new_projection: `transfer` is the paper's `M A A′ᵀ`, whose mean is the momentum, but whose noise is
        `m / r` times as large; `shorten` multiplies it by `r / m`, so that it is `M A` projected to the
        rows of the new `A` where these are orthonormal; `reset` begins with zero.
      compressed_only: Whether uncompressed gradients pass through unchanged. In the place of their momentum
        the state then has a single zero.

    Returns:
      A transformation with the state `MomentumState`.

    Raises:
      ValueError: An argument is not valid. On `update`, at trace time: a leaf does not fit the state.

    References:
      arXiv 2402.03293, Algorithm 2.
    """
    check_decay(decay)
    storage.check("dtype", dtype)
    move = mover(at_new_projection)
    if projection is not None:
        check_projection(projection)

    def init_fn(params):
        # two arrays rather than one, so that both can be donated
        count, cycle = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        kept = states.zeros(params, projection, dtype, compressed_only)
        return MomentumState(count, cycle, kept)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        sketches = states.map_leaves(states.expected("momentum", projection), projection, updates)
        states.check_fits("momentum", sketches, state.momentum, compressed_only)
        cycles = [leaf.cycle for leaf in states.leaves(sketches) if is_sketch(leaf)]
        cycle = cycles[0] if cycles else state.cycle
        kept = states.load(state.momentum, projection, sketches, (state.count,))

        moved = manual.switch(
            cycle == state.cycle,
            (
                lambda tree: move(sketches, state.cycle, cycle, tree),
                lambda tree: tree,
            ),
            kept,
        )
        with dtypes.promoting():

            def mix(leaf, old):
                if not is_sketch(leaf):
                    return old if compressed_only else decay * old + (1 - decay) * leaf
                return decay * old + (1 - decay) * leaf.data

            def passed_on(leaf, new):
                if compressed_only and not is_sketch(leaf):
                    return leaf
                return mix(leaf, new) if nesterov else new

            mixed = jax.tree.map(mix, sketches, moved, is_leaf=is_sketch)
            ahead = jax.tree.map(passed_on, sketches, mixed, is_leaf=is_sketch)
        result = states.with_numbers(sketches, ahead)
        count = optax.safe_increment(state.count)
        stored = states.store(mixed, projection, sketches, dtype, (count,))
        return result, MomentumState(count, cycle, stored)

    return transformation(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def mover(at_new_projection: AtNewProjection) -> Callable[[Any, Any, Any, Any], Any]:
    """Returns a function `(sketches, old, new, numbers) -> numbers` that moves a momentum to another cycle.

    Numbers of uncompressed leaves stay as they are.

    Raises:
      ValueError: `at_new_projection` is none of the choices.
    """
    if at_new_projection not in get_args(AtNewProjection):
        raise ValueError(
            f"at_new_projection must be one of {', '.join(get_args(AtNewProjection))}, found "
            f"{at_new_projection!r}"
        )

    def move(sketches, old, new, numbers):
        def visit(leaf, data):
            if not is_sketch(leaf):
                return data
            if at_new_projection == "reset":
                return jnp.zeros_like(data)
            moved = products.transfer(leaf.spec, old, new, data)
            return (
                moved * (leaf.spec.rank / leaf.spec.size)
                if at_new_projection == "shorten"
                else moved
            )

        return jax.tree.map(visit, sketches, numbers, is_leaf=is_sketch)

    return move


def check_decay(decay: Any) -> None:
    """Raises a ValueError unless this is the decay of a momentum."""
    if not isinstance(decay, jax.Array) and not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1, found {decay!r}")
