"""Weights in int8: what they stand for, rounding without bias, and training beside floating-point weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from flora_jax import bits
from flora_jax.chain.sketch import is_sketch
from flora_jax.fused import int8
from flora_jax.models import decoder
from flora_jax.qarray import is_int8
from tests.helpers import Naive, assert_close, assert_tree_equal, matrix_of_a, normal, often

pytest.importorskip("qwix")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (4, 17)), jnp.int32)


def model_of(dtype=jnp.float32, **changes):
    shape = decoder.Shape(48, 32, 64, 3, 4, 2, dtype, **changes)
    model = decoder.Decoder(shape)
    return (lambda p: decoder.loss(model, p, TOKENS)), model.init(jax.random.key(0), TOKENS)[
        "params"
    ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_half_a_step_of_the_block(dtype):
    """Each number is within half a step of its own, and a step is the largest of its block over 127, to bfloat16's 1/128."""
    weight = jnp.asarray(normal(0, (3, 64, 5)) * np.geomspace(1e-3, 1e3, 5), dtype)
    quantized = flora_jax.to_int8({"w": weight}, block=16)["w"]
    assert quantized.qvalue.shape == weight.shape and quantized.qvalue.dtype == jnp.int8
    assert quantized.scale.shape == (3, 4, 5) and quantized.scale.dtype == dtype
    exact = np.asarray(weight, np.float64)
    found = np.asarray(quantized.qvalue, np.float64).reshape(3, 4, 16, 5)
    found = (found * np.asarray(quantized.scale, np.float64)[:, :, None]).reshape(weight.shape)
    largest = np.abs(exact).reshape(3, 4, 16, 5).max(2)
    assert np.all(np.asarray(quantized.scale, np.float64) >= largest / 127)
    assert np.all(np.asarray(quantized.scale, np.float64) <= 1.009 * largest / 127)
    step = np.repeat(largest / 127 * 1.009, 16, axis=1)
    assert np.all(np.abs(found - exact) <= 0.5 * step)
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(
        np.asarray(flora_jax.from_int8({"w": quantized})["w"], np.float64), found, rtol=tolerance
    )


def test_qwix_reads_it_as_well():
    qwix = pytest.importorskip("qwix")
    quantized = flora_jax.to_int8({"w": jnp.asarray(normal(1, (64, 8)))}, block=16)["w"]
    np.testing.assert_allclose(qwix.dequantize(quantized), int8.value(quantized), rtol=1e-6)


def test_rounding_without_bias():
    """The mean of n roundings is within five standard deviations, half a step each at most, of the number."""
    weight = jnp.asarray(normal(2, (32, 3)))
    quantized = flora_jax.to_int8({"w": weight}, block=16)["w"]
    count = 4000

    def one(seed):
        random = bits.random((seed, 1), weight.shape)
        return int8.value(int8.requantized(quantized, weight, random))

    mean = np.asarray(jax.vmap(one)(jnp.arange(count)).mean(0), np.float64)
    step = np.repeat(np.asarray(quantized.scale, np.float64), 16, axis=0)
    assert np.all(np.abs(mean - np.asarray(weight)) <= 5 * 0.5 * step / np.sqrt(count))


def test_zeros_stay_zeros():
    quantized = flora_jax.to_int8({"w": jnp.zeros((32, 3))}, block=16)["w"]
    np.testing.assert_array_equal(int8.value(quantized), 0)


def test_what_is_quantized():
    """The matrices of the layers; no embedding, head, norm, nor what the block does not divide."""
    _, params = model_of()
    quantized = flora_jax.to_int8(params, block=16)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_flatten_with_path(quantized, is_leaf=is_int8)[0]
        if is_int8(leaf)
    ]
    parts = ("down", "gate", "key", "out", "query", "up", "value")
    assert names == [f"layers/{part}/kernel" for part in parts]
    only = flora_jax.to_int8(params, block=16, select=lambda path, _: "up" in path)
    assert is_int8(only["layers"]["up"]["kernel"])
    assert not is_int8(only["layers"]["down"]["kernel"])
    assert not is_int8(flora_jax.to_int8(params, block=48)["layers"]["up"]["kernel"])
    with pytest.raises(
        ValueError, match="block must divide the 32 of 'layers/up/kernel', found 48"
    ):
        flora_jax.to_int8(params, block=48, select=lambda path, _: "up" in path)
    with pytest.raises(ValueError, match="block must be at least 1, found 0"):
        flora_jax.to_int8(params, block=0)


@pytest.mark.parametrize(
    "changes", often([{}, {"scan": False}, {"scan": False, "remat": False}], {}), ids=str
)
def test_one_step_is_that_of_the_weights_it_stands_for(changes):
    loss, params = model_of(**changes)
    quantized = flora_jax.to_int8(params, block=16)
    plain = flora_jax.from_int8(quantized)
    tx = optax.sgd(optax.constant_schedule(0.5))
    step = flora_jax.make_train_step(
        loss, tx, update="backward", rounding="stochastic", donate=False
    )
    state = step.init(quantized)
    found, _, value = step(quantized, state)
    expected, _, expected_value = step(plain, tx.init(plain))
    assert_close(value, expected_value, 1e-6)
    kinds = jax.tree.leaves(jax.tree.map(is_int8, found, is_leaf=is_int8))
    assert sum(kinds) == 7 if not changes else 21
    largest = max(
        float(jnp.max(x.scale)) for x in jax.tree.leaves(found, is_leaf=is_int8) if is_int8(x)
    )
    for a, b in zip(*map(jax.tree.leaves, (flora_jax.from_int8(found), expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1.01 * largest)
    again, _, _ = step(quantized, state)
    assert_tree_equal(found, again)


def trained(step, params, count):
    """The last loss of weights in float32 and in int8."""
    losses = {}
    for name, own in (("float32", params), ("int8", flora_jax.to_int8(params, block=16))):
        own = jax.tree.map(jnp.copy, own)
        state = step.init(own)
        for _ in range(count):
            own, state, value = step(own, state)
        losses[name] = float(value)
    return losses


def over_four_devices(tree):
    """Each array with its last axis over four devices, where they divide it."""
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))

    def placed(x):
        last = "x" if x.ndim and x.shape[-1] % 4 == 0 else None
        names = (*[None] * (x.ndim - 1), last) if x.ndim else ()
        return jax.device_put(
            x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
        )

    return jax.tree.map(placed, tree)


def assert_integers_of_one_device(found, expected, sharded):
    for a, b, start in zip(*map(jax.tree.leaves, (found, expected, sharded)), strict=True):
        assert a.sharding.is_equivalent_to(start.sharding, a.ndim)
        same = np.mean(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)) < 1e-5)
        assert same > 0.99


def test_training_beside_float32():
    """40 steps of Adam: the losses of the weights in int8 stay within 5 % of the others'."""
    loss, params = model_of()
    tx = optax.adam(optax.constant_schedule(3e-3))
    step = flora_jax.make_train_step(loss, tx, update="backward", rounding="stochastic")
    losses = trained(step, params, 40)
    assert losses["float32"] < 2.0 < float(loss(params))
    assert abs(losses["int8"] / losses["float32"] - 1) < 0.05


def flora_of(**changes):
    """Sketches of every matrix but embedding and head, two micro-batches to an optimizer step."""
    settings = dict(side="input", embedding="whole", head="whole", resample_every=2) | changes
    projection = flora_jax.Projection(4, min_dim=8, **settings)
    rate = optax.constant_schedule(1e-2)
    return projection, flora_jax.flora(rate, projection=projection, accumulation_steps=2)


@pytest.mark.parametrize(
    "changes", often([{}, {"scan": False}, {"scan": False, "remat": False}], {}), ids=str
)
@pytest.mark.parametrize("side", ["input", "output"])
def test_sketches_are_those_of_the_gradient(changes, side):
    """`G Aᵀ` by a naive product, of the gradient with respect to the floating-point weights."""
    loss, params = model_of(**changes)
    quantized = flora_jax.to_int8(params, block=16)
    projection, _ = flora_of(side=side)
    grad_fn = flora_jax.value_and_grad(loss, projection)
    value, found = grad_fn(quantized, cycle=3)
    expected_value, gradients = jax.value_and_grad(loss)(flora_jax.from_int8(quantized))
    assert_close(value, expected_value, 1e-6)
    leaves = zip(jax.tree.leaves(found, is_leaf=is_sketch), jax.tree.leaves(gradients), strict=True)
    kinds = set()
    for leaf, gradient in leaves:
        kinds.add(is_sketch(leaf))
        if is_sketch(leaf):
            gradient = Naive(leaf.spec).project(matrix_of_a(leaf.spec, 3), gradient)
            leaf = leaf.data
        assert_close(leaf, gradient, 1e-4)
    assert kinds == {True, False}
    assert not grad_fn.plan(quantized).whole_uses


@pytest.mark.parametrize("mask", [False, True], ids=["all compressed", "one left out"])
@pytest.mark.parametrize("slice_above", [0, 10**9], ids=["by slices", "at once"])
def test_a_step_of_sketches(mask, slice_above, monkeypatch):
    """Two micro-batches: the first leaves all as it is; the second is optax's update to a step of the block, rounded at random."""
    monkeypatch.setitem(flora_jax.apply_gradients.__kwdefaults__, "slice_above", slice_above)
    loss, params = model_of()
    quantized = flora_jax.to_int8(params, block=16)
    plain = flora_jax.from_int8(quantized)
    masked = jax.tree_util.tree_map_with_path(lambda path, _: "gate" not in str(path), params)
    projection, tx = flora_of(**{"mask": masked} if mask else {})
    step = flora_jax.make_train_step(loss, tx, projection, rounding="stochastic", donate=False)
    state = step.init(quantized)
    assert_tree_equal(
        jax.tree.map(lambda x: (x.shape, str(x.dtype)), state),
        jax.tree.map(lambda x: (x.shape, str(x.dtype)), tx.init(plain)),
    )
    first, state, _ = step(quantized, state)
    assert_tree_equal(first, quantized)
    found, state, _ = step(first, state)
    expected, own = plain, tx.init(plain)
    for _ in range(2):
        updates, own = tx.update(jax.grad(loss)(expected), own, expected)
        expected = optax.apply_updates(expected, updates)
    moved, mean = 0, []
    for a, b, c in zip(
        *(jax.tree.leaves(x, is_leaf=is_int8) for x in (found, expected, quantized)),
        strict=True,
    ):
        if not is_int8(a):
            assert_close(a, b, 1e-4)
            continue
        grid = np.repeat(np.asarray(a.scale), 16, axis=-2)
        off = (np.asarray(int8.value(a)) - np.asarray(b)) / grid
        assert np.abs(off).max() <= 1.001
        moved += np.sum(np.asarray(a.qvalue) != np.asarray(c.qvalue))
        mean.append(off.ravel())
    assert moved > 1000
    every = np.concatenate(mean)
    assert abs(every.mean()) < 5 * 0.5 / np.sqrt(len(every))  # each is off by less than a step
    assert_tree_equal(found, step(first, step(quantized, step.init(quantized))[1])[0])


def test_nearest_and_without_sketches():
    """Rounded to nearest it is within half a step; ordinary gradients and any optimizer will do."""
    loss, params = model_of()
    quantized = flora_jax.to_int8(params, block=16)
    plain = flora_jax.from_int8(quantized)
    tx = optax.sgd(0.3)
    step = flora_jax.make_train_step(loss, tx, donate=False)
    found, _, _ = step(quantized, step.init(quantized))
    expected = jax.tree.map(lambda w, g: w - 0.3 * g, plain, jax.grad(loss)(plain))
    for a, b in zip(*(jax.tree.leaves(x, is_leaf=is_int8) for x in (found, expected)), strict=True):
        if is_int8(a):
            grid = np.repeat(np.asarray(a.scale), 16, axis=-2)
            assert np.all(np.abs(np.asarray(int8.value(a)) - np.asarray(b)) <= 0.501 * grid)
        else:
            assert_close(a, b, 1e-5)


def test_training_with_sketches_beside_float32():
    """60 optimizer steps: the losses of the weights in int8 stay within 5 % of the others'."""
    loss, params = model_of()
    projection, tx = flora_of()
    step = flora_jax.make_train_step(loss, tx, projection, rounding="stochastic")
    losses = trained(step, params, 120)
    assert losses["float32"] < 0.8 * float(loss(params))
    assert abs(losses["int8"] / losses["float32"] - 1) < 0.05


def test_states_plans_and_shardings():
    """Those of the floating-point weights; a state that was made for integers and scales is refused."""
    loss, params = model_of()
    quantized = flora_jax.to_int8(params, block=16)
    assert_tree_equal(flora_jax.to_int8(quantized, block=8), quantized)
    projection, tx = flora_of()
    assert flora_jax.plan(quantized, projection) == flora_jax.plan(params, projection)
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "x"))
    place = {2: None, 1: None, 3: over}
    alone = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(x):
        return jax.device_put(x, place.get(x.ndim) or alone)

    assert flora_jax.state_shardings(tx, jax.tree.map(placed, quantized)) == (
        flora_jax.state_shardings(tx, jax.tree.map(placed, params))
    )
    with pytest.raises(ValueError, match=r"'layers/down/kernel' in int8; .*step\.init"):
        tx.init(quantized)
    other = optax.adafactor(0.1)
    step = flora_jax.make_train_step(loss, other)
    with pytest.raises(ValueError, match=r"opt_state .* in int8, .*step\.init"):
        step(quantized, other.init(quantized))


def test_sketches_on_four_devices():
    """The integers of one device, but where sums differ in their last digits."""
    loss, params = model_of()
    quantized = flora_jax.to_int8(params, block=16)
    projection, tx = flora_of()
    step = flora_jax.make_train_step(loss, tx, projection, rounding="stochastic", donate=False)

    def run(params):
        state = step.init(params)
        for _ in range(4):
            params, state, _ = step(params, state)
        return params

    sharded = over_four_devices(quantized)
    assert_integers_of_one_device(run(sharded), run(quantized), sharded)


@pytest.mark.optimized
@pytest.mark.parametrize("remat", [True, False])
def test_no_floating_point_stack(remat, monkeypatch):
    """Neither the backward pass nor the update has a floating-point array of the size of a stack of weights."""
    monkeypatch.setitem(flora_jax.apply_gradients.__kwdefaults__, "slice_above", 0)
    shape = decoder.Shape(48, 128, 512, 6, 4, 4, jnp.float32, remat=remat)
    model = decoder.Decoder(shape)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    quantized = jax.eval_shape(flora_jax.to_int8, params)
    projection, tx = flora_of()
    step = flora_jax.make_train_step(
        lambda p: decoder.loss(model, p, TOKENS), tx, projection, rounding="stochastic"
    )
    text = step.lower(quantized, jax.eval_shape(tx.init, params)).compile().as_text()
    stacks = {"x".join(map(str, x.shape)) for x in jax.tree.leaves(params["layers"]) if x.ndim == 3}
    found = set(re.findall(r"f32\[(6,\d+,\d+)\]", text))
    assert "6,4,128" in found  # sketches
    assert not {one for one in found if one.replace(",", "x") in stacks}


@pytest.mark.optimized
def test_no_second_copy_of_the_weights():
    """What the program needs beside its arguments is less than a fifth of the weights as they are used."""
    shape = decoder.Shape(48, 128, 512, 24, 4, 4, jnp.float32)
    model = decoder.Decoder(shape)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    quantized = jax.eval_shape(flora_jax.to_int8, params)
    tx = optax.sgd(optax.constant_schedule(0.1))
    step = flora_jax.make_train_step(
        lambda p: decoder.loss(model, p, TOKENS), tx, update="backward", rounding="stochastic"
    )
    state = jax.eval_shape(tx.init, params)
    memory = step.lower(quantized, state).compile().memory_analysis()
    weights = sum(4 * x.size for x in jax.tree.leaves(params))
    assert memory.argument_size_in_bytes < 0.3 * weights
    assert memory.temp_size_in_bytes < 0.2 * weights


def test_what_does_not_change_stays_as_it_is():
    """With no update, and where others of the block are updated a little, integers and scales are the same, for ever."""
    weight = jnp.asarray(normal(3, (64, 6)), jnp.bfloat16).at[3].multiply(0.1)  # not the largest
    start = now = flora_jax.to_int8({"w": weight}, block=32)["w"]
    change = jnp.zeros((64, 6)).at[3].set(2e-3)
    for seed in range(20):
        random = bits.random((seed, 1), weight.shape)
        now = int8.requantized(now, int8.value(now, jnp.float32) + change, random)
    others = np.arange(64) != 3
    np.testing.assert_array_equal(now.scale, start.scale)
    np.testing.assert_array_equal(now.qvalue[others], start.qvalue[others])
    assert np.any(np.asarray(now.qvalue[3]) != np.asarray(start.qvalue[3]))


@pytest.mark.parametrize("factor", [0.5, 1.01, 3.0])
def test_a_block_that_grows_or_shrinks_has_another_scale(factor):
    """No number is cut off, and none is off by more than a step."""
    weight = jnp.asarray(normal(4, (64, 6)))
    now = flora_jax.to_int8({"w": weight}, block=32)["w"]
    for seed in range(5):
        weight = weight * factor
        random = bits.random((seed, 1), weight.shape)
        now = int8.requantized(now, weight, random)
        step = np.repeat(np.asarray(now.scale), 32, axis=0)
        assert np.all(np.abs(np.asarray(int8.value(now) - weight)) <= 1.001 * step)
        largest = np.abs(np.asarray(now.qvalue, np.int32)).reshape(2, 32, 6).max(1)
        assert largest.min() >= 115 and largest.max() <= 127


def test_sharded_and_resumed_from_a_checkpoint(tmp_path):
    """On four devices the integers of one, but where sums differ in their last digits; the same after a restart."""
    ocp = pytest.importorskip("orbax.checkpoint")
    loss, params = model_of()
    quantized = flora_jax.to_int8(params, block=16)
    tx = optax.adam(optax.constant_schedule(1e-3))
    step = flora_jax.make_train_step(
        loss, tx, update="backward", rounding="stochastic", donate=False
    )

    def run(params, state, count):
        for _ in range(count):
            params, state, _ = step(params, state)
        return params, state

    expected, _ = run(quantized, step.init(quantized), 3)
    sharded = over_four_devices(quantized)
    middle = run(sharded, over_four_devices(step.init(quantized)), 2)
    found, _ = run(*middle, 1)
    assert_integers_of_one_device(found, expected, sharded)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "middle", jax.tree.leaves(middle))
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = checkpointer.restore(tmp_path / "middle", jax.tree.leaves(middle))
    again, _ = run(*jax.tree.unflatten(jax.tree.structure(middle), leaves), 1)
    assert_tree_equal(again, found)


@pytest.mark.parametrize("update", ["after", "backward"])
def test_an_equinox_module(update):
    """Its activation functions and settings stay; a step takes the module, and gives one."""
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.MLP(32, 4, 64, 2, key=jax.random.key(0))
    x = jnp.asarray(normal(5, (8, 32)))

    def loss(module):
        return jnp.mean((jax.vmap(module)(x) - jnp.sin(x[:, :4])) ** 2)

    quantized = flora_jax.to_int8(module, block=16)
    assert [is_int8(layer.weight) for layer in quantized.layers] == [True, True, False]
    _, tx = flora_of()
    projection = None if update == "backward" else flora_of()[0]
    step = flora_jax.make_train_step(loss, tx, projection, update=update, rounding="stochastic")
    state, first = step.init(quantized), float(loss(flora_jax.from_int8(quantized)))
    for _ in range(20):
        quantized, state, value = step(quantized, state)
    assert float(value) < 0.9 * first
    assert quantized.activation is module.activation
