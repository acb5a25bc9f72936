"""Deep LoRA: three factors of full width, compressed by singular vectors of the first gradient.

A product of three factors that starts small and orthogonal learns changes of low rank first. Everything
it learns stays in a subspace that is known at the start: the leading singular vectors of the first
gradient, and their images under the starting product. In coordinates of that subspace the factors are
`r × r`.

| paper (`W`: out × in) | here (weight: in × out) |
|---|---|
| `W = W₀ + W₃ W₂ W₁`, each `ε` times an orthogonal matrix at the start | what the small factors stand for |
| `U_{L,1}`, `V_{1,1}`, bases of the two sides, `2 r̂` columns | `up`, `down`, `r = 2 r̂` |
| compressed factors `W̃₁`, `W̃₂`, `W̃₃`, `ε I` at the start | `first`, `second`, `third` |
| learning rates of the outer bases, `γ` times that of the rest | `discrepant` |
| first gradient's singular vectors | `singular_vectors`, from two sketches of it |

The basis of a side consists of `r̂` singular vectors of the gradient, and of `r̂` random directions, which
stand for the images of the other side's singular vectors under the starting product.

Source: Yaras, Wang, Balzano, Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning
& Adaptation", arXiv 2406.04112, Sections 2.2, 3 and 4. Singular vectors of a matrix from its sketches:
Tropp, Yurtsever, Udell, Cevher, arXiv 1609.00048, Section 4.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax.adapters.low_rank import (
    Adapter,
    Factors,
    as_projection,
    from_matrices,
    specs,
    to_matrices,
)
from flora_jax.chain import products
from flora_jax.chain.keys import fold_path
from flora_jax.chain.products import data_batch
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import Sketch, Spec, is_sketch
from flora_jax.fused.value_and_grad import value_and_grad

OVERSAMPLING = 8


def deep_lora(
    rank: int | Projection, vectors: dict[str, tuple[Any, Any]], *, epsilon: float = 1e-2
) -> Adapter:
    """Returns Deep LoRA: three small factors between two bases.

    Args:
      rank: The rank `r` of the small factors, which must be even; or a `Projection`, as in `lora`.
      vectors: The singular vectors of each weight to adapt, as the function that `singular_vectors`
        returns gives them: `r/2` for each side.
      epsilon: The scale `ε` of each factor at the start.

    Returns:
      An `Adapter`, whose params are `{path: {"down": (*B, *P, r), "first", "second", "third":
      (*B, r, r), "up"}}`, where `B` are the batch axes of the weight and `P` its projected axes.

    Raises:
      ValueError: On `init`, the rank is odd, or a weight has no vectors, or another number of them.
    """
    projection = as_projection(rank)

    def init(key: jax.Array, params: Any) -> dict[str, dict[str, Any]]:
        own = {}
        for path, spec in specs(projection, params).items():
            _check(path, spec, vectors)
            left, right = vectors[path]
            keys = jax.random.split(fold_path(key, path))
            down = _basis(keys[0], left, first=True)
            up = jnp.swapaxes(_basis(keys[1], right, first=False), -1, -2)
            dtype = jnp.dtype(spec.dtype)
            batch = [spec.shape[axis] for axis in spec.batch]
            small = jnp.broadcast_to(
                epsilon * jnp.eye(spec.rank, dtype=dtype), (*batch, *2 * [spec.rank])
            )
            pair = from_matrices(spec, down.astype(dtype), up.astype(dtype))
            inner = {name: jnp.array(small) for name in ("first", "second", "third")}
            own[path] = {"down": pair[0], **inner, "up": pair[1]}
        return own

    def factors(params: Any, adapter_params: Any) -> dict[str, Factors]:
        known, found = specs(projection, params), {}
        for path, own in adapter_params.items():
            down, up = to_matrices(known[path], own["down"], own["up"])
            pair = (down @ own["first"], own["second"] @ (own["third"] @ up))
            found[path] = Factors(*from_matrices(known[path], *pair))
        return found

    return Adapter(init, factors, projection)


def discrepant(gamma: float) -> optax.GradientTransformation:
    """Multiplies the updates of the bases (`down` and `up`) by `γ`. It goes last in the chain.

    Args:
      gamma: The factor `γ`.

    Returns:
      A transformation without state.
    """

    def update_fn(updates, state, params=None):
        del params

        def scale(path, update):
            return update * gamma if getattr(path[-1], "key", None) in ("down", "up") else update

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def singular_vectors(
    loss: Callable, rank: int | Projection, *, seed: int = 0
) -> Callable[..., dict[str, tuple[jax.Array, jax.Array]]]:
    """Finds the leading singular vectors of the gradient of a loss, without materializing the gradient.

    Two passes of the fused route give sketches of its rows and of its columns. The singular vectors follow
    from the range of the one sketch, and the other in coordinates of that range. They are exact where the
    gradient's rank is at most `rank`; otherwise the error is about as large as the singular values beyond.

    Args:
      loss: The loss function `(params, *args) -> scalar`.
      rank: The rank `r` of `deep_lora`, or its `Projection`. Half as many vectors are found for each side
        of every weight.
      seed: The seed of the sketches.

    Returns:
      A function `(params, *args) -> {path: (left, right)}`. `left` is `(*B, m, r/2)`, for the input side,
      and `right` is `(*B, n, r/2)`, for the output side; their columns are orthonormal, and in the order
      of the singular values.
    """
    projection = as_projection(rank)

    def find(params: Any, *args: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        known = specs(projection, params)
        rows, columns = (
            _sketches(loss, projection, known, side, times, seed, params, args)
            for side, times in (("input", 2), ("output", 1))
        )
        return {
            path: _from_sketches(rows[path], columns[path], spec.rank // 2)
            for path, spec in known.items()
        }

    return find


def _sketches(loss, projection, known, side, times, seed, params, args) -> dict[str, Sketch]:
    def rank(path: str, shape: tuple[int, ...]) -> int:
        spec = known[path]
        other = 1
        for axis, length in enumerate(shape):
            other *= 1 if axis in (*spec.batch, *spec.projected) else length
        most = (spec.size if side == "input" else other) - 1
        return max(1, min(times * (spec.rank // 2 + OVERSAMPLING), most))

    rule = dataclasses.replace(
        projection,
        rank=rank,
        side=side,
        embedding="matrix",  # like any matrix, since both sides are needed of all that has an adapter
        head="matrix",
        select=lambda path, shape: path in known,
        seed=seed,
    )
    _, grads = value_and_grad(loss, rule)(params, *args, cycle=0)
    leaves = jax.tree.leaves(grads, is_leaf=is_sketch)
    return {leaf.spec.path: leaf for leaf in leaves if is_sketch(leaf)}


def _from_sketches(rows: Sketch, columns: Sketch, rank: int) -> tuple[jax.Array, jax.Array]:
    """Finds the singular vectors from `A G` and `G A′ᵀ`.

    They are those of `G ≈ Q X`, where `Q` is the range of the second sketch, and `X` is the least-squares
    solution of `A Q X = A G`.
    """
    of_rows = _matrix(rows)
    range_, _ = jnp.linalg.qr(jnp.swapaxes(_matrix(columns), -1, -2))
    a = products.sample(rows.spec, 0)
    a = a.reshape(*a.shape[: len(rows.spec.batch)], rows.spec.rank, -1)
    within = jnp.linalg.pinv(a @ range_) @ of_rows
    left, _, right = jnp.linalg.svd(within, full_matrices=False)
    return (range_ @ left)[..., :rank], jnp.swapaxes(right, -1, -2)[..., :rank]


def _matrix(sketch: Sketch) -> jax.Array:
    """Reshapes the numbers of a sketch to `(*B, r, n)`."""
    spec = sketch.spec
    source = (*data_batch(spec), spec.projected[0])
    data = jnp.moveaxis(sketch.data, source, range(len(source)))
    return data.reshape(*data.shape[: len(source)], -1)


def _basis(key: jax.Array, vectors: jax.Array, first: bool) -> jax.Array:
    """Returns the vectors and as many random ones, all orthonormal, with the given ones first or last."""
    noise = jax.random.normal(key, vectors.shape, vectors.dtype)
    for _ in range(2):  # in floating point twice is enough
        noise -= vectors @ (jnp.swapaxes(vectors, -1, -2) @ noise)
    others, _ = jnp.linalg.qr(noise)
    return jnp.concatenate([vectors, others] if first else [others, vectors], axis=-1)


def _check(path: str, spec: Spec, vectors: dict[str, tuple[Any, Any]]) -> None:
    if spec.rank % 2:
        raise ValueError(f"rank of {path!r} must be even for deep_lora, found {spec.rank}")
    if path not in vectors:
        raise ValueError(
            f"vectors must have those of {path!r}, found {', '.join(vectors) or 'none'}"
        )
    found = {side.shape[-1] for side in vectors[path]}
    if found != {spec.rank // 2}:
        raise ValueError(
            f"vectors of {path!r} must be {spec.rank // 2}, half of the rank, found "
            f"{' and '.join(map(str, sorted(found)))}"
        )
