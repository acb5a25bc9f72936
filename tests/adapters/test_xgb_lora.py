"""XGBLoRA: rounds, by hand in float64; which layers are sampled; what many weak learners can do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flora_jax.adapters import boosting, lora, xgb_lora
from tests.adapters.test_low_rank import rule
from tests.helpers import assert_close, assert_tree_equal, normal

KEY = jax.random.key(0)
X = jnp.asarray(normal(0, (64, 24)))
PARAMS = {"w": jnp.asarray(normal(1, (24, 16)))}


def loss(p, x, goal):
    return 0.5 * jnp.mean(jnp.sum((x @ p["w"] - goal) ** 2, axis=-1))


def test_rounds_by_hand():
    """Seven steps of SGD in rounds of three: gradients, merges and restarts in numpy."""
    goal, rate = jnp.asarray(normal(2, (64, 16))), 0.002
    adapter = xgb_lora(None, rule(1), alpha=2.0)
    run = boosting(loss, adapter, optax.sgd(rate), steps=3)
    state = run.init(KEY, PARAMS)
    step = jax.jit(run.step)
    w, x = np.asarray(PARAMS["w"], np.float64), np.asarray(X, np.float64)
    for i in range(7):
        if i % 3 == 0:
            start = adapter.init(jax.random.fold_in(KEY, i // 3), PARAMS)["w"]
            down, up = (np.asarray(start[name], np.float64) for name in ("down", "up"))
        merged = w + 2 * down @ up
        delta = x @ merged - np.asarray(goal, np.float64)
        value = 0.5 * np.mean(np.sum(delta**2, axis=1))
        gradient = x.T @ delta / len(x)
        down, up = down - rate * 2 * gradient @ up.T, up - rate * 2 * down.T @ gradient
        if i % 3 == 2:
            w = w + 2 * down @ up
        state, found = step(state, X, goal)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        assert int(state.round) == (i + 1) // 3 and int(state.steps) == (i + 1) % 3
        assert_close(state.params["w"], w, 1e-5)
    final = run.finish(state)
    assert set(final) == {"w"}  # no adapter left
    assert_close(final["w"], w + 2 * down @ up, 1e-5)


LAYERS = {
    "layer_0": {"up": jnp.ones((24, 16)), "down": jnp.ones((16, 24))},
    "layer_1": {"up": jnp.ones((24, 16)), "down": jnp.ones((16, 24))},
    "head": {"kernel": jnp.ones((24, 16))},
    "stack": {"query": jnp.ones((5, 24, 24)), "value": jnp.ones((5, 24, 24))},
}


@pytest.mark.parametrize("layers", [1, 3, 8])
def test_a_random_subset_of_layers(layers):
    """All weights of a layer go together, so many of the eight layers; each is sampled at some time."""
    adapter = xgb_lora(layers, rule(1))
    seen = set()
    for seed in range(40):
        own = jax.tree.map(np.asarray, adapter.init(jax.random.key(seed), LAYERS))
        alive = {}
        for path, pair in own.items():
            downs = pair["down"] if path.startswith("stack") else pair["down"][None]
            for i, down in enumerate(downs):
                name = f"{path.split('/')[0]}[{i}]"
                assert name not in alive or alive[name] == bool(down.any())
                alive[name] = bool(down.any())
        sampled = {name for name, flag in alive.items() if flag}
        assert len(alive) == 8 and len(sampled) == layers
        seen |= sampled
    assert len(seen) == 8


def test_layers_that_are_not_sampled_do_not_move():
    adapter = xgb_lora(2, rule(1))
    tx = optax.adamw(0.1)
    x = jnp.asarray(normal(3, (7, 24)))

    def of_all(p, x):
        for w in p["stack"]["query"]:
            x = jnp.tanh(x @ w / 24)
        return jnp.sum(x**2)

    run = boosting(of_all, adapter, tx, steps=4)
    state = run.init(KEY, LAYERS)
    first = state.adapter_params["stack/query"]["down"]
    for _ in range(4):
        state, _ = jax.jit(run.step)(state, x)
    moved = np.any(np.asarray(state.params["stack"]["query"] != 1), axis=(1, 2))
    np.testing.assert_array_equal(moved, np.any(np.asarray(first), axis=(1, 2)))
    assert_tree_equal(state.params["layer_0"], LAYERS["layer_0"])


def test_many_weak_learners_make_a_strong_one():
    """The paper's claim: rounds of rank 1 reach what rank 1 alone cannot, a change of rank 4."""
    goal = X @ (PARAMS["w"] + normal(2, (24, 4)) @ normal(3, (4, 16)))
    tx = optax.adam(0.05)
    run = boosting(loss, xgb_lora(None, rule(1)), tx, steps=60)
    plain = lora(rule(1), init="gaussian")
    single = boosting(loss, plain, tx, steps=10_000)  # one round that never ends

    def final(run):
        def step(state, _):
            return run.step(state, X, goal)

        state, _ = jax.lax.scan(step, run.init(KEY, PARAMS), length=1200)
        return loss(run.finish(state), X, goal)

    boosted, alone = jax.jit(lambda: final(run))(), jax.jit(lambda: final(single))()
    assert boosted < 1e-3 * alone


def test_errors():
    with pytest.raises(ValueError, match="layers must be from 1 to the 8 there are, found 9"):
        xgb_lora(9, rule(1)).init(KEY, LAYERS)
    with pytest.raises(ValueError, match="steps must be at least 1, found 0"):
        boosting(loss, xgb_lora(), optax.sgd(1.0), steps=0)
