import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from tests.helpers import assert_tree_close, often

GRADIENTS = {"w": jnp.arange(32 * 24, dtype=jnp.float32).reshape(32, 24), "b": jnp.ones(24)}


@pytest.fixture
def sketches():
    tx = flora_jax.project(flora_jax.Projection(4, min_dim=8))
    return tx.update(GRADIENTS, tx.init(GRADIENTS))[0]


def test_the_cycle_is_absent_until_set(sketches):
    fresh = flora_jax.Sketch(sketches["w"].data, None, sketches["w"].spec)
    assert [leaf.dtype for leaf in jax.tree.leaves(fresh)] == [jnp.float32]
    assert [leaf.dtype for leaf in jax.tree.leaves(sketches["w"])] == [jnp.float32, jnp.float32]
    assert sketches["w"].cycle.dtype == jnp.int32


def test_round_trip_and_names_of_the_leaves(sketches):
    leaves, structure = jax.tree_util.tree_flatten_with_path(sketches)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    assert names == ["b", "w/data", "w/cycle"]
    again = jax.tree.unflatten(structure, [leaf for _, leaf in leaves])
    assert again["w"].spec == sketches["w"].spec


def test_sum_is_the_sketch_of_the_sum(sketches):
    tx = flora_jax.project(flora_jax.Projection(4, min_dim=8))
    double = jax.tree.map(lambda x: 2 * x, GRADIENTS)
    expected = tx.update(double, tx.init(GRADIENTS))[0]["w"]
    found = sketches["w"] + sketches["w"]
    np.testing.assert_allclose(found.data, expected.data, rtol=1e-6)
    assert found.spec == expected.spec


def test_loss_scaling_and_clipping_see_numbers(sketches):
    fresh = {"w": flora_jax.Sketch(sketches["w"].data, None, sketches["w"].spec)}
    halved = jax.tree.map(lambda x: x / 2, fresh)
    np.testing.assert_array_equal(halved["w"].data, fresh["w"].data / 2)
    clipped, _ = optax.clip_by_global_norm(1.0).update(fresh, optax.EmptyState())
    assert float(jnp.linalg.norm(clipped["w"].data)) == pytest.approx(1.0, 1e-5)


def test_different_specs_make_different_trees(sketches):
    tx = flora_jax.project(flora_jax.Projection(8, min_dim=8))
    other = tx.update(GRADIENTS, tx.init(GRADIENTS))[0]
    with pytest.raises(ValueError, match="rank"):
        jax.tree.map(jnp.add, sketches, other)


ARITHMETIC = {
    "scale": (optax.scale(2.0), 2.0),
    "turn": (optax.scale(-1.0), -1.0),
    "schedule": (optax.scale_by_schedule(lambda step: 0.5), 0.5),
    "clip": (optax.clip(1e9), 1.0),
    "clip by a norm that is not reached": (optax.clip_by_global_norm(1e9), 1.0),
    "noise": (optax.add_noise(1e-6, 0.0, 0), 1.0),
    "casts": (
        optax.stateless(
            lambda tree, _: jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tree)
        ),
        1.0,
    ),
    "sum of two": (
        optax.stateless(lambda tree, _: jax.tree.map(jnp.add, tree, tree)),
        2.0,
    ),
}


@functools.cache
def last_updates(name, last, jit):
    """The updates of the fourth micro-step, with the named change, or none, after `project`."""
    rule = flora_jax.Projection(8, min_dim=8, resample_every=2)
    sgd = optax.chain(flora_jax.decompress(), optax.sgd(1.0))
    ends = {
        "accumulate": flora_jax.accumulate(sgd, 2, projection=rule),
        "momentum": optax.chain(flora_jax.momentum(0.9, projection=rule), sgd),
        "decompress": sgd,
    }
    change = [ARITHMETIC[name][0]] if name else []
    tx = optax.chain(flora_jax.project(rule), *change, ends[last])
    state, update = tx.init(GRADIENTS), jax.jit(tx.update) if jit else tx.update
    for _ in range(4):
        found, state = update(GRADIENTS, state, GRADIENTS)
    return found


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize(
    "last", often(["accumulate", "momentum", "decompress"], "accumulate", "decompress")
)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_after_project_leaves_the_projection(name, last, jit):
    factor = ARITHMETIC[name][1]
    expected = jax.tree.map(lambda x: factor * x, last_updates(None, last, jit))
    tolerance = 1e-2 if name in ("casts", "noise") else 1e-5
    assert_tree_close(last_updates(name, last, jit), expected, tolerance)


def test_between_two_jitted_calls_scales_are_read_and_noise_is_seen():
    rule = flora_jax.Projection(8, min_dim=8)
    project, decompress = flora_jax.project(rule), flora_jax.decompress()
    state = project.init(GRADIENTS)
    for _ in range(3):
        sketches, state = jax.jit(project.update)(GRADIENTS, state)
    assert int(sketches["w"].cycle) == 2
    estimate, _ = jax.jit(decompress.update)(sketches, ())
    doubled, _ = jax.jit(decompress.update)(jax.tree.map(lambda x: 2 * x, sketches), ())
    assert_tree_close(doubled, jax.tree.map(lambda x: 2 * x, estimate), 1e-6)
    noisy = jax.tree.map(lambda x: x + 1e-3, sketches)
    with pytest.raises(ValueError, match="'w': the sketch's cycle cannot be read any more"):
        decompress.update(noisy, ())
    assert bool(jnp.all(jnp.isnan(jax.jit(decompress.update)(noisy, ())[0]["w"])))


def test_a_treedef_does_not_bring_back_an_older_cycle():
    tx = flora_jax.project(flora_jax.Projection(4, min_dim=8))
    state = tx.init(GRADIENTS)
    first, later = tx.update(GRADIENTS, state)
    second, _ = tx.update(GRADIENTS, later)
    mixed = jax.tree.unflatten(jax.tree.structure(first), jax.tree.leaves(second))
    assert (int(first["w"].cycle), int(mixed["w"].cycle)) == (0, 1)


def test_sum_of_traced_sketches_of_two_cycles_is_nan(sketches):
    spec = sketches["w"].spec

    @jax.jit
    def total(one, other):
        ones = jnp.ones(spec.data_shape)
        return (flora_jax.Sketch(ones, one, spec) + flora_jax.Sketch(ones, other, spec)).data

    assert bool(jnp.all(total(jnp.int32(1), jnp.int32(1)) == 2))
    assert bool(jnp.all(jnp.isnan(total(jnp.int32(1), jnp.int32(2)))))


def test_a_state_that_would_take_up_sketches_is_refused():
    """`zero_nans` before `project` keeps a tree of its input's structure."""
    rule = flora_jax.Projection(8, min_dim=8)
    tx = optax.chain(optax.zero_nans(), flora_jax.flora(1e-2, projection=rule))
    state = tx.init(GRADIENTS)
    tx.update(GRADIENTS, state, GRADIENTS)
    loss = lambda p: jnp.sum(p["w"] @ jnp.ones(24)) + jnp.sum(p["b"])  # noqa: E731
    sketches = flora_jax.value_and_grad(loss, rule)(GRADIENTS, cycle=state)[1]
    with pytest.raises(ValueError, match=r"optax.zero_nans cannot take sketches; put it after"):
        tx.update(sketches, state, GRADIENTS)
