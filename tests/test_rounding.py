"""Rounding: unbiased by the binomial distribution, exact where there is nothing to round, the same on every layout."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import flora_jax
from flora_jax import rounding
from tests.helpers import assert_tree_equal, bits_of, normal

COUNT = 2**16


@pytest.mark.parametrize("value", [1.0, -3.7, 1e-3, -1e-30, 2.5e38])
@pytest.mark.parametrize("part", [0.01, 0.25, 0.5, 0.9])
def test_the_mean_is_the_number(value, part):
    """Of n numbers the share that is rounded up is within five standard deviations of the part."""
    low = np.float32(jnp.asarray(value, jnp.bfloat16))
    away = jnp.bfloat16(np.copysign(np.inf, low))
    high = np.float32(jnp.nextafter(jnp.asarray(low, jnp.bfloat16), away))
    x = np.float32(np.float64(low) + part * (np.float64(high) - np.float64(low)))
    exact = (np.float64(x) - low) / (np.float64(high) - low)
    found = np.asarray(rounding.to_bfloat16(jnp.full(COUNT, x), bits_of(1, (COUNT,))), np.float32)
    assert set(np.unique(found)) <= {low, high}
    deviation = np.sqrt(exact * (1 - exact) / COUNT)
    assert abs(np.mean(found == high) - exact) <= 5 * deviation


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_the_mean_of_integers_is_the_number(part):
    x = np.float32(-7 + part)
    found = np.asarray(rounding.to_integers(jnp.full(COUNT, x), bits_of(2, (COUNT,))))
    assert set(np.unique(found)) <= {-7.0, -6.0}
    assert abs(np.mean(found == -6) - part) <= 5 * np.sqrt(part * (1 - part) / COUNT)


@hypothesis.settings(max_examples=50, derandomize=True)
@hypothesis.given(
    st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=20),
    st.integers(0, 2**31),
)
def test_one_of_the_two_numbers_beside(numbers, seed):
    x = jnp.asarray(numbers, jnp.float32)
    found = np.asarray(rounding.to_bfloat16(x, bits_of(seed, x.shape)), np.float32)
    for one, result in zip(np.asarray(x), found, strict=True):
        if not np.isfinite(one):
            np.testing.assert_array_equal(result, one)
            continue
        raw = one.view(np.uint32)
        down = (raw & np.uint32(0xFFFF0000)).view(np.float32)
        up = ((raw & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
        assert np.isfinite(result) and result in (down, up)
        if one == down:
            assert result == one


def small(dtype=jnp.bfloat16):
    return {
        "layers": {"kernel": jnp.ones((3, 32, 48), dtype)},
        "head": jnp.ones((48, 16), dtype),
        "scale": jnp.ones(7, jnp.float32),
    }


def stepped(params, steps=200, rounding="stochastic", **settings):
    """Each entry loses one thousandth of the distance of bfloat16 numbers below 1 in each step."""
    tx = optax.sgd(optax.constant_schedule(2.0**-8 / 50))
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def step(params, state):
        return flora_jax.apply_gradients(tx, grads, state, params, rounding=rounding, **settings)

    for _ in range(steps):
        params, state = step(params, state)
    return params


def test_small_updates_arrive():
    """After 200 steps of 1/50 of a distance each the mean has moved by 4 of them; to nearest nothing moves."""
    params = stepped(small())
    for leaf in (params["layers"]["kernel"], params["head"]):
        moved = (1 - np.asarray(leaf, np.float64)) * 2**8
        deviation = np.sqrt(200 * 0.02 * 0.98 / moved.size)
        assert abs(moved.mean() - 4) <= 5 * deviation
        assert moved.std() > 1.5
    plain = stepped(small(), rounding="nearest")
    np.testing.assert_array_equal(plain["head"], 1)
    np.testing.assert_allclose(params["scale"], 1 - 200 * 2.0**-8 / 50, rtol=1e-5)


@pytest.mark.parametrize("compressed", [False, True])
def test_the_same_bits_on_every_layout(compressed):
    """On one device and on eight, sharded along each axis, in slices or not; for compressed stacks and others."""
    params = small()
    projection = flora_jax.Projection(4, min_dim=16)
    tx = flora_jax.flora(1e-3, projection=projection) if compressed else optax.adam(1e-3)
    grads = jax.tree.map(lambda x: jnp.asarray(normal(x.size, x.shape), x.dtype), params)

    def after(params, **settings):
        @jax.jit
        def step(params, state, grads):
            return flora_jax.apply_gradients(
                tx, grads, state, params, rounding="stochastic", **settings
            )

        state = tx.init(params)
        for _ in range(2):
            params, state = step(params, state, grads)
        return params

    expected = after(params)
    if compressed:
        assert_tree_equal(after(params, slice_above=1), expected)
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
    for axis in (1, 2):
        names = PartitionSpec(*("x" if i == axis else None for i in range(3)))
        sharded = {
            **params,
            "layers": {
                "kernel": jax.device_put(params["layers"]["kernel"], NamedSharding(mesh, names))
            },
        }
        found = after(sharded)["layers"]["kernel"]
        same = np.mean(np.asarray(found) == np.asarray(expected["layers"]["kernel"]))
        assert (
            same > 0.999
        )  # where the update itself differs in its last digits a number may tip over


def test_fused_and_micro_steps_between_change_nothing():
    """Params are the very same on micro-steps that complete no optimizer step."""
    params = {"kernel": jnp.asarray(normal(0, (32, 48)), jnp.bfloat16)}
    projection = flora_jax.Projection(4, min_dim=16, resample_every=3)
    tx = flora_jax.flora(1e-2, projection=projection, accumulation_steps=3)
    step = flora_jax.make_train_step(
        lambda p, x: jnp.mean((x @ p["kernel"]).astype(jnp.float32) ** 2),
        tx,
        projection,
        rounding="stochastic",
        donate=False,
    )
    x = jnp.asarray(normal(1, (5, 32)), jnp.bfloat16)
    state = tx.init(params)
    first, state, _ = step(params, state, x)
    second, state, _ = step(first, state, x)
    third, state, _ = step(second, state, x)
    assert_tree_equal(second, params)
    assert np.any(np.asarray(third["kernel"]) != np.asarray(params["kernel"]))
