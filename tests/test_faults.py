"""What is not finite is left out of the fused step, as if it had not been there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import flora_jax
from tests.helpers import assert_tree_close, assert_tree_equal, make_params, normal

RULE = flora_jax.Projection(5, min_dim=16, resample_every=4)
BATCHES = [normal(i, (8, 32)) for i in range(5)]


def loss(params, x, dtype=jnp.float32):
    """In bfloat16 the square of a large activation overflows."""
    kernel, out = params["dense"]["kernel"].astype(dtype), params["out"]["kernel"].astype(dtype)
    y = jnp.tanh(x.astype(dtype) @ kernel + params["dense"]["bias"].astype(dtype)) @ out
    return jnp.mean(jnp.sum(y * y, axis=-1) * jnp.exp(x[:, 0]).astype(dtype))


def train(batches, of=loss, **others):
    tx = flora_jax.flora(0.1, projection=RULE, accumulation_steps=2, skip_nonfinite=True, **others)
    step = flora_jax.make_train_step(of, tx, RULE, donate=False)
    params = make_params()
    state = tx.init(params)
    for batch in batches:
        params, state, _ = step(params, state, jnp.asarray(batch))
    return params, state


def with_bad(bad):
    return [BATCHES[0], bad, *BATCHES[1:3], bad, *BATCHES[3:]]


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_batch_has_not_been(value, momentum):
    bad = BATCHES[0].copy()
    bad[2, 3] = value
    found, state = train(with_bad(bad), momentum=momentum)
    expected, clean = train(BATCHES, momentum=momentum)
    assert_tree_equal(found, expected)
    assert_tree_equal(state.inner_state, clean.inner_state)
    assert int(state.total_notfinite) == 2


def test_a_loss_that_overflows_in_bfloat16():
    of = functools.partial(loss, dtype=jnp.bfloat16)
    bad = BATCHES[0].copy()
    bad[:, 0] = 100.0  # finite, as is its exponential in float64; beyond bfloat16's 3.4e38
    assert not np.isfinite(of(make_params(), bad)) and np.isfinite(np.exp(np.float64(100)))
    found, state = train(with_bad(bad), of)
    expected, clean = train(BATCHES, of)
    assert_tree_equal(found, expected)
    assert_tree_equal(state.inner_state, clean.inner_state)


def test_a_batch_of_no_example_is_a_micro_step_of_gradient_zero():
    found, state = train([BATCHES[0], np.zeros((0, 32), np.float32)])
    tx = flora_jax.flora(0.1, projection=RULE, accumulation_steps=2)
    params = make_params()
    clean = tx.init(params)
    gradient = jax.grad(loss)(params, BATCHES[0])
    for grads in (gradient, jax.tree.map(jnp.zeros_like, gradient)):
        updates, clean = tx.update(grads, clean, params)
    assert_tree_close(found, jax.tree.map(jnp.add, params, updates), 1e-5)
    assert int(state.total_notfinite) == 0


def test_a_device_without_examples_adds_nothing():
    """Sums over a sharded batch of which one device's part is masked out, divided by the total count."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    x = jnp.asarray(normal(3, (8, 32)))
    kept = jnp.asarray([1, 1, 0, 0, 1, 1, 1, 0], jnp.float32)  # nothing of the second device's

    def part(params, x, kept):
        y = jnp.tanh(x @ params["dense"]["kernel"]) @ params["out"]["kernel"]
        return jnp.sum(kept * jnp.sum(y * y, axis=-1))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    def sharded(params, x, kept):
        grad_fn = flora_jax.value_and_grad(
            lambda params: (
                jax.lax.psum(part(params, x, kept), "data") / jax.lax.psum(kept.sum(), "data")
            ),
            RULE,
        )
        return grad_fn(params, cycle=0)

    def alone(params):
        chosen = np.asarray(kept) > 0
        return part(params, x[chosen], kept[chosen]) / kept.sum()

    expected = flora_jax.value_and_grad(alone, RULE)(make_params(), cycle=0)
    assert_tree_close(sharded(make_params(), x, kept), expected, 1e-5)


def test_a_leaf_of_no_numbers_passes():
    tx = flora_jax.flora(0.1, rank=4, accumulation_steps=2, skip_nonfinite=True)
    params = {"empty": jnp.zeros((0, 8)), "w": jnp.ones((256, 256))}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    assert updates["empty"].shape == (0, 8) and bool(jnp.all(jnp.isfinite(updates["w"])))
    assert float(jnp.abs(updates["w"]).max()) > 0
