"""SoRA: LoRA with a gate on each rank, which a proximal step may drive to zero, and the rank is pruned.

| paper | here |
|---|---|
| `h = W₀ x + W_u (g ⊙ (W_d x))`, equation 5 | `y = x W + s ((x down) · gate) up` |
| `g ← T_{ηλ}(g − η ∇_g L)`, `T_ξ(x) = sign(x) max(\\|x\\| − ξ, 0)`, equations 7 and 8 | `proximal`, after the optimizer |
| schedule of the sparsity | `sparsity`, an optax schedule |

The authors' code leaves the learning rate out of the threshold by default; `learning_rate=1.0` does the
same here.

Source: Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv 2311.11696,
Section 3.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from flora_jax.adapters.lora import Init, pair_factors, scaled
from flora_jax.adapters.low_rank import (
    Adapter,
    Factors,
    as_projection,
    from_matrices,
    specs,
    start_pair,
    to_matrices,
)
from flora_jax.chain.keys import fold_path
from flora_jax.chain.projection import Projection


class ProximalState(NamedTuple):
    """The state of `proximal`.

    Attributes:
      steps: The number of steps so far, an int32 scalar.
    """

    steps: jax.Array


def sora(rank: int | Projection, *, alpha: float | None = None, init: Init = "kaiming") -> Adapter:
    """Returns LoRA with a gate on each rank.

    Args:
      rank: The largest rank `r`, or a `Projection`, as in `lora`.
      alpha: The number `α`, with which the update is scaled by `α / r`. None scales it by 1.
      init: The distribution of `down` at the start, as in `lora`. Gates start as standard normal numbers.

    Returns:
      An `Adapter`, whose params are `{path: {"down", "gate": (*B, r), "up"}}`, where `B` are the batch
      axes of the weight.
    """
    projection, scale = as_projection(rank), scaled(alpha)
    of_pairs = pair_factors(projection, scale)

    def init_fn(key: Any, params: Any) -> dict[str, dict[str, Any]]:
        own = {}
        for path, spec in specs(projection, params).items():
            shape = (*(spec.shape[axis] for axis in spec.batch), spec.rank)
            of_gate = jax.random.fold_in(fold_path(key, path), 1)
            gate = jax.random.normal(of_gate, shape, jnp.dtype(spec.dtype))
            own[path] = {**start_pair(key, spec, init), "gate": gate}
        return own

    def factors(params: Any, adapter_params: Any) -> dict[str, Factors]:
        pairs = {path: _gated(own) for path, own in adapter_params.items()}
        return of_pairs(params, pairs)

    return Adapter(init_fn, factors, projection, scale)


def proximal(
    sparsity: optax.ScalarOrSchedule, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Applies the soft threshold `ηλ` to the gates. It goes last in the chain, after the optimizer.

    Args:
      sparsity: The number `λ`, or a schedule of the step.
      learning_rate: The learning rate `η` of the optimizer, a number or a schedule of the step.

    Returns:
      A transformation of updates of `{path: {…, "gate"}}`. Its `update` needs the adapter's params. What
      is not a gate passes through unchanged.

    Raises:
      ValueError: `sparsity` is negative. On `update`, no params were given.
    """
    if not callable(sparsity) and not isinstance(sparsity, jax.Array) and sparsity < 0:
        raise ValueError(f"sparsity must be at least 0, found {sparsity!r}")

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("proximal's update needs the adapter's params, found none")
        threshold = _at(sparsity, state.steps) * _at(learning_rate, state.steps)

        def step(path, update, value):
            if getattr(path[-1], "key", None) != "gate":
                return update
            moved = value + update
            return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - threshold, 0) - value

        visit = jax.tree_util.tree_map_with_path
        return visit(step, updates, params), ProximalState(state.steps + 1)

    return optax.GradientTransformation(
        lambda params: ProximalState(jnp.zeros([], jnp.int32)), update_fn
    )


def prune(adapter: Adapter, params: Any, adapter_params: Any) -> tuple[Adapter, Any]:
    """Removes the ranks whose gate is zero, and multiplies the other gates into `down`.

    The outputs stay the same. Stacked layers all keep as many ranks as the one with the most. A leaf with
    no rank left has no adapter any more.

    Args:
      adapter: The `Adapter` that `sora` returned.
      params: The params of the model, or their shapes.
      adapter_params: The params of the adapter after training, as concrete arrays.

    Returns:
      A LoRA `Adapter`, and its params.
    """
    known, pruned, ranks = specs(adapter.projection, params), {}, {}
    for path, own in adapter_params.items():
        spec, gate = known[path], np.asarray(own["gate"])
        rank = int((gate != 0).sum(axis=-1).max())
        if not rank:
            continue
        order = np.argsort(gate == 0, axis=-1, kind="stable")[..., :rank]
        down, up = to_matrices(spec, **_gated(own))
        down = jnp.take_along_axis(down, order[..., None, :], axis=-1)
        up = jnp.take_along_axis(up, order[..., :, None], axis=-2)
        ranks[path] = rank
        smaller = dataclasses.replace(spec, rank=rank)
        pair = from_matrices(smaller, down, up)
        pruned[path] = dict(zip(("down", "up"), pair, strict=True))

    def scale(spec: Any) -> float:
        return adapter.scale(known[spec.path])  # α over the rank before pruning

    projection = dataclasses.replace(
        adapter.projection, rank=lambda path, shape: ranks.get(path, 1)
    )

    def init_fn(key: Any, params: Any) -> dict[str, dict[str, Any]]:
        found = specs(projection, params)
        return {path: start_pair(key, found[path]) for path in pruned}

    return Adapter(init_fn, pair_factors(projection, scale), projection, scale), pruned


def _gated(own: dict[str, Any]) -> dict[str, Any]:
    """Returns the pair of factors with the gates multiplied into `down`."""
    down, gate = own["down"], own["gate"]
    between = down.ndim - gate.ndim  # the projected axes
    gate = gate.reshape(*gate.shape[:-1], *[1] * between, gate.shape[-1])
    return {"down": down * gate, "up": own["up"]}


def _at(value: optax.ScalarOrSchedule, count: jax.Array) -> ArrayLike:
    return value(count) if callable(value) else value
