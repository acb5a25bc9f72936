"""NNX modules: what is trained, what else changes, and how the optimizer's state is laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flora_jax
from flora_jax.trainers import nnx as flora_nnx
from flora_jax.trainers.axis_names import METADATA
from tests.helpers import normal, often

X = jnp.asarray(normal(0, (8, 32)))
PROJECTION = flora_jax.Projection(8, min_dim=8, resample_every=2)


class Module(nnx.Module):
    """Has statistics, dropout, a tied weight, and something that it sows."""

    def __init__(self, rngs, names=None):
        make = nnx.initializers.lecun_normal()
        kernel = make if names is None else nnx.with_partitioning(make, names)
        self.hidden = nnx.Linear(32, 48, use_bias=False, rngs=rngs, kernel_init=kernel)
        self.norm = nnx.BatchNorm(48, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(48, 32, rngs=rngs)
        self.out.kernel = nnx.Param(jnp.asarray(normal(5, (48, 32))) / 5)
        self.calls = nnx.Variable(jnp.int32(0))

    def __call__(self, x):
        x = self.dropout(self.norm(self.hidden(x)))
        self.calls[...] += 1
        self.sow(nnx.Intermediate, "seen", x.mean())
        return self.out(x)


def loss(model, x):
    return jnp.mean((model(x) - 1) ** 2)


def flora(**changes):
    chain = {"projection": PROJECTION, "accumulation_steps": 2, **changes}
    return flora_jax.flora(1e-2, **chain)


def others(model):
    """All state that is not trained, as numbers."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Param)))
    found = {}
    for path, variable in state:
        value = jax.tree.leaves(variable.get_value())[0]
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        found[path] = np.asarray(value)
    return found


def norm_of(grads):
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(nnx.as_pure(grads))))


def params(model):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]


def equal(one, two, tolerance=0.0):
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=tolerance, err_msg=str(key))


def test_all_other_state_is_as_after_nnx_value_and_grad():
    ours, theirs = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    own = flora_nnx.Optimizer(ours, flora())
    other = nnx.Optimizer(theirs, flora(), wrt=nnx.Param)
    before = others(ours)
    for i in range(5):
        value, grads = flora_nnx.value_and_grad(loss, PROJECTION)(ours, X + i, cycle=own)
        expected, full = nnx.value_and_grad(loss)(theirs, X + i)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        equal(others(ours), others(theirs), 1e-6)
        own.update(ours, grads)
        other.update(theirs, full)
    after = others(ours)
    assert int(after[("calls",)]) == 5
    assert not np.array_equal(before[("norm", "mean")], after[("norm", "mean")])
    assert int(after[("dropout", "rngs", "count")]) == 5
    assert ("seen",) in after
    for a, b in zip(params(ours), params(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("fused", often([True, False], True))
def test_the_step_is_the_steps_made_by_hand(fused):
    ours, theirs = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    own = flora_nnx.Optimizer(ours, flora())
    other = nnx.Optimizer(theirs, flora(), wrt=nnx.Param)
    step = flora_nnx.make_train_step(loss, PROJECTION if fused else None)
    for i in range(6):
        value, metrics = step(ours, own, X + i)
        expected, full = nnx.value_and_grad(loss)(theirs, X + i)
        other.update(theirs, full)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        if not fused:
            norm = norm_of(full)
            np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    assert int(own.step[...]) == 6
    equal(others(ours), others(theirs), 1e-4)
    for a, b in zip(params(ours), params(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_auxiliary_data_and_keywords():
    model = Module(nnx.Rngs(0))
    optimizer = flora_nnx.Optimizer(model, flora())

    def with_aux(model, x, *, shift=0.0):
        y = model(x) + shift
        return jnp.mean(y**2), {"largest": y.max()}

    of = flora_nnx.value_and_grad(with_aux, PROJECTION, has_aux=True)
    (value, aux), _ = of(model, X, shift=1.0, cycle=optimizer)
    assert value > 0 and aux["largest"].shape == ()
    step = flora_nnx.make_train_step(with_aux, PROJECTION, has_aux=True)
    _, metrics = step(model, optimizer, X)
    assert set(metrics) == {"gradient_norm", "aux"}


def test_the_square_of_the_norm_is_unbiased():
    """Over 400 projections; the standard error of the mean bounds what is allowed."""
    model = nnx.Linear(64, 24, use_bias=False, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(1, (16, 64)))
    of = lambda model: jnp.mean(model(x) ** 2)  # noqa: E731
    _, full = nnx.value_and_grad(of)(model)
    expected = float(norm_of(full)) ** 2
    projection = flora_jax.Projection(8, min_dim=8, side="input")

    @nnx.jit
    def norm(model, cycle):
        _, grads = flora_nnx.value_and_grad(of, projection)(model, cycle=cycle)
        return norm_of(grads)

    squares = np.array([float(norm(model, i)) ** 2 for i in range(400)])
    error = squares.std() / 20
    assert 0 < error < 0.05 * expected
    assert abs(squares.mean() - expected) < 4 * error


def mesh_of(shape, names):
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    count = int(np.prod(shape))
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), names, axis_types=kinds)


@pytest.mark.parametrize("tx", often(["flora", "momentum", "adafactor"], "flora"))
def test_a_trainer_that_lays_out_state_by_its_metadata(tx):
    """As MaxText and Tunix do: shardings from the names of each variable; then the steps are those of one device."""
    make = {
        "flora": flora,
        "momentum": lambda: flora(momentum=0.9),
        "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    }[tx]
    alone = Module(nnx.Rngs(0))
    expected = nnx.Optimizer(alone, make(), wrt=nnx.Param)
    mesh = mesh_of((4, 2), ("fsdp", "tp"))
    with jax.set_mesh(mesh):
        model = Module(nnx.Rngs(0), names=("fsdp", "tp"))
        optimizer = flora_nnx.Optimizer(model, make())
        state = nnx.state(optimizer)
        specs = nnx.get_partition_spec(state)
        leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
        assert any("fsdp" in str(spec) for spec in leaves) or tx == "adafactor"
        put = jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, s)),
            state,
            specs,
        )
        nnx.update(optimizer, put)
        step = flora_nnx.make_train_step(loss, PROJECTION if tx != "adafactor" else None)
        for i in range(4):
            step(model, optimizer, X + i)
    for i in range(4):
        _, full = nnx.value_and_grad(loss)(alone, X + i)
        expected.update(alone, full)
    for a, b in zip(params(model), params(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_names_are_those_of_the_axes_that_are_there():
    """Logical names, which no mesh has: of `embed` and `mlp` the sketch keeps that of the side that is not projected."""
    with nnx.use_eager_sharding(False):
        model = Module(nnx.Rngs(0), names=("embed", "mlp"))
        optimizer = flora_nnx.Optimizer(model, flora(momentum=0.9))
    found = []
    for one in jax.tree.leaves(optimizer.opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        names = next((one.get_metadata()[k] for k in METADATA if one.get_metadata().get(k)), None)
        if names is not None:
            assert len(names) == one.get_value().ndim
            found.append((one.get_value().shape, tuple(names)))
    assert (
        (32, 8),
        ("embed", "mlp"),
    ) in found  # the larger side, mlp's, is projected; the rank has its name


def test_masked_leaves_of_a_state_have_no_names():
    """The advised preset has states of some leaves only."""
    with nnx.use_eager_sharding(False):
        model = Module(nnx.Rngs(0), names=("embed", "mlp"))
        optimizer = flora_nnx.Optimizer(model, flora_jax.flora(1e-2, rank=8, preset="advised"))
    before = params(model)
    flora_nnx.make_train_step(loss)(model, optimizer, X)
    assert any((a != b).any() for a, b in zip(before, params(model), strict=True))


@pytest.mark.parametrize("plain", ["value_and_grad", "make_train_step"])
def test_the_plain_functions_name_this_one(plain):
    model = Module(nnx.Rngs(0))
    with pytest.raises(
        TypeError,
        match=r"has .*BatchStat.*, whose changes would be lost; take .*flora_jax\.trainers\.nnx",
    ):
        if plain == "value_and_grad":
            flora_jax.value_and_grad(lambda m: loss(m, X), PROJECTION)(model, cycle=0)
        else:
            step = flora_jax.make_train_step(lambda m: loss(m, X), flora(), PROJECTION)
            step(model, None)


def test_params_in_the_place_of_a_module():
    with pytest.raises(TypeError, match="model must be an NNX module, found dict"):
        flora_nnx.value_and_grad(loss, PROJECTION)({}, X, cycle=0)
