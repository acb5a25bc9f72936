"""Every method on one model: layers under scan and remat, weights and batch sharded over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flora_jax.adapters import (
    boosting,
    deep_lora,
    flat_lora,
    lora,
    lora_pro,
    lorta,
    proximal,
    run_lora,
    singular_vectors,
    sora,
    xgb_lora,
)
from flora_jax.adapters.quantized import quantize
from tests.adapters.test_low_rank import rule
from tests.helpers import assert_tree_close, normal, often

NAMES = ("query", "key", "value", "out")
PARAMS = {
    "layers": {
        **{
            name: {"kernel": jnp.asarray(normal(i, (2, 16, 16)) / 5)}
            for i, name in enumerate(NAMES)
        },
        "up": {"kernel": jnp.asarray(normal(5, (2, 16, 32)) / 5)},
        "down": {"kernel": jnp.asarray(normal(6, (2, 32, 16)) / 5)},
        "scale": jnp.ones((2, 16)),
    }
}
X = jnp.asarray(normal(7, (8, 4, 16)))
KEY = jax.random.key(0)


def loss(params, x):
    def layer(x, p):
        y = x * p["scale"]
        q, k, v = (y @ p[name]["kernel"] for name in NAMES[:3])
        x = x + (jnp.tanh(q * k) * v) @ p["out"]["kernel"]
        return x + jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"], None

    x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
    return jnp.mean(jnp.sin(x) ** 2)


def methods():
    plain, sgd = lora(rule(4)), optax.sgd(1.0)
    vectors = singular_vectors(loss, rule(4))(PARAMS, X)
    return {
        "lora": (plain, sgd, PARAMS),
        "lora-pro": (plain, optax.chain(lora_pro(plain, PARAMS), sgd), PARAMS),
        "flat-lora": (flat_lora(plain, KEY, 0.1), sgd, PARAMS),
        "sora": (sora(rule(4)), optax.chain(sgd, proximal(0.3, 1.0)), PARAMS),
        "deep-lora": (deep_lora(rule(4), vectors, epsilon=0.3), sgd, PARAMS),
        "lorta": (lorta(rule(4), heads=2), sgd, PARAMS),
        "run-lora": (run_lora(plain), sgd, PARAMS),
        "quantised": (plain, sgd, quantize(plain, PARAMS, "nf4", tile=8)),
    }


@pytest.mark.parametrize(
    "name",
    often(
        ["lora", "lora-pro", "flat-lora", "sora", "deep-lora", "lorta", "run-lora", "quantised"],
        *("lora", "quantised"),
    ),
)
def test_sharded_step(name):
    """Two steps on a mesh of 4 x 2 are those of one device; no use of a weight is without a rule."""
    adapter, tx, params = methods()[name]
    own = adapter.init(KEY, PARAMS)
    assert not [use for use in adapter.uses(loss, params, own, X) if use.whole]

    @jax.jit
    def step(params, own, state, x):
        value, grads = jax.value_and_grad(adapter.apply(loss), argnums=1)(params, own, x)
        updates, state = tx.update(grads, state, own)
        return optax.apply_updates(own, updates), state, value

    def two(params, x):
        found, state, values = own, tx.init(own), []
        for _ in range(2):
            found, state, value = step(params, found, state, x)
            values.append(value)
        return found, values

    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

    def sharded(leaf):
        lengths = (1, 1, 2)[-leaf.ndim :] if leaf.ndim < 3 else (1, 4, 2)
        fits = all(n % k == 0 for n, k in zip(leaf.shape, lengths, strict=True))
        spec = (None, "data", "model")[: leaf.ndim] if leaf.ndim == 3 and fits else ()
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    expected = two(params, X)
    assert_tree_close(two(jax.tree.map(sharded, params), x), expected, 1e-4)
    assert float(expected[1][1]) != float(expected[1][0])


@pytest.mark.long
def test_sharded_boosting():
    """Rounds on the mesh: the same params in the end."""
    run = boosting(loss, xgb_lora(1, rule(1)), optax.sgd(1.0), steps=2)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    place = NamedSharding(mesh, PartitionSpec(None, "data", "model"))
    replicated = NamedSharding(mesh, PartitionSpec())
    sharded = jax.tree.map(
        lambda x: jax.device_put(x, place if x.ndim == 3 else replicated), PARAMS
    )

    def final(params, x):
        state = run.init(KEY, params)
        step = jax.jit(run.step)
        for _ in range(5):
            state, _ = step(state, x)
        assert int(state.round) == 2
        return run.finish(state)

    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    assert_tree_close(final(sharded, x), final(PARAMS, X), 1e-5)


def test_explicit_mesh():
    """Axes that are part of the types: what is added is sharded as the product is."""
    types = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    adapter = lora(rule(4))
    params = {"w": jnp.asarray(normal(0, (16, 32)))}
    own = jax.tree.map(lambda x: x + 0.1, adapter.init(KEY, params))

    def plain(p, x):
        return jnp.sum(jnp.sin(x @ p["w"]))

    gradient = jax.jit(jax.value_and_grad(adapter.apply(plain), argnums=1))
    expected = gradient(params, own, X)
    with jax.set_mesh(mesh):
        put = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
        found = gradient(
            {"w": put(params["w"], None, "model")},
            jax.tree.map(put, own),
            put(X, "data"),
        )
    assert_tree_close(found, expected, 1e-5)
