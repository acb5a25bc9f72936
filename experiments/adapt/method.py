"""A method of adaptation: what it trains, its step, and the largest rank that fits a budget."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import flora_jax
from experiments import optimizers
from experiments.adapt.config import FULL, Config, Method
from experiments.adapt.task import Task
from flora_jax import Projection
from flora_jax.adapters import (
    Adapter,
    boosting,
    deep_lora,
    discrepant,
    flat_lora,
    growing,
    lora,
    lora_pro,
    lorta,
    proximal,
    run_lora,
    singular_vectors,
    sora,
    xgb_lora,
)
from flora_jax.chain.plan import tree_bytes


class Run(NamedTuple):
    """A method on a task, at one rank and one learning rate.

    Attributes:
      state: What the method trains, with the optimizer's state.
      step: `(params, state, i, batch) -> (state, loss)`.
      final: `(params, state) -> params`: the adapted model.
      gradient: `(params, batch)` to the gradient that a step computes; its memory is measured.
      trained: How many numbers are trained.
      extra: Bytes of the optimizer's state, and of what is trained where that is not the model itself.
    """

    state: Any
    step: Callable[..., tuple[Any, jax.Array]]
    final: Callable[[Any, Any], Any]
    gradient: Callable[[Any, jax.Array], Any]
    trained: int
    extra: int


def build(config: Config, task: Task, method: Method, rank: int, rate: float) -> Run:
    """Builds a method at this rank and rate."""
    params, loss = task.params, task.loss
    schedule = optimizers.cosine(rate, config.steps)
    key = jax.random.key(config.seed + 1)
    if method in (*FULL, "flora"):
        return of_params(method, rank, schedule, params, loss)
    rule = Projection(rank, side="input", embedding="whole", min_dim=64)
    tx = optax.adam(schedule)
    if method == "xgb-lora":
        return _boosted(config, task, rank, schedule, key)
    adapter = lora(rule, alpha=rank)
    perturb: Callable[[Adapter, Any], Adapter] = lambda adapter, i: adapter  # noqa: E731
    if method == "rslora":
        adapter = lora(rule, alpha=1.0, rank_stabilized=True)
    elif method == "lora-pro":
        tx = optax.chain(lora_pro(adapter, params), optax.adam(schedule))
    elif method == "flat-lora":
        strength = growing(0.05, config.steps)
        perturb = lambda adapter, i: flat_lora(adapter, jax.random.fold_in(key, i), strength(i))  # noqa: E731
    elif method == "sora":
        adapter = sora(rule)
        tx = optax.chain(optax.adam(schedule), proximal(1e-2, schedule))
    elif method == "deep-lora":
        vectors = jax.jit(singular_vectors(loss, rule))(params, task.batch(0))
        adapter = deep_lora(rule, vectors, epsilon=0.1)
        tx = optax.chain(optax.adam(schedule), discrepant(0.1))
    elif method == "lorta":
        adapter = lorta(rule, task.heads, layer_of=task.layer_of)
    elif method == "run-lora":
        adapter = run_lora(adapter)
    own = adapter.init(key, params)
    state = (own, tx.init(own))

    def gradient(params, own, i, batch):
        run = perturb(adapter, i).apply(loss)
        return jax.value_and_grad(run, argnums=1)(params, own, batch)

    def step(params, state, i, batch):
        own, opt_state = state
        value, grads = gradient(params, own, i, batch)
        updates, opt_state = tx.update(grads, opt_state, own)
        return (optax.apply_updates(own, updates), opt_state), value

    return Run(
        state,
        step,
        lambda params, state: adapter.merge(params, state[0]),
        lambda params, batch: gradient(params, own, 1, batch),
        _count(own),
        tree_bytes(state),
    )


def of_params(
    method: Method, rank: int, schedule: optax.Schedule, params: Any, loss: Callable
) -> Run:
    """Builds a method that trains the model's own params: in full, or by Flora at this rank."""
    if method == "flora":
        projection = Projection(
            rank,
            distribution="srtt",
            side="input",
            embedding="whole",
            min_dim=64,
            resample_every=64,
        )
        tx = flora_jax.flora(schedule, projection=projection, preset="advised")
        fused = flora_jax.value_and_grad(loss, projection)
    else:
        fused, tx = None, optax.adam(schedule) if method == "full" else optax.adafactor(schedule)

    def gradient(params: Any, opt_state: Any, batch: Any) -> Any:
        if fused is not None:
            return fused(params, batch, cycle=flora_jax.cycle(opt_state))
        return jax.value_and_grad(loss)(params, batch)

    first = tx.init(params)

    def step(_, state, i, batch):
        del i
        own, opt_state = state
        value, grads = gradient(own, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, own)
        return (optax.apply_updates(own, updates), opt_state), value

    return Run(
        (params, first),
        step,
        lambda _, state: state[0],
        lambda params, batch: gradient(params, first, batch),
        _count(params),
        tree_bytes(first),
    )


def _boosted(config: Config, task: Task, rank: int, schedule: Any, key: jax.Array) -> Run:
    """Builds XGBLoRA with rounds of a tenth of the steps, on two thirds of the layers, under one schedule."""
    rule = Projection(rank, side="input", embedding="whole", min_dim=64)
    adapter, each = xgb_lora(max(1, 2 * task.layers // 3), rule), max(1, config.steps // 10)
    params, loss = task.params, task.loss
    run = boosting(loss, adapter, optax.scale_by_adam(), each)
    state = run.init(key, params)

    def step(_, state, i, batch):
        scaled = optax.chain(optax.scale_by_adam(), optax.scale(-schedule(i)))
        inner = boosting(loss, adapter, scaled, each)
        opened = state._replace(opt_state=(state.opt_state, optax.ScaleState()))
        opened, value = inner.step(opened, batch)
        return opened._replace(opt_state=opened.opt_state[0]), value

    def gradient(params, batch):
        return jax.value_and_grad(adapter.apply(loss), argnums=1)(
            params, state.adapter_params, batch
        )

    own = (state.adapter_params, state.opt_state)
    return Run(
        state,
        step,
        lambda _, state: run.finish(state),
        gradient,
        _count(own[0]),
        tree_bytes(own),
    )


def largest_rank(config: Config, task: Task, method: Method) -> int:
    """Gives the largest rank whose trained numbers and state fit the budget; 0 for a method that has no rank.

    Raises:
      ValueError: Not even the smallest rank fits.
    """
    if method in FULL:
        return 0
    if method == "xgb-lora":
        return 1
    step = 2 if method == "deep-lora" else 1

    def extra(rank: int) -> int:
        size = jax.eval_shape(lambda: _extra(config, task, method, rank))
        return size.shape[0]

    most = task.width - 1 if method == "lorta" else task.width // 2
    best = 0
    low, high = 1, most // step
    while low <= high:
        middle = (low + high) // 2
        if extra(middle * step) <= config.budget * 2**20:
            best, low = middle * step, middle + 1
        else:
            high = middle - 1
    if not best:
        needed = extra(step) / 2**20
        raise ValueError(
            f"budget must be at least {needed:.2f} MiB for {method}, found {config.budget}"
        )
    return best


def _extra(config: Config, task: Task, method: Method, rank: int) -> jax.Array:
    """Gives an array of as many bytes as the method adds; only its shape is used."""
    return jnp.zeros(build(config, task, method, rank, 1.0).extra, jnp.int8)


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def train(
    run: Run, params: Any, batch: Callable[[int], Any], steps: int
) -> tuple[Any, list[float]]:
    """Trains for so many steps, and gives the adapted params and the losses."""
    step = jax.jit(run.step)
    state, losses = run.state, []
    for i in range(steps):
        state, value = step(params, state, jnp.int32(i), batch(i))
        losses.append(value)
    return jax.jit(run.final)(params, state), [float(value) for value in losses]
