"""momentum: the first moment as a sketch, transferred every `κ` steps (arXiv 2402.03293, Algorithm 2).

| paper | here |
|---|---|
| `M`, `n × r` | `MomentumState.momentum` |
| `β` | `decay` |
| `κ` | `Projection.resample_every` |
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import dtypes
from flora_jax.chain import products, states, storage
from flora_jax.chain.projection import Projection, check_projection
from flora_jax.chain.sketch import is_sketch
from flora_jax.chain.transformation import transformation
from flora_jax.sharding import manual


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
) -> optax.GradientTransformationExtraArgs:
    """Keeps the first moment of the gradient as a sketch: `M ← β M + (1 − β) G Aᵀ`.

    When the incoming sketches belong to another cycle, `M` is transferred to their projection first,
    `M ← M A A′ᵀ`.

    Args:
      decay: The decay `β`, at least 0 and below 1.
      projection: The `Projection` of the `project` that comes before, or None where nothing is
        compressed.
      dtype: The dtype of the state, with the meaning of `accumulator_dtype` in `accumulate`.

    Returns:
      A transformation with the state `MomentumState`.

    Raises:
      ValueError: An argument is not valid. On `update`, at trace time: a leaf does not fit the state.

    References:
      arXiv 2402.03293, Algorithm 2.
    """
    _check_decay(decay)
    storage.check("dtype", dtype)
    if projection is not None:
        check_projection(projection)

    def init_fn(params):
        # two arrays rather than one, so that both can be donated
        count, cycle = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return MomentumState(count, cycle, states.zeros(params, projection, dtype))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        sketches = states.map_leaves(states.expected("momentum", projection), projection, updates)
        states.check_fits("momentum", sketches, state.momentum)
        cycles = [leaf.cycle for leaf in states.leaves(sketches) if is_sketch(leaf)]
        cycle = cycles[0] if cycles else state.cycle
        kept = storage.load_tree(state.momentum)

        def move(leaf, data):
            if not is_sketch(leaf):
                return data
            return products.transfer(leaf.spec, state.cycle, cycle, data)

        moved = manual.switch(
            cycle == state.cycle,
            (
                lambda tree: jax.tree.map(move, sketches, tree, is_leaf=is_sketch),
                lambda tree: tree,
            ),
            kept,
        )
        with dtypes.promoting():
            mixed = jax.tree.map(
                lambda old, new: decay * old + (1 - decay) * new, moved, states.numbers(sketches)
            )
        result = states.with_numbers(sketches, mixed)
        stored = states.store(mixed, projection, sketches, dtype, (state.count,))
        return result, MomentumState(optax.safe_increment(state.count), cycle, stored)

    return transformation(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def _check_decay(decay: Any) -> None:
    if not isinstance(decay, jax.Array) and not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1, found {decay!r}")
