"""polar: Muon's orthogonalization of the gradient itself, without a momentum and so without a state."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax import dtypes
from flora_jax.chain import products, states
from flora_jax.chain.leaf_plan import LeafPlan
from flora_jax.chain.orthogonalize import inverse_root
from flora_jax.chain.projection import Projection, as_int
from flora_jax.chain.sketch import Spec
from flora_jax.chain.transformation import transformation


def matrices_of(min_dim: int = 128) -> Projection:
    """Returns a `Projection` with a `Spec` for each matrix that is no embedding and no head, of at least these sides."""
    return Projection(1, side="input", min_dim=min_dim, embedding="whole", head="whole")


MATRICES = matrices_of()


def polar(
    iterations: int = 5, *, block: int | None = None, matrices: Projection = MATRICES
) -> optax.GradientTransformation:
    """Replaces the gradient of each matrix by its polar factor, times `√max(1, outputs / inputs)`.

    With `G = U Σ Vᵀ` the result is near `U Vᵀ`; the singular values end as `orthogonalize` says. Embeddings, heads,
    vectors and all else pass through unchanged. Each matrix along batch axes (layers, heads, experts) is treated by
    itself.

    The iterations are on the Gram matrix of the smaller side, `b × b`: some `4 n b² + 24 b³` operations for an
    `n × b` matrix, beside the `6 n b` for each token of a step.

    Args:
      iterations: The number of Newton–Schulz iterations, at least 1.
      block: Where the smaller side is longer, it is cut into blocks of at most this many columns (or rows), each
        orthogonalized by itself and divided by the root of their number. It costs less, and orthogonalizes less.
      matrices: A `Projection` whose `min_dim`, `embedding`, `head`, `mask` and `weight_dimension_numbers` say what is
        a matrix, and which of its axes are inputs. Nothing is projected.

    Returns:
      A transformation without state.

    Raises:
      ValueError: `iterations` or `block` is no int of at least 1.

    References:
      Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Amsel et al., "The Polar
      Express", arXiv 2505.16932, Algorithm 1.
    """
    iterations = as_int(iterations)
    for name, number in (("iterations", iterations), ("block", block)):
        if (name, number) != ("block", None) and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} must be an int of at least 1, found {number!r}")

    def update_fn(updates, state, params=None):
        del params

        def visit(plan: LeafPlan, leaf):
            if plan.spec is None or plan.kind != "matrix":
                return leaf
            return _factors(plan.spec, leaf, iterations, block)

        return states.map_leaves(visit, matrices, updates), state

    return transformation(optax.GradientTransformation(optax.init_empty_state, update_fn))


@dtypes.promoting()
def _factors(spec: Spec, gradient: Any, iterations: int, block: int | None) -> jax.Array:
    """Returns the scaled polar factors of the matrices of a leaf."""
    order = (*spec.batch, *spec.kept, *spec.projected)
    moved = jnp.transpose(gradient, order)
    outputs, inputs = (
        math.prod(gradient.shape[i] for i in axes) for axes in (spec.kept, spec.projected)
    )
    x = moved.reshape(-1, outputs, inputs).astype(dtypes.sums(gradient.dtype))
    x = jnp.swapaxes(x, 1, 2) if outputs < inputs else x
    count, size = 1, x.shape[2]
    while block is not None and (size % count or size // count > block):
        count += 1
    parts = jnp.moveaxis(x.reshape(*x.shape[:2], count, size // count), 2, 1)
    each = jax.vmap(jax.vmap(lambda part: _factor(part, iterations)))
    x = jnp.moveaxis(each(parts), 1, 2).reshape(x.shape)
    x = jnp.swapaxes(x, 1, 2) if outputs < inputs else x
    x = x * (max(1.0, outputs / inputs) / count) ** 0.5
    back = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(x.reshape(moved.shape), back).astype(gradient.dtype)


def _factor(x: jax.Array, iterations: int) -> jax.Array:
    gram = jnp.matmul(x.T, x, precision=products.PRECISION)
    return jnp.matmul(x, inverse_root(gram, iterations))
