"""Deep LoRA: the first gradient's singular vectors without it, and the full-width product compressed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from experiments import completion
from flora_jax.adapters import deep_lora, discrepant, singular_vectors
from tests.adapters.test_low_rank import filled, rule
from tests.helpers import assert_close, normal

KEY = jax.random.key(0)
X = jnp.asarray(normal(9, (40, 24)))


def low_rank(seed, shape, rank):
    *batch, m, n = shape
    return normal(seed, (*batch, m, rank)) @ normal(seed + 1, (*batch, rank, n))


def random_vectors(rank, *shape):
    *batch, m, n = shape
    sides = (
        np.linalg.qr(normal(3, (*batch, m, rank)))[0],
        np.linalg.qr(normal(4, (*batch, n, rank)))[0],
    )
    return {"w": tuple(map(jnp.asarray, sides))}


def test_value_and_gradients_in_float64():
    params = {"w": jnp.asarray(normal(0, (24, 16)))}
    adapter = deep_lora(rule(6), random_vectors(3, 24, 16))
    own = filled(adapter, params)
    run = adapter.apply(lambda p, x: 0.5 * jnp.sum((x @ p["w"]) ** 2))
    value, found = jax.value_and_grad(run, argnums=1)(params, own, X)
    arrays = [
        np.asarray(own["w"][k], np.float64) for k in ("down", "first", "second", "third", "up")
    ]
    x = np.asarray(X, np.float64)
    y = x @ (np.asarray(params["w"], np.float64) + np.linalg.multi_dot(arrays))
    np.testing.assert_allclose(value, 0.5 * np.sum(y**2), rtol=1e-5)
    gradient = x.T @ y
    for i, name in enumerate(("down", "first", "second", "third", "up")):
        before = np.linalg.multi_dot([np.eye(24), np.eye(24), *arrays[:i]])
        after = np.linalg.multi_dot([*arrays[i + 1 :], np.eye(16), np.eye(16)])
        assert_close(found["w"][name], before.T @ gradient @ after.T, 1e-4)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_singular_vectors_of_a_gradient_of_low_rank(batch):
    """Exact: the projectors on both sides are numpy's, of the gradient that was never made."""
    shape, rank = (*batch, 60, 50), 3
    goal = low_rank(1, shape, rank)
    params = {"w": jnp.zeros(shape), "b": jnp.ones(5)}

    def loss(p, x):
        wanted = jnp.einsum("ti,...ij->...tj", x, goal)
        y = jnp.einsum("ti,...ij->...tj", x, p["w"])
        return 0.5 * jnp.sum((y - wanted) ** 2)

    x = jnp.asarray(normal(5, (30, 60)))
    find = singular_vectors(loss, rule(2 * rank))
    left, right = jax.jit(find)(params, x)["w"]
    gradient = np.asarray(jax.grad(loss)(params, x)["w"], np.float64)
    u, _, v = np.linalg.svd(gradient)
    for found, exact in ((left, u[..., :rank]), (right, np.swapaxes(v, -1, -2)[..., :rank])):
        found = np.asarray(found, np.float64)
        transposed = np.swapaxes(found, -1, -2)
        assert_close(transposed @ found, np.broadcast_to(np.eye(rank), (*batch, rank, rank)), 1e-5)
        assert_close(found @ transposed, exact @ np.swapaxes(exact, -1, -2), 1e-3)
    text = str(jax.make_jaxpr(find)(params, x))
    made = [
        line
        for line in text.splitlines()
        if "f32[60,50] = dot" in line or "f32[3,60,50] = dot" in line
    ]
    assert not made


def test_singular_vectors_of_a_decaying_spectrum():
    """Beyond the rank there are numbers of 2 %: the angle to the true vectors stays as small as that."""
    u, v = (np.linalg.qr(normal(seed, (60, 60)))[0] for seed in (1, 2))
    gradient = (u[:, :20] * np.r_[[3, 2, 1], 0.02 * np.ones(17)]) @ v[:, :20].T
    find = singular_vectors(
        lambda p: jnp.sum(p["w"] * gradient) + jnp.sum(p["w"] @ p["w"]), rule(6)
    )
    left, right = find({"w": jnp.zeros((60, 60))})["w"]
    for found, exact in ((left, u), (right, v)):
        cosines = np.linalg.svd(np.asarray(found, np.float64).T @ exact[:, :3])[1]
        assert np.all(np.sqrt(1 - np.minimum(cosines, 1) ** 2) < 0.1)


def test_how_it_starts():
    """`ε³` times an isometry of one basis on the other; each basis has the singular vectors in it."""
    params = {"w": jnp.zeros((2, 24, 16))}
    vectors = random_vectors(3, 2, 24, 16)
    adapter = deep_lora(rule(6), vectors, epsilon=0.1)
    own = adapter.init(KEY, params)["w"]
    for side, found in zip(
        vectors["w"], (own["down"], jnp.swapaxes(own["up"], -1, -2)), strict=True
    ):
        assert_close(
            jnp.swapaxes(found, -1, -2) @ found, np.broadcast_to(np.eye(6), (2, 6, 6)), 1e-5
        )
        within = np.asarray(jnp.swapaxes(found, -1, -2) @ side)
        assert_close(np.linalg.norm(within, axis=1), np.ones((2, 3)), 1e-5)
    merged = np.asarray(adapter.merge(params, {"w": own})["w"], np.float64)
    values = np.linalg.svd(merged)[1]
    np.testing.assert_allclose(values[:, :6], 1e-3, rtol=1e-4)
    np.testing.assert_allclose(values[:, 6:], 0, atol=1e-8)


def test_the_trajectory_of_the_full_width():
    """Theorem 1: for a target of rank 2, gradient descent on three 20 x 20 factors is what the compressed
    factors do in 4 x 4, all along, but for the `ε³` that the rest of the full product starts with."""
    size, rank, epsilon, rate = 20, 2, 0.1, 0.05
    target = low_rank(1, (size, size), rank)
    target = jnp.asarray(3 * target / np.linalg.norm(target))
    params = {"w": jnp.zeros((size, size))}

    def loss(p):
        return 0.5 * jnp.sum((p["w"] - target) ** 2)

    projection = rule(2 * rank)
    adapter = deep_lora(projection, singular_vectors(loss, projection)(params), epsilon=epsilon)
    own = adapter.init(KEY, params)
    down, up = np.asarray(own["w"]["down"], np.float64), np.asarray(own["w"]["up"], np.float64)
    rest = [np.linalg.svd(basis)[0][:, 2 * rank :] for basis in (down, up.T)]
    isometry = down @ up + rest[0] @ rest[1].T
    full = [jnp.asarray(epsilon * isometry), *[jnp.asarray(epsilon * np.eye(size))] * 2]
    full = [w.astype(jnp.float32) for w in full]

    def descend(tx, own, weight):
        def step(carry, _):
            own, state = carry
            grads = jax.grad(lambda own: loss({"w": weight(own)}))(own)
            updates, state = tx.update(grads, state)
            own = optax.apply_updates(own, updates)
            return (own, state), weight(own)

        return lax.scan(step, (own, tx.init(own)), length=400)[1]

    uncompressed = jax.jit(lambda: descend(optax.sgd(rate), full, lambda w: w[0] @ w[1] @ w[2]))()
    tx = optax.chain(optax.sgd(rate), discrepant(0.0))
    small = jax.jit(lambda: descend(tx, own, lambda own: adapter.merge(params, own)["w"]))()
    apart = np.linalg.norm(np.asarray(uncompressed - small, np.float64), axis=(1, 2))
    outside = epsilon**3 * np.sqrt(size - 2 * rank)
    assert np.all(apart < 1.1 * outside)
    assert np.linalg.norm(uncompressed[-1] - target) < 0.05 * np.linalg.norm(target)
    assert np.linalg.norm(uncompressed[100]) < 0.9 * np.linalg.norm(
        target
    )  # it was on its way then


def test_matrix_completion():
    """The paper's example: from 30 % of the entries the compressed factors find the matrix as the full ones
    do, where two factors fit what they see and not the rest."""
    config = completion.Config(size=60, true_rank=2, seen=0.3, rank=8, learning_rate=0.3)
    figures = completion.compare(config)
    errors = {name: error for name, (error, _, _) in figures.items()}
    assert errors["Deep LoRA"] < 0.05
    assert errors["Deep LoRA"] < 1.5 * errors["three factors of full width"]
    assert errors["Deep LoRA"] < 0.3 * errors["LoRA"]
    assert figures["Deep LoRA"][1] < 0.2 * figures["three factors of full width"][1]


def test_discrepant_rates():
    tx = discrepant(0.1)
    tree = {"w": {"down": jnp.ones(2), "first": jnp.ones(2), "up": jnp.ones(2)}}
    updates, _ = tx.update(tree, tx.init(tree))
    assert {k: float(v[0]) for k, v in updates["w"].items()} == {
        "down": pytest.approx(0.1),
        "first": 1.0,
        "up": pytest.approx(0.1),
    }


def test_errors():
    params = {"w": jnp.zeros((24, 16))}
    with pytest.raises(ValueError, match="rank of 'w' must be even for deep_lora, found 5"):
        deep_lora(rule(5), random_vectors(2, 24, 16)).init(KEY, params)
    with pytest.raises(ValueError, match="vectors must have those of 'w', found none"):
        deep_lora(rule(4), {}).init(KEY, params)
    with pytest.raises(ValueError, match="vectors of 'w' must be 2, half of the rank, found 3"):
        deep_lora(rule(4), random_vectors(3, 24, 16)).init(KEY, params)
