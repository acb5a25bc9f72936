"""flora with any optimizer inside, and inside any wrapper; each run must bring the loss far down."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from flora_jax.chain import storage
from tests.helpers import normal

INPUTS = jnp.asarray(normal(0, (64, 32)))
TARGETS = jnp.tanh(INPUTS @ normal(1, (32, 24)) / 6)
STEPS = 160


def projection(**others):
    return flora_jax.Projection(8, **{"min_dim": 16, "resample_every": 2, **others})


def start():
    return {
        "hidden": jnp.asarray(normal(2, (32, 48)) / 6),
        "out": jnp.asarray(normal(3, (48, 24)) / 7),
        "bias": jnp.zeros(24),
    }


def loss(params, rows):
    hidden = jnp.tanh(INPUTS[rows] @ params["hidden"])
    return jnp.mean((hidden @ params["out"] + params["bias"] - TARGETS[rows]) ** 2)


def fall(tx, steps=STEPS):
    """Final loss over the first, by micro-steps on halves of the data in turn."""
    params = start()
    state = tx.init(params)
    everything = np.arange(64)

    @jax.jit
    def step(carry, i):
        params, state = carry
        rows = jax.lax.dynamic_slice_in_dim(jnp.asarray(everything), (i % 2) * 32, 32)
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), jnp.arange(steps))
    return float(loss(params, everything) / loss(start(), everything)), state


def flora(rate=0.05, **others):
    others.setdefault("projection", projection())
    rate = None if "optimizer" in others else rate
    return flora_jax.flora(rate, accumulation_steps=2, **others)


OPTIMIZERS = {
    "adafactor": optax.adafactor(0.05),
    "adamw with decay and mask": optax.adamw(
        0.01, weight_decay=1e-3, mask={"hidden": True, "out": True, "bias": False}
    ),
    "sgd": optax.sgd(0.1),
    "lion": optax.lion(0.003),
    "muon": optax.contrib.muon(0.02),
    "schedule": optax.adam(optax.cosine_decay_schedule(0.02, STEPS // 2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_after_decompress(name):
    assert fall(flora(optimizer=OPTIMIZERS[name]))[0] < 0.4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_any_state(dtype, momentum, monkeypatch):
    monkeypatch.setattr(storage, "MIN_SIZE", 1)
    rate = optax.cosine_decay_schedule(0.1, STEPS)
    rule = projection(resample_every=20)
    tx = flora(rate, state_dtype=dtype, momentum=momentum, projection=rule)
    ratio, state = fall(tx, 2 * STEPS)
    assert ratio < 0.5
    kept = {leaf.dtype.name for leaf in jax.tree.leaves(state)}
    assert dtype in kept


@pytest.mark.parametrize("preset", ["paper", "advised"])
def test_presets(preset):
    assert fall(flora(preset=preset))[0] < 0.4


def test_official_preset():
    tx = flora_jax.flora(0.02, rank=8, momentum=0.9, preset="official")
    assert fall(tx)[0] < 0.4


WRAPPERS = {
    "multi_transform": lambda: optax.multi_transform(
        {"flora": flora(), "adam": optax.adam(0.01)},
        {"hidden": "flora", "out": "flora", "bias": "adam"},
    ),
    "masked": lambda: optax.masked(flora(), {"hidden": True, "out": True, "bias": True}),
    "apply_if_finite": lambda: optax.apply_if_finite(flora(), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(lambda rate: flora(rate))(rate=0.05),
    "schedule": lambda: flora(optax.cosine_decay_schedule(0.1, STEPS // 2)),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), flora()),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_any_wrapper(name):
    ratio, state = fall(WRAPPERS[name]())
    assert ratio < 0.4
    assert int(flora_jax.cycle(state)) == STEPS // 2
    assert bool(flora_jax.has_updated(state))


def test_every_argument_static_under_inject_hyperparams():
    static = (
        "accumulation_steps", "seed", "clipping_threshold", "use_grad_mean", "skip_nonfinite",
        "min_dim_size_to_factor", "multiply_by_parameter_scale", "projection", "preset",
    )  # fmt: skip
    make = optax.inject_hyperparams(flora_jax.flora, static_args=static)
    tx = make(learning_rate=0.05, projection=projection(), accumulation_steps=2)
    ratio, state = fall(tx)
    assert ratio < 0.4
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.05)


def test_masked_parameter_stays_with_the_gradient_as_its_update():
    tx = optax.masked(flora(), {"hidden": True, "out": True, "bias": False})
    grads = jax.tree.map(jnp.ones_like, start())
    updates, _ = tx.update(grads, tx.init(start()), start())
    np.testing.assert_array_equal(updates["bias"], grads["bias"])
    np.testing.assert_array_equal(updates["hidden"], 0.0)


def test_advised_scales_by_the_stated_factor():
    """srht of rank 8 on a side of 32: v = 3, so the update is half of the one without."""
    grads = jax.tree.map(lambda x: jnp.asarray(normal(5, x.shape)), start())
    both = []
    for preset in ("paper", "advised"):
        rule = flora_jax.Projection(8, min_dim=16, distribution="srht")
        tx = flora_jax.flora(0.1, projection=rule, preset=preset)
        both.append(tx.update(grads, tx.init(start()), start())[0])
    v = 31 * (32 - 8) / (8 * 31)
    v_out = 47 * (64 - 8) / (8 * 63)  # the larger side is padded from 48 to 64
    np.testing.assert_allclose(both[1]["bias"], both[0]["bias"])
    for name, size in (("hidden", v_out), ("out", v_out)):
        np.testing.assert_allclose(both[1][name], both[0][name] / (1 + size) ** 0.5, rtol=1e-5)
    assert v == 3.0


def test_rank_alone_resamples_each_optimizer_step_and_each_thousandth_under_momentum():
    params = {"w": jnp.ones((128, 160))}
    for momentum, micro_steps, cycle in ((None, 3, 1), (0.9, 3, 0)):
        tx = flora_jax.flora(0.1, rank=8, accumulation_steps=3, momentum=momentum)
        state = tx.init(params)
        for _ in range(micro_steps):
            state = jax.jit(tx.update)(params, state, params)[1]
        assert int(flora_jax.cycle(state)) == cycle
