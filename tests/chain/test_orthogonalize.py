"""Orthogonalized sketches: the polar factor of the estimate, in float64, for all that a sketch can be of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_jax
from flora_jax.chain import orthogonalize
from flora_jax.chain.sketch import Sketch
from tests.helpers import DISTRIBUTIONS, Naive, make_spec, matrix_of_a, normal

CYCLE = 3
LAYOUTS = {  # shape, projected axes, batch axes
    "matrix, input side": ((40, 24), (0,), ()),
    "matrix, output side": ((40, 24), (1,), ()),
    "a sketch wider than high": ((40, 6), (0,), ()),
    "layers": ((3, 40, 24), (2,), (0,)),
    "layers last": ((40, 24, 3), (0,), (2,)),
    "layers and experts": ((2, 3, 24, 20), (3,), (0, 1)),
    "heads merged": ((24, 4, 8), (1, 2), ()),
    "a head each": ((24, 4, 16), (0,), (1,)),
    "convolution": ((3, 3, 24, 32), (3,), (0, 1)),
}


def polar(x):
    """`U Vᵀ` of the singular values above rounding."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    kept = s > 1e-9 * s[..., :1]
    return np.einsum("...ns,...s,...sm->...nm", u, kept.astype(float), v)


def orthogonalized(spec, data, iterations):
    tx = flora_jax.orthogonalize(iterations)
    sketch, _ = tx.update({"w": Sketch(jnp.asarray(data), CYCLE, spec)}, optax.EmptyState())
    assert sketch["w"].data.dtype == data.dtype
    return np.asarray(sketch["w"].data, np.float64)


def matrices(spec, weights):
    """The matrices (batch, kept, projected) of a weight."""
    lead = Naive(spec).lead + spec.projected
    return np.transpose(weights, lead).reshape(Naive(spec).count, -1, spec.size)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decompressed_it_is_the_polar_factor_of_the_estimate(layout, distribution):
    shape, projected, batch = LAYOUTS[layout]
    spec = make_spec(shape, projected, batch, rank=8, distribution=distribution)
    data = normal(4, spec.data_shape)
    a, naive = matrix_of_a(spec, CYCLE), Naive(spec)
    expected = polar(matrices(spec, naive.decompress(a, data)))
    found = matrices(spec, naive.decompress(a, orthogonalized(spec, data, 9)))
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize(("iterations", "low", "high"), [(5, 0.85, 1.13), (6, 0.995, 1.005)])
@pytest.mark.parametrize("distribution", ["gaussian", "srtt"])
def test_singular_values_end_within_the_stated_error(distribution, iterations, low, high):
    """Singular values from 0.001 to 1 times the bound, of a sketch that is made of them."""
    spec = make_spec((64, 96), (0,), rank=16, distribution=distribution)
    (a,) = matrix_of_a(spec, CYCLE)
    q = np.linalg.qr(normal(1, (96, 16)).astype(np.float64))[0]
    v = np.linalg.qr(normal(2, (16, 16)).astype(np.float64))[0]
    values = np.geomspace(1, 2e-3, 16)  # the bound is at most 1.4
    rows = np.linalg.solve(np.linalg.cholesky(a @ a.T), a)  # orthonormal
    data = q @ np.diag(values) @ v @ np.linalg.lstsq(a.T, rows.T, rcond=None)[0].T
    found = orthogonalized(spec, data.T.astype(np.float32), iterations).T
    result = np.linalg.svd(found @ a, compute_uv=False)[:16]
    assert low <= result.min() <= result.max() <= high


@given(st.integers(1, 12), st.floats(-6, 6))
@settings(max_examples=20, deadline=None)
def test_polynomials_are_those_of_their_composition(iterations, exponent):
    """No singular value of at most 1 ends above the largest stated one, whatever the number of iterations."""
    value = 10.0 ** -abs(exponent)
    for a, b, c in orthogonalize.polynomials(iterations):
        value = value * (a + b * value**2 + c * value**4)
    assert 0 < value < 2
    if iterations >= 5:
        assert value < 1.13


def test_it_does_not_depend_on_the_scale_of_the_sketch():
    spec = make_spec((40, 24), (0,), rank=8, distribution="srtt")
    data = normal(4, spec.data_shape)
    expected = orthogonalized(spec, data, 5)
    for scale in (1e-12, 1e6):
        found = orthogonalized(spec, np.float32(scale) * data, 5)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_zeros_stay_zeros_and_a_nan_is_not_hidden():
    spec = make_spec((3, 40, 24), (1,), (0,), rank=8)
    data = normal(4, spec.data_shape)
    data[0], data[1, 2, 3] = 0, np.nan
    found = orthogonalized(spec, data, 5)
    assert np.all(found[0] == 0)
    assert np.isnan(found[1]).any()
    assert np.isfinite(found[2]).all()


def test_uncompressed_leaves_pass_and_what_it_needs_is_said():
    leaf = jnp.ones(3)
    tx = flora_jax.orthogonalize()
    assert tx.update({"b": leaf}, optax.EmptyState())[0]["b"] is leaf
    with pytest.raises(ValueError, match="iterations must be an int of at least 1, found 0"):
        flora_jax.orthogonalize(0)
    sketch = Sketch(jnp.ones((5, 24)), None, make_spec((40, 24), (0,)))
    with pytest.raises(ValueError, match="'w': orthogonalize found a sketch without a cycle"):
        tx.update({"w": sketch}, optax.EmptyState())


@pytest.mark.parametrize("distribution", ["gaussian", "srtt"])
def test_nothing_of_the_weights_size_exists_before_decompress(distribution):
    spec = make_spec((512, 4096), (0,), rank=16, distribution=distribution, block=2**10)
    sketch = Sketch(jax.ShapeDtypeStruct(spec.data_shape, "float32"), jnp.int32(0), spec)

    def update(data):
        given = Sketch(data, jnp.int32(0), spec)
        return flora_jax.orthogonalize().update({"w": given}, optax.EmptyState())[0]["w"].data

    jaxpr = jax.make_jaxpr(update)(sketch.data)
    largest = max(v.aval.size for v in every_variable(jaxpr.jaxpr))
    assert largest == np.prod(spec.data_shape)


def every_variable(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v for v in eqn.outvars if hasattr(v.aval, "size"))
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(param, "jaxpr", param), "eqns"):
                yield from every_variable(inner)
