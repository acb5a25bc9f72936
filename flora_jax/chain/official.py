"""Official: the optimizer of the authors' JAX package as it behaves, for comparison; it is never the default.

It differs from the paper, and from `flora_jax.flora`, in the following:

- Adafactor's factored second moment comes first, and the momentum `M` averages the preconditioned
  update `u`.
- The step is `β · (M A) + (1 − β) · u`, where the current `u` is not compressed.
- Every `κ` steps (the first included) `M` is projected with the old `A` again, `M A Aᵀ`, and from then
  on decompressed with the new one.
- Only matrices of two axes are compressed, of at least 128 × 128 and with an aspect ratio of at most 4;
  their smaller side is projected.
- The momentum is kept in bfloat16, rounded to nearest, for uncompressed leaves too.

The numbers are not the same as the authors' to the last bit, since their keys come from the order of
the leaves, and those here from the leaves' paths.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import dtypes
from flora_jax.chain import products
from flora_jax.chain.leaf_plan import leaf_plans
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import Spec

MAX_ASPECT = 4
KAPPA = 1000


class OfficialState(NamedTuple):
    """The state of `scale_by_official`.

    Attributes:
      count: The number of updates so far, an int32 scalar.
      momentum: A tree like the params, in bfloat16. Each leaf has the shape of the sketch, or of the
        weight where it is uncompressed.
    """

    count: Any
    momentum: Any


def flora(
    learning_rate: optax.ScalarOrSchedule, *, rank: int, decay: float = 0.9, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Returns the authors' chain: factored RMS (decay 0.99) → momentum → clipping → parameter scale.

    Args:
      learning_rate: The learning rate: a number or a schedule.
      rank: The rank `r` of the projections.
      decay: The decay `β` of the momentum.
      seed: The seed of the projections.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.99),
        scale_by_official(rank, decay, seed),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        optax.scale_by_param_block_rms(),
        optax.scale(-1.0),
    )


def scale_by_official(
    rank: int, decay: float = 0.9, seed: int = 0, kappa: int = KAPPA
) -> optax.GradientTransformation:
    """Returns the authors' momentum, `β · (M A) + (1 − β) · u`, as a transformation.

    Args:
      rank: The rank `r` of the projections.
      decay: The decay `β`.
      seed: The seed of the projections.
      kappa: The number `κ` of steps that share a projection.
    """

    def init_fn(params):
        leaves, structure = jax.tree.flatten(params)
        shapes = [
            spec.part_data_shape if spec else leaf.shape
            for spec, leaf in zip(_specs(params, rank, seed), leaves, strict=True)
        ]
        zeros = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
        return OfficialState(jnp.zeros([], jnp.int32), jax.tree.unflatten(structure, zeros))

    @dtypes.promoting()
    def update_fn(updates, state, params=None):
        del params
        switches = state.count % kappa == 0
        old, new = (state.count + kappa - 1) // kappa, state.count // kappa + 1

        def visit(spec: Spec | None, update, kept):
            if spec is None:
                kept = (decay * kept + (1 - decay) * update.astype(jnp.bfloat16)).astype(kept.dtype)
                return decay * kept + (1 - decay) * update, kept
            kept = jax.lax.cond(
                switches,
                lambda kept: products.transfer(spec, old, old, kept),
                lambda kept: kept,
                kept,
            )
            sketch = products.project(spec, new, update.astype(jnp.bfloat16))
            kept = (decay * kept + (1 - decay) * sketch).astype(kept.dtype)
            estimate = products.decompress(spec, new, kept.astype(jnp.float32))
            return decay * estimate + (1 - decay) * update, kept

        leaves, structure = jax.tree.flatten(updates)
        momenta = jax.tree.leaves(state.momentum)
        specs = _specs(updates, rank, seed)
        pairs = [visit(*leaf) for leaf in zip(specs, leaves, momenta, strict=True)]
        result, kept = (jax.tree.unflatten(structure, part) for part in zip(*pairs, strict=True))
        return result, OfficialState(optax.safe_increment(state.count), kept)

    return optax.GradientTransformation(init_fn, update_fn)


def _specs(tree: Any, rank: int, seed: int) -> list[Spec | None]:
    def select(path: str, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and max(shape) <= MAX_ASPECT * min(shape)

    plain = partial(Projection, rank, seed=seed, select=select, embedding="matrix", head="matrix")
    by_side = [leaf_plans(tree, plain(side=side)) for side in ("input", "output")]
    return [
        left.spec if left.shape and left.shape[0] < left.shape[-1] else right.spec
        for left, right in zip(*by_side, strict=True)
    ]
