"""make_train_step: the ordinary loop's result, for the frameworks that people use."""

import os
import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flora_jax
from tests.helpers import assert_close, assert_tree_close, make_params, normal

INPUTS = jnp.asarray(normal(0, (64, 32)))
TARGETS = jnp.tanh(INPUTS @ normal(1, (32, 24)) / 6)
PROJECTION = flora_jax.Projection(8, min_dim=16, side="input", resample_every=2)
STEPS = 100


def flora(**others):
    return flora_jax.flora(
        0.05, **{"projection": PROJECTION, "accumulation_steps": 2, **others}
    )  # fmt: skip


def squares(outputs, targets=TARGETS):
    return jnp.mean((outputs - targets) ** 2)


def falls(loss, params, *batch):
    tx = flora()
    trained = eqx.filter(params, eqx.is_inexact_array)
    step = flora_jax.make_train_step(loss, tx, PROJECTION)
    state = tx.init(trained)
    losses = []
    for _ in range(STEPS):
        params, state, value = step(params, state, *batch)
        losses.append(float(value))
    assert losses[-1] < 0.4 * losses[0]
    return params


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(24, name="out")(jnp.tanh(nn.Dense(48, name="hidden")(x)))


def linen_loss(params, x, y):
    return squares(jnp.asarray(Linen().apply({"params": params}, x)), y)


def linen_params():
    return Linen().init(jax.random.key(0), INPUTS)["params"]


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(32, 48, rngs=rngs)
        self.out = nnx.Linear(48, 24, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def test_linen():
    falls(linen_loss, linen_params(), INPUTS, TARGETS)


def test_nnx():
    graph, state = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)
    state = falls(lambda state, x: squares(nnx.merge(graph, state)(x)), state, INPUTS)
    assert squares(nnx.merge(graph, state)(INPUTS)) < 0.1


def test_equinox():
    model = eqx.nn.MLP(32, 24, 48, 1, activation=jnp.tanh, key=jax.random.key(0))
    trained = falls(lambda model, x: squares(jax.vmap(model)(x)), model, INPUTS)
    assert isinstance(trained, eqx.nn.MLP) and trained.activation is model.activation


def test_plain_function_with_arrays_that_are_not_trained():
    params = {"w": jnp.asarray(normal(2, (32, 24))), "steps": jnp.int32(7)}
    trained = falls(lambda p, x: squares(x @ p["w"] * (p["steps"] / 7)), params, INPUTS)
    assert trained["steps"] == 7 and trained["steps"].dtype == jnp.int32


def ordinary(params, count):
    tx = flora()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(linen_loss)(params, INPUTS, TARGETS)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    for _ in range(count):
        params, state, value = step(params, state)
    return params, state, value


def test_equal_to_the_ordinary_loop():
    tx = flora()
    step = flora_jax.make_train_step(linen_loss, tx, PROJECTION)
    params = linen_params()
    state = tx.init(params)
    for _ in range(5):
        params, state, value = step(params, state, INPUTS, TARGETS)
    found, expected = (params, state, value), ordinary(linen_params(), 5)
    assert_tree_close(jax.tree.map(jnp.float32, found), jax.tree.map(jnp.float32, expected), 1e-4)


def test_micro_batches_inside_are_micro_steps_outside():
    """One step over two micro-batches, and two micro-steps of accumulation."""
    inside = flora_jax.Projection(8, min_dim=16, side="input")
    tx = flora(projection=inside, accumulation_steps=1)
    step = flora_jax.make_train_step(linen_loss, tx, inside, micro_batches=2)
    outer = flora()
    plain = flora_jax.make_train_step(linen_loss, outer, PROJECTION)
    params, other = linen_params(), linen_params()
    state, other_state = tx.init(params), outer.init(other)
    halves = INPUTS.reshape(2, 32, 32), TARGETS.reshape(2, 32, 24)
    for _ in range(3):
        params, state, value = step(params, state, *halves)
        values = []
        for x, y in zip(*halves, strict=True):
            other, other_state, one = plain(other, other_state, x, y)
            values.append(one)
        assert jnp.allclose(value, jnp.stack(values).mean(), rtol=1e-5)
    assert_tree_close(params, other, 1e-4)


@pytest.mark.parametrize("micro_batches", [None, 2])
def test_aux(micro_batches):
    def loss(params, x):
        y = x @ params["w"]
        return jnp.mean(y**2), {"mean": y.mean()}

    projection = flora_jax.Projection(4, min_dim=8)
    tx = flora_jax.flora(1e-2, projection=projection)
    step = flora_jax.make_train_step(
        loss, tx, projection, has_aux=True, micro_batches=micro_batches
    )
    params = {"w": jnp.asarray(normal(2, (32, 24)))}
    x = INPUTS if micro_batches is None else INPUTS.reshape(2, 32, 32)
    expected = jnp.mean((x @ params["w"]) ** 2)
    _, _, value, aux = step(params, tx.init(params), x)
    assert jnp.allclose(value, expected, rtol=1e-5)
    assert aux["mean"].shape == (() if micro_batches is None else (2,))


def test_errors():
    projection = flora_jax.Projection(4, min_dim=8)
    tx = flora_jax.flora(1e-2, projection=projection)
    with pytest.raises(ValueError, match="micro_batches must be at least 1, found 0"):
        flora_jax.make_train_step(linen_loss, tx, projection, micro_batches=0)
    step = flora_jax.make_train_step(linen_loss, tx, projection, micro_batches=4)
    params = linen_params()
    with pytest.raises(ValueError, match=r"batch\[1\] must have micro_batches=4 .* \(3, 2\)"):
        step(params, tx.init(params), jnp.zeros((4, 2, 32)), jnp.zeros((3, 2)))


def test_a_step_on_a_mesh_keeps_the_shardings_and_equals_that_on_one_device():
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    projection = flora_jax.Projection(8, min_dim=16, resample_every=2)
    tx = flora_jax.flora(1e-2, projection=projection, accumulation_steps=2)
    params = make_params()
    batch = jnp.asarray(normal(7, (8, 32)))

    def loss(params, x):
        y = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])
        return jnp.mean((y @ params["out"]["kernel"]) ** 2)

    def place(path, x):
        spec = PartitionSpec("data", "model") if x.ndim == 2 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    sharded = jax.tree_util.tree_map_with_path(place, params)
    state = jax.jit(tx.init, out_shardings=flora_jax.state_shardings(tx, sharded))(sharded)
    single, plain = tx.init(params), params
    step = flora_jax.make_train_step(loss, tx, projection, donate=False)
    given = jax.tree.map(lambda x: x.sharding, (sharded, state))
    for _ in range(4):
        sharded, state, value = step(
            sharded, state, jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        )
        plain, single, expected = step(plain, single, batch)
    assert_close(value, expected, 1e-5)
    assert_tree_close((sharded, state[1].accumulated), (plain, single[1].accumulated), 1e-5)
    for leaf, sharding in zip(
        jax.tree.leaves((sharded, state)), jax.tree.leaves(given), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


PROGRAM = """
import hashlib, jax, jax.numpy as jnp, flora_jax
params = {f"layer{i}": {"kernel": jnp.ones((16, 16)), "bias": jnp.ones(16)} for i in range(3)}
def loss(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"])
    return jnp.mean(x**2)
rule = flora_jax.Projection(4, min_dim=8, resample_every=2)
tx = flora_jax.flora(1e-2, projection=rule, accumulation_steps=2, skip_nonfinite=True)
step = flora_jax.make_train_step(loss, tx, rule)
text = step.lower(params, tx.init(params), jnp.ones((2, 16))).as_text()
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_every_process_lowers_the_same_program():
    """Compilation caches hit, and the hosts of a run agree; addresses and hash seeds differ here."""
    found = {
        subprocess.run(
            [sys.executable, "-c", f"padding = [object() for _ in range({1000 * i})]\n{PROGRAM}"],
            env={**os.environ, "PYTHONHASHSEED": str(i)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for i in range(3)
    }
    assert len(found) == 1


@pytest.mark.parametrize("update", ["after", "backward"])
@pytest.mark.parametrize("count", [1, 8])
def test_a_run_is_traced_once_however_its_shardings_are_written(count, update):
    """A step gives state `P(None, None)` that began as `P()`; to plan a step it is lowered for shapes with either."""
    mesh = jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count])
    traces = []

    def loss(params, x, y):
        traces.append(1)
        return linen_loss(params, x, y)

    projection = PROJECTION if update == "after" else None
    tx = flora() if projection else optax.sgd(0.1, momentum=0.9)
    step = flora_jax.make_train_step(loss, tx, projection, update=update)

    def put(tree, full):
        def place(x):
            return NamedSharding(mesh, PartitionSpec(*[None] * x.ndim * full))

        return jax.tree.map(lambda x: jax.device_put(x, place(x)), tree)

    params = linen_params()
    state = step.init(params, INPUTS, TARGETS)
    batch = put((INPUTS, TARGETS), False)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        put((params, state), False),
    )
    traces.clear()
    with jax.set_mesh(mesh):
        step.lower(*shapes, *batch)
        begun = len(traces)
        params, state = put(params, True), put(state, False)
        for _ in range(3):
            params, state, _ = step(params, state, *batch)
    assert begun > 0
    assert len(traces) == begun


@pytest.mark.parametrize("name", ["cocob", "madgrad", "twice"])
def test_buffers_that_a_state_has_in_common_with_the_params_are_donated_once(name):
    optimizers = {
        "cocob": optax.contrib.cocob,
        "madgrad": lambda: optax.contrib.madgrad(0.1),
        "twice": lambda: optax.GradientTransformation(
            lambda params: (params, params), lambda updates, state, params=None: (updates, state)
        ),
    }
    tx = flora_jax.flora(
        None, projection=PROJECTION, accumulation_steps=2, optimizer=optimizers[name]()
    )
    step = flora_jax.make_train_step(lambda p, x: squares(x @ p["w"]), tx, PROJECTION)
    params = {"w": jnp.asarray(normal(2, (32, 24)))}
    state = tx.init(params)
    for _ in range(3):
        params, state, value = step(params, state, INPUTS)
    assert bool(jnp.isfinite(value))
