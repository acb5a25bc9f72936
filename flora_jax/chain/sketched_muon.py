"""sketched_muon: Muon on exact gradients, with its momentum as a sketch, or with none."""

from functools import partial
from typing import Any

import jax
import optax

from flora_jax.chain.exact_momentum import exact_momentum
from flora_jax.chain.leaf_plan import leaf_plans
from flora_jax.chain.polar import matrices_of, polar
from flora_jax.chain.projection import Projection, as_int
from flora_jax.chain.storage import StateDtype

DECAY, KAPPA = 0.8, 256


def sketched_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | None = None,
    momentum: float = DECAY,
    resample_every: int = KAPPA,
    iterations: int = 5,
    block: int | None = None,
    weight_decay: float | None = None,
    adafactor_learning_rate: optax.ScalarOrSchedule | None = None,
    min_dim: int = 128,
    state_dtype: StateDtype = "float32",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for exact gradients: `exact_momentum → polar` for the matrices, Adafactor for all else.

    It is meant for `flora_jax.make_train_step(..., update="backward")`, where a gradient exists for one layer at a time.
    With a rank the state of a matrix is a sketch of `r` numbers for each output; without, it has none, and beside the
    weights there is nothing but a layer and the activations. Embeddings, heads and vectors have Adafactor, whose state is a
    number for each row and column.

    Args:
      learning_rate: The learning rate: a number, or a schedule of the step.
      rank: The rank `r` of the momentum; None for no momentum.
      momentum: The decay of the momentum.
      resample_every: The number of steps after which a new projection is sampled, and the momentum begins anew.
      iterations: The number of Newton–Schulz iterations.
      block: The longest side that is orthogonalized at once; see `polar`.
      weight_decay: The share of each matrix that is subtracted, times the learning rate.
      adafactor_learning_rate: The learning rate of Adafactor, where it shall be another.
      min_dim: Matrices with a shorter side than this have Adafactor, so that stacks of vectors are none.
      state_dtype: The dtype of the sketches.
      seed: The seed of the projections.

    Returns:
      A `GradientTransformationExtraArgs`.

    Raises:
      ValueError: An argument is not valid.

    Examples:
      >>> import flora_jax, jax.numpy as jnp
      >>> tx = flora_jax.sketched_muon(0.02, rank=4, min_dim=8)
      >>> loss = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> step = flora_jax.make_train_step(loss, tx, update="backward")
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> opt_state = step.init(params, jnp.ones((2, 16)))
      >>> params, opt_state, value = step(params, opt_state, jnp.ones((2, 16)))

    References:
      Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; arXiv 2402.03293, Algorithm 2.
    """
    own: list[Any] = []
    if rank is not None:
        projection = Projection(
            rank,
            distribution="srtt",
            side="input",
            embedding="whole",
            head="whole",
            resample_every=resample_every,
            min_dim=min_dim,
            seed=as_int(seed),
        )
        own.append(exact_momentum(momentum, projection, dtype=state_dtype))
    matrices = matrices_of(min_dim)
    own.append(polar(iterations, block=block, matrices=matrices))
    if weight_decay is not None:
        own.append(optax.add_decayed_weights(weight_decay))
    own.append(optax.scale_by_learning_rate(learning_rate))
    rate = learning_rate if adafactor_learning_rate is None else adafactor_learning_rate
    return optax.partition(
        {"matrix": optax.chain(*own), "other": optax.adafactor(rate)}, partial(_kinds, matrices)
    )


def _kinds(matrices: Projection, tree: Any) -> Any:
    """Says of each leaf whether it is a matrix."""
    names = ["matrix" if plan.spec else "other" for plan in leaf_plans(tree, matrices)]
    return jax.tree.unflatten(jax.tree.structure(tree), names)
