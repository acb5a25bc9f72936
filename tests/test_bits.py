"""Bits: uniform and independent over entries, keys and layers; constants on the host are those of the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_jax import bits
from tests.helpers import bits_of

WORDS = st.integers(0, 2**32 - 1)


def test_bits_of_all_kinds_are_independent():
    """Of entries side by side, layers, steps and leaves: correlations within five standard deviations."""
    shape = (4, 128, 128)
    draws = [np.asarray(bits_of(seed, shape, axis=0), np.float64) / 2**32 - 0.5 for seed in (0, 1)]
    size = 128 * 128
    for one in draws:
        np.testing.assert_allclose(one.mean(), 0, atol=5 / np.sqrt(12 * one.size))
        np.testing.assert_allclose(one.var(), 1 / 12, atol=5 * 0.0745 / np.sqrt(one.size))
    pairs = [(draws[0][i], draws[0][j]) for i in range(4) for j in range(i)]
    pairs += [(draws[0][i], draws[1][i]) for i in range(4)]
    flat = [x.reshape(-1) for x in draws[0]]
    pairs += [(x[:-lag], x[lag:]) for x in flat for lag in (1, 2, 16, 128, 1024)]
    for left, right in pairs:
        correlation = 12 * float(np.mean(left * right))
        assert abs(correlation) <= 5 / np.sqrt(size - 1024)
    for place in (0, 7, 16, 31):  # each bit by itself
        ones = np.mean((np.asarray(bits_of(3, (size,))) >> place) & 1)
        assert abs(ones - 0.5) <= 5 * 0.5 / np.sqrt(size)


def test_a_part_of_the_layers_has_their_bits():
    whole = bits_of(5, (6, 8, 3), axis=0)
    part = bits_of(5, (2, 8, 3), axis=0, index=jnp.array([4, 1]))
    np.testing.assert_array_equal(whole[jnp.array([4, 1])], part)


@given(WORDS, WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_keys_of_the_host_are_those_of_the_device(first, second, numbers):
    on_host, on_device = (first, second), (jnp.uint32(first), jnp.uint32(second))
    for number in numbers:
        on_host = bits.fold(on_host, number)
        on_device = bits.fold(on_device, jnp.uint32(number))
    assert on_host == tuple(map(int, on_device))
    place = jnp.arange(5)
    np.testing.assert_array_equal(bits.at(on_host, place), bits.at(on_device, place))


@given(WORDS, WORDS, WORDS)
def test_the_hash_is_what_its_definition_gives(first, second, number):
    """Chris Wellons' lowbias32, in Python's integers, twice."""

    def mixed(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    expected = mixed((mixed(number ^ first) + second) % 2**32)
    assert int(bits.at((first, second), jnp.uint32(number))) == expected


@pytest.mark.parametrize("step", [1, 2**16, 2**31])
def test_folded_keys_are_independent(step):
    """Each of 32 bits of words under keys that differ by one number, and by two in turn: within six standard errors."""
    count = 2**14
    numbers = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(
        step % 2**32 if step < 2**31 else 0x10001
    )
    folded = bits.fold(bits.fold((1, 2), jnp.uint32(step)), numbers)
    draws = [np.asarray(bits.at(folded, jnp.uint32(place))) for place in (0, 1)]
    draws += [np.asarray(word) for word in folded]
    for word in draws:
        ones = ((word[:, None] >> np.arange(32)) & 1).mean(0)
        assert np.abs(ones - 0.5).max() <= 6 * 0.5 / np.sqrt(count)
    centred = [word.astype(np.float64) / 2**32 - 0.5 for word in draws]
    for i, left in enumerate(centred):
        for right in [*centred[:i], np.roll(left, 1)]:
            assert abs(12 * np.mean(left * right)) <= 6 / np.sqrt(count)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_words_of_keys_differ(impl):
    keys = jax.random.split(jax.random.key(0, impl=impl), 100)
    found = np.stack(bits.words(keys), -1)
    assert found.shape == (100, 2) and len(np.unique(found, axis=0)) == 100
    np.testing.assert_array_equal(found[7], np.stack(bits.words(keys[7])))
