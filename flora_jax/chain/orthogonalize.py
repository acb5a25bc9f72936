"""orthogonalize: Muon's orthogonalization of a momentum, done at the size of its sketch.

| in Muon, of a matrix `X` with singular value decomposition `U Σ Vᵀ` | here, of the estimate `X = C A` |
|---|---|
| `msign(X) = U Vᵀ = X (XᵀX)^(−1/2)` | `C Q A`, with `Q = L (Lᵀ Cᵀ C L)^(−1/2) L⁻¹` and `L Lᵀ = A Aᵀ` |
| Newton–Schulz iterations on `X` | the same iterations on the Gram matrix `Lᵀ Cᵀ C L`, `r × r` |

Since `A = L (L⁻¹ A)`, and `L⁻¹ A` has orthonormal rows, `msign(C A) = msign(C L) L⁻¹ A`. So
orthogonalization and decompression commute, and nothing larger than the sketch is worked on.

An iteration multiplies `X` by a polynomial `p` of `XᵀX`, which acts on the singular values one by one,
`σ ← σ p(σ²)`. All of them are polynomials of one symmetric matrix, so their product is collected at `r × r`,
and the sketch is multiplied once.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from flora_jax.chain import products, recorder
from flora_jax.chain.decompress import with_cycle
from flora_jax.chain.leaf_operations import LeafOperation
from flora_jax.chain.projection import as_int
from flora_jax.chain.sketch import Sketch, Spec, is_sketch
from flora_jax.chain.transformation import transformation
from flora_jax.tracing import once

POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
"""Coefficients of `p(x) = a + b x + c x²`, one iteration each: Polar Express (arXiv 2505.16932), which is the
best composition for singular values from 0.001 to 1. The last one may be repeated."""


def orthogonalize(iterations: int = 5) -> optax.GradientTransformation:
    """Replaces each sketch `C` by the one whose `decompress` has all singular values near 1.

    With `X = C A = U Σ Vᵀ`, the result is a sketch `D` of the same cycle with `D A ≈ U Vᵀ`. It goes between
    the accumulated, or averaged, sketches and `decompress`, and takes the place of the second moments:
    the update has the same length for each matrix, whatever the gradients' scale. Each matrix along the
    batch axes is treated by itself. Uncompressed leaves pass through unchanged.

    Singular values of at least 0.001 times the bound `(Σ σ⁴)^(1/4)` of the largest end between 0.85 and 1.13 after
    5 iterations, and within 0.005 of 1 after 6; those below it end between 0 and 1.

    Args:
      iterations: The number of Newton–Schulz iterations, at least 1.

    Returns:
      A transformation without state.

    Raises:
      ValueError: `iterations` is no int of at least 1. On `update`, a sketch has no cycle, because no `project` has set
        it.

    Examples:
      >>> import flora_jax, optax
      >>> projection = flora_jax.Projection(16, distribution="srtt", resample_every=64)
      >>> tx = optax.chain(
      ...     flora_jax.project(projection),
      ...     flora_jax.momentum(0.9, projection=projection, nesterov=True),
      ...     flora_jax.orthogonalize(),
      ...     flora_jax.decompress(),
      ...     optax.scale_by_learning_rate(0.02),
      ... )

    References:
      Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Amsel et al., "The Polar
      Express", arXiv 2505.16932, Algorithm 1.
    """
    iterations = as_int(iterations)
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be an int of at least 1, found {iterations!r}")

    def update_fn(updates, state, params=None):
        del params

        def visit(leaf):
            if not is_sketch(leaf):
                return leaf
            leaf = with_cycle("orthogonalize", leaf)
            data = leaf.data
            if not recorder.outlines():
                data = _orthogonalize(leaf.spec, leaf.cycle, data, iterations=iterations)
            return Sketch(data, leaf.cycle, leaf.spec)

        return jax.tree.map(visit, updates, is_leaf=is_sketch), state

    return transformation(optax.GradientTransformation(optax.init_empty_state, update_fn))


def polynomials(iterations: int) -> list[tuple[float, float, float]]:
    """Returns the coefficients of each iteration.

    All but the last leave room for rounding, by a factor of 1.01, as their source says.
    """
    repeated = [POLYNOMIALS[-1]] * (iterations - len(POLYNOMIALS))
    *first, last = POLYNOMIALS[: min(iterations, len(POLYNOMIALS))]
    return [*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in first), last, *repeated]


def _matrix(spec: Spec, keys: jax.Array, data: jax.Array, *, iterations: int) -> jax.Array:
    def factor(gram, projection_gram):
        """Returns `Q` of the module's docstring."""
        if isinstance(projection_gram, float):
            return inverse_root(gram, iterations) * projection_gram**-0.5
        lower = jnp.linalg.cholesky(projection_gram)
        inner = _times(lower.T, _times(gram, lower))
        root = inverse_root(inner, iterations)
        solved = jax.lax.linalg.triangular_solve(lower, root, left_side=False, lower=True)
        return _times(lower, solved)

    return products.times_function(spec, keys, data, factor)


_orthogonalize = LeafOperation("flora_orthogonalize", _matrix, expands=False)


@partial(once, static_argnums=1)
def inverse_root(gram: jax.Array, iterations: int) -> jax.Array:
    """Returns a polynomial of a positive semidefinite matrix `Y` near `Y^(−1/2)`; zero for zero."""
    one = jnp.eye(gram.shape[0], dtype=gram.dtype)
    largest = jnp.max(jnp.diagonal(gram))  # taken out first: squares of small numbers underflow
    gram = gram / jnp.where(largest > 0, largest, 1.0)
    bound = jnp.linalg.norm(gram)  # (Σ σ⁴)^(1/2), at least the largest eigenvalue
    gram = gram / jnp.where(bound > 0, bound, 1.0)
    result = one
    coefficients = polynomials(iterations)
    for number, (a, b, c) in enumerate(coefficients):
        step = a * one + b * gram + c * _times(gram, gram)
        result = step if number == 0 else _times(result, step)
        if number + 1 < len(coefficients):
            gram = _times(_times(step, gram), step)
    return result * jnp.where(largest > 0, bound * largest, 1.0) ** -0.5


def _times(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=products.PRECISION)
