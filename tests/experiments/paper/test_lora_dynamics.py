import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.paper import lora, lora_dynamics
from flora_jax import Projection
from flora_jax.adapters import lora as library
from tests.helpers import normal

RATE = 0.3


def plain(params, batch):
    return jnp.sum(jnp.sin(jnp.tanh(batch @ params["w"]["kernel"])))


loss = lora.apply(library(Projection(2, side="input", min_dim=1)), plain)


def start():
    pair = {"down": normal(1, (6, 2)), "up": np.zeros((2, 5), np.float32)}
    tree = {"w": {"kernel": normal(0, (6, 5))}, "lora": {"w/kernel": pair}}
    return jax.tree.map(jnp.asarray, tree)


def naive(steps):
    """The two changes of the weight, in float64, with the gradient of tanh and sin by hand."""
    pair = start()["lora"]["w/kernel"]
    arrays = (start()["w"]["kernel"], pair["down"], pair["up"])
    w, a, b = (np.asarray(array, np.float64) for array in arrays)
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
    sums = {"w/kernel": jnp.zeros((6, 5))}
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
