import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax

GRADIENTS = {"w": jnp.arange(32 * 24, dtype=jnp.float32).reshape(32, 24), "b": jnp.ones(24)}


@pytest.fixture
def sketches():
    tx = flora_jax.project(flora_jax.Projection(4, min_dim=8))
    return tx.update(GRADIENTS, tx.init(GRADIENTS))[0]


def test_the_cycle_is_absent_until_set(sketches):
    fresh = flora_jax.Sketch(sketches["w"].data, None, sketches["w"].spec)
    assert [leaf.dtype for leaf in jax.tree.leaves(fresh)] == [jnp.float32]
    assert [leaf.dtype for leaf in jax.tree.leaves(sketches["w"])] == [jnp.float32, jnp.int32]


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
