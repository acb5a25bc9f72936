"""Linen's boxes: the state is laid out by its own boxes on a mesh, and the steps are those without boxes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import Mesh

import flora_jax
from flora_jax.trainers.linen import own_axis_names
from tests.helpers import normal

X = jnp.asarray(normal(0, (8, 32)))
PROJECTION = flora_jax.Projection(8, min_dim=8, resample_every=2)
TX = {
    "flora": lambda: flora_jax.flora(1e-2, projection=PROJECTION, accumulation_steps=2),
    "momentum": lambda: flora_jax.flora(
        1e-2, projection=PROJECTION, accumulation_steps=2, momentum=0.9
    ),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "adam": lambda: optax.adam(1e-2),
}


class Model(nn.Module):
    boxed: bool = True

    @nn.compact
    def __call__(self, x):
        make = nn.initializers.lecun_normal()
        for i, (width, names) in enumerate(((48, ("fsdp", "tp")), (32, ("tp", "fsdp")))):
            kernel = nn.with_partitioning(make, names) if self.boxed else make
            x = nn.Dense(width, kernel_init=kernel, name=f"dense_{i}")(x)
        return x


def loss(params, model, x):
    return jnp.mean((model.apply({"params": params}, x) - 1) ** 2)


def started(model, tx):
    params = model.init(jax.random.key(0), X)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def stepped(state, model, x):
    return state.apply_gradients(grads=jax.grad(loss)(state.params, model, x))


@pytest.mark.parametrize("name", TX)
def test_state_by_its_boxes_on_a_mesh(name):
    model, plain = Model(), Model(boxed=False)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tp"), axis_types=kinds)
    tx = own_axis_names(TX[name]())
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: started(model, tx))
        shardings = nn.get_sharding(shapes, mesh)
        state = jax.jit(lambda: started(model, tx), out_shardings=shardings)()
        specs = [x.sharding.spec for x in jax.tree.leaves(state.opt_state) if x.ndim == 2]
        assert any("fsdp" in str(spec) for spec in specs) or name == "adafactor"
        step = jax.jit(lambda state, x: stepped(state, model, x))
        for i in range(4):
            state = step(state, X + i)
    expected = started(plain, TX[name]())
    for i in range(4):
        expected = stepped(expected, plain, X + i)
    found = nn.meta.unbox(state.params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_each_axis_has_the_name_of_the_one_that_it_came_from():
    params = {"w": nn.Partitioned(jnp.ones((32, 48)), names=("embed", "mlp"))}
    state = own_axis_names(TX["flora"]()).init(params)
    boxes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    found = {x.value.shape: x.names for x in boxes if isinstance(x, nn.Partitioned)}
    assert found[32, 8] == (
        "embed",
        "mlp",
    )  # the larger side is projected, and the rank has its name
    assert all(len(shape) == len(names) for shape, names in found.items())
    state = own_axis_names(TX["adafactor"]()).init(params)
    factors = state[0]
    assert factors.v_row["w"].names == ("embed",)
    assert factors.v_col["w"].names == ("mlp",)


def test_fused_gradients_in_boxes():
    model, plain = Model(), Model(boxed=False)
    tx = own_axis_names(TX["flora"]())
    params = model.init(jax.random.key(0), X)["params"]
    own = plain.init(jax.random.key(0), X)["params"]
    state, other = tx.init(params), TX["flora"]().init(own)
    for i in range(4):
        of = flora_jax.value_and_grad(lambda p, x: loss(p, model, x), PROJECTION)
        _, grads = of(params, X + i, cycle=flora_jax.cycle(state))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        full = jax.grad(loss)(own, plain, X + i)
        updates, other = TX["flora"]().update(full, other, own)
        own = optax.apply_updates(own, updates)
    found = jax.tree.leaves(nn.meta.unbox(params))
    for a, b in zip(found, jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
