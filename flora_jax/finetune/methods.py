"""Methods of fine-tuning: what each trains, its state and its compiled step.

In the shape descriptions `B` is a micro-batch, `T` a sequence.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import flora_jax
from flora_jax import adapters
from flora_jax.adapters import Adapter
from flora_jax.chain.projection import Projection
from flora_jax.finetune.muon import has_two_sides, matrices, muon, of_matrices
from flora_jax.finetune.settings import ADAPTERS, EXACT, OTHERS, Settings

MIN_DIM = 32
"""Matrices with a shorter side are not compressed and have no adapter."""


class Method(NamedTuple):
    """What a run needs of a method.

    Attributes:
      init: The function `(params, batch) -> (frozen, state)`: params that stay as they are (None where all are
        trained), and a dict of all that changes.
      step: The compiled function `(frozen, state, batch) -> (state, loss)`; it may overwrite the state.
      lower: The function that lowers the step for shapes of its arguments.
      loss: The function `(frozen, state, batch) -> scalar`, the loss as it is now; an adapter is not merged for it.
      params: The function `(frozen, state) -> params`, the whole model as it is now; it may overwrite both.
      tx: The optax transformation of what is trained.
      adapter: The adapter, where there is one, or None.
    """

    init: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
    step: Callable[[Any, Any, Any], tuple[dict[str, Any], jax.Array]]
    lower: Callable[[Any, Any, Any], Any]
    loss: Callable[[Any, Any, Any], jax.Array]
    params: Callable[[Any, Any], Any]
    tx: optax.GradientTransformation
    adapter: Adapter | None = None


def build(
    settings: Settings, loss: Callable[..., jax.Array], model: Any, outline: Any, steps: int
) -> Method:
    """Returns the method that the settings ask for.

    Args:
      settings: The settings.
      loss: The function `(params, batch) -> scalar`.
      model: The Flax module.
      outline: The params as `jax.ShapeDtypeStruct`s.
      steps: The number of optimizer steps, for the schedule.

    Raises:
      ValueError: The model's weights are not of the form that the method needs.
    """
    if settings.method in ADAPTERS:
        return _adapted(settings, loss, model, outline, steps)
    tx, projection = _transformation(settings, outline, steps)
    step: Any = flora_jax.make_train_step(
        loss,
        tx,
        projection,
        update="backward" if settings.method in EXACT else "after",
        rounding=settings.rounding if _narrow(outline) and _counts(tx, outline) else "nearest",
    )

    def init(params: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        return None, {"params": params, "opt_state": step.init(params, batch)}

    def run(_: Any, state: Any, batch: Any) -> tuple[dict[str, Any], jax.Array]:
        params, opt_state, value = step(state["params"], state["opt_state"], batch)
        return {"params": params, "opt_state": opt_state}, value

    def lower(_: Any, state: Any, batch: Any) -> Any:
        return step.lower(state["params"], state["opt_state"], batch)

    def now(_: Any, state: Any, batch: Any) -> jax.Array:
        return loss(state["params"], batch)

    return Method(init, run, lower, now, lambda _, state: state["params"], tx)


def schedule(settings: Settings, peak: float, steps: int) -> optax.Schedule:
    """Returns the learning rate by optimizer step: a linear rise, then the fall that the settings name."""
    rise = min(round(settings.warmup * steps), steps - 1)
    if settings.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif settings.schedule == "linear":
        after = optax.linear_schedule(peak, 0.0, max(1, steps - rise))
    else:
        after = optax.cosine_decay_schedule(peak, max(1, steps - rise))
    if not rise:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(peak / rise, peak, rise - 1 or 1), after], [rise]
    )


def _transformation(
    settings: Settings, outline: Any, steps: int
) -> tuple[optax.GradientTransformation, Projection | None]:
    """Returns the transformation of a method that trains the model's own params, and Flora's projection or None."""
    rate = schedule(settings, settings.peak, steps)
    others = schedule(settings, settings.other_rate or OTHERS, steps)
    share, count = settings.weight_decay, settings.accumulated
    decay = {
        "weight_decay_rate": (lambda step: share * rate(step)) if share else None,
        "weight_decay_mask": matrices(outline, MIN_DIM),
    }
    name = settings.method
    if settings.sketched:
        projection = Projection(
            settings.ranked or 1,
            distribution="srtt",
            side="input",
            resample_every=count * (256 if name == "flora" else 1),
            min_dim=MIN_DIM,
            select=has_two_sides,
            seed=settings.seed,
        )
        if name == "flora":
            tx = flora_jax.flora(
                rate,
                projection=projection,
                accumulation_steps=count,
                preset="advised",
                adafactor_learning_rate=others,
                state_dtype=settings.state_dtype,
                **decay,
            )
            return tx, projection
        inner = [optax.adafactor(rate), flora_jax.shrink(projection)]
        if share:
            mask = decay["weight_decay_mask"]
            inner.append(optax.add_decayed_weights(lambda step: -share * rate(step), mask))
        tx = flora_jax.flora(
            None,
            projection=projection,
            accumulation_steps=count,
            optimizer=optax.chain(*inner),
            state_dtype=settings.state_dtype,
        )
        return tx, projection
    if name == "exact":
        return optax.adafactor(rate, **decay), None
    if name == "exact-muon":
        tx = flora_jax.sketched_muon(
            rate,
            weight_decay=share or None,
            adafactor_learning_rate=others,
            min_dim=MIN_DIM,
            seed=settings.seed,
        )
        return tx, None
    if name == "muon":
        tx: Any = muon(rate, optax.adafactor(others), min_dim=MIN_DIM, weight_decay=share or None)
    elif name == "adam":
        tx = optax.adamw(
            rate, b2=0.99, weight_decay=share, mask=decay["weight_decay_mask"], mu_dtype=jnp.float32
        )
    else:
        tx = optax.adafactor(rate, **decay)
    return _accumulated(tx, count), None


def _accumulated(tx: Any, count: int) -> Any:
    return tx if count == 1 else optax.MultiSteps(tx, count).gradient_transformation()


def _narrow(outline: Any) -> bool:
    return any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(outline))


def _counts(tx: Any, outline: Any) -> bool:
    """Returns whether the state has a count, from which stochastic rounding takes its random numbers."""
    state = jax.eval_shape(tx.init, outline)
    return any(x.shape == () and x.dtype == jnp.int32 for x in jax.tree.leaves(state))


def _adapted(settings: Settings, loss: Callable, model: Any, outline: Any, steps: int) -> Method:
    """Returns a method that trains an adapter."""
    rate = schedule(settings, settings.peak, steps)
    key = jax.random.key(settings.seed)
    if settings.method == "xgb-lora":
        return _boosted(settings, loss, model.shape.layers, rate, steps)
    make, around = _adapter(settings, loss, model, rate)
    adapter = make(None)
    adam = optax.adamw(rate, weight_decay=settings.weight_decay)
    before, after = around(adapter, outline)
    tx = _accumulated(optax.chain(*before, adam, *after), settings.accumulated)
    noise = adapters.growing(0.05, steps * settings.accumulated)

    def init(params: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        started = make((params, batch)).init(key, params)
        own = jax.tree.map(lambda x: x.astype(jnp.float32), started)
        return params, {"own": own, "opt_state": tx.init(own), "count": jnp.int32(0)}

    def narrow(own: Any, params: Any) -> Any:
        # the factors are kept in float32 and used in the dtype of the weights
        return jax.tree.map(lambda x: x.astype(jax.tree.leaves(params)[0].dtype), own)

    def value_of(own: Any, params: Any, count: jax.Array, batch: Any) -> jax.Array:
        used = adapter
        if settings.method == "flat-lora":
            used = adapters.flat_lora(adapter, jax.random.fold_in(key, count), noise(count))
        return used.apply(loss)(params, narrow(own, params), batch)

    def now(params: Any, state: Any, batch: Any) -> jax.Array:
        return adapter.apply(loss)(params, narrow(state["own"], params), batch)

    @partial(jax.jit, donate_argnums=1)
    def step(params: Any, state: Any, batch: Any) -> tuple[dict[str, Any], jax.Array]:
        value, grads = jax.value_and_grad(value_of)(state["own"], params, state["count"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"], state["own"])
        own = optax.apply_updates(state["own"], updates)
        return {"own": own, "opt_state": opt_state, "count": state["count"] + 1}, value

    merge = jax.jit(lambda params, own: adapter.merge(params, own), donate_argnums=0)
    return Method(
        init, step, step.lower, now, lambda frozen, state: merge(frozen, state["own"]), tx, adapter
    )


def adapter_rule(rank: int) -> Projection:
    """Returns the projection that says which weights have an adapter: all matrices inside the layers."""
    return of_matrices(rank, MIN_DIM)


def _adapter(
    settings: Settings, loss: Callable, model: Any, rate: Any
) -> tuple[Callable, Callable]:
    """Returns a function that makes the adapter, and one that gives what stands before and after Adam.

    The first takes params and a batch, or None where its starting values are not needed.
    """
    name, rank = settings.method, settings.ranked or 1
    rule = adapter_rule(rank)

    def nothing(adapter: Adapter, outline: Any) -> tuple[list[Any], list[Any]]:
        del adapter, outline
        return [], []

    if name == "lora-pro":
        around = lambda adapter, outline: ([adapters.lora_pro(adapter, outline)], [])  # noqa: E731
        return lambda _: adapters.lora(rule, alpha=2 * rank), around
    if name == "sora":
        after = adapters.proximal(1e-2, rate)
        return lambda _: adapters.sora(rule, alpha=2 * rank), lambda *_: ([], [after])
    if name == "deep-lora":
        find = adapters.singular_vectors(loss, rule)

        def make(given: Any) -> Adapter:
            return adapters.deep_lora(rule, find(*given) if given else {}, epsilon=0.1)

        return make, lambda *_: ([], [adapters.discrepant(0.1)])
    if name == "lorta":
        return lambda _: adapters.lorta(rule, model.shape.heads, alpha=2 * rank), nothing
    stabilized = name == "rslora"
    alpha = 8 if stabilized else 2 * rank  # both are scaled by 2 at rank 16
    one = adapters.lora(rule, alpha=alpha, rank_stabilized=stabilized)
    return lambda _: adapters.run_lora(one) if name == "run-lora" else one, nothing


def _boosted(settings: Settings, loss: Callable, layers: int, rate: Any, steps: int) -> Method:
    """Returns XGBLoRA: an adapter of rank 1 on two thirds of the layers, merged and begun anew ten times."""
    rule = adapter_rule(settings.ranked or 1)
    adapter, each = adapters.xgb_lora(max(1, 2 * layers // 3), rule), max(1, steps // 10)
    starting = adapters.boosting(loss, adapter, optax.scale_by_adam(), each)
    key = jax.random.key(settings.seed)

    def init(params: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        del batch
        state = starting.init(key, params)
        return None, {**_without_key(state), "count": jnp.int32(0)}

    @partial(jax.jit, donate_argnums=1)
    def step(_: Any, state: Any, batch: Any) -> tuple[dict[str, Any], jax.Array]:
        scaled = optax.chain(optax.scale_by_adam(), optax.scale(-rate(state["count"])))
        run = adapters.boosting(loss, adapter, scaled, each)
        opened = _with_key(state, key)
        opened = opened._replace(opt_state=(opened.opt_state, optax.ScaleState()))
        opened, value = run.step(opened, batch)
        closed = opened._replace(opt_state=opened.opt_state[0])
        return {**_without_key(closed), "count": state["count"] + 1}, value

    def now(_: Any, state: Any, batch: Any) -> jax.Array:
        return adapter.apply(loss)(state["params"], state["adapter_params"], batch)

    finish = jax.jit(lambda state: starting.finish(_with_key(state, key)), donate_argnums=0)
    return Method(
        init, step, step.lower, now, lambda _, state: finish(state), optax.scale_by_adam()
    )


def _without_key(state: Any) -> dict[str, Any]:
    """Returns the state as a dict without the key, which no checkpoint keeps."""
    return {name: value for name, value in state._asdict().items() if name != "key"}


def _with_key(state: dict[str, Any], key: jax.Array) -> adapters.BoostingState:
    return adapters.BoostingState(
        **{name: value for name, value in state.items() if name != "count"}, key=key
    )
