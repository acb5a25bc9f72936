"""What `value_and_grad` is given and gives back: Python numbers, settings among the params, auxiliary data, the cycle."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flora_jax
from tests.helpers import normal

RULE = flora_jax.Projection(4, min_dim=8, resample_every=2)
PARAMS = {"kernel": jnp.asarray(normal(0, (16, 16))), "bias": jnp.zeros(16)}
X = jnp.asarray(normal(1, (5, 16)))


def loss(params, x, train=False, layers=1, axis=0, name="none"):
    for _ in range(layers):
        x = jnp.tanh(x @ params["kernel"] + params["bias"])
    assert name == "none"
    return jnp.sum(x.mean(axis) ** 2) if train else jnp.mean(x)


@pytest.mark.parametrize(
    "settings", [dict(train=True), dict(layers=3), dict(axis=1, train=True), dict(name="none")]
)
def test_python_values_stay_what_they_are(settings):
    value, sketches = flora_jax.value_and_grad(loss, RULE)(PARAMS, X, cycle=0, **settings)
    expected, gradients = jax.value_and_grad(loss)(PARAMS, X, **settings)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(sketches["bias"], gradients["bias"], rtol=1e-5, atol=1e-7)


def test_a_float_among_the_params_has_a_gradient():
    def scaled(params, x):
        return loss(params["inner"], x) * params["scale"] ** 2

    params = {"inner": PARAMS, "scale": 0.5}
    value, sketches = flora_jax.value_and_grad(scaled, RULE)(params, X, cycle=0)
    expected, gradients = jax.value_and_grad(scaled)(params, X)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(sketches["scale"], gradients["scale"], rtol=1e-6)


def equinox_models():
    key = jax.random.key(0)
    dropout = eqx.nn.Sequential([eqx.nn.Linear(16, 16, key=key), eqx.nn.Dropout(0.5)])
    attention = eqx.nn.MultiheadAttention(2, 16, key=key)
    return {
        "dropout": (dropout, lambda m, x: jax.vmap(lambda row: m(row, key=key))(x)),
        "attention": (attention, lambda m, x: m(x, x, x)),
    }


@pytest.mark.parametrize("name", ["dropout", "attention"])
def test_floats_that_are_attributes_are_settings(name):
    model, call = equinox_models()[name]

    def squares(model, x):
        return jnp.mean(call(model, x) ** 2)

    tx = flora_jax.flora(1e-2, projection=RULE, accumulation_steps=2)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    value, sketches = flora_jax.value_and_grad(squares, RULE)(model, X, cycle=state)
    np.testing.assert_allclose(value, squares(model, X), rtol=1e-5)
    trained = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    found = jax.tree.leaves(sketches, is_leaf=lambda x: isinstance(x, flora_jax.Sketch))
    assert len(found) == len(trained)
    step = flora_jax.make_train_step(squares, tx, RULE, donate=False)
    after, _, value = step(model, state, X)
    np.testing.assert_allclose(value, squares(model, X), rtol=1e-5)
    settings = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, float)]
    assert [leaf for leaf in jax.tree.leaves(after) if isinstance(leaf, float)] == settings


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_of_any_kind(kind):
    def pair(params, x):
        return kind([loss(params, x), {"rows": x.shape[0], "mean": x.mean()}])

    (value, aux), _ = flora_jax.value_and_grad(pair, RULE, has_aux=True)(PARAMS, X, cycle=0)
    np.testing.assert_allclose(value, loss(PARAMS, X), rtol=1e-6)
    assert aux["rows"] == 5
    np.testing.assert_allclose(aux["mean"], X.mean(), rtol=1e-6)


def test_a_forgotten_has_aux_is_named():
    grad_fn = flora_jax.value_and_grad(lambda p, x: (loss(p, x), x), RULE)
    with pytest.raises(
        TypeError, match="fun must return a scalar, or use has_aux=True, found tuple"
    ):
        grad_fn(PARAMS, X, cycle=0)


class Stateful(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def test_an_nnx_module_whose_state_would_be_lost_is_refused():
    model = Stateful(nnx.Rngs(0))
    grad_fn = flora_jax.value_and_grad(lambda model: jnp.mean(model(X) ** 2), RULE)
    with pytest.raises(
        TypeError, match="NNX module Stateful itself, found that it has BatchStat and"
    ):
        grad_fn(model, cycle=0)
    tx = flora_jax.flora(1e-2, projection=RULE)
    step = flora_jax.make_train_step(lambda model: jnp.mean(model(X) ** 2), tx, RULE)
    with pytest.raises(TypeError, match="NNX module Stateful itself"):
        step(model, tx.init(nnx.state(model, nnx.Param)))
    plain = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    grad_fn = flora_jax.value_and_grad(lambda model: jnp.mean(model(X) ** 2), RULE)
    assert isinstance(jax.tree.leaves(grad_fn(plain, cycle=0)[1])[0], jax.Array)


def train(jit, cycle_of, count=6):
    tx = flora_jax.flora(1e-2, projection=RULE, accumulation_steps=2, min_dim_size_to_factor=8)
    grad_fn = flora_jax.value_and_grad(loss, RULE)

    def step(params, state):
        value, grads = grad_fn(params, X, cycle=cycle_of(state))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step) if jit else step
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(count):
        params, state, _ = step(params, state)
    return params


@pytest.mark.parametrize("jit", [True, False])
def test_the_state_is_as_good_as_its_cycle(jit):
    whole, number = train(jit, lambda state: state), train(jit, flora_jax.cycle)
    for left, right in zip(jax.tree.leaves(whole), jax.tree.leaves(number), strict=True):
        np.testing.assert_array_equal(left, right)
        assert bool(jnp.all(jnp.isfinite(left)))


def test_a_cycle_that_is_not_the_state_s_is_refused_or_poisons():
    with pytest.raises(ValueError, match="'kernel': found a sketch of cycle 0, expected 1; give"):
        train(False, lambda state: 0)
    assert bool(jnp.all(jnp.isnan(train(True, lambda state: 0)["kernel"])))
    assert bool(jnp.all(jnp.isnan(train(True, lambda state: jnp.int32(0))["kernel"])))
    late = train(True, lambda state: flora_jax.cycle(state) + 1)
    assert bool(jnp.all(jnp.isnan(late["kernel"])))


def test_a_cycle_that_is_not_the_state_s_is_seen_between_two_jitted_calls():
    tx = flora_jax.flora(1e-2, projection=RULE, min_dim_size_to_factor=8)
    grad_fn = jax.jit(
        lambda params, cycle: flora_jax.value_and_grad(loss, RULE)(params, X, cycle=cycle)[1]
    )
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    updates, state = update(grad_fn(PARAMS, flora_jax.cycle(state)), state, PARAMS)
    assert bool(jnp.all(jnp.isfinite(updates["kernel"])))
    for _ in range(2):
        updates, state = update(grad_fn(PARAMS, 0), state, PARAMS)
    assert bool(jnp.all(jnp.isnan(updates["kernel"])))


def test_apply_gradients_compares_too():
    tx = flora_jax.flora(1e-2, projection=RULE, min_dim_size_to_factor=8)
    grads = flora_jax.value_and_grad(loss, RULE)(PARAMS, X, cycle=5)[1]
    with pytest.raises(ValueError, match="'kernel': found a sketch of cycle 5, expected 0"):
        flora_jax.apply_gradients(tx, grads, tx.init(PARAMS), PARAMS)


def test_something_else_is_no_cycle():
    with pytest.raises(
        ValueError, match=r"opt_state must hold the state of one flora_jax\.project"
    ):
        flora_jax.value_and_grad(loss, RULE)(PARAMS, X, cycle={"step": jnp.zeros(3)})
