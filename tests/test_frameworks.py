"""The loops that people have: a plain dict, Linen's TrainState, NNX's Optimizer, Equinox."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import flora_jax
from flora_jax.chain import storage
from tests.helpers import assert_tree_equal, normal

INPUTS = jnp.asarray(normal(0, (64, 32)))
TARGETS = jnp.tanh(INPUTS @ normal(1, (32, 24)) / 6)
STEPS = 120


def make(state_dtype="float32"):
    projection = flora_jax.Projection(8, min_dim=16, resample_every=2)
    return flora_jax.flora(
        0.05, projection=projection, accumulation_steps=2, state_dtype=state_dtype
    )


def squares(outputs):
    return jnp.mean((outputs - TARGETS) ** 2)


def assert_compressed(opt_state):
    """What is accumulated is of rank 8: for the kernels 32 × 48 and 48 × 24, (32, 8) and (8, 24)."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda n: hasattr(n, "accumulated"))
    (state,) = [node for node in nodes if hasattr(node, "accumulated")]
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.accumulated) if leaf.ndim == 2)
    assert shapes in ([(8, 24), (32, 8)], [(24, 8), (8, 32)], [(8, 32), (24, 8)])


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(24, name="out")(jnp.tanh(nn.Dense(48, name="hidden")(x)))


def linen_params():
    return Linen().init(jax.random.key(0), INPUTS)["params"]


def train_linen():
    state = TrainState.create(apply_fn=Linen().apply, params=linen_params(), tx=make())

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: squares(state.apply_fn({"params": p}, INPUTS)))(
            state.params
        )
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(STEPS):
        state, loss = step(state)
        losses.append(float(loss))
    return state, losses


def test_linen_train_state():
    state, losses = train_linen()
    assert losses[-1] < 0.4 * losses[0]
    assert_compressed(state.opt_state)


def test_plain_dict_gives_what_linen_gives():
    params, tx = linen_params(), make()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: squares(Linen().apply({"params": p}, INPUTS)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
    linen = TrainState.create(apply_fn=Linen().apply, params=linen_params(), tx=make())
    for _ in range(4):
        grads = jax.jit(jax.grad(lambda p: squares(Linen().apply({"params": p}, INPUTS))))(
            linen.params
        )
        linen = linen.apply_gradients(grads=grads)
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(linen.params), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(32, 48, rngs=rngs)
        self.out = nnx.Linear(48, 24, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_nnx_optimizer(dtype, monkeypatch):
    monkeypatch.setattr(storage, "MIN_SIZE", 1)
    model = Nnx(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(dtype), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: squares(m(INPUTS)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    assert losses[-1] < 0.4 * losses[0]
    kept = {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(optimizer))}
    assert dtype in kept


def test_equinox():
    model = eqx.nn.MLP(32, 24, 48, 1, activation=jnp.tanh, key=jax.random.key(0))
    tx = make()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        loss, grads = eqx.filter_value_and_grad(lambda m: squares(jax.vmap(m)(INPUTS)))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(STEPS):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    assert losses[-1] < 0.4 * losses[0]
    assert_compressed(state)


def test_linen_twice_is_the_same():
    assert_tree_equal(train_linen()[0].params, train_linen()[0].params)
