import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax import bits
from flora_jax.chain import storage
from tests.helpers import bytes_on_device, normal

KEY = (3, 4)
SHAPE = (33, 200)  # 6600 numbers; the last axis is no multiple of the block


def kept_many(dtype, array, samples, rank_axis=0):
    """What is loaded after rounding under many keys, in float64."""
    load = jax.jit(jax.vmap(lambda i: kept(dtype, array, bits.fold(KEY, i), rank_axis)))
    return np.asarray(load(jnp.arange(samples)), np.float64)


def kept(dtype, array, key=KEY, rank_axis=0):
    return storage.load(storage.store(dtype, array, key, rank_axis), key, rank_axis)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_rounding_is_unbiased(dtype):
    """One step wide rounding has a spread of at most half a step; six of its standard errors, of 6600 numbers."""
    array, samples = jnp.asarray(normal(0, SHAPE)), 400
    exact = np.asarray(array, np.float64)
    if dtype == "bfloat16":
        step = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    else:
        step = steps(dtype, exact)
    error = np.abs(kept_many(dtype, array, samples).mean(0) - exact)
    assert (error <= 6 * step / 2 / np.sqrt(samples) + 1e-6).all()


def steps(dtype, exact, rank_axis=0):
    """The distance of integers: a block's largest number over the largest integer and a half, to bfloat16 in int4."""
    rows, columns = exact.shape
    if dtype == "int4" and rank_axis == 0:
        padded = np.pad(np.abs(exact), ((0, -rows % 64), (0, 0))).reshape(-1, 64, columns)
        return in_bfloat16(np.repeat(padded.max(1) / 7.5, 64, axis=0)[:rows])
    padded = np.pad(np.abs(exact), ((0, 0), (0, -columns % 128))).reshape(rows, -1, 128)
    found = np.repeat(padded.max(-1) / (127.5 if dtype == "int8" else 7.5), 128, axis=1)
    return found[:, :columns] if dtype == "int8" else in_bfloat16(found[:, :columns])


def in_bfloat16(positive):
    """The least number of eight significant bits that is not smaller."""
    fraction, exponent = np.frexp(positive)
    return np.ldexp(np.ceil(fraction * 256) / 256, exponent)


@pytest.mark.parametrize(
    ("dtype", "rank_axis"), [("int8", 0), ("int4", 0), ("int4", None), ("int4", 1)]
)
def test_the_error_is_uniform_whatever_the_number(dtype, rank_axis):
    """Its variance is a twelfth of a step's square for each number, within six standard errors, and it is within half a step.

    (The square of a uniform number has a standard deviation of 1 / √180.) Stochastic rounding has f (1 − f), a sixth in the mean.
    """
    exact = normal(0, SHAPE).astype(np.float64)
    step = steps(dtype, exact, rank_axis)
    samples = 2000
    array = jnp.asarray(exact, jnp.float32)
    error = (kept_many(dtype, array, samples, rank_axis) - exact) / step
    assert np.abs(error).max() <= 0.5 + 1e-4
    bound = 6 / np.sqrt(180 * samples)
    np.testing.assert_allclose(np.mean(error**2, 0), 1 / 12, atol=bound)
    assert np.abs(np.mean(error**2) - 1 / 12) <= 6 / np.sqrt(180 * error.size)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_blocks_of_zeros_stay_zeros(dtype):
    """As those of an embedding's rows whose tokens were not there."""
    array = jnp.asarray(normal(0, SHAPE)).at[5].set(0.0)
    np.testing.assert_array_equal(kept(dtype, array, rank_axis=None)[5], 0.0)
    np.testing.assert_array_equal(kept(dtype, array, rank_axis=1)[5], 0.0)


def test_another_key_adds_noise_but_no_bias():
    """A state that another manual mesh reads: a sixth of a step's square from rounding, a twelfth from what is added."""
    exact = normal(0, SHAPE).astype(np.float64)
    stored = storage.store("int4", jnp.asarray(exact, jnp.float32), KEY, 0)
    loaded = np.asarray(storage.load(stored, bits.fold(KEY, 1), 0), np.float64)
    error = (loaded - exact) / steps("int4", exact)
    assert abs(np.mean(error)) <= 6 * np.sqrt(1 / 4 / error.size)
    assert np.mean(error**2) == pytest.approx(1 / 4, abs=6 * np.sqrt(1 / 8 / error.size))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    ("shape", "rank_axis"),
    [
        (SHAPE, None),
        (SHAPE, 0),
        (SHAPE, 1),
        ((4096,), None),
        ((7,), None),
        ((), None),
        ((2, 3, 1000), 1),
    ],
)
def test_bytes_are_the_real_ones(dtype, shape, rank_axis):
    with jax.enable_x64(True):
        zeros = storage.zeros(dtype, shape, rank_axis=rank_axis)
        stored = storage.store(dtype, jnp.ones(shape, jnp.float64), KEY, rank_axis)
    for tree in (zeros, stored):
        real = sum(map(bytes_on_device, jax.tree.leaves(tree)))
        assert storage.nbytes(dtype, shape, rank_axis=rank_axis) == real


def test_float32_is_exact():
    array = jnp.asarray(normal(1, SHAPE))
    np.testing.assert_array_equal(kept("float32", array), array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(dtype, bad):
    array = jnp.zeros(SHAPE).at[3, 4].set(bad)
    assert not bool(jnp.isfinite(kept(dtype, array)[3, 4]))


def test_small_additions_are_not_lost_in_bfloat16():
    """1000 additions of 0.001 to 1: nearest rounding stays at 1, stochastic rounding reaches 2."""

    def add(kept, i):
        return storage.store("bfloat16", storage.load(kept, None) + 1e-3, bits.fold(KEY, i)), None

    start = jnp.ones(4000, jnp.bfloat16)
    end, _ = jax.lax.scan(add, start, jnp.arange(1000))
    nearest = start
    for _ in range(10):
        nearest = (nearest.astype(jnp.float32) + 1e-3).astype(jnp.bfloat16)
    assert float(nearest.astype(jnp.float32).max()) == 1.0
    # each addition is off by at most a step of 1/128, without bias: √1000/128/2 for one number
    assert float(end.astype(jnp.float32).mean()) == pytest.approx(2.0, abs=5 * 0.124 / 4000**0.5)


def test_small_arrays_are_not_quantized():
    stored = storage.store("int8", jnp.full(100, 0.1), KEY)
    assert stored.values.dtype == jnp.float32
    np.testing.assert_array_equal(storage.load(stored, KEY), jnp.full(100, 0.1))


def test_a_tree_keeps_its_structure():
    tree = {"a": jnp.asarray(normal(0, SHAPE)), "b": [jnp.ones(3)]}
    leaves, structure = jax.tree.flatten(tree)
    stored = [storage.store("int8", leaf, KEY) for leaf in leaves]
    stored = storage.transposed("int8", stored, structure)
    assert jax.tree.structure(stored.values) == jax.tree.structure(stored.scales) == structure
    first, second = (storage.load(leaf, KEY) for leaf in storage.separated(stored, structure))
    np.testing.assert_allclose(first, tree["a"], atol=float(jnp.abs(tree["a"]).max()) / 254)
    np.testing.assert_array_equal(second, tree["b"][0])
