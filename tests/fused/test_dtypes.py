"""Sketches and adapters against float64, for every pair of dtypes of activation and weight, by use and side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flora_jax
from flora_jax import adapters, dtypes
from flora_jax.chain.sketch import is_sketch
from tests.helpers import Naive, assert_close, matrix_of_a, normal, often

ACTIVATIONS = (
    "bool",
    "int8",
    "uint8",
    "int32",
    "float8_e4m3fn",
    "bfloat16",
    "float16",
    "float32",
    "float64",
)
WEIGHTS = ("float8_e4m3fn", "bfloat16", "float16", "float32", "float64")
EPSILON = {"float8_e4m3fn": 2**-3, "bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-22}
SHAPE = (16, 12)


def numbers(seed, shape, dtype):
    values = np.random.default_rng(seed).normal(size=shape)
    if dtype == "bool":
        return jnp.asarray(values > 0)
    if "int" in dtype:
        return jnp.asarray(np.abs(np.round(3 * values))).astype(dtype)
    return jnp.asarray(values).astype(dtype)


def mixed_product(x, w):
    """A product of two dtypes as `dot_general` takes it, with sums in float32 or float64."""
    total = jnp.promote_types(dtypes.sums(x.dtype), dtypes.sums(w.dtype))
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=total)


def promoted_product(x, w):
    """The same after the casts that `jnp.matmul` would make."""
    dtype = dtypes.operands(x.dtype, w.dtype)
    return x.astype(dtype) @ w.astype(dtype)


def looked_up(x, w):
    return w[jnp.argmax(jnp.abs(x.astype(jnp.float32)), axis=1)].astype(dtypes.sums(w.dtype))


def scaled(x, w):
    dtype = dtypes.sums(x.dtype, w.dtype)
    return x.astype(dtype) @ (w.astype(dtype) * x[0, 0].astype(dtype))


def convolved(x, w):
    """A 1 × 1 convolution."""
    dtype = dtypes.operands(x.dtype, w.dtype)
    image, kernel = x.astype(dtype)[:, None, None], w.astype(dtype)[None, None]
    return lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


USES = (mixed_product, promoted_product, looked_up, scaled, convolved)


def squares(y):
    return jnp.sum(jnp.sin(y.astype(dtypes.sums(y.dtype)) / 4))


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("weight", often(WEIGHTS, "float8_e4m3fn", "bfloat16", "float32"))
def test_sketches(weight, side, use):
    with jax.enable_x64(True):
        params = {x: numbers(1, SHAPE, weight) for x in ACTIVATIONS}
        batch = {x: numbers(2, (5, SHAPE[0]), x) for x in ACTIVATIONS}

        def loss(params, batch):
            return sum(squares(use(batch[x], params[x])).astype(jnp.float64) for x in ACTIVATIONS)

        rule = flora_jax.Projection(4, side=side, min_dim=8)
        grad_fn = flora_jax.value_and_grad(loss, rule)
        _, sketches = jax.jit(functools.partial(grad_fn, cycle=2))(params, batch)
        exact = {x: params[x].astype(jnp.float64) for x in params}
        wide = jax.jit(
            jax.grad(lambda p: loss(p, {x: batch[x].astype(jnp.float64) for x in batch}))
        )
        gradients = wide(exact)
        for x, sketch in sketches.items():
            assert is_sketch(sketch), x
            assert sketch.data.dtype == ("float64" if weight == "float64" else "float32")
            expected = Naive(sketch.spec).project(matrix_of_a(sketch.spec, 2), gradients[x])
            found = np.asarray(sketch.data, np.float64)
            rounding = max(
                EPSILON.get(name, 1e-11) for name in (x, weight, str(_middle(x, weight)))
            )
            assert_close(found, expected, 4 * rounding)


def _middle(x, weight):
    """The dtype of the products: the coarser of the two where it is rounded to."""
    return dtypes.operands(x, weight)


@pytest.mark.parametrize(
    "use", [mixed_product, promoted_product, convolved], ids=lambda use: use.__name__
)
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("weight", ["bfloat16", "float16", "float32"])
def test_adapters(weight, side, use):
    """The adapted function is that of the weight with the factors' product added in float64."""
    params = {x: numbers(1, SHAPE, weight) for x in ACTIVATIONS[:-1]}
    batch = {x: numbers(2, (5, SHAPE[0]), x) for x in ACTIVATIONS[:-1]}

    def outputs(params, batch):
        return {x: use(batch[x], params[x]).reshape(5, -1) for x in params}

    adapter = adapters.lora(flora_jax.Projection(4, side=side, min_dim=8))
    own = adapter.init(jax.random.key(0), params)
    own = jax.tree.map(lambda x: x + 0.25 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), own)
    found = jax.jit(adapter.apply(outputs))(params, own, batch)
    wide = adapter.merge(jax.tree.map(lambda x: x.astype(jnp.float32), params), own)
    for x, y in found.items():
        values = np.asarray(batch[x].astype(jnp.float32), np.float64)
        expected = values @ np.asarray(wide[x], np.float64)
        rounding = max(EPSILON[name] for name in (x, weight, "float32") if name in EPSILON)
        assert_close(np.asarray(y.astype(jnp.float32)), expected, 4 * rounding)


def test_float16_does_not_overflow_where_the_gradient_does_not():
    """`x Aᵀ` is larger than `x` by the root of `m / r` at the least, which float16 has no room for."""
    x = jnp.full((2, 512), 2e4, jnp.float16)
    params = {"w": jnp.zeros((512, 16), jnp.float16)}

    def loss(params):
        return jnp.mean(x @ params["w"]).astype(jnp.float32) * 1e-3

    for side in ("input", "output"):
        rule = flora_jax.Projection(8, side=side, min_dim=16, distribution="srht")
        sketch = flora_jax.value_and_grad(loss, rule)(params, cycle=0)[1]["w"]
        gradient = jax.grad(loss)(params)["w"].astype(jnp.float32)
        assert bool(jnp.all(jnp.isfinite(gradient)))
        expected = Naive(sketch.spec).project(matrix_of_a(sketch.spec, 0), gradient)
        assert_close(sketch.data, expected, 2e-3)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(
    "scale",
    [
        lambda p: p["re"] + 1j * p["im"],
        lambda p: p["re"] * jnp.exp(1j * jnp.arange(12.0)) + 0 * p["im"],
        lambda p: jnp.exp(1j * jnp.arange(16.0))[:, None] * p["re"] + p["im"] / (1 + 2j),
        lambda p: lax.complex(p["re"], p["im"]),
        lambda p: (p["re"] * (2 - 1j)) @ jnp.ones((12, 12)) + p["im"],
    ],
)
def test_complex_scales(scale, side):
    params = {"re": numbers(1, SHAPE, "float32"), "im": numbers(2, SHAPE, "float32")}
    x = numbers(3, (5, 16), "float32")

    def loss(params):
        return jnp.sum(jnp.abs(x @ scale(params)) ** 2) + 0 * jnp.sum(params["im"])

    rule = flora_jax.Projection(4, side=side, min_dim=8)
    sketches = flora_jax.value_and_grad(loss, rule)(params, cycle=0)[1]
    for name, gradient in jax.grad(loss)(params).items():
        sketch = sketches[name]
        expected = Naive(sketch.spec).project(matrix_of_a(sketch.spec, 0), gradient)
        assert_close(sketch.data, expected, 1e-5)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_convolution_of_patches_in_float64(side):
    with jax.enable_x64(True):
        params = {"w": numbers(1, (3, 3, 4, 12), "float64")}
        image = numbers(2, (2, 6, 6, 4), "float64")

        def loss(params):
            y = lax.conv_general_dilated(
                image, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jnp.sum(jnp.sin(y))

        numbers_of = flora_jax.DimensionNumbers((0, 1, 2), 3)
        rule = flora_jax.Projection(4, side=side, min_dim=8, weight_dimension_numbers=numbers_of)
        sketch = flora_jax.value_and_grad(loss, rule)(params, cycle=0)[1]["w"]
        gradient = jax.grad(loss)(params)["w"]
        expected = Naive(sketch.spec).project(matrix_of_a(sketch.spec, 0), gradient)
        assert_close(sketch.data, expected, 1e-12)


def test_precision_is_handed_on():
    """Each product of the sketch has the precision that the user's product has."""
    params, x = {"w": jnp.ones((16, 12))}, jnp.ones((5, 16))

    def loss(params):
        return jnp.sum(jnp.dot(x, params["w"], precision=lax.Precision.HIGHEST) ** 2)

    grad_fn = flora_jax.value_and_grad(loss, flora_jax.Projection(4, min_dim=8))
    text = str(jax.make_jaxpr(lambda p: grad_fn(p, cycle=0)[1]["w"].data)(params))
    products = text.count("dot_general[")
    assert products >= 3  # y, x Aᵀ and the sketch
    assert text.count("HIGHEST") == 2 * products


def tied(params, tokens):
    """An embedding that is the head as well, as Gemma's."""
    return jnp.take(params["w"], tokens, 0) @ params["w"].T


def gating(params, x):
    """Gemma's two inner projections in one weight, whose last axis is summed over."""
    return jnp.einsum("...f,nhf->...nh", x, params["w"])


@pytest.mark.parametrize("model, shape", [(tied, (512, 256)), (gating, (2, 512, 256))])
def test_bfloat16_in_the_layouts_of_gemma(model, shape):
    """XLA's CPU backend has no product of bfloat16 with sums in float32 in these layouts, at these sizes."""
    params = {"w": jnp.asarray(normal(0, shape), jnp.bfloat16)}
    x = jnp.asarray(normal(1, (8, 32, 256)), jnp.bfloat16)
    x = jnp.arange(256, dtype=jnp.int32).reshape(8, 32) if model is tied else x
    projection = flora_jax.Projection(16)
    tx = flora_jax.project(projection)

    def loss(params, x):
        return jnp.mean(model(params, x).astype(jnp.float32) ** 2)

    @jax.jit
    def both(params, x):
        _, fused = flora_jax.value_and_grad(loss, projection)(params, x, cycle=0)
        full = jax.grad(loss)(params, x)
        return fused["w"].data, tx.update(full, tx.init(params), params)[0]["w"].data

    fused, expected = both(params, x)
    error = jnp.linalg.norm(fused - expected) / jnp.linalg.norm(expected)
    assert error < 2**-6
