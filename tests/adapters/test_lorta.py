"""LoRTA: the full tensor in numpy; the paper's count; what one tensor for all layers can do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import decoder
from flora_jax.adapters import lora, lorta
from flora_jax.adapters.lorta import count
from flora_jax.chain.plan import tree_bytes
from tests.adapters.test_low_rank import filled, rule
from tests.helpers import assert_close, normal

NAMES = ("query", "key", "value", "out")
WIDTH, HEADS, LAYERS, RANK = 24, 4, 11, 3


def make_params(stacked, split=False):
    def kernel(layer, i):
        seed = 10 * layer + i
        shape = (WIDTH, WIDTH)
        if split:
            shape = (HEADS, 6, WIDTH) if i == 3 else (WIDTH, HEADS, 6)
        return jnp.asarray(normal(seed, shape))

    layers = [
        {name: {"kernel": kernel(layer, i)} for i, name in enumerate(NAMES)}
        for layer in range(LAYERS)
    ]
    if stacked:
        return {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers), "up": jnp.ones((24, 96))}
    return {**{f"layer_{i}": layer for i, layer in enumerate(layers)}, "up": jnp.ones((24, 96))}


def tensor(own):
    arrays = [
        np.asarray(own[k], np.float64) for k in ("input", "head_dim", "heads", "layers", "matrices")
    ]
    return np.einsum("ar,br,hr,lr,mr->abhlm", *arrays)


def kernels(params, stacked):
    """`(L, 4, d, H, head_dim)`, the output projections turned."""
    found = []
    for i in range(LAYERS):
        layer = (
            jax.tree.map(lambda x, i=i: x[i], params["layers"]) if stacked else params[f"layer_{i}"]
        )
        for name in NAMES:
            kernel = np.asarray(layer[name]["kernel"], np.float64)
            kernel = kernel.reshape(WIDTH, WIDTH)
            found.append(kernel.T if name == "out" else kernel)
    return np.stack(found).reshape(LAYERS, 4, WIDTH, HEADS, 6)


@pytest.mark.parametrize("stacked, split", [(True, False), (False, False), (False, True)])
def test_updates_are_slices_of_the_tensor(stacked, split):
    params = make_params(stacked, split)
    adapter = lorta(rule(RANK), HEADS, alpha=6)
    own = filled(adapter, params)
    merged = adapter.merge(params, own)
    found = kernels(merged, stacked) - kernels(params, stacked)
    assert_close(found, 2 * np.einsum("abhlm->lmahb", tensor(own)), 1e-4)
    np.testing.assert_array_equal(merged["up"], params["up"])


def test_gradients_in_float64():
    """Through a product with each kernel, against the tensor's own gradient in numpy."""
    params = make_params(stacked=True)
    adapter = lorta(rule(RANK), HEADS)
    own = filled(adapter, params)
    x = jnp.asarray(normal(1, (5, WIDTH)))

    def loss(p, x):
        ys = [jnp.einsum("ti,lio->lto", x, p["layers"][name]["kernel"]) for name in NAMES]
        return 0.5 * sum(jnp.sum(y**2) for y in ys)

    found = jax.jit(jax.grad(adapter.apply(loss), argnums=1))(params, own, x)
    inputs = np.asarray(x, np.float64)
    gram = inputs.T @ inputs
    merged = kernels(adapter.merge(params, own), True).reshape(LAYERS, 4, WIDTH, WIDTH)
    gradient = np.stack(  # of ½‖x W‖², and of the turned output projection
        [[gram @ w if m < 3 else w @ gram for m, w in enumerate(layer)] for layer in merged]
    ).reshape(LAYERS, 4, WIDTH, HEADS, 6)
    names = {"input": "a", "head_dim": "b", "heads": "h", "layers": "l", "matrices": "m"}
    for name, label in names.items():
        others = [other for other in names if other != name]
        equation = "lmahb," + ",".join(f"{names[o]}r" for o in others) + f"->{label}r"
        expected = np.einsum(equation, gradient, *(np.asarray(own[o], np.float64) for o in others))
        assert_close(found[name], expected, 1e-4)


def test_count_is_the_papers_formula():
    """`r (d + d/H + H + L + 4)`, of trees as they are; the model starts as it was."""
    shape = decoder.Shape(width=32, layers=3, heads=4)
    model = decoder.model(shape)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    adapter = lorta(rule(5), 4)
    own = adapter.init(jax.random.key(0), params)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(own))
    assert numbers == count(5, 32, 4, 3) == 5 * (32 + 8 + 4 + 3 + 4)
    merged = adapter.merge(params, own)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, merged, params)))


def test_one_tensor_for_all_layers():
    """The paper's claim: where updates share structure over layers and heads, a small part of LoRA's
    parameters fits what LoRA, at its smallest rank, does not."""
    params = make_params(stacked=True)
    teacher = lorta(rule(2), HEADS)
    goal = jax.tree.map(lambda x: 3 * x, filled(teacher, params, seed=5))
    goal = teacher.merge(params, goal)

    def loss(p):
        pairs = [(p["layers"][n]["kernel"], goal["layers"][n]["kernel"]) for n in NAMES]
        return sum(jnp.mean((a - b) ** 2) for a, b in pairs)

    def final(adapter, steps=1500):
        tx = optax.adam(optax.cosine_decay_schedule(0.03, steps))
        own = adapter.init(jax.random.key(0), params)
        gradient = jax.grad(adapter.apply(loss), argnums=1)

        def step(carry, _):
            own, state = carry
            updates, state = tx.update(gradient(params, own), state)
            return (optax.apply_updates(own, updates), state), None

        (own, _), _ = jax.lax.scan(step, (own, tx.init(own)), length=steps)
        return loss(adapter.merge(params, own)), own

    ours, own = jax.jit(lambda: final(lorta(rule(2), HEADS)))()
    matrices = rule(1, select=lambda path, shape: path.startswith("layers"))
    theirs, pairs = jax.jit(lambda: final(lora(matrices, init="gaussian")))()
    assert tree_bytes(own) < 0.06 * tree_bytes(pairs)
    assert ours < 0.1 * theirs


def test_errors():
    params = make_params(stacked=False)
    with pytest.raises(ValueError, match=r"heads must divide the width 24 of .*, found 5"):
        lorta(rule(2), 5).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="no weight has one of the names q_proj"):
        lorta(rule(2), 4, names=("q_proj",)).init(jax.random.key(0), params)
    params["layer_3"]["key"]["kernel"] = jnp.ones((24, 12))
    with pytest.raises(ValueError, match=r"'layer_3/key/kernel': .* 24 x 24 .*, found 24 x 12"):
        lorta(rule(2), 4).init(jax.random.key(0), params)
