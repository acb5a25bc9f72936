"""LoRA: low-rank adaptation.

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
    """LoRA on every weight that the projection names.

    Args:
      rank: of all adapters; or a `Projection`, which says which leaves have one (`min_dim`, `mask`,
        `select`, `weight_dimension_numbers`), on which side `A` is, and the rank of each.
      alpha: the update is scaled by `alpha / r`; by default by 1.
      rank_stabilized: by `alpha / √r` instead.
      init: of `A`: `kaiming` (uniform on ±1/√m) or `gaussian` (standard deviation 1/r).

    Returns:
      An `Adapter`, whose params are `{path: {"down": (*B, *P, r), "up": …}}`.

    Raises:
      ValueError: (on init) an unknown `init`, no weight to adapt.

    Example:
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
    """`(params, {path: {"down", "up"}}) -> {path: Factors}`."""

    def factors(params: Any, adapter_params: Any) -> dict[str, Factors]:
        known = specs(projection, params)
        return {
            path: Factors(pair["down"], pair["up"] * (scale(known[path]) if path in known else 1))
            for path, pair in adapter_params.items()
        }

    return factors


def scaled(alpha: float | None, rank_stabilized: bool = False) -> Callable[[Spec], float]:
    """`α/r`, or `α/√r`, of a leaf; 1 without an `α`."""

    def scale(spec: Spec) -> float:
        if alpha is None:
            return 1.0
        return alpha / (spec.rank**0.5 if rank_stabilized else spec.rank)

    return scale
