"""The distributions of `A`: unbiased, with the stated variance and the stated structure."""

import json
import os
import subprocess
import sys
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.chain import distributions
from tests.helpers import DISTRIBUTIONS, make_spec, normal, sample

SAMPLES = 3000
SIZE, RANK, ROWS = 12, 3, 2


def estimates(distribution, size=SIZE, rank=RANK):
    """`g AᵀA` for two rows and many keys, in float64: (samples, rows, size), and the rows."""
    spec = make_spec((size, ROWS), (0,), rank=rank, distribution=distribution)
    a = np.asarray(jax.vmap(lambda cycle: sample(spec, cycle))(jnp.arange(SAMPLES)), np.float64)
    g = normal(5, (ROWS, size)).astype(np.float64)
    return np.einsum("nm,krm,krl->knl", g, a, a), g


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mean_of_the_estimates_is_the_gradient(distribution):
    """The mean of K estimates is off by √(v/K) ‖g‖ in the root mean square; four of these is the bound."""
    found, g = estimates(distribution)
    bound = 4 * np.sqrt(distributions.variance(distribution, RANK, SIZE) / SAMPLES)
    error = np.linalg.norm(found.mean(0) - g) / np.linalg.norm(g)
    assert error < bound


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [8, 12])
def test_variance_is_the_stated_one(distribution, size):
    """Relative errors have a spread of the order of their mean: 3000 samples give it within 10 %."""
    found, g = estimates(distribution, size)
    measured = np.mean(np.sum((found - g) ** 2, (1, 2))) / np.sum(g**2)
    assert measured == pytest.approx(distributions.variance(distribution, RANK, size), rel=0.1)


@pytest.mark.parametrize("distribution", ["orthonormal", "srtt"])
@pytest.mark.parametrize("size", [9, 16])
@pytest.mark.parametrize("rank", [4, 9])
def test_orthonormal_rows_and_their_scale(size, rank, distribution):
    spec = make_spec((size, 5), (0,), rank=rank, distribution=distribution)
    a = np.asarray(sample(spec, 2), np.float64)
    np.testing.assert_allclose(a @ a.T, np.eye(rank) * size / rank, atol=1e-5)


def test_srht_rows_are_orthogonal_on_a_power_of_two():
    spec = make_spec((64, 5), (0,), rank=16, distribution="srht")
    a = np.asarray(sample(spec, 2), np.float64)
    np.testing.assert_allclose(a @ a.T, np.eye(16) * 4, atol=1e-5)


def test_srht_is_signs_times_rows_of_the_hadamard_matrix():
    spec = make_spec((16, 5), (0,), rank=8, distribution="srht")
    a = np.asarray(sample(spec, 1), np.float64) * np.sqrt(8)
    hadamard = np.ones((1, 1))
    for _ in range(4):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    hits = [
        [bool(np.all(a[i] * a[j] == a[i][0] * a[j][0] * row)) for row in hadamard]
        for i in range(8)
        for j in range(i)
    ]
    assert all(sum(row) == 1 for row in hits)  # products of two rows cancel the signs


@given(st.integers(1, 90))
@settings(max_examples=15, deadline=None)
def test_srtt_is_signs_times_rows_of_hartley_by_hadamard(size):
    """A row of signs alone times any other cancels the random signs: what is left are the rows, in another order."""
    every = jnp.arange(size, dtype=jnp.int32)
    a = np.asarray(
        distributions.columns("srtt", jax.random.key(7), size, size, every), np.float64
    ).T
    odd, expected = size, np.ones((1, 1))
    while odd % 2 == 0:
        odd //= 2
        expected = np.kron(expected, [[1, 1], [1, -1]])
    angles = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    expected = np.kron(np.cos(angles) + np.sin(angles), expected)
    signs = a[np.argmin(np.abs(np.abs(a) - 1).max(1))]
    overlap = (a * signs) @ expected.T / size
    assert sorted(np.argmax(overlap, 1)) == list(range(size))
    np.testing.assert_allclose(overlap.max(1), 1, atol=1e-5)


@pytest.mark.parametrize("size", [1, 8, 64])
def test_srtt_is_srht_on_a_power_of_two(size):
    every, key = jnp.arange(size, dtype=jnp.int32), jax.random.key(3)
    rank = max(1, size // 2)
    np.testing.assert_array_equal(
        distributions.columns("srtt", key, rank, size, every),
        distributions.columns("srht", key, rank, size, every),
    )


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_products_modulo_an_odd_side_do_not_overflow(data):
    modulus = data.draw(st.integers(2**15, 2**24 - 1))
    left, right = (data.draw(st.integers(0, modulus - 1)) for _ in range(2))
    found = distributions._times(jnp.uint32(left), jnp.uint32(right), modulus)
    assert int(found) == left * right % modulus


@pytest.mark.parametrize("distribution", ["rademacher", "srht"])
def test_entries_are_signs(distribution):
    spec = make_spec((40, 5), (0,), rank=33, distribution=distribution)
    a = np.asarray(sample(spec, 0))
    np.testing.assert_allclose(np.abs(a), 33**-0.5, rtol=1e-6)
    assert abs(np.sign(a).mean()) < 5 / np.sqrt(a.size)


def test_gaussian_entries_are_normal():
    """A million entries: five standard errors of each moment; Kolmogorov's bound at 1e-6 is 2.7/√n."""
    key = jax.random.key(1)
    found = distributions.columns("gaussian", key, 1000, 1000, jnp.arange(1000))
    a = np.sort(np.asarray(found, np.float64).ravel())
    assert abs(a.mean()) < 5 / np.sqrt(a.size)
    assert a.var() == pytest.approx(1, abs=5 * np.sqrt(2 / a.size))
    assert np.mean(a**4) == pytest.approx(3, abs=5 * np.sqrt(96 / a.size))
    assert np.mean(a**6) == pytest.approx(15, abs=5 * np.sqrt(10170 / a.size))
    expected = np.array([NormalDist().cdf(x) for x in a])
    steps = np.arange(a.size + 1) / a.size
    distance = max(np.abs(steps[1:] - expected).max(), np.abs(steps[:-1] - expected).max())
    assert distance < 2.7 / np.sqrt(a.size) + 2.3e-4


def test_gaussian_entries_of_a_column_are_uncorrelated():
    """Neighbours in a column and in a row, and their squares: five standard errors."""
    a = np.asarray(
        distributions.columns("gaussian", jax.random.key(2), 500, 1000, jnp.arange(1000)),
        np.float64,
    )
    for values in (a, (a**2 - 1) / np.sqrt(2)):
        for left, right in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1])):
            assert abs(np.mean(left * right)) < 5 / np.sqrt(left.size)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_block_of_columns_is_the_same_block(distribution):
    key = jax.random.key(3)
    every = jnp.arange(40, dtype=jnp.int32)
    full = distributions.columns(distribution, key, 7, 40, every)
    part = distributions.columns(distribution, key, 7, 40, every[11:23].reshape(3, 4))
    np.testing.assert_array_equal(part.reshape(12, 7), full[11:23])


GOLDEN = {
    "gaussian": [
        [-0.026104450225830078, -0.4555492401123047, -0.34862375259399414, 0.08136415481567383],
        [-0.754453182220459, -0.16579008102416992, -0.5326652526855469, 1.0763821601867676],
    ],
    "rademacher": [[-1.0, 1.0, 1.0, -1.0], [1.0, -1.0, 1.0, 1.0]],
    "srht": [[-1.0, -1.0, -1.0, -1.0], [1.0, 1.0, -1.0, -1.0]],
    "srtt": [
        [-1.0, -1.0, -1.0, -1.0],
        [-0.8111595511436462, 1.1584559679031372, -1.366025447845459, 1.0],
    ],
}


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "srht", "srtt"])
def test_values_of_this_release(distribution):
    """What checkpoints rely on: columns 0 and 5 under key 42, which were others before 0.2.0."""
    columns = distributions.columns(distribution, jax.random.key(42), 4, 9, jnp.array([0, 5]))
    np.testing.assert_array_equal(columns, np.float32(GOLDEN[distribution]))


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [
        "--xla_cpu_enable_fast_math=true",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=3",
    ],
)
def test_values_do_not_depend_on_xla_flags(flags):
    program = (
        "import jax, jax.numpy as jnp\n"
        "from flora_jax.chain import distributions\n"
        "for name in ('gaussian', 'rademacher', 'srht', 'srtt'):\n"
        "    sample = jax.jit(lambda: distributions.columns(\n"
        "        name, jax.random.key(42), 4, 9, jnp.array([0, 5])))\n"
        "    print(sample().tolist())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert dict(zip(("gaussian", "rademacher", "srht", "srtt"), lines, strict=True)) == GOLDEN
