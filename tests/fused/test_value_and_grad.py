"""value_and_grad: the sketches that numpy makes of JAX's own gradient, for all kinds of functions.

One file since all of its tests take their functions from one table.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import flora_jax
from flora_jax.chain.sketch import is_sketch
from tests.helpers import Naive, assert_close, assert_tree_close, matrix_of_a, normal

CYCLE = 3
SIDES = ("input", "output")


def array(*shape, seed=0):
    return jnp.asarray(normal(seed + sum(shape), shape))


def rule(**others):
    return flora_jax.Projection(others.pop("rank", 4), **{"min_dim": 8, **others})


def numbers(tree):
    return jax.tree.map(lambda x: x.data if is_sketch(x) else x, tree, is_leaf=is_sketch)


def compare(loss, params, *args, full=(), tolerance=2e-5, **settings):
    """Values, sketches and full gradients against `jax.value_and_grad`; and the uses without a rule."""
    grad_fn = flora_jax.value_and_grad(loss, rule(**settings))
    value, grads = jax.jit(functools.partial(grad_fn, cycle=jnp.int32(CYCLE)))(params, *args)
    expected_value, expected = jax.jit(jax.value_and_grad(loss))(params, *args)
    np.testing.assert_allclose(value, expected_value, rtol=max(tolerance, 1e-5))
    leaves = jax.tree.leaves(grads, is_leaf=is_sketch)
    assert any(map(is_sketch, leaves)), "nothing was compressed"
    for leaf, gradient in zip(leaves, jax.tree.leaves(expected), strict=True):
        if is_sketch(leaf):
            assert leaf.cycle is None
            gradient = Naive(leaf.spec).project(matrix_of_a(leaf.spec, CYCLE), gradient)
            leaf = leaf.data
        assert_close(leaf, gradient, tolerance)
    found = [(use.path, use.primitive) for use in grad_fn.uses(params, *args) if use.whole]
    assert sorted(found) == sorted(full)


def square(x):
    return jnp.sum(jnp.tanh(x.astype(jnp.float32) / 4) ** 2)


def conv(x, w, strides, padding, layout, **others):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, **others)


X = array(5, 24)
TOKENS = jnp.array([[3, 0, 39, 3], [1, 2, 3, 4]])
NHWC = ("NHWC", "HWIO", "NHWC")

# name: function of params and arguments, shapes of the params, arguments
FUNCTIONS = {
    "mlp": (
        lambda p, x: square(jnp.tanh(x @ p["a"] + p["c"]) @ p["b"]),
        dict(a=(24, 16), b=(16, 12), c=(16,)),
        [X],
    ),
    "transposed": (lambda p, x: square(x @ p["w"].T), dict(w=(16, 24)), [X]),
    "weight_first": (lambda p, x: square(p["w"] @ x.T), dict(w=(16, 24)), [X]),
    "used_twice": (lambda p, x: square(jnp.tanh(x @ p["w"]) @ p["w"]), dict(w=(24, 24)), [X]),
    "einsum_heads": (
        lambda p, x: square(jnp.einsum("btd,dhk->bhtk", x, p["q"])),
        dict(q=(24, 4, 10)),
        [array(2, 5, 24)],
    ),
    "einsum_heads_out": (
        lambda p, x: square(jnp.einsum("bthk,hkd->btd", x, p["o"])),
        dict(o=(4, 10, 24)),
        [array(2, 5, 4, 10)],
    ),
    "einsum_heads_moved": (
        lambda p, x: square(jnp.einsum("bthk,khd->btd", x, p["o"].transpose(1, 0, 2))),
        dict(o=(4, 10, 24)),
        [array(2, 5, 4, 10)],
    ),
    "experts": (
        lambda p, x: square(jnp.einsum("etd,edf->etf", x, p["w"])),
        dict(w=(3, 24, 10)),
        [array(3, 5, 24)],
    ),
    "experts_all": (
        lambda p, x: square(jnp.einsum("td,edf->tef", x, p["w"])),
        dict(w=(3, 24, 10)),
        [X],
    ),
    "experts_summed": (
        lambda p, x: square(jnp.einsum("etd,edf->tf", x, p["w"])),
        dict(w=(3, 24, 10)),
        [array(3, 5, 24)],
    ),
    "take": (
        lambda p, t: square(jnp.take(p["embed"], t, axis=0)),
        dict(embed=(40, 16)),
        [TOKENS],
    ),
    "index": (lambda p, t: square(p["embed"][t]), dict(embed=(40, 16)), [TOKENS]),
    "tied": (
        lambda p, t: square(p["embed"][t] @ p["embed"].T),
        dict(embed=(40, 16)),
        [TOKENS],
    ),
    "tied_and_hidden": (
        lambda p, t: square(jnp.tanh(p["embed"][t] @ p["w"]) @ p["embed"].T),
        dict(embed=(40, 16), w=(16, 16)),
        [TOKENS],
    ),
    "scan": (
        lambda p, x: square(lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]),
        dict(w=(3, 24, 24)),
        [X],
    ),
    "scan_backwards": (
        lambda p, x: square(
            lax.scan(lambda c, w: (jnp.tanh(c @ w), c), x, p["w"], reverse=True, unroll=2)[1]
        ),
        dict(w=(4, 24, 24)),
        [X],
    ),
    "scan_with_a_constant": (
        lambda p, x: square(
            lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, None, length=3)[0]
        ),
        dict(w=(24, 24)),
        [X],
    ),
    "scan_of_remat": (
        lambda p, x: square(
            lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, p["w"])[0]
        ),
        dict(w=(3, 24, 24)),
        [X],
    ),
    "fori_loop": (
        lambda p, x: square(lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"][i]), x)),
        dict(w=(3, 24, 24)),
        [X],
    ),
    "fori_loop_carries_the_weight": (
        lambda p, x: square(
            lax.fori_loop(0, 3, lambda i, c: (jnp.tanh(c[0] @ c[1]), c[1]), (x, p["w"]))[0]
        ),
        dict(w=(24, 24)),
        [X],
    ),
    "cond": (
        lambda p, x: square(
            lax.cond(x[0, 0] > 0, lambda w, x: x @ w, lambda w, x: 2 * x @ w.T, p["w"], x)
        ),
        dict(w=(24, 24)),
        [X],
    ),
    "switch": (
        lambda p, x, i: square(
            lax.switch(i, [lambda w: x @ w, lambda w: x, lambda w: x @ w @ w], p["w"])
        ),
        dict(w=(24, 24)),
        [X, jnp.int32(2)],
    ),
    "while_without_the_weight": (
        lambda p, x: square(lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x) @ p["w"]),
        dict(w=(24, 16)),
        [X],
    ),
    "remat": (
        lambda p, x: square(jax.checkpoint(lambda w, x: jnp.tanh(x @ w) @ w)(p["w"], x)),
        dict(w=(24, 24)),
        [X],
    ),
    "remat_with_a_policy": (
        lambda p, x: square(
            jax.checkpoint(
                lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w),
                policy=jax.checkpoint_policies.dots_saveable,
            )(p["w"], x)
        ),
        dict(w=(24, 24)),
        [X],
    ),
    "jit": (
        lambda p, x: square(jax.jit(lambda w, x: jax.jit(jnp.tanh)(x @ w))(p["w"], x)),
        dict(w=(24, 16)),
        [X],
    ),
    "vmap_over_examples": (
        lambda p, x: jnp.sum(jax.vmap(lambda one: square(one @ p["w"]))(x)),
        dict(w=(24, 16)),
        [X],
    ),
    "vmap_over_weights": (
        lambda p, x: square(jax.vmap(lambda w: jnp.tanh(x @ w))(p["w"])),
        dict(w=(3, 24, 16)),
        [X],
    ),
    "custom_vjp_of_others": (
        lambda p, x: (
            optax.losses.safe_softmax_cross_entropy(jax.nn.relu(x @ p["w"]), x[:, :16]).mean()
        ),
        dict(w=(24, 16)),
        [X],
    ),
    "scaled": (lambda p, x: square(x @ (p["w"] * 0.3 / 2)), dict(w=(24, 16)), [X]),
    "scaled_by_input": (
        lambda p, x, s: square(x @ (p["w"] * s[:, None])),
        dict(w=(24, 16)),
        [X, array(24)],
    ),
    "scaled_by_output": (
        lambda p, x, s: square(x @ (p["w"] / (2 + s**2))),
        dict(w=(24, 16)),
        [X, array(16)],
    ),
    "scaled_by_both": (
        lambda p, x, s, t: square(x @ (-p["w"] * s[:, None] * t)),
        dict(w=(24, 16)),
        [X, array(24), array(16)],
    ),
    "noise_added": (
        lambda p, x, n: square(x @ (n - p["w"])),
        dict(w=(24, 16)),
        [X, array(24, 16, seed=1)],
    ),
    "split_on_output": (
        lambda p, x: sum(
            (i + 1) * square(x @ part) for i, part in enumerate(jnp.split(p["w"], 3, axis=1))
        ),
        dict(w=(24, 36)),
        [X],
    ),
    "split_on_input": (
        lambda p, x: sum(
            (i + 1) * square(x[:, :8] @ part) for i, part in enumerate(jnp.split(p["w"], 3))
        ),
        dict(w=(24, 16)),
        [X],
    ),
    "sliced": (
        lambda p, x: square(x[:, :10] @ lax.slice(p["w"], (2, 1), (22, 16), (2, 1))),
        dict(w=(24, 16)),
        [X],
    ),
    "sliced_dynamically": (
        lambda p, x, i: square(x[:, :10] @ lax.dynamic_slice(p["w"], (i, i), (10, 10))),
        dict(w=(24, 16)),
        [X, jnp.int32(3)],
    ),
    "reversed": (lambda p, x: square(x @ p["w"][::-1, ::-1]), dict(w=(24, 16)), [X]),
    "stacked": (
        lambda p, x: square(
            lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.stack([p["a"], p["b"]]))[0]
        ),
        dict(a=(24, 24), b=(24, 24)),
        [X],
    ),
    "concatenated_on_output": (
        lambda p, x: square(x @ jnp.concatenate([p["a"], p["b"], p["c"]], axis=1)),
        dict(a=(24, 16), b=(24, 12), c=(24, 3)),
        [X],
    ),
    "concatenated_and_transposed": (
        lambda p, x: square(jnp.concatenate([p["a"], p["b"]], axis=1).T @ x.T),
        dict(a=(24, 16), b=(24, 12)),
        [X],
    ),
    "reshaped": (
        lambda p, x: square(x @ p["w"].reshape(24, 40)),
        dict(w=(24, 4, 10)),
        [X],
    ),
    "reshaped_on_input": (
        lambda p, x: square(jnp.einsum("tab,abn->tn", x.reshape(5, 4, 6), p["w"].reshape(4, 6, 16))),
        dict(w=(24, 16)),
        [X],
    ),
    "broadcast": (
        lambda p, x: square(
            jnp.einsum("btd,bdn->btn", x, jnp.broadcast_to(p["w"], (2, 24, 16)))
        ),
        dict(w=(24, 16)),
        [array(2, 5, 24)],
    ),
    "stop_gradient": (
        lambda p, x: square(x @ p["w"]) + square(lax.stop_gradient(p["w"])),
        dict(w=(24, 16)),
        [X],
    ),
    "conv": (
        lambda p, x: square(conv(x, p["w"], (1, 1), "SAME", NHWC)),
        dict(w=(3, 3, 8, 12)),
        [array(2, 6, 6, 8)],
    ),
    "conv_of_patches": (
        lambda p, x: square(conv(x, p["w"], (4, 4), "VALID", NHWC)),
        dict(w=(4, 4, 3, 24)),
        [array(2, 8, 8, 3)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_sketches_of_the_gradient(name, side):
    loss, shapes, args = FUNCTIONS[name]
    params = {key: array(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    compare(loss, params, *args, side=side)


# the full gradient is materialized, and the use is named
WITHOUT_A_RULE = {
    "penalty": (lambda p, x: square(x @ p["w"]) + jnp.sum(jnp.abs(p["w"])), ["abs"]),
    "learned_scale": (lambda p, x: square(x @ (p["w"] * p["s"])), ["mul"]),
    "product_of_weights": (
        lambda p, x: square(x @ (p["w"] @ p["v"])),
        ["dot_general", "dot_general"],
    ),
    "sorted": (lambda p, x: square(x @ jnp.sort(p["w"])), ["sort"]),
}


@pytest.mark.parametrize("name", WITHOUT_A_RULE)
def test_full_gradient_where_there_is_no_rule(name):
    loss, primitives = WITHOUT_A_RULE[name]
    params = dict(w=array(24, 16))
    paths = ["w"] * len(primitives)
    if name == "learned_scale":
        params["s"] = 1 + array(16) ** 2
    if name == "product_of_weights":
        params["v"] = array(16, 12)
        paths = ["v", "w"]
    compare(loss, params, X, full=list(zip(paths, primitives, strict=True)))


@pytest.mark.parametrize("side", ["input", "output"])
def test_scan_over_rows(side):
    """The full gradient is materialized of a weight that is sliced along its projected axis."""

    def loss(p, x):
        return square(lax.scan(lambda c, row: (c, x @ row), 0.0, p["w"])[1])

    full = [("w", "scan")] if side == "input" else []
    compare(loss, dict(w=array(16, 24)), X, full=full, side=side)


def test_the_plan_names_what_has_no_rule():
    def loss(p, x):
        return square(x @ p["w"]) + jnp.sum(jnp.exp(p["w"]))

    grad_fn = flora_jax.value_and_grad(loss, rule())
    plan = grad_fn.plan(dict(w=jax.ShapeDtypeStruct((24, 16), jnp.float32)), X)
    (use,) = plan.whole_uses
    assert (use.path, use.primitive) == ("w", "exp")
    assert "test_value_and_grad.py" in use.place
    assert "exp" in str(plan) and "test_value_and_grad.py" in str(plan)
    assert plan.as_dict()["whole_uses"][0]["primitive"] == "exp"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("distribution", ["rademacher", "orthonormal", "srht"])
def test_other_distributions(distribution, side):
    loss = FUNCTIONS["sliced"][0]
    compare(loss, dict(w=array(24, 16)), X, side=side, distribution=distribution)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["mlp", "experts", "einsum_heads_out", "sliced"])
def test_a_block_at_a_time(name, side):
    loss, shapes, args = FUNCTIONS[name]
    params = {key: array(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    compare(loss, params, *args, side=side, block=4 * 7)


@pytest.mark.parametrize("side", SIDES)
def test_strided_and_dilated_convolution(side):
    def loss(p, x):
        y = conv(x, p["w"], (2, 1), [(1, 2), (0, 1)], ("NCHW", "OIHW", "NHWC"), rhs_dilation=(1, 2))
        return square(y)

    numbers = flora_jax.DimensionNumbers(1, 0)
    params = dict(w=array(12, 8, 3, 2))
    compare(loss, params, array(2, 8, 9, 9), side=side, weight_dimension_numbers=numbers)


@pytest.mark.parametrize("side", SIDES)
def test_bfloat16_compute(side):
    """The bound is bfloat16's: products of numbers with 8 bits."""

    def loss(p, x):
        return square(x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16))

    compare(loss, dict(w=array(24, 16)), X, side=side, tolerance=2e-2)


def test_has_aux_and_argnums():
    def loss(x, params, scale, *, shift):
        y = x @ params["w"]
        return scale * jnp.sum(y**2) + shift, {"y": y, "name": "aux", "w": params["w"]}

    params, scale = dict(w=array(24, 16)), jnp.float32(2)
    grad_fn = flora_jax.value_and_grad(loss, rule(), argnums=(1, 2), has_aux=True)
    (value, aux), (grads, of_scale) = grad_fn(X, params, scale, cycle=0, shift=1.0)
    plain = jax.value_and_grad(lambda *a: loss(*a, shift=1.0)[0], argnums=(1, 2))
    expected, (full, expected_scale) = plain(X, params, scale)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(of_scale, expected_scale, rtol=1e-5)
    spec = grads["w"].spec
    assert_close(grads["w"].data, Naive(spec).project(matrix_of_a(spec, 0), full["w"]), 1e-5)
    assert aux["name"] == "aux"
    np.testing.assert_allclose(aux["y"], X @ params["w"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(aux["w"], params["w"])


def test_eager_is_jit():
    loss, shapes, args = FUNCTIONS["mlp"]
    params = {key: array(*shape) for key, shape in shapes.items()}
    grad_fn = functools.partial(flora_jax.value_and_grad(loss, rule()), cycle=CYCLE)
    assert_tree_close(grad_fn(params, *args), jax.jit(grad_fn)(params, *args), 1e-5)


def test_the_chain_takes_fused_sketches():
    """Three optimizer steps of two micro-steps each; equal to the ordinary route to rounding."""
    loss, shapes, _ = FUNCTIONS["tied_and_hidden"]
    projection = rule(resample_every=2, side="input")
    params = {key: array(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}

    def train(fused):
        tx = flora_jax.flora(1e-2, projection=projection, accumulation_steps=2)
        grad_fn = flora_jax.value_and_grad(loss, projection)

        @jax.jit
        def step(params, state, tokens):
            if fused:
                _, grads = grad_fn(params, tokens, cycle=flora_jax.cycle(state))
            else:
                _, grads = jax.value_and_grad(loss)(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        trained, state = params, tx.init(params)
        for i in range(6):
            trained, state = step(trained, state, TOKENS + i % 2)
        return trained

    assert_tree_close(train(True), train(False), 1e-4)


def test_what_is_saved_for_the_backward_pass():
    """A chain of layers saves its inputs at width r, and nothing of the weight's or batch's size."""
    params = [array(64, 64, seed=i) for i in range(4)]

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    grad_fn = flora_jax.value_and_grad(loss, rule(rank=4, side="input"))
    jaxpr = str(jax.make_jaxpr(functools.partial(grad_fn, cycle=0))(params, array(128, 64)))
    assert "f32[128,4]" in jaxpr
    text = jax.jit(functools.partial(grad_fn, cycle=0)).lower(params, array(128, 64))
    compiled = text.compile().as_text()
    products = [line for line in compiled.splitlines() if " dot(" in line or "custom-call" in line]
    assert products
    assert not [line for line in products if "= f32[64,64]" in line]


class TestErrors:
    def test_argnums(self):
        grad_fn = flora_jax.value_and_grad(square, rule(), argnums=1)
        with pytest.raises(ValueError, match=r"argnums must be below .* found 1 for 1"):
            grad_fn(X, cycle=0)

    def test_complex(self):
        grad_fn = flora_jax.value_and_grad(square, rule())
        with pytest.raises(ValueError, match=r"parameters must be real, found .* complex64"):
            grad_fn(X.astype(jnp.complex64), cycle=0)

    def test_no_pair(self):
        grad_fn = flora_jax.value_and_grad(square, rule(), has_aux=True)
        with pytest.raises(TypeError, match=r"pair \(value, aux\)"):
            grad_fn(X, cycle=0)
