"""SoRA: gates, the proximal step as the minimum that it is, and pruning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flora_jax.adapters import proximal, prune, sora
from tests.adapters.test_low_rank import filled, rule
from tests.helpers import assert_close, normal

KEY = jax.random.key(0)
X = jnp.asarray(normal(9, (7, 24)))


def test_value_and_gradients_in_float64():
    """Equation 5: `x W + s ((x A) g) B`; the gradients by hand."""
    params = {"w": jnp.asarray(normal(0, (24, 16)))}
    adapter = sora(rule(4), alpha=8)
    own = filled(adapter, params)
    run = adapter.apply(lambda p, x: 0.5 * jnp.sum((x @ p["w"]) ** 2))
    value, found = jax.value_and_grad(run, argnums=1)(params, own, X)
    w, x = np.asarray(params["w"], np.float64), np.asarray(X, np.float64)
    down, gate, up = (np.asarray(own["w"][k], np.float64) for k in ("down", "gate", "up"))
    middle = (x @ down) * gate
    y = x @ w + 2 * middle @ up
    np.testing.assert_allclose(value, 0.5 * np.sum(y**2), rtol=1e-5)
    of_middle = 2 * y @ up.T
    assert_close(found["w"]["up"], 2 * middle.T @ y, 1e-5)
    assert_close(found["w"]["gate"], np.sum(of_middle * (x @ down), axis=0), 1e-5)
    assert_close(found["w"]["down"], x.T @ (of_middle * gate), 1e-5)


def test_gates_start_as_normal_numbers():
    params = {"w": jnp.zeros((3, 600, 512))}
    gate = sora(rule(500)).init(KEY, params)["w"]["gate"]
    assert gate.shape == (3, 500)
    assert abs(np.var(gate) - 1) < 5 / np.sqrt(1500 / 2)


def test_the_proximal_step_is_a_minimum():
    """`½ (z − (g − η∇))² + ηλ|z|`, minimised by search; a schedule; other leaves pass."""
    own = {"w": {"gate": jnp.asarray(normal(0, (6,))), "up": jnp.ones(3)}}
    updates = {"w": {"gate": jnp.asarray(0.5 * normal(1, (6,))), "up": jnp.full(3, 0.25)}}
    tx = proximal(lambda step: 2.0 + step, learning_rate=lambda step: 0.5 / (1 + step))
    state = tx.init(own)
    grid = np.linspace(-4, 4, 400_001)
    for step in range(2):
        found, state = jax.jit(tx.update)(updates, state, own)
        moved = np.asarray(own["w"]["gate"] + updates["w"]["gate"], np.float64)
        threshold = (2 + step) * 0.5 / (1 + step)
        cost = 0.5 * (grid - moved[:, None]) ** 2 + threshold * abs(grid)
        best = grid[cost.argmin(axis=1)]
        np.testing.assert_allclose(own["w"]["gate"] + found["w"]["gate"], best, atol=3e-5)
        np.testing.assert_array_equal(found["w"]["up"], updates["w"]["up"])
    assert np.any(best == 0) and np.any(best != 0)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_pruning_changes_no_output(batch):
    params = {"w": jnp.asarray(normal(0, (*batch, 24, 16))), "v": jnp.asarray(normal(1, (16, 16)))}
    adapter = sora(rule(6), alpha=3)
    own = filled(adapter, params)
    kept = np.random.default_rng(0).random(own["w"]["gate"].shape) < 0.4
    own["w"]["gate"] = own["w"]["gate"] * kept
    own["v"]["gate"] = jnp.zeros(6)

    def fun(p, x):
        return jnp.einsum("ti,...ij->...tj", x, p["w"]) @ p["v"]

    expected = adapter.apply(fun)(params, own, X)
    smaller, pruned = prune(adapter, params, own)
    assert set(pruned) == {"w"}
    assert pruned["w"]["down"].shape[-1] == kept.sum(axis=-1).max() < 6
    assert_close(smaller.apply(fun)(params, pruned, X), expected, 1e-6)
    assert_close(smaller.merge(params, pruned)["w"], adapter.merge(params, own)["w"], 1e-6)


def test_finds_the_rank_of_the_change():
    """The paper's claim: gates keep fewer of eight ranks the larger λ is, down to the two that the
    change needs, and the fit stays; without λ all are kept."""
    x = jnp.asarray(normal(0, (256, 24)))
    params = {"w": jnp.asarray(normal(1, (24, 16)))}
    goal = x @ (params["w"] + normal(2, (24, 2)) @ normal(3, (2, 16)) / 5)
    adapter = sora(rule(8))
    start = adapter.init(KEY, params)
    run_loss = adapter.apply(lambda p, x: jnp.mean((x @ p["w"] - goal) ** 2))

    @jax.jit
    def train(sparsity):
        tx = optax.chain(optax.adam(0.02), proximal(sparsity, 0.02))

        def step(carry, _):
            own, state = carry
            grads = jax.grad(run_loss, argnums=1)(params, own, x)
            updates, state = tx.update(grads, state, own)
            return (optax.apply_updates(own, updates), state), None

        (own, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=800)
        return own, run_loss(params, own, x)

    before = float(run_loss(params, start, x))
    ranks, losses = [], []
    for sparsity in (0.0, 0.1, 0.4):
        own, loss = train(sparsity)
        ranks.append(int(np.count_nonzero(own["w"]["gate"])))
        losses.append(float(loss) / before)
    assert ranks[0] == 8 > ranks[1] > ranks[2] == 2
    assert losses[2] < 1e-3


def test_errors():
    with pytest.raises(ValueError, match=r"sparsity must be at least 0, found -1"):
        proximal(-1, 0.1)
    tx = proximal(1.0, 0.1)
    own = {"w": {"gate": jnp.ones(2)}}
    with pytest.raises(ValueError, match="needs the adapter's params, found none"):
        tx.update(own, tx.init(own))
