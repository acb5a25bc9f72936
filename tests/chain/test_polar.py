"""Exact gradients orthogonalized, against the singular value decomposition in float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from flora_jax.chain.polar import matrices_of
from tests.chain.test_orthogonalize import polar
from tests.helpers import assert_tree_equal, normal

SMALL = matrices_of(2)


def factors(gradient, iterations=9, numbers=None, **settings):
    matrices = matrices_of(2)
    if numbers is not None:
        matrices = flora_jax.Projection(
            1, side="input", min_dim=2, weight_dimension_numbers=lambda _: {"w": numbers}
        )
    tx = flora_jax.polar(iterations, matrices=matrices, **settings)
    found, _ = tx.update({"w": jnp.asarray(gradient)}, optax.EmptyState())
    return np.asarray(found["w"], np.float64)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
def test_the_polar_factor(shape):
    """Of inputs × outputs, times the root of outputs over inputs where there are more of them."""
    gradient = normal(0, shape)
    expected = polar(gradient.astype(np.float64)) * max(1, shape[1] / shape[0]) ** 0.5
    np.testing.assert_allclose(factors(gradient), expected, atol=2e-3)


def test_layers_each_by_itself():
    gradient = normal(1, (3, 24, 10))
    expected = np.stack([factors(layer) for layer in gradient])
    np.testing.assert_allclose(factors(gradient), expected, atol=1e-5)


def test_axes_by_dimension_numbers():
    """A projection of heads: one matrix of the width times heads and their width."""
    gradient = normal(2, (12, 4, 8))
    numbers = flora_jax.DimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    found = factors(gradient, numbers=numbers)
    expected = factors(gradient.reshape(12, 32)).reshape(12, 4, 8)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_blocks(shape):
    """Each block of the smaller side is orthogonal; together they are as long as the whole's polar factor."""
    gradient = normal(3, shape)
    found = factors(gradient, block=6)
    tall = (lambda x: x.T) if shape[0] < shape[1] else (lambda x: x)
    factor = max(1, shape[1] / shape[0]) ** 0.5
    for part in (slice(0, 6), slice(6, 12)):
        expected = polar(tall(gradient.astype(np.float64))[:, part]) * factor / 2**0.5
        np.testing.assert_allclose(tall(found)[:, part], expected, atol=2e-3)
    assert abs(np.linalg.norm(found) / (factor * 12**0.5 / 2**0.5) - 1) < 1e-2


def test_what_is_no_matrix_stays():
    tree = {
        "embedding": jnp.asarray(normal(4, (64, 16))),
        "bias": jnp.asarray(normal(5, (16,))),
        "head": {"kernel": jnp.asarray(normal(6, (16, 64)))},
        "layers": {"scale": jnp.asarray(normal(7, (32, 256)))},
    }
    found, _ = flora_jax.polar().update(tree, optax.EmptyState())
    assert_tree_equal(found, tree)


def test_zero_and_scale():
    np.testing.assert_array_equal(factors(np.zeros((8, 8), np.float32)), 0)
    gradient = normal(8, (16, 8))
    for scale in (1e-12, 1e12):
        np.testing.assert_allclose(
            factors(gradient * np.float32(scale)), factors(gradient), atol=1e-4
        )


@pytest.mark.parametrize(("settings", "said"), [({"iterations": 0}, "iterations"), ({"block": 0}, "block"), ({"block": 1.5}, "block")])  # fmt: skip
def test_arguments(settings, said):
    with pytest.raises(ValueError, match=f"{said} must be an int of at least 1"):
        flora_jax.polar(**settings)
