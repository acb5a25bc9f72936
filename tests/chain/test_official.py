"""The official behaviour, restated in numpy from the list in its module's docstring."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flora_jax.chain import official
from tests.helpers import Naive, assert_close, make_gradients, matrix_of_a

DECAY, KAPPA = 0.9, 2
ROUNDING = 0.02  # bfloat16 has 8 bits, and the momentum is rounded three times


@pytest.fixture(scope="module")
def params():
    return {"b": jnp.ones(256), "w": jnp.ones((128, 256)), "wide": jnp.ones((128, 1024))}


def test_only_square_enough_matrices_and_their_smaller_side(params):
    specs = official._specs(params, 16, 0)
    assert [spec is not None for spec in specs] == [False, True, False]
    state = official.scale_by_official(16).init(params)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), state.momentum)
    assert shapes == {
        "b": ((256,), "bfloat16"),
        "w": ((16, 256), "bfloat16"),
        "wide": ((128, 1024), "bfloat16"),
    }


def test_steps_against_numpy(params):
    tx = official.scale_by_official(16, DECAY, 0, KAPPA)
    (_, spec, _) = official._specs(params, 16, 0)
    naive = Naive(spec)
    state, step = tx.init(params), jax.jit(tx.update)
    sketch, full, key = np.zeros((16, 256)), np.zeros((128, 1024)), 0
    for count, update in enumerate(make_gradients(params, 4)):
        found, state = step(update, state)
        if count % KAPPA == 0:
            old, key = matrix_of_a(spec, key), key + 1
            sketch = naive.transfer(old, old, sketch)
        a = matrix_of_a(spec, key)
        current = np.asarray(update["w"], np.float64)
        sketch = DECAY * sketch + (1 - DECAY) * naive.project(a, current)
        expected = DECAY * naive.decompress(a, sketch) + (1 - DECAY) * current
        assert_close(found["w"], expected, ROUNDING)
        plain = np.asarray(update["wide"], np.float64)
        full = DECAY * full + (1 - DECAY) * plain
        assert_close(found["wide"], DECAY * full + (1 - DECAY) * plain, ROUNDING)


def test_the_chain_steps_down(params):
    tx = official.flora(0.1, rank=16)
    gradients = make_gradients(params, 1)[0]
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    towards = sum(
        float(jnp.vdot(after - before, gradient))
        for after, before, gradient in zip(
            *map(jax.tree.leaves, (moved, params, gradients)), strict=True
        )
    )
    assert towards < 0
