"""Flat-LoRA: the noise's law, the noisy weight made dense in numpy, and what noise costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from flora_jax.adapters import flat_lora, growing, lora
from flora_jax.adapters.flat_lora import filter_scale, noise
from flora_jax.adapters.low_rank import specs
from flora_jax.fused.lazy import Lazy
from flora_jax.fused.weight import Weight
from tests.adapters.test_low_rank import dense, filled, rule
from tests.helpers import assert_close, normal

KEY = jax.random.key(5)
SIGMA = 0.3
X = jnp.asarray(normal(9, (7, 24)))


def dense_weight(spec, value, own):
    """`W′` and its noise, float64; the scale by the definition, entries as the library samples them."""
    product, pull = dense(spec, own["down"], own["up"])
    merged = np.asarray(value, np.float64) + product
    norms = np.sqrt((merged**2).sum(axis=spec.projected, keepdims=True))
    scale = SIGMA * norms / np.sqrt(spec.size)
    kept = [i for i in range(merged.ndim) if i not in spec.projected]
    order = [*spec.batch, *(i for i in kept if i not in spec.batch)]
    ones = jnp.ones([spec.shape[i] for i in order])
    unit = np.asarray(noise(spec, KEY, ones), np.float64)
    return merged + unit * scale, pull, scale


CASES = {
    "matrix": (lambda w, x: x @ w, (24, 16), {}),
    "transposed": (lambda w, x: x @ w.T, (16, 24), {}),
    "heads": (lambda w, x: jnp.einsum("td,dhk->htk", x, w), (24, 4, 10), {}),
    "heads_out": (lambda w, x: jnp.einsum("thk,hkd->td", x.reshape(7, 4, 6), w), (4, 6, 24), {}),
    "scan": (
        lambda w, x: lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, w)[0],
        (3, 24, 24),
        {},
    ),
    "cast_and_split": (
        lambda w, x: sum(x @ part for part in jnp.split(w.astype(jnp.float32), 2, axis=1)),
        (24, 16),
        {},
    ),
    "without a rule": (lambda w, x: x @ jnp.sort(w), (24, 16), {}),
}


@pytest.mark.parametrize("block", [24, 2**22])
@pytest.mark.parametrize("name", CASES)
def test_the_noisy_weight(name, block):
    """Values and gradients are those of the dense noisy weight, a block at a time too."""
    fun, shape, others = CASES[name]
    params = {"w": jnp.asarray(normal(0, shape))}
    adapter = lora(rule(4, **others), alpha=4)
    own = filled(adapter, params)
    spec = specs(adapter.projection, params)["w"]
    merged, pull, _ = dense_weight(spec, params["w"], own["w"])

    def loss(p, x):
        return jnp.sum(jnp.sin(fun(p["w"], x)))

    noisy = flat_lora(adapter, KEY, SIGMA, block=block).apply(loss)
    value, (of_own, of_x) = jax.jit(jax.value_and_grad(noisy, argnums=(1, 2)))(params, own, X)
    plain = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    expected, (of_weight, expected_of_x) = plain({"w": jnp.asarray(merged, jnp.float32)}, X)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)
    assert_close(of_x, expected_of_x, 1e-4)
    for factor, gradient in pull(of_weight["w"]).items():
        assert_close(of_own["w"][factor], gradient, 1e-4)


def test_filter_scale():
    """`σ‖W′_i‖/√n` of each output, without the dense weight, for stacked heads as well."""
    params = {"w": jnp.asarray(normal(0, (3, 24, 16))), "v": jnp.asarray(normal(1, (24, 4, 10)))}
    adapter = lora(rule(4))
    own = filled(adapter, params)
    for path, spec in specs(adapter.projection, params).items():
        weight = Weight.adapted(spec, params[path], **own[path])
        _, _, scale = dense_weight(spec, params[path], own[path])
        assert_close(filter_scale(weight, SIGMA), scale.squeeze(axis=spec.projected), 1e-5)


def test_the_law_of_the_noise():
    """Mean, variance and independence of 300,000 numbers, within five standard errors."""
    spec = specs(rule(4), {"w": jnp.zeros((3, 400, 250))})["w"]
    samples = np.asarray(noise(spec, KEY, jnp.ones((3, 250))), np.float64)
    count = samples.size
    assert abs(samples.mean()) < 5 / np.sqrt(count)
    assert abs(samples.var() - 1) < 5 * np.sqrt(2 / count)
    for axis in range(3):
        neighbours = (samples * np.roll(samples, 1, axis)).mean()
        assert abs(neighbours) < 5 / np.sqrt(count)
    other = np.asarray(noise(spec, jax.random.key(6), jnp.ones((3, 250))), np.float64)
    assert abs((samples * other).mean()) < 5 / np.sqrt(count)


@pytest.mark.newest  # XLA of jaxlib 0.8 holds three layers of noise more
def test_no_second_copy_of_a_weight():
    """Temporaries of the compiled gradient under noise, in small blocks or in one: no weight more than without."""
    params = {"w": jax.ShapeDtypeStruct((4, 256, 256), jnp.float32)}
    adapter = lora(rule(4))
    own = jax.eval_shape(lambda: adapter.init(KEY, {"w": jnp.zeros((4, 256, 256))}))
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32)

    def loss(p, x):
        return jnp.sum(lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0])

    def temporaries(block):
        def gradient(params, own, x, key):
            run = flat_lora(adapter, key, 0.1, block=block) if block else adapter
            return jax.grad(run.apply(loss), argnums=1)(params, own, x)

        compiled = jax.jit(gradient).lower(params, own, x, KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    matrix = 4 * 256 * 256
    assert temporaries(2**12) - temporaries(0) < matrix
    assert temporaries(2**22) - temporaries(0) < matrix  # a hash is computed where it is used


def test_growing():
    schedule = growing(0.1, 10)
    expected = [0.05 * (1 - np.cos(np.pi * min(t, 10) / 10)) for t in range(13)]
    np.testing.assert_allclose([schedule(t) for t in range(13)], expected, rtol=1e-6, atol=1e-9)


def test_ends_in_a_flatter_place():
    """The paper's claim: trained to as low a loss, the loss rises less under noise on the merged weight."""
    x = jnp.asarray(normal(0, (12, 24)))
    params = {"a": jnp.asarray(normal(1, (24, 32)) / 5), "b": jnp.asarray(normal(2, (32, 16)) / 6)}
    goal = jnp.asarray(normal(3, (12, 16)))

    def loss(p, x):
        return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - goal) ** 2)

    adapter = lora(rule(6), init="gaussian")
    start = adapter.init(KEY, params)
    tx, steps = optax.adam(0.01), 600
    schedule = growing(0.3, steps)

    @jax.jit
    def train(strength):
        def step(carry, i):
            own, state = carry
            noisy = flat_lora(adapter, jax.random.fold_in(KEY, i), strength * schedule(i))
            grads = jax.grad(noisy.apply(loss), argnums=1)(params, own, x)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(own, updates), state), None

        return lax.scan(step, (start, tx.init(start)), jnp.arange(steps))[0][0]

    @jax.jit
    def risen(own):
        keys = jax.random.split(jax.random.key(99), 64)
        under = jax.vmap(lambda k: flat_lora(adapter, k, 0.3).apply(loss)(params, own, x))(keys)
        return under.mean()

    sharp, flat = risen(train(0.0)), risen(train(1.0))
    assert flat < 0.8 * sharp


def test_quantised_weights_are_refused():
    spec = specs(rule(4), {"w": jnp.zeros((24, 16))})["w"]
    made = Lazy({"x": jnp.zeros((24, 16))}, lambda parts: parts["x"])
    weight = Weight.adapted(spec, made, jnp.zeros((24, 4)), jnp.zeros((4, 16)))
    with pytest.raises(ValueError, match="'w': flat_lora needs a weight in floating point"):
        prepare = flat_lora(lora(rule(4)), KEY, 0.1).prepare
        assert prepare is not None
        prepare({}, {}, {"w": weight})
