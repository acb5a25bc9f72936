"""make_train_step(update="backward"): the ordinary step's result, with no gradient that outlives its layer."""

import dataclasses
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flora_jax
from flora_jax.models import decoder, gpt2, t5
from flora_jax.update.ordinary_step import ordinary_step
from tests.fused.test_models import LANGUAGE, TOKENS, Vit, cross_entropy, init
from tests.fused.test_programs import ROWS, SQUARE, STACKED, WIDTH, WRAPPERS
from tests.helpers import assert_close, assert_tree_close, assert_tree_equal, normal, often

SHAPE = decoder.Shape(48, 32, 56, 3, 4, 2, jnp.float32)


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def steps_of(step, tx, params, batch, count=3):
    params = copied(params)
    state = tx.init(params)
    losses = []
    for _ in range(count):
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    return params, state, losses


def compare(loss, params, tx=None, batch=(), tolerance=2e-5):
    """A gradient is what SGD subtracts; where it cancels it is as exact as the params that it is added to."""
    if tx is None:
        tx = optax.sgd(1.0)
    ordinary = steps_of(ordinary_step(loss, tx), tx, params, batch)
    ours = steps_of(flora_jax.make_train_step(loss, tx, update="backward"), tx, params, batch)
    np.testing.assert_allclose(ours[2], ordinary[2], rtol=1e-4)
    moved = jax.tree.map(lambda a, b: a - b, ordinary[0], params)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(moved)) > 1e-4
    for found, expected, start in zip(
        *map(jax.tree.leaves, (ours[0], ordinary[0], params)), strict=True
    ):
        change, goal = (np.asarray(x, np.float64) - np.asarray(start) for x in (found, expected))
        error = np.linalg.norm(change - goal)
        assert error <= tolerance * (np.linalg.norm(goal) + 1e-2 * np.linalg.norm(start))
    assert_tree_close(ours[1], ordinary[1], 1e-3)


def named(tree, part):
    """Which leaves have this in their path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: part in str(path), tree)


def of_llama(**changes):
    model = decoder.Decoder(dataclasses.replace(SHAPE, **changes))
    return lambda p: decoder.loss(model, p, TOKENS), init(model, TOKENS)


@pytest.mark.parametrize(
    "changes",
    often(
        [{}, {"remat": False}, {"scan": False}, {"scan": False, "remat": False}, {"tied": True}],
        *({}, {"scan": False}, {"tied": True}),
    ),
    ids=str,
)
def test_llama(changes):
    compare(*of_llama(**changes), optax.sgd(0.1))


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.05, momentum=0.9, nesterov=True),
        optax.adamw(optax.linear_schedule(1e-2, 0.0, 5), weight_decay=0.1),
        optax.lion(1e-3),
        optax.chain(optax.clip(0.01), optax.scale_by_rms(), optax.scale(-1e-3)),
        optax.partition(
            {"frozen": optax.set_to_zero(), "own": optax.adam(1e-2)},
            lambda tree: jax.tree.map(
                lambda found: "frozen" if found else "own", named(tree, "query")
            ),
        ),
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
        optax.chain(
            optax.ema(0.9),
            optax.masked(optax.add_decayed_weights(0.1), lambda tree: named(tree, "kernel")),
            optax.sgd(0.05),
        ),
    ],
    ids=["momentum", "adamw", "lion", "rms", "frozen", "hyperparams", "masked"],
)
def test_optimizers(tx):
    compare(*of_llama(), tx, tolerance=1e-3)


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name):
    model = LANGUAGE[name]()
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]

    def loss(params):
        return cross_entropy(model.apply({"params": params}, inputs), targets)

    compare(loss, init(model, inputs), optax.sgd(0.3))


def test_gpt2():
    model = gpt2.Gpt2(gpt2.Shape(48, 16, 32, 2, 4))
    compare(lambda p: gpt2.loss(model, p, TOKENS), init(model, TOKENS), optax.sgd(0.1))


def test_t5():
    """Two stacks, of encoder and decoder, one after the other."""
    model = t5.T5(t5.Shape(48, 32, 64, 2, 4, 8))
    compare(lambda p: t5.loss(model, p, TOKENS), init(model, TOKENS, TOKENS), optax.sgd(0.1))


def test_vit():
    model, images = Vit(), jnp.asarray(normal(3, (2, 12, 12, 3)))

    def loss(params):
        return cross_entropy(model.apply({"params": params}, images), jnp.array([1, 2]))

    compare(loss, init(model, images), optax.sgd(0.1))


def layer(x, w):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def weights(axis=0, layers=4):
    one = {
        "up": jnp.asarray(normal(0, (layers, 8, 24))) / 3,
        "down": jnp.asarray(normal(1, (layers, 24, 8))) / 5,
    }
    return {"layers": jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), one)}


X = jnp.asarray(normal(2, (5, 8)))


def scanned(params, x, body=None, axis=0, **settings):
    def step(x, w):
        return layer(x, w), None

    stacked = jax.tree.map(lambda w: jnp.moveaxis(w, axis, 0), params)
    return jax.lax.scan(body or step, x, stacked, **settings)[0]


STACKS = {
    "plain": lambda p: scanned(p["layers"], X),
    "last first": lambda p: scanned(p["layers"], X, reverse=True),
    "unrolled by two": lambda p: scanned(p["layers"], X, unroll=2),
    "twice": lambda p: scanned(p["layers"], scanned(p["layers"], X)),
    "with a penalty": lambda p: (
        scanned(p["layers"], X) + sum(jnp.sum(w**2) for w in p["layers"].values()) / 50
    ),
    "with a penalty before": lambda p: scanned(
        p["layers"], X * sum(jnp.sum(w**2) for w in p["layers"].values()) / 50
    ),
    "in half precision": lambda p: scanned(
        jax.tree.map(lambda w: w.astype(jnp.bfloat16), p["layers"]), X.astype(jnp.bfloat16)
    ).astype(jnp.float32),
    "policy": lambda p: scanned(
        p["layers"],
        X,
        jax.checkpoint(
            lambda x, w: (layer(x, w), None), policy=jax.checkpoint_policies.dots_saveable
        ),
    ),
    "with the input in each": lambda p: scanned(
        p["layers"], X, lambda x, w: (layer(x, w) + X * jnp.sum(w["up"]), None)
    ),
    "states handed out": lambda p: jax.lax.scan(
        lambda x, w: (layer(x, w), jnp.sin(x)), X, p["layers"]
    )[1],
    "groups of two": lambda p: jax.lax.scan(
        lambda x, w: (scanned(w, x), None),
        X,
        jax.tree.map(lambda w: w.reshape(2, 2, *w.shape[1:]), p["layers"]),
    )[0],
    "remat around it": jax.checkpoint(lambda p: scanned(p["layers"], X)),
    "its own derivative": lambda p: jax.grad(lambda x: jnp.sum(scanned(p["layers"], x) ** 2))(X),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks(name):
    tolerance = 2e-2 if name == "in half precision" else 1e-4
    compare(lambda p: jnp.mean(STACKS[name](p) ** 2), weights(), optax.sgd(0.05), (), tolerance)


@pytest.mark.parametrize("axis", [1, 2])
def test_layers_along_another_axis(axis):
    def loss(p):
        return jnp.mean(scanned(p["layers"], X, axis=axis) ** 2)

    compare(loss, weights(axis), optax.adam(1e-2), tolerance=1e-3)


def test_what_is_shared_by_layers_and_what_each_has_of_its_own():
    """Numbers of each layer beside its weights, and a weight that all layers use."""
    params = {**weights(), "shared": jnp.asarray(normal(4, (8, 8))), "scales": jnp.ones((4, 8))}
    depth = jnp.linspace(0.5, 1.0, 4)

    def loss(p):
        y = jnp.tanh(X @ p["shared"])

        def step(x, given):
            w, scale, factor, i = given
            return layer(x * scale, w) * factor + x @ p["shared"] * (i > 1) + y, x.sum()

        x, sums = jax.lax.scan(step, y, (p["layers"], p["scales"], depth, jnp.arange(4)))
        return jnp.mean(x**2) / 100 + sums[2] / 1000

    compare(loss, params, optax.sgd(0.1), tolerance=1e-4)


programs = st.lists(
    st.tuples(
        st.sampled_from(sorted(SQUARE)),
        st.sampled_from(sorted(WRAPPERS)),
        st.none() | st.sampled_from(sorted(STACKED)),
    ).filter(lambda drawn: (drawn[0], drawn[2]) != ("grouped by rows", "vmap")),
    min_size=1,
    max_size=3,
)


def check(steps, shared):
    params, names = {}, []
    for i, (_, _, stack) in enumerate(steps):
        kind = "stack" if stack else "matrix"
        names.append(kind if shared else f"{kind}{i}")
        shape = (2, WIDTH, WIDTH) if stack else (WIDTH, WIDTH)
        params[names[-1]] = jnp.asarray(normal(i, shape)) / WIDTH**0.5
    x = jnp.asarray(normal(9, (ROWS, WIDTH)))

    def loss(params, x):
        for name, (use, wrapper, stack) in zip(names, steps, strict=True):
            step = WRAPPERS[wrapper](SQUARE[use])
            x = STACKED[stack](step, x, params[name]) if stack else step(x, params[name])
            x = jnp.tanh(x)
        return jnp.sum(x**2)

    tx = optax.sgd(0.1)
    params, _, _ = steps_of(ordinary_step(loss, tx), tx, params, (x,), 1)
    step = flora_jax.make_train_step(loss, tx, update="backward", donate=False)
    found, _, value = step(params, tx.init(params), x)
    expected_value, grads = jax.jit(jax.value_and_grad(loss))(params, x)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    for name, param in params.items():
        change = np.asarray(param - found[name], np.float64) / 0.1
        error = np.linalg.norm(change - np.asarray(grads[name], np.float64))
        assert error <= 2e-4 * (np.linalg.norm(grads[name]) + 1e-1 * np.linalg.norm(param))


@hypothesis.settings(max_examples=12, derandomize=True)
@hypothesis.given(programs, st.booleans())
def test_programs(steps, shared):
    check(steps, shared)


@pytest.mark.long
@hypothesis.settings(max_examples=400, derandomize=True)
@hypothesis.given(programs, st.booleans())
def test_many_programs(steps, shared):
    check(steps, shared)


def one_by_one(params):
    """The same params with the layers as dicts of their own."""
    layers = params["layers"]
    return {
        f"layer{i}": jax.tree.map(lambda w, i=i: w[i], layers)
        for i in range(len(jax.tree.leaves(layers)[0]))
    }


@pytest.mark.parametrize("name", ["adafactor", "muon", "lamb", "clipped"])
def test_each_layer_is_a_parameter_of_its_own(name):
    """What an optimizer computes of a parameter's size, norm or singular vectors is that of the layer."""
    tx = {
        "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
        "muon": optax.contrib.muon(1e-2),
        "lamb": optax.lamb(1e-2),
        "clipped": optax.chain(optax.clip_by_block_rms(1e-3), optax.sgd(1.0)),
    }[name]

    def stacked(p):
        return jnp.mean(scanned(p["layers"], X) ** 2)

    def apart(p):
        x = X
        for i in range(4):
            x = layer(x, p[f"layer{i}"])
        return jnp.mean(x**2)

    params = weights()
    step = flora_jax.make_train_step(stacked, tx, update="backward")
    own, state = copied(params), step.init(params)
    for _ in range(3):
        own, state, _ = step(own, state)
    expected, _, _ = steps_of(ordinary_step(apart, tx), tx, one_by_one(params), ())
    assert_tree_close(one_by_one(own), expected, 1e-4)
    whole, _, _ = steps_of(ordinary_step(stacked, tx), tx, params, ())
    difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), whole, own)
    assert max(map(float, jax.tree.leaves(difference))) > 1e-4  # so the distinction is one


def test_a_state_of_whole_stacks_is_refused():
    """Adafactor factors a stack of vectors by layer and entry, and the vector of a layer not at all."""
    params = {**weights(layers=8), "scales": jnp.ones((8, 8))}
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=8)

    def loss(p):
        def step(x, given):
            return layer(x * given[1], given[0]), None

        return jnp.mean(jax.lax.scan(step, X, (p["layers"], p["scales"]))[0] ** 2)

    step = flora_jax.make_train_step(loss, tx, update="backward")
    with pytest.raises(
        ValueError, match=r"'scales'.*each layer is a parameter.*step\.init\(params"
    ):
        step(params, tx.init(params))
    state = step.init(params)
    before = float(loss(params))
    params, state, _ = step(params, state)
    params, state, after = step(params, state)
    assert float(after) < before


@pytest.mark.parametrize(
    ("tx", "said"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "clip_by_block_rms"),
        (optax.apply_if_finite(optax.sgd(0.1), 3), "leaf-wise"),
    ],
    ids=["global norm", "finite"],
)
def test_what_needs_two_passes_is_refused(tx, said):
    params = weights()
    step = flora_jax.make_train_step(
        lambda p: jnp.mean(scanned(p["layers"], X) ** 2), tx, update="backward"
    )
    with pytest.raises(ValueError, match=said) as error:
        step(params, tx.init(params))
    assert "layers/up" in str(error.value) and "layers/down" in str(error.value)


def test_arguments():
    def make(**settings):
        return flora_jax.make_train_step(jnp.sum, optax.sgd(0.1), **settings)

    with pytest.raises(ValueError, match="micro_batches must be None"):
        make(update="backward", micro_batches=2)
    with pytest.raises(ValueError, match="update must be 'after' or 'backward', found 'before'"):
        make(update="before")
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic', found 'up'"):
        make(update="backward", rounding="up")
    with pytest.raises(ValueError, match=r"count.*constant_schedule"):
        make(update="backward", rounding="stochastic")(
            jnp.ones(3), optax.sgd(0.1).init(jnp.ones(3))
        )


def test_auxiliary_data_and_params_without_a_use():
    params = {**weights(), "idle": jnp.ones((3, 3)), "count": jnp.int32(5)}
    tx = optax.sgd(0.1)

    def loss(p, x):
        def step(x, w):
            return layer(x, w), x.mean()

        y, means = jax.lax.scan(step, x, p["layers"])
        return jnp.mean(y**2), {"means": means, "count": p["count"] + 1}

    step = flora_jax.make_train_step(loss, tx, update="backward", has_aux=True, donate=False)
    trained = {k: v for k, v in params.items() if k != "count"}
    new, _, value, aux = step(params, tx.init(trained), X)
    (expected, expected_aux), grads = jax.value_and_grad(
        lambda p: loss({**p, "count": params["count"]}, X), has_aux=True
    )(trained)
    assert_close(value, expected, 1e-6)
    assert_tree_close(aux, expected_aux, 1e-5)
    assert_close(new["layers"]["up"], params["layers"]["up"] - 0.1 * grads["layers"]["up"], 1e-6)
    assert_tree_equal(new["idle"], params["idle"])
    assert int(new["count"]) == 5


@pytest.mark.optimized
def test_no_stack_of_gradients_and_no_tree_of_updates_in_the_program():
    """What the program needs beside its arguments is a layer and the activations; an ordinary one has the gradients."""
    shape = dataclasses.replace(SHAPE, width=64, hidden=256, layers=32)
    model = decoder.Decoder(shape)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    tx = optax.adam(1e-3)

    def loss(p):
        return decoder.loss(model, p, TOKENS)

    def program(step):
        return step.lower(params, jax.eval_shape(tx.init, params)).compile()

    def temporary(compiled):
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes / memory.argument_size_in_bytes

    ours = program(flora_jax.make_train_step(loss, tx, update="backward"))
    assert temporary(ours) < 0.1
    assert temporary(program(ordinary_step(loss, tx))) > 0.3
    assert not re.search(r"= f32\[32,64,256\]\S* copy\(", ours.as_text())


@pytest.mark.parametrize("name", often(["paper", "momentum", "advised"], "advised"))
def test_flora_accumulates_what_the_backward_pass_gives_it(name):
    """Each gradient is projected where it is; params and sketches are those of the ordinary chain, layer by layer."""
    projection = flora_jax.Projection(8, min_dim=16, resample_every=4)
    settings = {
        "paper": dict(learning_rate=None, optimizer=optax.sgd(0.1), accumulation_steps=2),
        "momentum": dict(
            learning_rate=None, optimizer=optax.sgd(0.1), accumulation_steps=2, momentum=0.9
        ),
        "advised": dict(
            learning_rate=0.02,
            adafactor_learning_rate=optax.constant_schedule(0.0),
            accumulation_steps=2,
            preset="advised",
        ),
    }[name]
    tx = flora_jax.flora(projection=projection, **settings)
    loss, params = of_llama()
    ours = steps_of(flora_jax.make_train_step(loss, tx, update="backward"), tx, params, (), 6)
    expected = steps_of(ordinary_step(loss, tx), tx, params, (), 6)
    assert_tree_close(ours[0], expected[0], 1e-4)
    assert_tree_close(ours[1], expected[1], 1e-3)
    assert ours[2][1] == ours[2][0] != ours[2][2]


@pytest.mark.parametrize("layout", often(["fsdp", "stack"], "fsdp"))
def test_sharded_params(layout):
    """The numbers of one device, and every array where it was."""
    mesh = jax.make_mesh((4,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    loss, params = of_llama(layers=4)
    tx = optax.adamw(1e-2)

    def placed(x):
        axes = [0] if layout == "stack" else range(1 if x.ndim > 2 else 0, x.ndim)
        axis = next((i for i in axes if x.shape[i] % 4 == 0), None)
        names = ("fsdp" if i == axis else None for i in range(x.ndim))
        return jax.device_put(x, NamedSharding(mesh, P(*names)))

    own = jax.tree.map(placed, params)
    step = flora_jax.make_train_step(loss, tx, update="backward")
    expected, _, _ = steps_of(step, tx, params, ())
    found, state, _ = steps_of(step, tx, own, ())
    assert_tree_close(found, expected, 2e-4)
    for a, b in zip(*map(jax.tree.leaves, (found, jax.tree.map(placed, params))), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    del state


def test_without_a_projection_after_the_backward_pass():
    """Ordinary gradients, updated leaf by leaf."""
    loss, params = of_llama()
    tx = optax.adamw(1e-2)
    expected = steps_of(ordinary_step(loss, tx), tx, params, ())
    found = steps_of(flora_jax.make_train_step(loss, tx), tx, params, ())
    assert_tree_close(found[0], expected[0], 1e-4)
