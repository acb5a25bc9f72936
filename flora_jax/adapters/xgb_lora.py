"""XGBLoRA: boosting with rank-1 adapters, each of which is trained for a few steps and merged before the next.

| paper | here |
|---|---|
| boosting round, `κ` training steps | `steps` |
| a weak learner, rank 1, on `L_s` randomly sampled layers | `xgb_lora(layers=…)`, whose `init` samples them |
| `W ← W + α B A`, then a new `A`, `B` | `Boosting.step` at the end of a round |

A layer that is not sampled has both factors at zero. Then its gradients are zero, any optimizer leaves
it there, and all rounds are one compiled program.

Source: Zhang et al., "Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning
of LLMs", arXiv 2410.19694, Algorithm 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax.adapters.lora import Init, lora
from flora_jax.adapters.low_rank import Adapter, as_projection, layer_name, layer_names, specs
from flora_jax.chain.projection import Projection


class BoostingState(NamedTuple):
    """The state of a run of boosting.

    Attributes:
      params: The params of the model, with all rounds but the present one merged.
      adapter_params: The params of the present round's adapter.
      opt_state: The optimizer's state in the present round.
      round: The number of rounds that are merged, an int32 scalar.
      steps: The number of steps taken in the present round, an int32 scalar.
      key: The typed key of the run.
    """

    params: Any
    adapter_params: Any
    opt_state: Any
    round: jax.Array
    steps: jax.Array
    key: jax.Array


class Boosting(NamedTuple):
    """The three functions that `boosting` returns.

    Attributes:
      init: The function `(key, params) -> BoostingState`.
      step: The function `(state, *batch) -> (state, loss)`, which should be compiled. Its state may be
        donated (`donate_argnums=0`).
      finish: The function `(state) -> params`, which merges the last adapter.
    """

    init: Callable[[jax.Array, Any], BoostingState]
    step: Callable[..., tuple[BoostingState, jax.Array]]
    finish: Callable[[BoostingState], Any]


def xgb_lora(
    layers: int | None = None,
    rank: int | Projection = 1,
    *,
    alpha: float | None = None,
    init: Init = "gaussian",
    layer_of: Callable[[str], str] | None = None,
) -> Adapter:
    """Returns rank-1 LoRA on some of the layers, which are sampled with the key of `init`.

    Args:
      layers: The number of layers, or None for all.
      rank: The rank `r` of the adapters, or a `Projection`, as in `lora`.
      alpha: The number `α`, with which the update is scaled by `α / r`. None scales it by 1.
      init: The distribution of `down` at the start, as in `lora`.
      layer_of: A function from a leaf's path to the name of its layer. The default is the path up to the
        first name that ends in a number, or else the first name. A stacked leaf has a layer for each
        index.

    Returns:
      An `Adapter`, whose params are those of `lora`.

    Raises:
      ValueError: On `init`, `layers` is below 1, or above the number of layers that there are.
    """
    base = lora(as_projection(rank), alpha=alpha, init=init)
    name_of = layer_of or layer_name

    def init_fn(key: jax.Array, params: Any) -> Any:
        own = base.init(key, params)
        if layers is None:
            return own
        known = specs(base.projection, params)
        names = sorted({name for spec in known.values() for name in layer_names(spec, name_of)})
        if not 1 <= layers <= len(names):
            raise ValueError(f"layers must be from 1 to the {len(names)} there are, found {layers}")
        order = jax.random.permutation(jax.random.fold_in(key, 1), len(names))
        sampled = jnp.zeros(len(names), bool).at[order[:layers]].set(True)
        for path, spec in known.items():
            index = jnp.array([names.index(name) for name in layer_names(spec, name_of)])
            down = own[path]["down"]
            if spec.batch:
                chosen = sampled[index].reshape(-1, *[1] * (down.ndim - 1))
            else:
                chosen = sampled[index[0]]
            own[path] = {**own[path], "down": jnp.where(chosen, down, 0)}
        return own

    return dataclasses.replace(base, init=init_fn)


def boosting(
    loss: Callable[..., jax.Array],
    adapter: Adapter,
    tx: optax.GradientTransformation,
    steps: int,
) -> Boosting:
    """Trains one adapter after another, and merges each into the params.

    The optimizer starts anew in each round.

    Args:
      loss: The loss function `(params, *batch) -> scalar`.
      adapter: The `Adapter` that `xgb_lora`, or another method, returned.
      tx: The optimizer of the adapter's params.
      steps: The number `κ` of steps in a round.

    Returns:
      A `Boosting`, three functions that start, continue and finish a run.

    Raises:
      ValueError: `steps` is below 1.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flora_jax.adapters import boosting, xgb_lora
      >>> loss = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> run = boosting(loss, xgb_lora(), optax.adam(1e-3), steps=8)
      >>> state = run.init(jax.random.key(0), {"kernel": jnp.ones((256, 128))})
      >>> state, value = jax.jit(run.step)(state, jnp.ones((2, 256)))
      >>> params = run.finish(state)
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    gradient = jax.value_and_grad(adapter.apply(loss), argnums=1)

    def start(key: jax.Array, params: Any, round_: Any) -> tuple[Any, Any]:
        own = adapter.init(jax.random.fold_in(key, round_), params)
        return own, tx.init(own)

    def init(key: jax.Array, params: Any) -> BoostingState:
        first, zero = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        own, opt_state = start(key, params, first)
        return BoostingState(params, own, opt_state, first, zero, key)

    def step(state: BoostingState, *batch: Any) -> tuple[BoostingState, jax.Array]:
        value, grads = gradient(state.params, state.adapter_params, *batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.adapter_params)
        own = optax.apply_updates(state.adapter_params, updates)
        state = state._replace(adapter_params=own, opt_state=opt_state, steps=state.steps + 1)

        def next_round(state: BoostingState) -> BoostingState:
            params, round_ = adapter.merge(state.params, state.adapter_params), state.round + 1
            own, opt_state = start(state.key, params, round_)
            return BoostingState(params, own, opt_state, round_, jnp.int32(0), state.key)

        return jax.lax.cond(state.steps == steps, next_round, lambda state: state, state), value

    def finish(state: BoostingState) -> Any:
        return adapter.merge(state.params, state.adapter_params)

    return Boosting(init, step, finish)
