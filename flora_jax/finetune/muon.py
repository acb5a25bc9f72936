"""Muon, uncompressed: optax's orthogonalization with the learning rates that `flora_jax.flora` has for matrices."""

from functools import partial
from typing import Any

import jax
import optax

from flora_jax.chain.leaf_plan import leaf_plans
from flora_jax.chain.projection import Projection


def muon(
    learning_rate: optax.ScalarOrSchedule,
    others: optax.GradientTransformation,
    *,
    min_dim: int = 2,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float | None = None,
) -> optax.GradientTransformation:
    """Makes Muon for the matrices inside a model, stacked or not, scaled as `flora_jax.flora` scales them.

    Args:
      learning_rate: The learning rate of the matrices.
      others: The optimizer of embeddings, head, vectors and what has a side below `min_dim`.
      min_dim: The shortest side of a matrix.
      momentum: The decay of the momentum.
      nesterov: Whether it is Nesterov's.
      weight_decay: The decay of the matrices, times the learning rate.

    References:
      Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    numbers = partial(
        jax.tree.map, lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)
    )
    own = [
        optax.contrib.scale_by_muon(
            beta=momentum, nesterov=nesterov, weight_dimension_numbers=numbers
        ),
        optax.stateless(_by_outputs),
        *([optax.add_decayed_weights(weight_decay)] if weight_decay else []),
        optax.scale_by_learning_rate(learning_rate),
    ]

    def kinds(tree: Any) -> Any:
        names = {True: "matrix", False: "other"}
        return jax.tree.map(names.__getitem__, matrices(tree, min_dim))

    return optax.partition({"matrix": optax.chain(*own), "other": others}, kinds)


def matrices(tree: Any, min_dim: int = 2) -> Any:
    """Returns a tree of bools: which leaves are matrices inside a model, stacked or not, and no embedding or head."""
    found = [bool(plan.spec) for plan in leaf_plans(tree, of_matrices(1, min_dim))]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def of_matrices(rank: int, min_dim: int) -> Projection:
    """Returns the projection of the matrices inside a model, and of nothing else."""
    return Projection(
        rank,
        side="input",
        embedding="whole",
        head="whole",
        min_dim=min_dim,
        select=has_two_sides,
    )


def has_two_sides(path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a leaf has two sides beside the axis of stacked layers: scales of many layers are no matrix."""
    return len(shape) > (2 if path.startswith("layers/") else 1)


def _by_outputs(updates: Any, params: Any = None) -> Any:
    """Multiplies the update of each matrix by the root of its outputs over its inputs, where that is above 1."""
    del params
    return jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)
