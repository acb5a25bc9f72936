"""The present gradient exact, the past as a sketch; and Muon made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from flora_jax.update.ordinary_step import ordinary_step
from tests.helpers import (
    Naive,
    assert_close,
    assert_tree_close,
    make_gradients,
    matrix_of_a,
    normal,
)


def params_of(layers=3):
    return {
        "layers": {"kernel": jnp.asarray(normal(0, (layers, 16, 24))) / 4},
        "norm": jnp.ones((16,)),
    }


def test_the_recursion():
    """`β Σ β^k (1 − β) G_{t−k} AᵀA + (1 − β) G_t`, anew with each projection, in float64."""
    params = {"w": jnp.zeros((16, 24)), "b": jnp.zeros(5)}
    projection = flora_jax.Projection(6, min_dim=8, side="input", resample_every=3)
    tx = flora_jax.exact_momentum(0.7, projection)
    state = tx.init(params)
    spec = flora_jax.plan(params, projection).leaves[1].spec
    momentum = None
    for step, grads in enumerate(make_gradients(params, 5)):
        found, state = jax.jit(tx.update)(grads, state, params)
        naive, a = Naive(spec), matrix_of_a(spec, step // 3)
        gradient = np.asarray(grads["w"], np.float64)
        if step % 3 == 0:
            momentum = np.zeros(spec.data_shape)
        past = naive.decompress(a, 0.7 * momentum)
        assert_close(found["w"], past + 0.3 * gradient, 1e-5)
        np.testing.assert_array_equal(found["b"], grads["b"])
        momentum = 0.7 * momentum + 0.3 * naive.project(a, gradient)
        assert_close(state.momentum.momentum["w"], momentum, 1e-5)


def test_sketches_are_refused():
    params = {"w": jnp.ones((16, 24))}
    projection = flora_jax.Projection(6, min_dim=8)
    tx = flora_jax.exact_momentum(0.9, projection)
    _, sketches = flora_jax.value_and_grad(lambda p: jnp.sum(p["w"] ** 2), projection)(
        params, cycle=0
    )
    with pytest.raises(ValueError, match="ordinary gradients, found sketches"):
        tx.update(sketches, tx.init(params), params)


def loss(params, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w) @ w.T, None

    x, _ = jax.lax.scan(layer, x * params["norm"], params["layers"]["kernel"])
    return jnp.mean(x**2)


@pytest.mark.parametrize("rank", [None, 6])
def test_in_the_backward_pass_each_layer_has_a_projection_of_its_own(rank):
    """The state is a sketch for each layer, or nothing; the first step is that of `tx.update`, the loss falls."""
    params, x = params_of(), jnp.asarray(normal(1, (4, 16)))
    tx = flora_jax.sketched_muon(0.02, rank=rank, min_dim=8)
    step = flora_jax.make_train_step(loss, tx, update="backward", donate=False)
    state = step.init(params, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim == 3]
    assert shapes == ([] if rank is None else [(3, 6, 24)])
    ordinary = ordinary_step(loss, tx)
    expected, _, _ = ordinary(jax.tree.map(jnp.copy, params), tx.init(params), x)
    found, second, first_loss = step(params, state, x)
    assert_tree_close(found, expected, 1e-4)
    if rank is not None:  # the same gradient twice has another sketch in each layer
        same = {
            **params,
            "layers": {"kernel": jnp.broadcast_to(params["layers"]["kernel"][:1], (3, 16, 24))},
        }

        def alike(p, x):
            w = p["layers"]["kernel"]
            total, _ = jax.lax.scan(lambda c, v: (c + jnp.mean((x @ v) ** 2), None), 0.0, w)
            return total + jnp.sum(p["norm"])

        one = flora_jax.make_train_step(alike, tx, update="backward", donate=False)
        _, kept, _ = one(same, one.init(same, x), x)
        (sketch,) = (leaf for leaf in jax.tree.leaves(kept) if leaf.ndim == 3)
        assert float(jnp.abs(sketch[0] - sketch[1]).max()) > 1e-3 * float(jnp.abs(sketch).max())
    for _ in range(15):
        found, second, last = step(found, second, x)
    assert float(last) < 0.7 * float(first_loss)


def test_weight_decay_and_rates():
    """Zero gradients: matrices shrink by the rate of matrices, and all else stays."""
    params = params_of()
    tx = flora_jax.sketched_muon(0.1, weight_decay=0.5, adafactor_learning_rate=0.3, min_dim=8)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert_close(new["layers"]["kernel"], 0.95 * np.asarray(params["layers"]["kernel"]), 1e-6)
    np.testing.assert_array_equal(new["norm"], params["norm"])
