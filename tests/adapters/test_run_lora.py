"""RunLoRA: every order gives the same numbers, and costs what its formula says, by XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flora_jax.adapters import lora, run_lora
from flora_jax.adapters.run_lora import ORDERS, Order, cheapest, flops, multiply
from tests.adapters.test_low_rank import filled, rule
from tests.fused.test_value_and_grad import square
from tests.helpers import assert_close, assert_tree_close, normal

SHAPES = [(7, 24, 16, 4), (400, 48, 40, 24), (3, 64, 32, 2)]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_values_and_gradients_in_float64(order):
    x, w, down, up = (
        normal(i, shape) for i, shape in enumerate([(7, 24), (24, 16), (24, 4), (4, 16)])
    )
    weights = normal(4, (7, 16))
    y, pull = jax.vjp(lambda *a: multiply(order, *a), *map(jnp.asarray, (x, w, down, up)))
    x, w, down, up, weights = (np.asarray(a, np.float64) for a in (x, w, down, up, weights))
    assert_close(y, x @ w + x @ down @ up, 1e-5)
    of_weight = x.T @ weights
    expected = (weights @ (w + down @ up).T, of_weight, of_weight @ up.T, down.T @ of_weight)
    for found, gradient in zip(pull(jnp.asarray(weights, jnp.float32)), expected, strict=True):
        assert_close(found, gradient, 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops_are_those_that_xla_counts(shape):
    """Of all sixteen orders, forward and backward; sums of matrices are less than 3 % here."""
    t, m, n, r = shape
    arrays = [jnp.ones(s) for s in ((t, m), (m, n), (m, r), (r, n))]

    def count(fun, *args):
        costs = jax.jit(fun).lower(*args).compile().cost_analysis()
        assert costs is not None
        return costs["flops"]

    counted = {}
    for order in ORDERS if shape == SHAPES[0] else (*ORDERS[:1], *ORDERS[5:8]):

        def backward(x, w, down, up, delta, order=order):
            _, pull = jax.vjp(lambda x, d, u: multiply(order, x, w, d, u), x, down, up)
            return pull(delta)

        forward_flops, backward_flops = flops(order, *shape)
        sums = 2 * (t * n + m * n + t * m)
        found = count(lambda *a, order=order: multiply(order, *a), *arrays)
        assert 0 <= found - forward_flops <= sums
        found = count(backward, *arrays, jnp.ones((t, n)))
        assert 0 <= found - backward_flops <= sums
        counted[order] = forward_flops + backward_flops
    best = cheapest(*shape)
    assert sum(flops(best, *shape)) == min(sum(flops(order, *shape)) for order in ORDERS)


def test_the_choice_depends_on_the_shapes():
    """Few tokens: never a product of the weight's size; many: both passes with `W + A B`; a large
    rank: gradients through `Xᵀ dY`."""
    assert cheapest(16, 512, 512, 8) == Order()
    assert cheapest(4096, 512, 512, 8) == Order("merged", "split", "split", "merged")
    assert cheapest(4096, 512, 512, 256) == Order("merged", "merged", "merged", "merged")


@pytest.mark.parametrize("side", ["input", "output"])
def test_on_a_model(side):
    """Under scan and remat, heads, a transposed use; gradients of the weights themselves too."""
    params = {
        "q": jnp.asarray(normal(0, (24, 4, 10))),
        "o": jnp.asarray(normal(1, (4, 10, 24))),
        "stack": jnp.asarray(normal(2, (3, 24, 24))),
        "t": jnp.asarray(normal(3, (16, 24))),
    }
    params = jax.tree.map(lambda w: w / 4, params)
    numbers = {"q": None, "o": None, "stack": None, "t": None}

    def loss(p, x):
        heads = jnp.einsum("btd,dhk->bhtk", x, p["q"])
        x = jnp.einsum("bhtk,hkd->btd", jnp.tanh(heads), p["o"])
        step = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
        x, _ = lax.scan(step, x, p["stack"])
        return square(x @ p["t"].T)

    x = jnp.asarray(normal(5, (2, 30, 24)))
    adapter = lora(rule(4, side=side, weight_dimension_numbers=numbers))
    own = filled(adapter, params)
    expected = jax.jit(jax.value_and_grad(adapter.apply(loss), argnums=(0, 1, 2)))(params, own, x)
    for order in (None, Order("merged", "merged", "split", "merged")):
        run = run_lora(adapter, order).apply(loss)
        found = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(params, own, x)
        assert_tree_close(found, expected, 2e-5)


def test_x_down_is_not_saved():
    """What the backward pass keeps: `x` and the frozen weight, no array of width `r`."""
    params = {"w": jnp.ones((24, 16))}
    adapter = lora(rule(5))
    own, x = filled(adapter, params), jnp.ones((7, 24))

    def kept(adapter):
        run = adapter.apply(lambda p, x: jnp.tanh(x @ p["w"]))
        _, pull = jax.vjp(lambda own, x: run(params, own, x), own, x)
        return {leaf.shape for leaf in jax.tree.leaves(pull)}

    assert (7, 5) in kept(adapter) and (7, 5) not in kept(run_lora(adapter))
