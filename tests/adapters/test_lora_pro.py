"""LoRA-Pro: the least-squares optimum, in float64, found by numpy over all pairs of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from flora_jax.adapters import lora, lora_pro, lora_pro_inside
from tests.adapters.test_low_rank import rule
from tests.helpers import assert_close, normal

SCALE = 2.0
ALPHA = SCALE * 3


def best_pair(down, up, gradient):
    """All pairs by least squares: the error of the best, and the best that is nearest to LoRA's own."""
    m, r = down.shape
    n = up.shape[1]
    columns = [
        SCALE * np.einsum("ir,rj->ij", unit.reshape(m, r), up).ravel() for unit in np.eye(m * r)
    ] + [SCALE * np.einsum("ir,rj->ij", down, unit.reshape(r, n)).ravel() for unit in np.eye(r * n)]
    matrix = np.stack(columns, axis=1)
    own = np.concatenate([(SCALE * gradient @ up.T).ravel(), (SCALE * down.T @ gradient).ravel()])
    change = np.linalg.pinv(matrix, rcond=1e-10) @ (gradient.ravel() - matrix @ own)
    pair = own + change  # of minimal change, since the pseudo-inverse's solution is the shortest
    error = np.linalg.norm(matrix @ pair - gradient.ravel())
    return (
        error,
        np.linalg.norm(matrix @ own - gradient.ravel()),
        pair[: m * r].reshape(m, r),
        pair[m * r :].reshape(r, n),
    )


def setting(batch=(), start=False, seed=0):
    shape = (*batch, 9, 8)
    params = {"w": jnp.zeros(shape)}
    adapter = lora(rule(3, min_dim=8), alpha=ALPHA)
    down = normal(seed, (*batch, 9, 3))
    up = np.zeros((*batch, 3, 8), np.float32) if start else normal(seed + 1, (*batch, 3, 8))
    gradient = normal(seed + 2, shape)
    own = {"w": {"down": jnp.asarray(down), "up": jnp.asarray(up)}}
    of_own = {
        "w": {
            "down": SCALE * gradient @ np.swapaxes(up, -1, -2),
            "up": SCALE * np.swapaxes(down, -1, -2) @ gradient,
        }
    }
    return params, adapter, own, of_own, gradient


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("seed", [0, 10])
def test_the_least_squares_optimum(seed, start):
    """Theorems 2.1 and 2.3, also at LoRA's start, where the inverses do not exist."""
    params, adapter, own, of_own, gradient = setting(start=start, seed=seed)
    tx = lora_pro(adapter, params)
    found, _ = jax.jit(tx.update)(of_own, tx.init(own), own)
    down, up, full = (np.asarray(x, np.float64) for x in (*own["w"].values(), gradient))
    error, plain, of_down, of_up = best_pair(down, up, full)
    equivalent = SCALE * (np.asarray(found["w"]["down"]) @ up + down @ np.asarray(found["w"]["up"]))
    assert abs(np.linalg.norm(equivalent - full) - error) <= 1e-4 * error
    assert error < 0.9 * plain
    assert_close(found["w"]["up"], of_up, 1e-4)
    if start:
        assert not np.any(np.asarray(found["w"]["down"]))
    else:
        assert_close(found["w"]["down"], of_down, 1e-4)


def test_stacked_layers_are_adjusted_one_by_one():
    params, adapter, own, of_own, _ = setting((2, 3))
    tx = lora_pro(adapter, params)
    found, _ = tx.update(of_own, tx.init(own), own)
    for i in np.ndindex(2, 3):
        one = lora_pro(adapter, {"w": params["w"][i]})
        pick = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
        expected, _ = one.update(pick(of_own), one.init(pick(own)), pick(own))
        assert_close(found["w"]["down"][i], expected["w"]["down"], 1e-5)
        assert_close(found["w"]["up"][i], expected["w"]["up"], 1e-5)


def test_axes_of_heads():
    """A weight `(heads, head_dim, out)` whose input side has two axes is its matrix."""
    _, adapter, own, of_own, _ = setting()
    numbers = flora_jax.DimensionNumbers((0, 1), 2)
    heads = lora(rule(3, min_dim=8, weight_dimension_numbers=numbers), alpha=ALPHA)
    split = lambda pair: {"w": {"down": pair["w"]["down"].reshape(3, 3, 3), "up": pair["w"]["up"]}}  # noqa: E731
    tx, reference = (
        lora_pro(heads, {"w": jnp.zeros((3, 3, 8))}),
        lora_pro(adapter, {"w": jnp.zeros((9, 8))}),
    )
    found, _ = tx.update(split(of_own), tx.init(own), split(own))
    expected, _ = reference.update(of_own, reference.init(own), own)
    assert_close(found["w"]["down"].reshape(9, 3), expected["w"]["down"], 1e-5)
    assert_close(found["w"]["up"], expected["w"]["up"], 1e-5)


def test_inside_adam():
    """Algorithm 2 against numpy: Adam of the equivalent gradient, then the best pair for its step."""
    params, adapter, own, of_own, gradient = setting()
    tx = lora_pro_inside(optax.scale_by_adam(), adapter, params)
    found, state = jax.jit(tx.update)(of_own, tx.init(own), own)
    down, up = (np.asarray(x, np.float64) for x in own["w"].values())
    _, _, of_down, of_up = best_pair(down, up, np.asarray(gradient, np.float64))
    equivalent = SCALE * (of_down @ up + down @ of_up)
    step = equivalent / (np.abs(equivalent) + 1e-8)  # Adam's first
    _, _, of_down, of_up = best_pair(down, up, step)
    assert_close(found["w"]["down"], of_down, 1e-3)
    assert_close(found["w"]["up"], of_up, 1e-3)
    assert state.mu["w"].shape == (9, 8)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_nearer_to_full_training_than_lora(optimizer):
    """The paper's claim, on three regressions: at each one's best rate, a lower loss in as many steps."""
    x = jnp.asarray(normal(0, (200, 24)) * np.geomspace(1, 0.2, 24))
    params = {"w": jnp.asarray(normal(1, (24, 16)))}
    changes = [normal(seed, (24, 4)) @ normal(seed + 1, (4, 16)) / 2 for seed in (2, 20, 200)]
    goals = jnp.stack([x @ (params["w"] + change) for change in changes])
    adapter = lora(rule(4))
    start = adapter.init(jax.random.key(0), params)

    def loss(p, x, goal):
        return jnp.mean((x @ p["w"] - goal) ** 2)

    run_loss = adapter.apply(loss)

    def best(chain, rates):
        def final(rate, goal):
            tx = chain(rate)

            def step(carry, _):
                own, state = carry
                grads = jax.grad(run_loss, argnums=1)(params, own, x, goal)
                updates, state = tx.update(grads, state, own)
                return (optax.apply_updates(own, updates), state), None

            (own, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=60)
            return run_loss(params, own, x, goal)

        over_rates = jax.vmap(final, in_axes=(0, None))
        finals = jax.jit(jax.vmap(over_rates, in_axes=(None, 0)))(jnp.asarray(rates), goals)
        return np.nanmin(finals, axis=1)

    rates = np.geomspace(1e-3, 30, 24)
    if optimizer == "sgd":
        plain = best(optax.sgd, rates)
        adjusted = best(lambda rate: optax.chain(lora_pro(adapter, params), optax.sgd(rate)), rates)
    else:
        inside = lora_pro_inside(optax.scale_by_adam(), adapter, params)
        plain = best(optax.adamw, rates)
        adjusted = best(
            lambda rate: optax.chain(inside, optax.add_decayed_weights(1e-4), optax.sgd(rate)),
            rates,
        )
    print(plain, adjusted)
    assert np.all(adjusted < plain)


def test_no_params():
    params, adapter, own, of_own, _ = setting()
    tx = lora_pro(adapter, params)
    with pytest.raises(ValueError, match="needs the adapter's params, found none"):
        tx.update(of_own, tx.init(own))
