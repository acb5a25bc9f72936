"""optax's wrappers around flora: what cannot take sketches says so, and MultiSteps costs what it need not."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import flora_jax

PROJECTION = flora_jax.Projection(4, min_dim=8, resample_every=2)
PARAMS = {"w": jnp.ones((16, 12))}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)


def flora():
    return flora_jax.flora(1e-2, projection=PROJECTION, accumulation_steps=2)


def sketches():
    tx = flora_jax.project(PROJECTION)
    return tx.update(GRADS, tx.init(PARAMS))[0]


WRAPPED = {
    "apply_if_finite": (lambda: optax.apply_if_finite(flora(), 3), "skip_nonfinite=True"),
    "conditionally_mask": (
        lambda: optax.conditionally_mask(flora(), lambda step: step < 3),
        r"optimizer=optax.chain\(conditionally_mask\(...\), ...\)",
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapper_is_given_sketches(name):
    make, way = WRAPPED[name]
    tx = make()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=f"optax.{name} cannot take sketches; .*{way}"):
        tx.update(sketches(), state, PARAMS)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapper_is_given_ordinary_gradients(name):
    tx = WRAPPED[name][0]()
    with warnings.catch_warnings(action="error"):
        updates, _ = jax.eval_shape(tx.update, GRADS, tx.init(PARAMS), PARAMS)
    assert updates["w"].shape == (16, 12)


AROUND = {
    "flora": flora,
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), flora()),
    "accumulate": lambda: flora_jax.accumulate(optax.sgd(0.1), 2),
}


@pytest.mark.parametrize("name", AROUND)
def test_multisteps_around_a_chain_warns_once(name):
    tx = optax.MultiSteps(AROUND[name](), 2)
    with pytest.warns(
        UserWarning, match="accumulator as large as the params; .*accumulation_steps"
    ):
        state = tx.init(PARAMS)
    with warnings.catch_warnings(action="error"):
        jax.eval_shape(tx.update, GRADS, state, PARAMS)


def test_multisteps_warns_on_update_of_a_state_from_elsewhere():
    tx = optax.MultiSteps(flora(), 2)
    with pytest.warns(UserWarning):
        state = optax.MultiSteps(flora(), 2).init(PARAMS)
    with pytest.warns(UserWarning, match="accumulation_steps"):
        jax.eval_shape(tx.update, GRADS, state, PARAMS)


def test_multisteps_inside_is_no_concern():
    with warnings.catch_warnings(action="error"):
        inner = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
        flora_jax.flora(None, projection=PROJECTION, optimizer=inner).init(PARAMS)
