"""LoRA-Pro: LoRA with gradients of its factors that are adjusted to approximate the full gradient.

A step along `(g_A, g_B)` moves the weight along the *equivalent gradient* `s B g_A + s g_B A`. With the
adjusted pair, this is as near to the full gradient `G` as any pair can make it; of all such pairs the
adjusted one is the nearest to LoRA's own. It is computed from LoRA's gradients alone, without `G`.

| paper (`W`: out × in) | here (weight: in × out) |
|---|---|
| `A`, `B` | `D = Aᵀ` is `down`, `U = Bᵀ` is `up` |
| `g_A = (1/s²)(BᵀB)⁻¹ g_A^lora + X A` | `(1/s²) g_D (UUᵀ)⁺ + D Y`, `Y = Xᵀ` |
| `g_B = (1/s²)[I − B(BᵀB)⁻¹Bᵀ] g_B^lora (AAᵀ)⁻¹ − B X` | `(1/s²)(DᵀD)⁺ g_U [I − Uᵀ(UUᵀ)⁺U] − Y U` |
| `BᵀB X + X AAᵀ = −(1/s²)(BᵀB)⁻¹ g_A^lora Aᵀ` | `Y UUᵀ + DᵀD Y = −(1/s²) Dᵀ g_D (UUᵀ)⁺` |

Both Gram matrices are symmetric, so the Sylvester equation is solved by means of their eigenvectors.
`⁺` is the pseudo-inverse: with `B = 0`, where LoRA starts, the paper's inverses do not exist, but the
pair with pseudo-inverses is still the best one.

Source: Wang, Liang, He, Wang, Tan, "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv
2407.18242, Theorems 2.1 and 2.3, Algorithms 1 and 2.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax.adapters.low_rank import Adapter, from_matrices, specs, to_matrices
from flora_jax.chain.sketch import Spec


def lora_pro(adapter: Adapter, params: Any) -> optax.GradientTransformation:
    """Adjusts the gradients of LoRA's factors. Any optimizer can follow it.

    Args:
      adapter: The `Adapter` that `lora` returned.
      params: The params of the model, or their shapes.

    Returns:
      A transformation of the gradients of `{path: {"down", "up"}}`, without state. Its `update` needs
      the adapter's params.

    Raises:
      ValueError: On `update`, no params were given.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flora_jax.adapters import lora, lora_pro
      >>> params = {"kernel": jnp.ones((256, 128))}
      >>> adapter = lora(4)
      >>> tx = optax.chain(lora_pro(adapter, params), optax.sgd(0.1))
      >>> own = adapter.init(jax.random.key(0), params)
      >>> updates, state = tx.update(own, tx.init(own), own)
    """
    known = specs(adapter.projection, params)

    def update_fn(updates, state, params=None):
        own = _expected(params)
        adjusted = {
            path: _adjusted(known[path], adapter.scale(known[path]), own[path], gradient)
            for path, gradient in updates.items()
        }
        return adjusted, state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def lora_pro_inside(
    inner: optax.GradientTransformation, adapter: Adapter, params: Any
) -> optax.GradientTransformation:
    """Runs an optimizer on the equivalent gradient in place of the factors' gradients.

    This is the paper's Algorithm 2. The gradients are adjusted and combined to the equivalent gradient,
    `inner` (such as `optax.scale_by_adam`) turns that into a step, and the step is turned into one of the
    factors, which is adjusted again. The state of `inner` is as large as for the weights themselves.

    Args:
      inner: The optimizer. It receives `{path: array of the weight's matrices, (*B, m, n)}`.
      adapter: The `Adapter` that `lora` returned.
      params: The params of the model, or their shapes.

    Returns:
      A transformation of the gradients of `{path: {"down", "up"}}`. Its `update` needs the adapter's
      params.

    Raises:
      ValueError: On `update`, no params were given.
    """
    known = specs(adapter.projection, params)

    def init_fn(params):
        own: Any = params

        def zeros(spec: Spec):
            batch = [spec.shape[axis] for axis in spec.batch]
            down, up = to_matrices(spec, own[spec.path]["down"], own[spec.path]["up"])
            return jnp.zeros((*batch, down.shape[-2], up.shape[-1]), down.dtype)

        return inner.init({path: zeros(known[path]) for path in own})

    def update_fn(updates, state, params=None):
        own = _expected(params)
        equivalent = {}
        for path, gradient in updates.items():
            spec, scale = known[path], adapter.scale(known[path])
            down, up = to_matrices(spec, **own[path])
            of_down, of_up = to_matrices(spec, **_adjusted(spec, scale, own[path], gradient))
            equivalent[path] = scale * (of_down @ up + down @ of_up)
        steps: Any
        steps, state = inner.update(equivalent, state)
        result = {}
        for path, step in steps.items():
            spec, scale = known[path], adapter.scale(known[path])
            down, up = to_matrices(spec, **own[path])
            pair = (scale * step @ _transposed(up), scale * _transposed(down) @ step)
            pair = dict(zip(("down", "up"), from_matrices(spec, *pair), strict=True))
            result[path] = _adjusted(spec, scale, own[path], pair)
        return result, state

    return optax.GradientTransformation(init_fn, update_fn)


def _expected(params: Any) -> Any:
    if params is None:
        raise ValueError("lora_pro's update needs the adapter's params, found none")
    return params


def _adjusted(spec: Spec, scale: float, own: Any, gradient: Any) -> dict[str, jax.Array]:
    down, up = to_matrices(spec, own["down"], own["up"])
    of_down, of_up = to_matrices(spec, gradient["down"], gradient["up"])
    pair = adjust(scale, *(x.astype(_wide(x)) for x in (down, up, of_down, of_up)))
    pair = (x.astype(y.dtype) for x, y in zip(pair, (of_down, of_up), strict=True))
    return dict(zip(("down", "up"), from_matrices(spec, *pair), strict=True))


def adjust(
    scale: float, down: jax.Array, up: jax.Array, of_down: jax.Array, of_up: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the adjusted gradients of the factors.

    Args:
      scale: The scale `s` of the product of the factors.
      down: The down factor, of shape `(*B, m, r)`.
      up: The up factor, of shape `(*B, r, n)`.
      of_down: The gradient of the down factor.
      of_up: The gradient of the up factor.
    """
    of_d, vectors_d = jnp.linalg.eigh(_transposed(down) @ down)
    of_u, vectors_u = jnp.linalg.eigh(up @ _transposed(up))
    inverse_d = (vectors_d * _inverse(of_d)[..., None, :]) @ _transposed(vectors_d)
    inverse_u = (vectors_u * _inverse(of_u)[..., None, :]) @ _transposed(vectors_u)
    first = of_down @ inverse_u / scale**2
    second = inverse_d @ of_up / scale**2
    second = second - second @ _transposed(up) @ inverse_u @ up
    right = _transposed(vectors_d) @ (-_transposed(down) @ first) @ vectors_u
    sums = of_d[..., :, None] + of_u[..., None, :]
    ratio = jnp.where(sums > 0, right / jnp.where(sums > 0, sums, 1), 0)
    y = vectors_d @ ratio @ _transposed(vectors_u)
    return first + down @ y, second - y @ up


def _inverse(values: jax.Array) -> jax.Array:
    """Returns the inverses of eigenvalues that are above the rounding error, and 0 for the others."""
    least = values.shape[-1] * jnp.finfo(values.dtype).eps * values.max(axis=-1, keepdims=True)
    known = values > least
    return jnp.where(known, 1 / jnp.where(known, values, 1), 0)


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)


def _wide(array: jax.Array) -> Any:
    return jnp.promote_types(array.dtype, jnp.float32)
