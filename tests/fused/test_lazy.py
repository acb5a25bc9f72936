"""Lazy: products with an array that is computed in blocks, against the whole array."""

import functools

import jax
import jax.numpy as jnp
import pytest

from flora_jax.fused import lazy
from tests.helpers import assert_close, normal

EQUATIONS = {
    "summed": ("tai", "aio", "tao", (3, 10, 8)),
    "summed_alone": ("ti", "io", "to", (10, 8)),
    "in_the_result": ("to", "io", "ti", (10, 8)),
    "of_a_batch": ("iat", "iao", "iato", (10, 3, 8)),
}
LENGTHS = {"t": 5, "a": 3, "i": 10, "o": 8}


def double(parts):
    return 2 * parts["half"]


def double_piece(axis, parts, start, length):
    return 2 * jax.lax.dynamic_slice_in_dim(parts["half"], start, length, axis)


@pytest.mark.parametrize("block", [1, 24 * 7, 2**22])
@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("pieces", [True, False])
def test_product(name, block, pieces):
    of_x, of_value, of_y, shape = EQUATIONS[name]
    half = jnp.asarray(normal(0, shape))
    x = jnp.asarray(normal(1, [LENGTHS[label] for label in of_x]))
    axis = of_value.index("i")
    piece = functools.partial(double_piece, axis) if pieces else None
    value = lazy.Lazy({"half": half}, double, piece, axis - len(shape), block=block)
    equation = f"{of_x},{of_value}->{of_y}"

    def bind(x, value):
        return jnp.einsum(equation, x, value)

    def run(x, value):
        return jnp.sum(jnp.sin(lazy.product(value, x, bind, (of_x, of_value, of_y))))

    def plain(x):
        return jnp.sum(jnp.sin(jnp.einsum(equation, x, 2 * half)))

    found, expected = jax.value_and_grad(run)(x, value), jax.value_and_grad(plain)(x)
    assert_close(found[0], expected[0], 1e-5)
    assert_close(found[1], expected[1], 1e-5)


def test_cast_and_shape():
    value = lazy.Lazy({"half": jnp.ones((4, 6))}, double).astype(jnp.bfloat16)
    assert value.shape == (4, 6) and value.ndim == 2
    assert value.materialize().dtype == jnp.bfloat16
    assert lazy.materialized(3.0) == 3.0
