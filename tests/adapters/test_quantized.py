"""Quantised weights under adapters: the integers by hand, and runs as with the weights they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from flora_jax.adapters import lora
from flora_jax.adapters.quantized import quantize
from flora_jax.chain.plan import tree_bytes
from flora_jax.fused.lazy import is_lazy
from tests.adapters.test_low_rank import filled, rule
from tests.fused.test_value_and_grad import square
from tests.helpers import assert_close, assert_tree_close, normal

PARAMS = {
    "in": {"kernel": jnp.asarray(normal(0, (24, 32))), "bias": jnp.asarray(normal(1, (32,)))},
    "layers": jnp.asarray(normal(2, (3, 32, 32)) / 6),
    "heads": jnp.asarray(normal(3, (32, 4, 8))),
}
X = jnp.asarray(normal(4, (5, 24)))


def fun(p, x):
    x = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"])
    step = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
    x, _ = lax.scan(step, x, p["layers"])
    return jnp.einsum("td,dhk->htk", x, p["heads"].astype(jnp.float32))


def dequantized(params):
    return jax.tree.map(lambda x: x.materialize() if is_lazy(x) else x, params, is_leaf=is_lazy)


def test_int8_by_hand():
    """Rounded to 1/127 of the largest entry of each output."""
    lazy = quantize(lora(rule(4)), PARAMS)["in"]["kernel"]
    exact = np.asarray(PARAMS["in"]["kernel"], np.float64)
    scale = abs(exact).max(axis=0) / 127.5
    assert np.all(abs(np.asarray(lazy.materialize()) - exact) <= 0.51 * scale + 1e-6)
    assert lazy.parts.qvalue.dtype == jnp.int8 and lazy.shape == (24, 32)


@pytest.mark.parametrize(
    "kind, tile, error", [("int8", None, 0.01), ("int4", 8, 0.12), ("nf4", 8, 0.12)]
)
def test_runs_as_the_weights_it_stands_for(kind, tile, error):
    """Values, gradients and merged weights; under scan and remat, heads, and a cast."""
    adapter = lora(rule(4), alpha=8)
    own = filled(adapter, PARAMS)
    quantised = quantize(adapter, PARAMS, kind, tile=tile)
    assert isinstance(quantised["in"]["bias"], jax.Array)
    plain = dequantized(quantised)
    for found, expected in zip(jax.tree.leaves(plain), jax.tree.leaves(PARAMS), strict=True):
        assert_close(found, expected, error)

    def loss(p, x):
        return square(fun(p, x))

    run = jax.jit(jax.value_and_grad(adapter.apply(loss), argnums=(1, 2)))
    assert_tree_close(run(quantised, own, X), run(plain, own, X), 1e-5)
    assert_tree_close(adapter.merge(quantised, own), adapter.merge(plain, own), 1e-6)
    assert all(not use.whole for use in adapter.uses(loss, quantised, own, X))


def test_bytes_and_no_whole_stack():
    """A quarter and an eighth of the bytes; a layer is turned into floating point within the scan."""
    adapter = lora(rule(4, select=lambda path, shape: path == "layers"))
    big = {"layers": jnp.asarray(normal(0, (3, 256, 256)))}
    full = tree_bytes(big)
    held = quantize(adapter, big)["layers"]
    assert tree_bytes(held) < 0.26 * full
    four = quantize(adapter, big, "nf4")["layers"].parts
    bits = 4 * four.qvalue.size + 8 * four.scale.nbytes
    assert bits < 0.16 * 8 * full
    own = filled(adapter, big)

    def loss(p, x):
        return square(lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["layers"])[0])

    gradient = jax.grad(adapter.apply(loss), argnums=1)
    text = str(jax.make_jaxpr(gradient)({"layers": held}, own, jnp.ones((5, 256))))
    assert "i8[3,256,256]" in text and "f32[256,256]" in text and "f32[3,256,256]" not in text


def test_lora_makes_up_for_four_bits():
    """QLoRA's claim: adapters trained on 4-bit weights end as low as on the weights themselves."""
    goal = jnp.asarray(normal(5, (4, 5, 8)))
    adapter = lora(rule(6))
    own = adapter.init(jax.random.key(0), PARAMS)
    run_loss = adapter.apply(lambda p, x: jnp.mean((fun(p, x) - goal) ** 2))
    tx = optax.adam(0.02)

    @jax.jit
    def train(params):
        def step(carry, _):
            own, state = carry
            grads = jax.grad(run_loss, argnums=1)(params, own, X)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(own, updates), state), None

        (trained, _), _ = lax.scan(step, (own, tx.init(own)), length=300)
        return run_loss(params, own, X), run_loss(params, trained, X)

    before, after = train(PARAMS)
    _, after_quantised = train(quantize(adapter, PARAMS, "nf4", tile=8))
    assert after_quantised < after + 0.01 * before


def test_errors():
    adapter = lora(rule(4))
    with pytest.raises(ValueError, match="kind must be one of int8, int4, nf4, found 'int2'"):
        quantize(adapter, PARAMS, "int2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tile must divide the 32 of 'heads', found 7"):
        quantize(adapter, PARAMS, "int4", tile=7)
