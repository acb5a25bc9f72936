"""The tag of a cycle survives what is done to gradients, and what destroys it is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_jax.chain import tag

CYCLES = st.integers(0, 2**31 - 1)


def read(array):
    cycle, valid = tag.decode(array)
    return int(cycle) if bool(valid) else None


@given(CYCLES, st.floats(1e-10, 1e10), st.sampled_from([-1, 1]))
def test_scales(cycle, size, sign):
    assert read(tag.encode(cycle) * np.float32(sign * size)) == cycle


@given(CYCLES, st.integers(1, 4096))
def test_sums_and_means_of_one_cycle(cycle, count):
    array = tag.encode(cycle)
    assert read(array * count) == read(array + array) == read((array * count) / 3) == cycle


@given(CYCLES, st.floats(1e-5, 1e5))
def test_bfloat16(cycle, size):
    assert read((tag.encode(cycle) * np.float32(size)).astype(jnp.bfloat16)) == cycle


@given(CYCLES, CYCLES)
def test_two_cycles_that_differ_do_not_add_up_to_a_third_unseen(one, other):
    found = read(tag.encode(one) + tag.encode(other))
    if one == other:
        assert found == one
    else:  # digits that differ by an even number have a mean
        digits = [((one >> shift) - (other >> shift)) & 1 for shift in range(0, 32, 4)]
        assert found is None or not any(digits)


@pytest.mark.parametrize(
    "change",
    [
        lambda array: array + 1e-3 * jax.random.normal(jax.random.key(0), array.shape),
        jnp.sign,
        lambda array: array * 0,
        lambda array: array * jnp.nan,
        lambda array: array.astype(jnp.float16),
        lambda array: jnp.abs(array) ** 0.5,
    ],
)
def test_what_destroys_it_is_seen(change):
    assert read(change(tag.encode(123456789))) is None


def test_no_norm_sees_it():
    assert float(jnp.sum(tag.encode(2**31 - 1) ** 2)) == 0.0
    assert float(jnp.max(jnp.abs(tag.encode(2**31 - 1)))) < 1e-22


def test_many_at_once():
    array = jax.vmap(tag.encode)(jnp.arange(40))
    cycles, valid = tag.decode(array)
    np.testing.assert_array_equal(cycles, np.arange(40))
    assert bool(jnp.all(valid))
