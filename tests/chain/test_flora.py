"""flora with any optimizer inside, and inside any wrapper; each run must bring the loss far down."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from flora_jax.chain import storage
from tests.helpers import Naive, assert_tree_close, make_gradients, matrix_of_a, normal, often, run

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("momentum", often([None, 0.9], 0.9))
def test_any_state(dtype, momentum, monkeypatch):
    monkeypatch.setattr(storage, "MIN_SIZE", 1)
    rate = optax.cosine_decay_schedule(0.1, STEPS)
    rule = projection(resample_every=20)
    tx = flora(rate, state_dtype=dtype, momentum=momentum, projection=rule)
    ratio, state = fall(tx, 2 * STEPS)
    assert ratio < (0.6 if dtype == "int4" else 0.5)
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


def test_advised_is_the_orthogonalized_momentum_for_matrices_and_adafactor_for_all_else():
    """Against numpy, over two cycles of two optimizer steps: the momentum is in the accumulator, and begins anew."""
    params = start()
    rule = projection(distribution="srtt", resample_every=4, side="output")
    tx = flora_jax.flora(0.1, projection=rule, accumulation_steps=2, momentum=0.8, preset="advised")
    state, adafactor = tx.init(params), optax.adafactor(0.1)
    bias = adafactor.init(params["bias"])
    specs = {leaf.path: leaf.spec for leaf in flora_jax.plan(params, rule).leaves}
    momentum = {name: np.zeros(specs[name].data_shape) for name in ("hidden", "out")}
    for i in range(8):
        first, second = (
            jax.tree.map(lambda x, seed=2 * i + j: jnp.asarray(normal(seed, x.shape)), params)
            for j in range(2)
        )
        zeros, state = tx.update(first, state, params)
        assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(zeros))
        updates, state = tx.update(second, state, params)
        wanted, bias = adafactor.update((first["bias"] + second["bias"]) / 2, bias, params["bias"])
        np.testing.assert_allclose(updates["bias"], wanted, rtol=1e-4)
        for name, kept in momentum.items():
            naive, a = Naive(specs[name]), matrix_of_a(specs[name], i // 2)
            mean = (np.asarray(first[name], np.float64) + second[name]) / 2
            kept[:] = (0.8 * kept if i % 2 else 0) + naive.project(a, mean)
            u, s, v = np.linalg.svd(naive.decompress(a, kept), full_matrices=False)
            values = np.linalg.svd(u.T @ updates[name] @ v.T, compute_uv=False)[:8]
            inputs, outputs = params[name].shape
            longer = max(1, outputs / inputs) ** 0.5 * (min(inputs, outputs) / 8) ** 0.25
            np.testing.assert_allclose(values, 0.1 * longer, rtol=0.15)  # of 5 iterations
            aligned = np.sum(updates[name] * (u[:, :8] @ v[:8])) / np.linalg.norm(updates[name])
            assert -aligned / 8**0.5 > 0.99
            assert np.all(s[8:] < 1e-5)


def test_nesterov_takes_a_second_sketch_of_compressed_leaves_alone():
    params = start()
    rule = projection(distribution="srtt", resample_every=4)
    sizes = {}
    for nesterov in (False, True):
        tx = flora_jax.flora(
            0.1, projection=rule, accumulation_steps=2, nesterov=nesterov, preset="advised"
        )
        sizes[nesterov] = sum(leaf.size for leaf in jax.tree.leaves(tx.init(params)))
        assert fall(tx)[0] < 0.4
    sketches = 8 * 24 + 8 * 32  # the larger sides, of 48, are projected
    counts = 3  # two, and a zero for the bias
    assert sketches <= sizes[True] - sizes[False] <= sketches + counts


def test_compressed_embeddings_and_heads_have_adafactor_in_the_advised_preset():
    params = {
        "embed": jnp.asarray(normal(1, (64, 32))),
        "lm_head": jnp.asarray(normal(2, (32, 64))),
        "inner": jnp.asarray(normal(3, (32, 64))),
    }
    grads = jax.tree.map(lambda x: jnp.asarray(normal(4, x.shape)), params)
    rule = projection(distribution="srtt", side="input")
    advised = flora_jax.flora(
        0.03, projection=rule, momentum=0.0, preset="advised", adafactor_learning_rate=0.1
    )
    inner = optax.chain(optax.adafactor(0.1), flora_jax.shrink(rule))
    other = flora_jax.flora(None, projection=rule, optimizer=inner)
    found, expected = (tx.update(grads, tx.init(params), params)[0] for tx in (advised, other))
    for name in ("embed", "lm_head"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-7)
    values = np.linalg.svd(found["inner"], compute_uv=False)[:8]
    np.testing.assert_allclose(values, 0.03 * 2**0.5 * (32 / 8) ** 0.25, rtol=0.15)


def test_weight_decay_of_the_advised_preset():
    """As in optax.adafactor: each optimizer step, not multiplied by the learning rate."""
    params = start()
    grads = jax.tree.map(lambda x: jnp.asarray(normal(5, x.shape)), params)

    def updates(**others):
        tx = flora_jax.flora(0.1, projection=projection(), preset="advised", **others)
        return tx.update(grads, tx.init(params), params)[0]

    params["bias"] = jnp.ones(24)
    plain, decayed = updates(), updates(weight_decay_rate=0.01)
    scheduled = updates(weight_decay_rate=lambda step: 0.01 / (1 + step))
    assert_tree_close(scheduled, decayed, 1e-6)
    masked = updates(
        weight_decay_rate=0.01, weight_decay_mask={"hidden": True, "out": False, "bias": False}
    )
    other = updates(weight_decay_rate=0.01, optimizer=optax.sgd(0.1))
    for name in params:
        moved = 0.01 * params[name]
        np.testing.assert_allclose(plain[name] - decayed[name], moved, atol=1e-6)
        np.testing.assert_allclose(
            plain[name] - masked[name], moved if name == "hidden" else 0, atol=1e-6
        )
        if name != "bias":
            np.testing.assert_allclose(plain[name] - other[name], moved, atol=1e-6)
    np.testing.assert_allclose(other["bias"], -0.1 * grads["bias"], atol=1e-6)


def test_an_optimizer_without_a_rate_beside_it_gets_orthogonalized_updates():
    params = start()
    grads = jax.tree.map(lambda x: jnp.asarray(normal(5, x.shape)), params)
    rule = projection()
    every = flora_jax.flora(None, projection=rule, preset="advised", optimizer=optax.sgd(0.1))
    split = flora_jax.flora(0.1, projection=rule, preset="advised", optimizer=optax.sgd(0.1))
    found, expected = (tx.update(grads, tx.init(params), params)[0] for tx in (every, split))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), found, expected)


def test_rank_alone_resamples_each_optimizer_step_and_each_thousandth_under_momentum():
    params = {"w": jnp.ones((128, 160))}
    for momentum, micro_steps, cycle in ((None, 3, 1), (0.9, 3, 0)):
        tx = flora_jax.flora(0.1, rank=8, accumulation_steps=3, momentum=momentum)
        state = tx.init(params)
        for _ in range(micro_steps):
            state = jax.jit(tx.update)(params, state, params)[1]
        assert int(flora_jax.cycle(state)) == cycle


def test_choices_of_the_advised_preset_are_those_of_its_parts():
    """Iterations and what becomes of the momentum reach `orthogonalize` and `accumulate`."""
    params = {"kernel": jnp.asarray(normal(0, (32, 48)))}
    projection = flora_jax.Projection(8, min_dim=16, side="input", resample_every=2)
    tx = flora_jax.flora(
        0.1,
        projection=projection,
        accumulation_steps=2,
        preset="advised",
        at_new_projection="shorten",
        iterations=2,
    )
    expected = optax.chain(
        flora_jax.project(projection),
        flora_jax.accumulate(
            optax.chain(
                flora_jax.orthogonalize(2),
                flora_jax.decompress(),
                flora_jax.scale_by_shape(projection),
                optax.scale_by_learning_rate(0.1),
            ),
            2,
            projection=projection,
            decay=0.8,
            at_new_projection="shorten",
        ),
    )
    gradients = make_gradients(params, 6)
    assert_tree_close(run(tx, params, gradients)[0], run(expected, params, gradients)[0], 1e-5)
