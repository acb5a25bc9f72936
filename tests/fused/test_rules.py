"""Uses that real models have beyond products and lookups, against `jax.value_and_grad`; and what has no rule says why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flora_jax
from flora_jax import adapters
from tests.fused.test_value_and_grad import SIDES, X, array, compare, square
from tests.helpers import assert_close

IDS = jnp.array([1, 0, 2, 1, 1])
SIZES = jnp.array([2, 0, 3])
IMAGE = array(2, 5, 5, 16)
NHWC = ("NHWC", "HWIO", "NHWC")


@jax.custom_vjp
def kernel(x, w):
    return x @ w


kernel.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, d: (d @ r[1].T, jnp.dot(r[0].T, d)))


@jax.custom_vjp
def kernel_of_three(x, w, ids, bias):
    return jnp.take(x, ids, axis=0) @ w.T + bias, jnp.sum(ids)


def _kernel_forward(x, w, ids, bias):
    return kernel_of_three(x, w, ids, bias), (x, w, ids)


def _kernel_backward(residuals, deltas):
    x, w, ids = residuals
    of_y = deltas[0].astype(jnp.float32)
    of_x = jnp.zeros_like(x).at[ids].add(of_y @ w)
    of_w = jnp.einsum("bo,bi->oi", of_y, x[ids]).astype(w.dtype)
    return of_x, of_w, None, of_y.sum(0)


kernel_of_three.defvjp(_kernel_forward, _kernel_backward)


def grouped(x, w, groups, layout=NHWC, strides=(1, 1)):
    return lax.conv_general_dilated(
        x, w, strides, "SAME", dimension_numbers=layout, feature_group_count=groups
    )


NUMBERS = flora_jax.DimensionNumbers
PATCH = dict(weight_dimension_numbers=NUMBERS((0, 1, 2), 3))
CHANNELS = dict(weight_dimension_numbers=NUMBERS(2, 3))
ALL_CHANNELS = dict(weight_dimension_numbers=lambda params: {"w": NUMBERS(2, (0, 1, 3))})

# name: function of the params, shapes of the params, settings of the projection
WITH_RULES = {
    "ragged_dot": (
        lambda p: square(lax.ragged_dot(X, p["w"], SIZES)),
        dict(w=(3, 24, 10)),
        {},
    ),
    "experts by index": (
        lambda p: square(jnp.einsum("bi,bio->bo", X, p["w"][IDS])),
        dict(w=(3, 24, 10)),
        {},
    ),
    "experts by two indices": (
        lambda p: square(jnp.einsum("bi,bio->bo", X, p["w"][IDS % 2, IDS])),
        dict(w=(2, 3, 24, 10)),
        {},
    ),
    "layers, then an expert each": (
        lambda p: square(jnp.einsum("bi,blio->blo", X, p["w"][:, IDS].swapaxes(0, 1))),
        dict(w=(2, 3, 24, 10)),
        {},
    ),
    "experts by index under vmap": (
        lambda p: square(jax.vmap(lambda x, i: x @ p["w"][i])(X, IDS)),
        dict(w=(3, 24, 10)),
        {},
    ),
    "grouped, of patches": (
        lambda p: square(grouped(IMAGE, p["w"], 2)),
        dict(w=(3, 3, 8, 12)),
        PATCH,
    ),
    "grouped, of channels": (
        lambda p: square(grouped(IMAGE, p["w"], 2, strides=(2, 1))),
        dict(w=(3, 3, 8, 12)),
        CHANNELS,
    ),
    "grouped, four, OIHW": (
        lambda p: square(grouped(IMAGE.transpose(0, 3, 1, 2), p["w"], 2, ("NCHW", "OIHW", "NCHW"))),
        dict(w=(12, 8, 3, 3)),
        dict(weight_dimension_numbers=NUMBERS((1, 2, 3), 0)),
    ),
    "padded vocabulary, tied": (
        lambda p: square(p["embed"][IDS] @ jnp.pad(p["embed"], ((0, 3), (0, 0))).T),
        dict(embed=(40, 16)),
        {},
    ),
    "padded on both sides": (
        lambda p: square(jnp.pad(X, ((0, 0), (1, 2))) @ jnp.pad(p["w"], ((1, 2), (3, 0)))),
        dict(w=(24, 16)),
        {},
    ),
    "padded with a number": (
        lambda p: square(
            jnp.pad(X, ((0, 0), (0, 2))) @ jnp.pad(p["w"], (0, 2), constant_values=0.5)
        ),
        dict(w=(24, 16)),
        {},
    ),
    "a row set to zero": (
        lambda p: square(p["embed"].at[1].set(0.0)[IDS]),
        dict(embed=(40, 16)),
        {},
    ),
    "rows set to numbers": (
        lambda p: square(X @ p["w"].at[jnp.array([0, 5, 5])].set(2.0)),
        dict(w=(24, 16)),
        {},
    ),
    "columns set to numbers": (
        lambda p: square(X @ p["w"].at[:, jnp.array([0, 5])].set(2.0)),
        dict(w=(24, 16)),
        {},
    ),
    "something added to rows": (
        lambda p: square(X @ p["w"].at[jnp.array([0, 5, 5])].add(2.0)),
        dict(w=(24, 16)),
        {},
    ),
    "a slice overwritten": (
        lambda p: square(X @ lax.dynamic_update_slice(p["w"], jnp.ones((24, 2)), (0, 1))),
        dict(w=(24, 16)),
        dict(side="input"),
    ),
    "a mask of rows": (
        lambda p: square(X @ jnp.where(jnp.arange(24)[:, None] % 3 > 0, p["w"], 0.0)),
        dict(w=(24, 16)),
        {},
    ),
    "a mask of columns": (
        lambda p: square(X @ jnp.where(jnp.arange(16) % 3 > 0, p["w"], 1.0)),
        dict(w=(24, 16)),
        {},
    ),
    "beside a product that is trained too": (
        lambda p: square(X @ (p["w"] + p["a"] @ p["b"])),
        dict(w=(24, 16), a=(24, 2), b=(2, 16)),
        {},
    ),
    "beside one, under scan and remat": (
        lambda p: square(
            lax.scan(
                jax.checkpoint(lambda h, s: (jnp.tanh(h @ (s[0] - s[1] @ s[2])), None)),
                X,
                (p["w"], p["a"], p["b"]),
            )[0]
        ),
        dict(w=(3, 24, 24), a=(3, 24, 2), b=(3, 2, 24)),
        {},
    ),
    "concatenated stacks under scan": (
        lambda p: square(
            lax.scan(
                lambda h, w: (jnp.tanh(h @ w)[:, :24] + h, None),
                X,
                jnp.concatenate([p["q"], p["k"], p["v"]], 2),
            )[0]
        ),
        dict(q=(3, 24, 16), k=(3, 24, 8), v=(3, 24, 12)),
        dict(side="input"),
    ),
    "concatenated and a constant of a scan": (
        lambda p: square(
            lax.scan(
                lambda h, _: (jnp.tanh(h @ jnp.concatenate([p["q"], p["k"]], 1)), None),
                X,
                None,
                length=2,
            )[0]
        ),
        dict(q=(24, 16), k=(24, 8)),
        {},
    ),
    "concatenated under jit and remat": (
        lambda p: square(
            jax.jit(jax.checkpoint(lambda w: jnp.tanh(X @ w)))(jnp.concatenate([p["q"], p["k"]], 1))
        ),
        dict(q=(24, 16), k=(24, 8)),
        {},
    ),
    "custom_vjp": (lambda p: square(kernel(X, p["w"])), dict(w=(24, 16)), {}),
    "custom_vjp under scan": (
        lambda p: square(lax.scan(lambda h, w: (jnp.tanh(kernel(h, w)), None), X, p["w"])[0]),
        dict(w=(3, 24, 24)),
        {},
    ),
    "custom_vjp of four, transposed": (
        lambda p: square(kernel_of_three(X, p["w"], IDS, p["b"])[0]),
        dict(w=(16, 24), b=(16,)),
        {},
    ),
    "platform_dependent": (
        lambda p: square(
            lax.platform_dependent(X, p["w"], tpu=lambda x, w: x @ w + 1, default=jnp.dot)
        ),
        dict(w=(24, 16)),
        {},
    ),
    "straight through": (
        lambda p: square(X @ (p["w"] + lax.stop_gradient(jnp.round(p["w"]) - p["w"]))),
        dict(w=(24, 16)),
        {},
    ),
    "asked whether it is NaN": (
        lambda p: jnp.where(jnp.isnan(p["w"]).any(), 0.0, square(X @ p["w"])),
        dict(w=(24, 16)),
        {},
    ),
    "measured, without a gradient": (
        lambda p: square(X @ p["w"] / lax.stop_gradient(jnp.linalg.norm(p["w"]))),
        dict(w=(24, 16)),
        {},
    ),
}

# name: function, shapes, and the uses that materialize the full gradient
WITHOUT = {
    "L2 in the loss": (lambda p: jnp.sum(p["w"] ** 2), dict(w=(24, 16)), [("w", "integer_pow")]),
    "weight norm": (
        lambda p: square(X @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))),
        dict(w=(24, 16)),
        [("w", "div"), ("w", "mul")],
    ),
    "a mask of both sides": (
        lambda p: square(X @ jnp.where(jnp.tri(24, 16) > 0, p["w"], 0.0)),
        dict(w=(24, 16)),
        [("w", "select_n")],
    ),
    "a product of two weights": (
        lambda p: square(X @ (p["w"] @ p["v"])),
        dict(w=(24, 16), v=(16, 24)),
        [("v", "dot_general"), ("w", "dot_general")],
    ),
}


def params_of(shapes):
    return {name: array(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", WITH_RULES)
def test_a_use_with_a_rule(name, side):
    loss, shapes, settings = WITH_RULES[name]
    compare(loss, params_of(shapes), **{"side": side, **settings})


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", WITHOUT)
def test_a_use_without_one_is_right_and_says_why(name, side):
    loss, shapes, full = WITHOUT[name]
    compare(loss, params_of(shapes), full=full, side=side)
    rule = flora_jax.Projection(4, min_dim=8, side=side)
    plan = flora_jax.value_and_grad(loss, rule).plan(params_of(shapes))
    assert plan.whole_uses
    for use in plan.whole_uses:
        assert use.reason and use.reason in str(plan) and use.place in str(plan)


def test_auxiliary_data_are_no_use():
    def loss(p):
        return square(X @ p["w"]), {"norm": jnp.linalg.norm(p["w"]), "weight": p["w"]}

    params = {"w": array(24, 16)}
    grad_fn = flora_jax.value_and_grad(loss, flora_jax.Projection(4, min_dim=8), has_aux=True)
    assert not grad_fn.plan(params).whole_uses
    (_, aux), _ = grad_fn(params, cycle=0)
    assert_close(aux["weight"], params["w"], 0)
    assert_close(aux["norm"], jnp.linalg.norm(params["w"]), 1e-6)


ADAPTED = [
    "ragged_dot",
    "experts by index",
    "padded vocabulary, tied",
    "padded on both sides",
    "rows set to numbers",
    "columns set to numbers",
    "a mask of rows",
    "a mask of columns",
    "concatenated stacks under scan",
    "concatenated under jit and remat",
    "straight through",
    "measured, without a gradient",
    "platform_dependent",
]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters(name, side):
    """`apply` is the function of the weights that `merge` gives, and so are its gradients."""
    loss, shapes, settings = WITH_RULES[name]
    params = params_of(shapes)
    adapter = adapters.lora(flora_jax.Projection(4, min_dim=8, **{"side": side, **settings}))
    own = adapter.init(jax.random.key(0), params)
    own = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), own)
    found = jax.jit(jax.value_and_grad(adapter.apply(loss), argnums=1))(params, own)
    dense = jax.jit(jax.value_and_grad(lambda own: loss(adapter.merge(params, own))))(own)
    np.testing.assert_allclose(found[0], dense[0], rtol=1e-4)
    for left, right in zip(jax.tree.leaves(found[1]), jax.tree.leaves(dense[1]), strict=True):
        assert_close(left, right, 1e-3)


@pytest.mark.parametrize("fill", [None, 0.0, 7.0])
def test_lookups_out_of_bounds_under_an_adapter(fill):
    """What stands in for a row that is not there is not multiplied by a factor."""
    params = {"embed": array(40, 16)}
    ids = jnp.array([3, 40, 0, 99])

    def rows(params):
        return jnp.take(params["embed"], ids, axis=0, mode="fill", fill_value=fill)

    adapter = adapters.lora(flora_jax.Projection(4, min_dim=8))
    own = jax.tree.map(lambda x: x + 0.1, adapter.init(jax.random.key(0), params))
    np.testing.assert_allclose(
        adapter.apply(rows)(params, own), rows(adapter.merge(params, own)), rtol=1e-4, atol=1e-5
    )
