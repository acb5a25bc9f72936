"""apply_gradients and make_train_step with sketches: what optax cannot do with them is said in a sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from tests.helpers import assert_tree_close, normal

PROJECTION = flora_jax.Projection(4, min_dim=8, resample_every=2)
PARAMS = {"a": jnp.asarray(normal(0, (16, 12))), "b": jnp.asarray(normal(1, (12, 16)))}
X = jnp.asarray(normal(2, (4, 16)))


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)


def flora():
    return flora_jax.flora(1e-2, projection=PROJECTION, accumulation_steps=2)


def sketches(cycle=0):
    return flora_jax.value_and_grad(loss, PROJECTION)(PARAMS, X, cycle=cycle)[1]


LABELS = {"a": "frozen", "b": "train"}
PARTLY = {
    "set_to_zero": optax.multi_transform({"train": flora(), "frozen": optax.set_to_zero()}, LABELS),
    "another optimizer": optax.partition({"train": flora(), "frozen": optax.adam(1e-2)}, LABELS),
    "masked": optax.masked(flora(), {"a": False, "b": True}),
}


@pytest.mark.parametrize("name", PARTLY)
def test_a_step_for_leaves_some_of_which_are_not_floras(name):
    tx = PARTLY[name]
    step = flora_jax.make_train_step(loss, tx, PROJECTION, donate=False)

    @jax.jit
    def ordinary(params, state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    found = expected = (PARAMS, tx.init(PARAMS))
    for _ in range(2):
        found, expected = step(*found, X)[:2], ordinary(*expected, X)[:2]
    single = jax.tree.map(jnp.float32, (found, expected))
    assert_tree_close(*single, 1e-4)
    assert bool(jnp.any(found[0]["b"] != PARAMS["b"]))
    if name == "set_to_zero":
        np.testing.assert_array_equal(found[0]["a"], PARAMS["a"])


@pytest.mark.parametrize("name", PARTLY)
def test_a_sketch_that_no_project_takes(name):
    tx = PARTLY[name]
    sentence = (
        "^'a': found a sketch, .* no flora_jax.project .* mask=, or use flora_jax.make_train_step"
    )
    with pytest.raises(ValueError, match=sentence):
        flora_jax.apply_gradients(tx, sketches(), tx.init(PARAMS), PARAMS)


REFUSED = {
    "apply_if_finite": (lambda: optax.apply_if_finite(flora(), 3), "skip_nonfinite=True"),
    "MultiSteps": (
        lambda: optax.MultiSteps(flora(), 2).gradient_transformation(),
        "accumulation_steps in its place",
    ),
    "adaptive_grad_clip": (
        lambda: optax.chain(optax.adaptive_grad_clip(0.1), flora()),
        r"after flora_jax.decompress, as .*optimizer=optax.chain\(adaptive_grad_clip",
    ),
    "add_decayed_weights": (
        lambda: optax.chain(optax.add_decayed_weights(0.1), flora()),
        r"after flora_jax.decompress, as .*optimizer=optax.chain\(add_decayed_weights",
    ),
}


@pytest.mark.filterwarnings("ignore:optax.MultiSteps around flora")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("route", ["apply_gradients", "make_train_step"])
def test_what_cannot_take_sketches(name, route):
    make, way = REFUSED[name]
    tx = make()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=f"^optax.{name} cannot take sketches; .*{way}"):
        if route == "apply_gradients":
            flora_jax.apply_gradients(tx, sketches(), state, PARAMS)
        else:
            flora_jax.make_train_step(loss, tx, PROJECTION)(PARAMS, state, X)


def test_a_state_before_project_that_would_keep_sketches():
    tx = optax.chain(optax.zero_nans(), flora())
    with pytest.raises(ValueError, match=r"optax.zero_nans cannot take sketches; put it after"):
        flora_jax.apply_gradients(tx, sketches(), tx.init(PARAMS), PARAMS)


def test_a_state_around_project_that_would_keep_sketches():
    inner = flora()

    def update(updates, state, params=None):
        result, after = inner.update(updates, state[0], params)
        return result, (after, updates)

    tx = optax.GradientTransformation(lambda params: (inner.init(params), params), update)
    with pytest.raises(
        ValueError, match="must keep the structure of its state, found the sketch of"
    ):
        flora_jax.apply_gradients(tx, sketches(), tx.init(PARAMS), PARAMS)


def test_sentences_of_our_own_stay():
    other = flora_jax.Projection(8, min_dim=8, resample_every=2)
    tx = flora_jax.flora(1e-2, projection=other, accumulation_steps=2)
    with pytest.raises(ValueError, match="'a': found a sketch of rank 4, expected 8"):
        flora_jax.apply_gradients(tx, sketches(), tx.init(PARAMS), PARAMS)


def test_a_failure_without_sketches_stays():
    tx = flora_jax.flora(None, projection=PROJECTION, optimizer=optax.polyak_sgd())
    with pytest.raises(TypeError, match="value"):
        flora_jax.apply_gradients(tx, sketches(), tx.init(PARAMS), PARAMS)


def test_extra_arguments_that_are_no_arrays():
    def update(updates, state, params=None, *, how, **others):
        del params, others
        return jax.tree.map(how, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = flora_jax.flora(None, projection=PROJECTION, optimizer=inner)
    found, _ = flora_jax.apply_gradients(
        tx, sketches(), tx.init(PARAMS), PARAMS, how=lambda update: 0 * update
    )
    np.testing.assert_array_equal(found["a"], PARAMS["a"])
