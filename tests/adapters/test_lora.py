"""LoRA: how it starts, its scale, merge and unmerge, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from flora_jax.adapters import lora
from tests.adapters.test_low_rank import filled, rule
from tests.helpers import assert_close, assert_tree_close, assert_tree_equal, make_params, normal

PARAMS = make_params()
KEY = jax.random.key(0)


def test_starts_as_the_model():
    adapter = lora(rule(4), alpha=16)
    own = adapter.init(KEY, PARAMS)
    assert set(own) == {"dense/kernel", "out/kernel"}
    for pair in own.values():
        assert not np.any(pair["up"]) and np.all(np.asarray(pair["down"]) != 0)
    assert_tree_equal(adapter.merge(PARAMS, own), PARAMS)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_random_factor(init):
    """Bounds and variance of 64,000 numbers; the relative error of a variance is below 5/√(n/2)."""
    own = lora(rule(64), init=init).init(KEY, {"w": jnp.zeros((1000, 64))})["w"]["down"]
    samples = np.asarray(own, np.float64).ravel()
    variance = 1 / 3000 if init == "kaiming" else 1 / 64**2
    assert abs(samples.var() / variance - 1) < 5 / np.sqrt(samples.size / 2)
    assert abs(samples.mean()) < 5 * np.sqrt(variance / samples.size)
    if init == "kaiming":
        assert abs(samples).max() <= 1000**-0.5


def test_a_leaf_draws_the_same_beside_others():
    adapter = lora(rule())
    own = adapter.init(KEY, PARAMS)
    more = adapter.init(KEY, {"a": PARAMS["dense"]["kernel"], **PARAMS})
    assert_tree_equal({path: more[path] for path in own}, own)
    assert not np.array_equal(more["a"]["down"], own["dense/kernel"]["down"])


@pytest.mark.parametrize("stabilized, factor", [(False, 8 / 4), (True, 8 / 2)])
def test_scale(stabilized, factor):
    """α/r, and α/√r of arXiv 2312.03732."""
    adapter = lora(rule(4), alpha=8, rank_stabilized=stabilized)
    own = filled(adapter, PARAMS)
    pair = own["dense/kernel"]
    product = np.asarray(pair["down"], np.float64) @ np.asarray(pair["up"], np.float64)
    found = adapter.merge(PARAMS, own)["dense"]["kernel"] - PARAMS["dense"]["kernel"]
    assert_close(found, factor * product, 1e-5)


def test_unmerge_undoes_merge():
    adapter = lora(rule(4), alpha=8)
    own = filled(adapter, PARAMS)
    assert_tree_close(adapter.unmerge(adapter.merge(PARAMS, own), own), PARAMS, 1e-6)


def test_merged_runs_as_adapted():
    adapter = lora(rule(4), alpha=8)
    own = filled(adapter, PARAMS)
    x = jnp.asarray(normal(3, (7, 32)))

    def model(p, x):
        return jnp.tanh(x @ p["dense"]["kernel"] + p["dense"]["bias"]) @ p["out"]["kernel"]

    found = jax.jit(adapter.apply(model))(PARAMS, own, x)
    assert_close(found, model(adapter.merge(PARAMS, own), x), 1e-5)


def test_its_first_step_is_a_sketch_of_the_gradient():
    """The paper of Flora: LoRA's `B` moves along `(x A)ᵀ δ`, the gradient in its projection."""
    adapter = lora(rule(4))
    own = adapter.init(KEY, PARAMS)
    x = jnp.asarray(normal(3, (7, 32)))

    def loss(p, x):
        return jnp.sum((x @ p["dense"]["kernel"]) ** 2)

    of_up = jax.grad(adapter.apply(loss), argnums=1)(PARAMS, own, x)["dense/kernel"]["up"]
    full = np.asarray(jax.grad(loss)(PARAMS, x)["dense"]["kernel"], np.float64)
    down = np.asarray(own["dense/kernel"]["down"], np.float64)
    assert_close(of_up, down.T @ full, 1e-5)


def test_fits_a_change_of_its_rank():
    """Section 4.1: at the rank of the change, LoRA can be the whole change; below it, not."""
    x = jnp.asarray(normal(0, (256, 24)))
    start = {"w": jnp.asarray(normal(1, (24, 16)))}
    change = normal(2, (24, 3)) @ normal(3, (3, 16)) / 5
    goal = x @ (start["w"] + change)

    def loss(p, x, goal):
        return jnp.mean((x @ p["w"] - goal) ** 2)

    def final(rank):
        adapter = lora(flora_jax.Projection(rank, side="input", min_dim=8), init="gaussian")
        own, tx = adapter.init(KEY, start), optax.adam(0.02)

        @jax.jit
        def run(own):
            def step(carry, _):
                own, state = carry
                grads = jax.grad(adapter.apply(loss), argnums=1)(start, own, x, goal)
                updates, state = tx.update(grads, state)
                return (optax.apply_updates(own, updates), state), None

            return jax.lax.scan(step, (own, tx.init(own)), length=1500)[0][0]

        return float(loss(adapter.merge(start, run(own)), x, goal))

    before = float(loss(start, x, goal))
    assert final(3) < 1e-5 * before
    assert final(1) > 1e-2 * before


def test_unknown_init():
    with pytest.raises(ValueError, match="init must be one of kaiming, gaussian, found 'zeros'"):
        lora(rule(), init="zeros").init(KEY, PARAMS)  # type: ignore[arg-type]
