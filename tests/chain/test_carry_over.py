import jax
import jax.numpy as jnp
import optax
import pytest

import flora_jax
from tests.helpers import assert_tree_equal, make_gradients, make_params, normal, often, run

RULE = flora_jax.Projection(5, min_dim=16, resample_every=8)


def flora(**others):
    return flora_jax.flora(0.1, projection=RULE, accumulation_steps=4, **others)


NESTEROV = {"preset": "advised", "nesterov": True, "state_dtype": "int8"}


@pytest.mark.parametrize(
    "others", often([{}, {"momentum": 0.9}, {"preset": "advised"}, NESTEROV], {}, NESTEROV)
)
def test_a_param_is_added_in_the_middle_of_a_cycle(others):
    """What was there goes on to the last bit; what is new starts from nothing."""
    tx = flora(**others)
    params = make_params()
    gradients = make_gradients(params, 12)
    expected, _ = run(tx, params, gradients)
    middle, state = run(tx, params, gradients[:6])
    middle["new"] = jnp.asarray(normal(9, (32, 48)))
    later = [{**g, "new": jnp.asarray(normal(i, (32, 48)))} for i, g in enumerate(gradients[6:])]
    state = flora_jax.carry_over(state, tx, middle)
    found, _ = run(tx, middle, later, state)
    assert (found.pop("new") != middle["new"]).any()
    assert_tree_equal(found, expected)


def labelled(frozen):
    def labels(params):
        return {name: "frozen" if name in frozen else "trained" for name in params}

    return optax.multi_transform({"trained": flora(), "frozen": optax.set_to_zero()}, labels)


def test_a_param_is_frozen_in_the_middle_of_a_cycle():
    params = make_params()
    gradients = make_gradients(params, 12)
    expected, _ = run(labelled(()), params, gradients)
    middle, state = run(labelled(()), params, gradients[:6])
    tx = labelled(("out",))
    found, _ = run(tx, middle, gradients[6:], flora_jax.carry_over(state, tx, middle))
    assert_tree_equal(found["out"], middle["out"])
    assert_tree_equal(found["dense"], expected["dense"])


def test_another_chain_is_refused():
    params = make_params()
    state = optax.sgd(0.1, momentum=0.9).init(params)
    with pytest.raises(
        ValueError, match=r"opt_state must be of a chain like tx, found none of the"
    ):
        flora_jax.carry_over(state, flora(), params)


def test_a_shape_that_changed_starts_anew():
    params = make_params()
    tx = flora()
    _, state = run(tx, params, make_gradients(params, 2))
    other = make_params(outputs=64)
    found = jax.tree.leaves(flora_jax.carry_over(state, tx, other))
    fresh = jax.tree.leaves(tx.init(other))
    assert [leaf.shape for leaf in found] == [leaf.shape for leaf in fresh]
    assert int(flora_jax.cycle(flora_jax.carry_over(state, tx, params))) == 0
