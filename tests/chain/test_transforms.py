"""The transformations: accumulate against optax.MultiSteps, momentum against numpy, project's counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flora_jax
from flora_jax.chain.accumulate import StepsPerCycle
from flora_jax.chain.sketch import without_cycle
from tests.helpers import (
    Naive,
    assert_close,
    assert_tree_close,
    make_gradients,
    make_params,
    matrix_of_a,
    run,
)


def growing(step):
    """1, 2, 3, 3, 3, ... micro-steps."""
    return jnp.minimum(step + 1, 3)


def projection(**others):
    return flora_jax.Projection(8, min_dim=8, **others)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("every", [1, 4, growing])
def test_accumulate_of_uncompressed_gradients_is_multisteps(every, mean):
    params = make_params()
    gradients = make_gradients(params, 9)
    mine = flora_jax.accumulate(optax.adam(0.1), every, use_grad_mean=mean)
    theirs = optax.MultiSteps(optax.adam(0.1), every, use_grad_mean=mean)
    state, expected = mine.init(params), theirs.init(params)
    step, other = jax.jit(mine.update), jax.jit(theirs.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        wanted, expected = other(gradient, expected, params)
        assert_tree_close(updates, wanted, 1e-4)
        assert bool(flora_jax.has_updated(state)) == bool(theirs.has_updated(expected))


def test_updates_between_optimizer_steps_are_zero():
    params = make_params()
    tx = flora_jax.flora(0.1, projection=projection(resample_every=3), accumulation_steps=3)
    state, step = tx.init(params), jax.jit(tx.update)
    for i, gradient in enumerate(make_gradients(params, 6)):
        updates, state = step(gradient, state, params)
        moves = [bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates)]
        assert all(moves) if i % 3 == 2 else not any(moves)


@pytest.mark.parametrize("distribution", ["gaussian", "srht"])
@pytest.mark.parametrize("mean", [True, False])
def test_algorithm_one_against_numpy(distribution, mean):
    params = make_params()
    rule = projection(resample_every=3, distribution=distribution)
    tx = flora_jax.flora(
        None,
        projection=rule,
        accumulation_steps=3,
        optimizer=optax.scale(1.0),
        use_grad_mean=mean,
    )
    gradients = make_gradients(params, 6)
    state, step = tx.init(params), jax.jit(tx.update)
    plans = {leaf.path: leaf.spec for leaf in flora_jax.plan(params, rule).leaves}
    for i, gradient in enumerate(gradients):
        updates, state = step(gradient, state, params)
        if i % 3 == 2:
            total = jax.tree.map(
                lambda *leaves: np.sum(np.asarray(leaves, np.float64), 0), *gradients[i - 2 : i + 1]
            )
            total = jax.tree.map(lambda x: x / 3 if mean else x, total)
            assert_close(updates["dense"]["bias"], total["dense"]["bias"], 1e-6)
            for path, found, g in (
                ("dense/kernel", updates["dense"]["kernel"], total["dense"]["kernel"]),
                ("out/kernel", updates["out"]["kernel"], total["out"]["kernel"]),
            ):
                naive, a = Naive(plans[path]), matrix_of_a(plans[path], i // 3)
                assert_close(found, naive.decompress(a, naive.project(a, g)), 1e-5)


def test_algorithm_two_against_numpy():
    """Momentum in float64, with a real transfer each two micro-steps."""
    params = {"w": make_params()["out"]["kernel"]}
    rule = projection(resample_every=2)
    tx = flora_jax.flora(None, projection=rule, momentum=0.8, optimizer=optax.scale(1.0))
    spec = flora_jax.plan(params, rule).leaves[0].spec
    naive, moment = Naive(spec), np.zeros(spec.data_shape)
    state, step = tx.init(params), jax.jit(tx.update)
    for i, gradient in enumerate(make_gradients(params, 7)):
        updates, state = step(gradient, state, params)
        a = matrix_of_a(spec, i // 2)
        if i and i % 2 == 0:
            moment = naive.transfer(matrix_of_a(spec, i // 2 - 1), a, moment)
        moment = 0.8 * moment + 0.2 * naive.project(a, gradient["w"])
        assert_close(updates["w"], naive.decompress(a, moment), 1e-5)


@pytest.mark.parametrize("where", ["momentum", "accumulate"])
@pytest.mark.parametrize("way", ["transfer", "shorten", "reset"])
def test_momentum_at_a_new_projection_against_numpy(way, where):
    """Nesterov's in a sketch of its own, and the plain one in the accumulator."""
    params = make_params()
    rule = projection(resample_every=4, distribution="srtt")
    decompressed = flora_jax.decompress()
    if where == "momentum":
        kept = flora_jax.momentum(
            0.8, projection=rule, nesterov=True, at_new_projection=way, compressed_only=True
        )
        inner = flora_jax.accumulate(optax.chain(kept, decompressed), 2, projection=rule)
    else:
        inner = flora_jax.accumulate(
            decompressed, 2, projection=rule, decay=0.8, at_new_projection=way
        )
    tx = optax.chain(flora_jax.project(rule), inner)
    state, step = tx.init(params), jax.jit(tx.update)
    plans = {leaf.path: leaf.spec for leaf in flora_jax.plan(params, rule).leaves}
    spec = plans["dense/kernel"]
    naive, moment = Naive(spec), np.zeros(spec.data_shape)
    gradients = make_gradients(params, 12)
    for i in range(0, 12, 2):
        _, state = step(gradients[i], state, params)
        updates, state = step(gradients[i + 1], state, params)
        mean = jax.tree.map(lambda *x: np.mean(np.asarray(x, np.float64), 0), *gradients[i : i + 2])
        assert_close(updates["dense"]["bias"], mean["dense"]["bias"], 1e-6)  # no momentum
        a = matrix_of_a(spec, i // 4)
        if i and i % 4 == 0:
            moved = naive.transfer(matrix_of_a(spec, i // 4 - 1), a, moment)
            share = {"transfer": 1, "shorten": spec.rank / spec.size, "reset": 0}[way]
            moment = share * moved
        sketch = naive.project(a, mean["dense"]["kernel"])
        if where == "momentum":
            moment = 0.8 * moment + 0.2 * sketch
            expected = naive.decompress(a, 0.8 * moment + 0.2 * sketch)
        else:
            moment = 0.8 * moment + sketch
            expected = naive.decompress(a, moment)
        assert_close(updates["dense"]["kernel"], expected, 1e-5)


def test_momentum_of_uncompressed_leaves_is_an_average():
    params = {"b": jnp.zeros(5)}
    tx = flora_jax.momentum(0.5)
    state, moment = tx.init(params), np.zeros(5)
    for gradient in make_gradients(params, 3):
        updates, state = tx.update(gradient, state, params)
        moment = 0.5 * moment + 0.5 * np.asarray(gradient["b"], np.float64)
        assert_close(updates["b"], moment, 1e-6)


@pytest.mark.parametrize(
    ("every", "cycles"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6]),
        (3, [0, 0, 0, 1, 1, 1, 2]),
        (growing, [0, 1, 1, 2, 2, 2, 3]),
        (StepsPerCycle(growing, 2), [0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_cycles_of_project(every, cycles):
    params = make_params()
    tx = flora_jax.project(projection(resample_every=every))
    state, step = tx.init(params), jax.jit(tx.update)
    for cycle in cycles:
        assert int(flora_jax.cycle(state)) == cycle
        sketches, state = step(params, state)
        assert int(sketches["out"]["kernel"].cycle) == cycle


def test_schedule_of_optimizer_steps_under_momentum_trains():
    params = make_params()
    rule = projection(resample_every=StepsPerCycle(growing, 2))
    tx = flora_jax.flora(0.1, projection=rule, accumulation_steps=growing, momentum=0.9)
    _, state = run(tx, params, make_gradients(params, 9))
    assert int(flora_jax.cycle(state)) == 2
    assert bool(flora_jax.has_updated(state))


def test_project_sets_the_cycle_of_a_sketch_that_has_none():
    params = make_params()
    tx = flora_jax.project(projection())
    state = tx.init(params)
    made, later = tx.update(params, state)
    again, _ = tx.update(without_cycle(made), later)
    assert int(again["out"]["kernel"].cycle) == 1
    np.testing.assert_array_equal(again["out"]["kernel"].data, made["out"]["kernel"].data)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_gradients_come_back_in_their_dtype(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), make_params())
    rule = projection(resample_every=2)
    tx = flora_jax.flora(None, projection=rule, accumulation_steps=2, optimizer=optax.scale(1.0))
    state = tx.init(params)
    for gradient in make_gradients(params, 2):
        updates, state = jax.jit(tx.update)(gradient, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates))


def test_state_maps_over_params():
    """`optax.tree.map_params` finds what belongs to a parameter: the way to its shardings."""
    params = make_params()
    rule = projection(resample_every=2)
    tx = flora_jax.flora(0.1, projection=rule, accumulation_steps=2, momentum=0.9)
    names = {"dense": {"kernel": "dk", "bias": "db"}, "out": {"kernel": "ok"}}
    mapped = optax.tree.map_params(tx, lambda leaf, name: name, tx.init(params), names)
    found = [leaf for leaf in jax.tree.leaves(mapped) if isinstance(leaf, str)]
    assert sorted(set(found)) == ["db", "dk", "ok"]


def test_has_updated_without_accumulation():
    params = make_params()
    tx = flora_jax.flora(0.1, projection=projection())
    assert bool(flora_jax.has_updated(tx.init(params)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("momentum", [None, 0.5])
def test_complex_leaves_are_kept_unrounded(dtype, momentum):
    params = {"w": make_params()["out"]["kernel"], "z": jnp.ones(3, jnp.complex64)}
    tx = flora_jax.flora(
        None,
        projection=projection(resample_every=2),
        accumulation_steps=2,
        momentum=momentum,
        optimizer=optax.scale(1.0),
        state_dtype=dtype,
    )
    step, state = jax.jit(tx.update), tx.init(params)
    values = np.array([[1 + 2.003j, -3.1j, 0.7], [5, 1 + 1j, -0.3j]], np.complex64)
    for value in values:
        updates, state = step({"w": params["w"], "z": jnp.asarray(value)}, state, params)
    assert updates["z"].dtype == jnp.complex64
    factor = 1.0 if momentum is None else 0.5
    np.testing.assert_allclose(updates["z"], factor * values.mean(0), rtol=1e-6)


def test_a_stack_of_no_layers():
    params = {"layers": jnp.zeros((0, 16, 12)), "w": jnp.ones((16, 12))}
    rule = projection(resample_every=2)
    tx = flora_jax.flora(0.1, projection=rule, accumulation_steps=2, momentum=0.9)
    params, _ = run(tx, params, [params] * 2)
    assert params["layers"].shape == (0, 16, 12)

    def loss(params, x):
        return jnp.mean(
            jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, params["layers"])[0] @ params["w"]
        )

    step = flora_jax.make_train_step(loss, tx, rule)
    params, _, value = step(params, tx.init(params), jnp.ones((2, 16)))
    assert params["layers"].shape == (0, 16, 12) and bool(jnp.isfinite(value))


@pytest.mark.parametrize("mode", ["ranks", "dtypes"])
@pytest.mark.parametrize("route", ["ordinary", "fused"])
@pytest.mark.parametrize("preset", ["paper", "advised", "official"])
def test_strict_promotion(preset, route, mode):
    """What optax's own optimizers pass: ranks that must be equal in float32, dtypes in bfloat16."""
    dtype = jnp.float32 if mode == "ranks" else jnp.bfloat16
    params = {"w": jnp.ones((2, 16, 12), dtype), "b": jnp.ones(12, dtype)}
    rule = projection(resample_every=2, distribution="srht" if preset == "advised" else "gaussian")
    tx = flora_jax.flora(
        None,
        projection=rule,
        optimizer=optax.sgd(0.1),
        accumulation_steps=2,
        momentum=0.9,
        preset="paper" if preset == "official" else preset,
        state_dtype="bfloat16",
    )
    if preset == "official":
        if mode == "dtypes" or route == "fused":
            pytest.skip("its Adafactor is optax's, which mixes dtypes; and it takes no sketches")
        tx = flora_jax.flora(0.1, rank=8, momentum=0.9, preset="official")

    def loss(params, x):
        h = jax.lax.scan(lambda x, w: (jnp.matmul(jnp.matmul(x, w), w.T), None), x, params["w"])[0]
        return jnp.sum(h) + jnp.sum(params["b"])

    strict = (
        jax.numpy_rank_promotion("raise")
        if mode == "ranks"
        else jax.numpy_dtype_promotion("strict")
    )
    with strict:
        state = tx.init(params)
        if route == "ordinary":
            jax.eval_shape(tx.update, params, state, params)
        else:
            step = flora_jax.make_train_step(loss, tx, rule, donate=False)
            step.lower(params, state, jnp.ones((2, 16), dtype))


def test_counts_of_an_nnx_optimizer():
    rule = projection(resample_every=2)
    tx = flora_jax.flora(0.1, projection=rule, accumulation_steps=2)
    optimizer = nnx.Optimizer(nnx.Linear(16, 12, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    assert int(flora_jax.cycle(optimizer.opt_state)) == 0
    assert not bool(flora_jax.has_updated(optimizer.opt_state))
    assert isinstance(flora_jax.cycle(optimizer.opt_state), jax.Array)
