"""Meshes with explicit axes: equal to one device, and every array keeps its type."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flora_jax
from tests.helpers import assert_tree_close, normal, often

LAYOUTS = {
    "tensor": {
        "up": P(None, "model"),
        "down": P("model", None),
        "stack": P(None, None, "model"),
        "embed": P(None, "model"),
    },
    "fsdp": {
        "up": P("data", None),
        "down": P("data", None),
        "stack": P(None, "data", None),
        "embed": P("data", None),
    },
    "both": {
        "up": P("data", "model"),
        "down": P("model", "data"),
        "stack": P(None, "data", "model"),
        "embed": P("model", "data"),
    },
}
VALUES = {
    "embed": normal(1, (64, 32)),
    "up": normal(2, (32, 64)) / 6,
    "down": normal(3, (64, 32)) / 8,
    "stack": normal(4, (3, 32, 32)) / 6,
    "bias": normal(5, (64,)),
}
TOKENS = np.random.default_rng(0).integers(0, 64, (16,)).astype(np.int32)


MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def loss(params, tokens, explicit=False, gathered=False):
    """A lookup, two products, and a scan over stacked layers."""

    def dot(equation, x, w, at):
        if gathered:
            w = jax.sharding.reshard(w, P())
        return jnp.einsum(equation, x, w, out_sharding=at if explicit else None)

    table = params["embed"]
    x = table.at[tokens].get(out_sharding=P("data", None)) if explicit else table[tokens]
    hidden = None if gathered else "model"
    h = dot("bd,df->bf", x, params["up"], P("data", hidden))
    h = jnp.tanh(h + params["bias"])
    x = dot("bf,fd->bd", h, params["down"], P("data", None))

    def layer(x, w):
        return x + jnp.tanh(dot("bd,de->be", x, w, P("data", None))), None

    x, _ = jax.lax.scan(layer, x, params["stack"])
    return jnp.mean(x**2)


def placed(layout):
    def put(name, value):
        return jax.device_put(value, NamedSharding(MESH, LAYOUTS[layout].get(name, P())))

    return {name: put(name, jnp.asarray(value)) for name, value in VALUES.items()}


def make(side, **others):
    projection = flora_jax.Projection(8, min_dim=16, side=side, resample_every=2)
    rate = None if "optimizer" in others else 3e-2
    tx = flora_jax.flora(rate, projection=projection, accumulation_steps=2, **others)
    return projection, tx


def plain_run(tx, steps=3):
    """On one device, by `tx.update` of uncompressed gradients."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, TOKENS), state, params)
        return optax.apply_updates(params, updates), state

    params = {name: jnp.asarray(value) for name, value in VALUES.items()}
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def types(tree):
    return jax.tree.map(jax.typeof, tree)


@pytest.mark.parametrize(
    ("layout", "side"),
    often(
        [("tensor", "input"), ("fsdp", "output"), ("both", "input"), ("both", "output")],
        ("tensor", "input"),
        ("both", "output"),
    ),
)
def test_a_train_step(layout, side):
    projection, tx = make(side)
    expected = plain_run(tx)
    with jax.set_mesh(MESH):
        params = placed(layout)
        tokens = jax.device_put(TOKENS, NamedSharding(MESH, P("data")))
        state = jax.jit(tx.init)(params)
        before = types((params, state))
        of = functools.partial(loss, explicit=True, gathered=layout == "fsdp")
        step = flora_jax.make_train_step(of, tx, projection, donate=False)
        for _ in range(3):
            params, state, _ = step(params, state, tokens)
    assert types((params, state)) == before
    assert_tree_close((params, state), expected, 1e-4)


OTHERS = {
    "adamw": {"optimizer": optax.adamw(1e-2)},
    "momentum": {"momentum": 0.9},
    "int8": {"state_dtype": "int8", "skip_nonfinite": True},
}


@pytest.mark.parametrize("name", often(OTHERS, "adamw", "int8"))
def test_the_chain(name):
    """Updates have the params' types, and the state keeps its own."""
    _, tx = make("larger", **OTHERS[name])
    expected, _ = plain_run(tx)
    with jax.set_mesh(MESH):
        params = placed("both")
        tokens = jax.device_put(TOKENS, NamedSharding(MESH, P("data")))
        state = jax.jit(tx.init)(params)
        before = types(state)
        grad = jax.jit(jax.grad(functools.partial(loss, explicit=True)))
        update = jax.jit(tx.update)
        for _ in range(3):
            updates, state = update(grad(params, tokens), state, params)
            assert types(updates) == types(params)
            params = optax.apply_updates(params, updates)
    assert types(state) == before
    assert_tree_close(params, expected, 5e-2 if name == "int8" else 1e-4)


def test_transformations_on_their_own():
    projection, _ = make("input")
    project, decompress = flora_jax.project(projection), flora_jax.decompress()
    alone = {name: jnp.asarray(2 * value) for name, value in VALUES.items() if name != "stack"}
    expected, _ = project.update(alone, project.init(alone))
    expected_estimate, _ = decompress.update(expected, optax.EmptyState())
    params = {name: leaf for name, leaf in placed("both").items() if name != "stack"}
    grads = jax.tree.map(lambda x: 2 * x, params)
    sketches, _ = project.update(grads, project.init(params), params)
    spec = jax.typeof(sketches["up"].data).sharding.spec
    assert sketches["up"].data.shape == (8, 64) and spec == P("data", "model")
    estimate, _ = decompress.update(sketches, optax.EmptyState(), params)
    assert types(estimate) == types(params)
    assert_tree_close(sketches, expected, 1e-5)
    assert_tree_close(estimate, expected_estimate, 1e-5)
    with pytest.raises(
        ValueError, match=r"params must be given to tx\.update on a mesh of explicit"
    ):
        decompress.update(sketches, optax.EmptyState())


@pytest.mark.parametrize(
    "specs",
    [
        {"first": P(None, "model", None), "second": P(), "head": P()},
        {"first": P(None, None, "model"), "second": P(None, "model"), "head": P("model")},
    ],
    ids=["input", "output"],
)
def test_the_backward_mode(specs):
    """Batches over one axis and weights over the other: one step is that of the whole arrays, and the types stay."""
    shapes = {"first": (3, 16, 8), "second": (3, 8, 16), "head": (16, 4)}
    params = {
        name: jnp.asarray(normal(i, shape)) / 4 for i, (name, shape) in enumerate(shapes.items())
    }
    x = jnp.asarray(normal(3, (8, 16)))

    def loss(params, x, rows=None):
        def layer(x, weights):
            first, second = weights
            hidden = jnp.tanh(jnp.einsum("bi,io->bo", x, first, out_sharding=rows))
            return x + jnp.einsum("bi,io->bo", hidden, second, out_sharding=rows), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, (params["first"], params["second"]))
        return jnp.mean(jnp.einsum("bi,io->bo", x, params["head"], out_sharding=rows) ** 2)

    gradients = jax.grad(loss)(params, x)
    expected = {name: params[name] - 0.1 * gradients[name] for name in params}
    with jax.set_mesh(MESH):
        own = {name: jax.device_put(np.asarray(params[name]), specs[name]) for name in params}
        batch = jax.device_put(np.asarray(x), P("data"))
        before = types(own)
        step = flora_jax.make_train_step(
            lambda params, x: loss(params, x, P("data")), optax.sgd(0.1), update="backward"
        )
        found, _, _ = step(own, step.init(own, batch), batch)
    assert_tree_close(found, expected, 1e-5)
    assert types(found) == before
