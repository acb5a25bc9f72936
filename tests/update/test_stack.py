"""A layer's backward pass on a TPU, where each weight is written before it goes on; here XLA for CPUs runs the same program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from flora_jax.models import t5
from tests.fused.test_models import TOKENS, init
from tests.helpers import assert_tree_close, normal
from tests.update.test_backward import compare, copied, of_llama

WIDTH, LAYERS = 8, 3


@pytest.fixture
def tpu(monkeypatch):
    def platform_dependent(*args, tpu, default):
        return tpu(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", platform_dependent)


def of_t5():
    model = t5.T5(t5.Shape(48, 32, 64, 2, 4, 8))
    return lambda p: t5.loss(model, p, TOKENS), init(model, TOKENS, TOKENS)


@pytest.mark.parametrize(
    "made",
    [of_llama, lambda: of_llama(remat=False), lambda: of_llama(tied=True), of_t5],
    ids=["llama", "without remat", "tied", "t5"],
)
def test_the_ordinary_step_s_result(tpu, made):
    compare(*made(), optax.sgd(0.1))


def test_a_weight_that_all_layers_share(tpu):
    """Its gradient is a sum over the layers; that of a stack that is used once more is not complete in them."""
    params = {
        "stack": jnp.asarray(normal(0, (LAYERS, WIDTH, WIDTH))) / 3,
        "shared": jnp.asarray(normal(1, (WIDTH, WIDTH))) / 3,
    }
    x = jnp.asarray(normal(2, (5, WIDTH)))

    def loss(params):
        def layer(h, w):
            return h + jnp.tanh(h @ w) @ params["shared"], None

        h, _ = jax.lax.scan(jax.checkpoint(layer), x @ params["stack"][1], params["stack"])
        return jnp.mean(h**2)

    compare(loss, params, optax.adam(1e-2), tolerance=1e-3)


def test_weights_in_int8(tpu, monkeypatch):
    """The same integers and scales as elsewhere."""
    pytest.importorskip("qwix")
    loss, params = of_llama()
    params = flora_jax.to_int8(params, block=8)
    tx = optax.adafactor(optax.constant_schedule(1e-2))
    found = []
    for undone in (False, True):
        if undone:
            monkeypatch.undo()
        step = flora_jax.make_train_step(loss, tx, update="backward", rounding="stochastic")
        state = step.init(params)
        found.append(step(copied(params), state)[0])
    same = [
        np.mean(np.asarray(a) == np.asarray(b))
        for a, b in zip(*map(jax.tree.leaves, found), strict=True)
        if a.dtype == jnp.int8
    ]
    assert same and min(same) > 0.99
    assert_tree_close(*map(flora_jax.from_int8, found), 1e-2)


def barriers(devices):
    """The barriers through which a stack of weights goes, as lines of the program."""
    mesh = jax.make_mesh((devices,), ("x",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    loss, params = of_llama()
    step = flora_jax.make_train_step(loss, optax.sgd(0.1), update="backward")
    params = jax.device_put(params, sharding)
    lines = step.lower(params, step.init(params)).as_text().splitlines()
    stack = re.compile(rf"optimization_barrier.*tensor<{LAYERS}x\d+(x\d+)?xf32>")
    return [line for line in lines if stack.search(line)]


def test_it_waits_on_one_device_alone(tpu):
    """One barrier for each weight of a layer, all but the first norm's with a cotangent; and one when all layers are done."""
    kinds = 4 + 3 + 2  # of attention, of the feed-forward network, of the norms
    lines = barriers(1)
    assert len(lines) == kinds + 1
    cotangents = [line for line in lines if re.search(r"tensor<2x\d+x32xf32>", line)]
    assert kinds - 1 <= len(cotangents) <= kinds + 1
    assert len(barriers(2)) == 1


@pytest.mark.parametrize("devices, kept", [(1, True), (2, True), (4, False)])
def test_the_layout_is_that_of_what_a_device_has(tpu, devices, kept):
    """256 columns are whole tiles of 128 on one device and on two, and on four a device has half a tile's."""
    mesh = jax.make_mesh((devices,), ("x",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "x"))
    stack = jax.device_put(jnp.zeros((LAYERS, 40, 256)), sharding)
    params = {"stack": stack}

    def loss(params):
        def layer(h, w):
            return h + jnp.tanh(h @ w) @ w.T, None

        return jnp.mean(jax.lax.scan(layer, jnp.ones((5, 40)), params["stack"])[0])

    step = flora_jax.make_train_step(loss, optax.sgd(0.1), update="backward")
    text = step.lower(params, step.init(params)).as_text()
    assert ("@LayoutConstraint" in text) == kept
