"""ordinary_step is optax's own loop, keeps to shardings, and trains adapters too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flora_jax.update.ordinary_step import ordinary_step
from tests.helpers import assert_tree_equal, make_params, normal

X = jnp.asarray(normal(5, (8, 32)))


def loss(params, x, scale=1.0):
    y = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])
    return scale * jnp.mean((y @ params["out"]["kernel"] - x) ** 2)


def expected(tx, params, steps, *batch):
    @jax.jit
    def one(params, state):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    for _ in range(steps):
        params, state, value = one(params, state)
    return params, state, value


@pytest.mark.parametrize("batch", [(X,), (X, jnp.float32(2.0))])
def test_it_is_the_loop_as_it_is_written(batch):
    tx = optax.adam(1e-2)
    step, params = ordinary_step(loss, tx), make_params()
    state = tx.init(params)
    goal = expected(tx, make_params(), 3, *batch)
    for _ in range(3):
        params, state, value = step(params, state, *batch)
    assert_tree_equal((params, state, value), goal)


def test_params_and_state_are_overwritten():
    tx = optax.adam(1e-2)
    params = make_params()
    given = (params, tx.init(params))
    ordinary_step(loss, tx)(*given, X)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_results_lie_where_they_are_told():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    tx, params = optax.adam(1e-2), make_params()
    goal = expected(tx, params, 1, X)
    shapes = (params, jax.eval_shape(tx.init, params))
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = jax.tree.map(lambda x: rows if x.ndim else everywhere, shapes)
    params = jax.device_put(params, places[0])
    state = jax.jit(tx.init, out_shardings=places[1])(params)
    found = ordinary_step(loss, tx, places)(params, state, X)
    for leaf, place in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(goal), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)


def test_what_is_frozen_goes_with_the_batch():
    tx, params = optax.sgd(0.1), make_params()

    def of_own(own, frozen, x):
        return loss({**frozen, "out": own}, x)

    own = jax.tree.map(jnp.copy, params["out"])
    step = ordinary_step(of_own, tx)
    own, _, value = step(own, tx.init(own), params, X)
    grads = jax.grad(loss)(params, X)["out"]
    np.testing.assert_allclose(
        own["kernel"], params["out"]["kernel"] - 0.1 * grads["kernel"], rtol=1e-6, atol=1e-7
    )
    assert float(value) == pytest.approx(float(loss(params, X)))
