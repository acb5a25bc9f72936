import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.paper import lora_dynamics
from tests.helpers import normal

RATE = 0.3


def loss(params, batch):
    w = params["w"]
    y = jnp.tanh(batch @ w["kernel"] + batch @ w["a"] @ w["b"])
    return jnp.sum(jnp.sin(y))


def start():
    w = {"kernel": normal(0, (6, 5)), "a": normal(1, (6, 2)), "b": np.zeros((2, 5), np.float32)}
    return {"w": jax.tree.map(jnp.asarray, w)}


def naive(steps):
    """The two changes of the weight, in float64, with the gradient of tanh and sin by hand."""
    w, a, b = (np.asarray(start()["w"][name], np.float64) for name in ("kernel", "a", "b"))
    a0, total = a.copy(), np.zeros_like(w)
    for i in range(steps):
        x = normal(10 + i, (4, 6)).astype(np.float64)
        y = np.tanh(x @ w + x @ a @ b)
        gradient = x.T @ (np.cos(y) * (1 - y**2))
        total += gradient
        a, b = a - RATE * gradient @ b.T, b - RATE * a.T @ gradient
    return a @ b, -RATE * a0 @ a0.T @ total, np.linalg.norm(a - a0) / np.linalg.norm(a0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_against_a_naive_computation(steps):
    params = first = start()
    sums = {("w",): jnp.zeros((6, 5))}
    for i in range(steps):
        params, sums, _ = lora_dynamics.step(
            loss, params, sums, jnp.asarray(normal(10 + i, (4, 6))), RATE
        )
    found = lora_dynamics.compare(first, params, sums, RATE)
    change, expected, moved = naive(steps)
    distance = np.linalg.norm(change - expected) / np.linalg.norm(change)
    cosine = (change * expected).sum() / np.linalg.norm(change) / np.linalg.norm(expected)
    np.testing.assert_allclose(found["distance"], distance, atol=1e-5)
    np.testing.assert_allclose(found["cosine"], cosine, atol=1e-5)
    np.testing.assert_allclose(found["moved"], moved, atol=1e-5)
    assert (distance < 1e-12) == (steps == 1)
