import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.chain import storage
from tests.helpers import bytes_on_device, normal

SHAPE = (33, 200)  # 6600 numbers; the last axis is no multiple of the block


def kept_many(dtype, array, samples):
    """The mean of what is loaded after rounding under many keys, in float64."""
    keys = jax.random.split(jax.random.key(0), samples)
    load = jax.jit(jax.vmap(lambda key: storage.load(storage.store(dtype, array, key))))
    return np.asarray(load(keys), np.float64).mean(0)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_rounding_is_unbiased(dtype):
    """One step wide rounding has a spread of at most half a step; five of its standard errors."""
    array, samples = jnp.asarray(normal(0, SHAPE)), 400
    exact = np.asarray(array, np.float64)
    if dtype == "bfloat16":
        step = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    else:
        padded = np.pad(np.abs(exact), ((0, 0), (0, 56))).reshape(33, 2, 128)
        largest = 127 if dtype == "int8" else 7
        step = np.repeat(padded.max(-1) / largest, 128, axis=1)[:, :200]
    error = np.abs(kept_many(dtype, array, samples) - exact)
    assert (error <= 5 * step / 2 / np.sqrt(samples) + 1e-6).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape", [SHAPE, (4096,), (7,), (), (2, 3, 1000)])
def test_bytes_are_the_real_ones(dtype, shape):
    with jax.enable_x64(True):
        kept = storage.zeros(dtype, shape)
        stored = storage.store(dtype, jnp.ones(shape, jnp.float64), jax.random.key(0))
    for tree in (kept, stored):
        real = sum(map(bytes_on_device, jax.tree.leaves(tree)))
        assert storage.nbytes(dtype, shape) == real


def test_float32_is_exact():
    array = jnp.asarray(normal(1, SHAPE))
    kept = storage.load(storage.store("float32", array, jax.random.key(0)))
    np.testing.assert_array_equal(kept, array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(dtype, bad):
    array = jnp.zeros(SHAPE).at[3, 4].set(bad)
    kept = storage.load(storage.store(dtype, array, jax.random.key(0)))
    assert not bool(jnp.isfinite(kept[3, 4]))


def test_small_additions_are_not_lost_in_bfloat16():
    """1000 additions of 0.001 to 1: nearest rounding stays at 1, stochastic rounding reaches 2."""

    def add(kept, key):
        return storage.store("bfloat16", storage.load(kept) + 1e-3, key), None

    start = jnp.ones(4000, jnp.bfloat16)
    end, _ = jax.lax.scan(add, start, jax.random.split(jax.random.key(0), 1000))
    nearest = start
    for _ in range(10):
        nearest = (nearest.astype(jnp.float32) + 1e-3).astype(jnp.bfloat16)
    assert float(nearest.astype(jnp.float32).max()) == 1.0
    # each addition is off by at most a step of 1/128, without bias: √1000/128/2 for one number
    assert float(end.astype(jnp.float32).mean()) == pytest.approx(2.0, abs=5 * 0.124 / 4000**0.5)


def test_small_arrays_are_not_quantized():
    kept = storage.store("int8", jnp.full(100, 0.1), jax.random.key(0))
    assert kept.values.dtype == jnp.float32
    np.testing.assert_array_equal(storage.load(kept), jnp.full(100, 0.1))


def test_a_tree_keeps_its_structure():
    tree = {"a": jnp.asarray(normal(0, SHAPE)), "b": [jnp.ones(3)]}
    leaves, structure = jax.tree.flatten(tree)
    kept = [storage.store("int8", leaf, jax.random.key(0)) for leaf in leaves]
    stored = storage.transposed("int8", kept, structure)
    assert jax.tree.structure(stored.values) == jax.tree.structure(stored.scales) == structure
    loaded = storage.load_tree(stored)
    np.testing.assert_allclose(loaded["a"], tree["a"], atol=float(jnp.abs(tree["a"]).max()) / 127)
    np.testing.assert_array_equal(loaded["b"][0], tree["b"][0])
