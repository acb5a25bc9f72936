"""LoRA: low-rank adaptation, which trains two factors beside each frozen weight.

| paper | here |
|---|---|
| `h = W₀ x + (α/r) B A x`, equation 3 | `y = x W + (x down) up · scale` |
| `A`, random at the start | `down`, transposed |
| `B`, zero at the start | `up`, transposed |

Source: Hu et al., arXiv 2106.09685, Section 4.1. The scale `α/√r`: Kalajdzievski, "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.
"""

from collections.abc import Callable
from typing import Any, Literal

from flora_jax.adapters.low_rank import Adapter, Factors, as_projection, specs, start_pair
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import Spec

Init = Literal["kaiming", "gaussian"]


def lora(
    rank: int | Projection,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    init: Init = "kaiming",
) -> Adapter:
    """Returns LoRA on every weight that the projection selects.

    Args:
      rank: The rank `r` of all adapters; or a `Projection`, which says which leaves have an adapter
        (`min_dim`, `mask`, `select`, `weight_dimension_numbers`), on which side the factor `A` is, and
        the rank of each.
      alpha: The number `α`, with which the product of the factors is scaled by `α / r`. None scales it by
        1.
      rank_stabilized: Whether to scale by `α / √r` instead.
      init: The distribution of `A` at the start: `kaiming` (uniform on ±1/√m) or `gaussian` (normal with
        standard deviation 1/r).

    Returns:
      An `Adapter`, whose params are `{path: {"down": (*B, *P, r), "up": …}}`, where `B` are the batch
      axes of the weight and `P` its projected axes, and `up` has the weight's shape with `r` in the
      place of `P`.

    Raises:
      ValueError: On `init`, the name of the distribution is unknown, or there is no weight to adapt.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flora_jax.adapters import lora
      >>> adapter = lora(4, alpha=8)
      >>> params = {"kernel": jnp.ones((256, 128))}
      >>> loss = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> own = adapter.init(jax.random.key(0), params)
      >>> grads = jax.grad(adapter.apply(loss), argnums=1)(params, own, jnp.ones((2, 256)))
      >>> grads["kernel"]["up"].shape
      (4, 128)
      >>> params = adapter.merge(params, own)
    """
    projection = as_projection(rank)

    scale = scaled(alpha, rank_stabilized)

    def init_fn(key: Any, params: Any) -> dict[str, dict[str, Any]]:
        found = specs(projection, params).values()
        return {spec.path: start_pair(key, spec, init) for spec in found}

    return Adapter(init_fn, pair_factors(projection, scale), projection, scale)


def pair_factors(projection: Projection, scale: Callable[[Spec], float]) -> Callable:
    """Returns a function `(params, {path: {"down", "up"}}) -> {path: Factors}` that applies the scale."""

    def factors(params: Any, adapter_params: Any) -> dict[str, Factors]:
        known = specs(projection, params)
        return {
            path: Factors(pair["down"], pair["up"] * (scale(known[path]) if path in known else 1))
            for path, pair in adapter_params.items()
        }

    return factors


def scaled(alpha: float | None, rank_stabilized: bool = False) -> Callable[[Spec], float]:
    """Returns a function from a leaf's spec to its scale: `α/r`, or `α/√r`, or 1 without an `α`."""

    def scale(spec: Spec) -> float:
        if alpha is None:
            return 1.0
        return alpha / (spec.rank**0.5 if rank_stabilized else spec.rank)

    return scale
