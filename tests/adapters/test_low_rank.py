"""Adapters on all kinds of functions, against the dense weights and the chain rule in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flora_jax
from flora_jax.adapters import Adapter, Factors, lora
from flora_jax.adapters.low_rank import specs
from flora_jax.models import decoder, gpt2, t5
from tests.fused.test_models import TOKENS, Experts, Lstm, init
from tests.fused.test_value_and_grad import (
    FUNCTIONS,
    NHWC,
    SIDES,
    WITHOUT_A_RULE,
    X,
    array,
    conv,
    square,
)
from tests.helpers import assert_close, assert_tree_close, normal


def rule(rank=4, **others):
    return flora_jax.Projection(rank, **{"min_dim": 8, "side": "input", **others})


def filled(adapter, params, seed=0):
    """Adapter params of which none is zero."""
    own = adapter.init(jax.random.key(seed), params)
    leaves, structure = jax.tree.flatten(own)
    noise = [jnp.asarray(0.3 * normal(seed + i, x.shape)) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, noise)


def dense(spec, down, up):
    """`A B` in the weight's shape, float64; and the function that takes a weight's cotangent to theirs."""
    axes = range(len(spec.shape))
    labels = "abcdefgh"[: len(spec.shape)]
    of_down = "".join(labels[i] for i in (*spec.batch, *spec.projected)) + "r"
    kept = [i for i in axes if i not in spec.projected[1:]]
    of_up = "".join("r" if i == spec.projected[0] else labels[i] for i in kept)
    down, up = np.asarray(down, np.float64), np.asarray(up, np.float64)

    def pull(delta):
        delta = np.asarray(delta, np.float64)
        return {
            "down": np.einsum(f"{labels},{of_up}->{of_down}", delta, up),
            "up": np.einsum(f"{labels},{of_down}->{of_up}", delta, down),
        }

    return np.einsum(f"{of_down},{of_up}->{labels}", down, up), pull


def leaf(tree, path):
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


def compare(loss, params, *args, projection, full=(), tolerance=2e-5):
    """Value and gradients of adapters and of what is not adapted, against the merged weights'."""
    adapter = lora(projection)
    own = filled(adapter, params)
    known = specs(projection, params)
    assert set(own) == set(known)
    pulls, merged = {}, jax.tree.map(lambda x: x, params)
    for path, spec in known.items():
        product, pulls[path] = dense(spec, **own[path])
        *parents, last = path.split("/")
        place = functools.reduce(lambda node, name: node[name], parents, merged)
        place[last] = jnp.asarray(np.asarray(place[last], np.float64) + product, place[last].dtype)
    run = jax.jit(jax.value_and_grad(adapter.apply(loss), argnums=(0, 1)))
    value, (of_params, of_own) = run(params, own, *args)
    expected_value, expected = jax.jit(jax.value_and_grad(loss))(merged, *args)
    np.testing.assert_allclose(value, expected_value, rtol=max(tolerance, 2e-5))
    for path, pull in pulls.items():
        assert_tree_close(of_own[path], pull(leaf(expected, path)), tolerance)
    assert_tree_close(of_params, expected, tolerance)
    assert_tree_close(adapter.merge(params, own), merged, 1e-6)
    uses = adapter.uses(loss, params, own, *args)
    assert uses and sorted((u.path, u.primitive) for u in uses if u.whole) == sorted(full)


MOVED_BY_SIDE = ["einsum_heads_moved", "tied_and_hidden", "scan", "scaled_by_both", "sliced"]


@pytest.mark.parametrize(
    "name, side",
    [(name, "input") for name in FUNCTIONS] + [(name, "output") for name in MOVED_BY_SIDE],
)
def test_functions(name, side):
    loss, shapes, args = FUNCTIONS[name]
    params = {key: array(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    full = {
        "stop_gradient": [("w", "stop_gradient")],
        "conv": [
            ("w", "conv_general_dilated")
        ],  # a matrix of its own for each position in the window
    }.get(name, [])
    compare(loss, params, *args, projection=rule(side=side), full=full)


@pytest.mark.parametrize("name", WITHOUT_A_RULE)
def test_a_use_without_a_rule_gets_the_merged_weight(name):
    loss, primitives = WITHOUT_A_RULE[name]
    params = dict(w=array(24, 16))
    paths = ["w"] * len(primitives)
    if name == "learned_scale":
        params["s"], primitives, paths = 1 + array(16) ** 2, [], []
    if name == "product_of_weights":
        params["v"] = array(16, 12)
        paths = ["v", "w"]
    full = list(zip(paths, primitives, strict=True))
    compare(loss, params, X, projection=rule(), full=full)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("layout", [NHWC, ("NCHW", "OIHW", "NHWC")])
def test_convolution_as_a_matrix_of_patches(side, layout):
    """LoRA of a convolution: `r` channels by the whole kernel, then a product."""
    channels_last = layout == NHWC
    shape = (3, 2, 8, 12) if channels_last else (12, 8, 3, 2)
    numbers = flora_jax.DimensionNumbers(
        (0, 1, 2) if channels_last else (1, 2, 3), 3 if channels_last else 0
    )
    x = array(2, 6, 6, 8) if channels_last else array(2, 8, 6, 6)

    def loss(p, x):
        return square(conv(x, p["w"], (2, 1), [(1, 2), (0, 1)], layout, rhs_dilation=(1, 2)))

    projection = rule(side=side, weight_dimension_numbers=numbers)
    compare(loss, dict(w=array(*shape)), x, projection=projection)


def test_convolution_with_channels_alone_on_the_input_side():
    def loss(p, x):
        return square(conv(x, p["w"], (1, 1), "SAME", NHWC))

    projection = rule(weight_dimension_numbers=flora_jax.DimensionNumbers(2, (0, 1, 3)))
    compare(loss, dict(w=array(3, 2, 8, 12)), array(2, 5, 5, 8), projection=projection)


def test_llama():
    shape = decoder.Shape(48, 32, 56, 2, 4, 2, jnp.float32)
    model = decoder.Decoder(shape)
    params = init(model, TOKENS)
    projection = rule(min_dim=12, embedding="output")
    compare(lambda p: decoder.loss(model, p, TOKENS), params, projection=projection, tolerance=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tied_heads(name):
    """The embedding is looked up and is the head; both get the adapter."""
    if name == "gpt2":
        model, loss = gpt2.Gpt2(gpt2.Shape(48, 16, 32, 2, 4)), gpt2.loss
        params = init(model, TOKENS)
    else:
        shape = t5.Shape(vocabulary=48, width=16, hidden=32, layers=1, heads=2, head_size=8)
        model, loss = t5.T5(shape), t5.loss
        params = init(model, TOKENS, TOKENS)
    projection = rule(min_dim=16, embedding="output")
    compare(lambda p: loss(model, p, TOKENS), params, projection=projection, tolerance=1e-4)


@pytest.mark.parametrize("model", [Experts(), Lstm()])
def test_experts_and_recurrence(model):
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    params = init(model, inputs)

    def loss(params):
        logits = jnp.asarray(model.apply({"params": params}, inputs), jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    compare(loss, params, projection=rule(min_dim=16, embedding="output"), tolerance=1e-4)


def test_bfloat16():
    def loss(p, x):
        return square(x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16))

    compare(loss, dict(w=array(24, 16)), X, projection=rule(), tolerance=3e-2)


def arrays_of(text, shape):
    return text.count(f"f32[{','.join(map(str, shape))}]")


def test_the_merged_weight_is_not_made():
    """Neither forward nor backward; not even one layer's under scan and remat."""
    params = dict(w=array(3, 40, 40))
    adapter = lora(rule())
    own = filled(adapter, params)

    def loss(p, x):
        step = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
        return square(lax.scan(step, x, p["w"])[0])

    gradient = jax.grad(adapter.apply(loss), argnums=1)
    text = str(jax.make_jaxpr(gradient)(params, own, array(5, 40)))
    made = [
        line for line in text.splitlines() if "f32[40,40] =" in line or "f32[3,40,40] =" in line
    ]
    assert not [line for line in made if "dot_general" in line or " add " in line], made
    assert "f32[40,40]" in text  # the frozen slice itself


def test_sharded_over_devices():
    """Weights, factors and batch sharded over a mesh of eight: the same numbers."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def loss(p, x):
        step = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
        return square(lax.scan(step, x, p["w"])[0])

    params, x = dict(w=array(2, 24, 24)), array(8, 24)
    adapter = lora(rule())
    own = filled(adapter, params)
    gradient = jax.jit(jax.value_and_grad(adapter.apply(loss), argnums=1))
    expected = gradient(params, own, x)
    sharded = {
        "w": {
            "down": put(own["w"]["down"], None, "data"),
            "up": put(own["w"]["up"], None, None, "model"),
        }
    }
    found = gradient(dict(w=put(params["w"], None, "data", "model")), sharded, put(x, "data"))
    assert_tree_close(found, expected, 1e-5)


@pytest.mark.parametrize("axis", ["input", "output"])
def test_shard_map_inside_the_function(axis):
    """A weight that is sharded by `shard_map`, along either side."""
    mesh = Mesh(np.array(jax.devices()), ("shards",))
    sharded = PartitionSpec(*(("shards", None) if axis == "input" else (None, "shards")))

    def product(w, x):
        y = x @ w
        return lax.psum(y, "shards") if axis == "input" else y

    def loss(p, x):
        of_x = PartitionSpec(None, "shards") if axis == "input" else PartitionSpec()
        of_y = PartitionSpec() if axis == "input" else PartitionSpec(None, "shards")
        mapped = jax.shard_map(product, mesh=mesh, in_specs=(sharded, of_x), out_specs=of_y)
        return square(mapped(p["w"], x))

    compare(loss, dict(w=array(24, 16)), X, projection=rule())


def test_any_tree_of_params_and_results():
    """Numbers, strings and integer arrays in the params; auxiliary data and keyword arguments."""

    def fun(p, x, *, shift, name):
        return {"y": p["gain"] * (x @ p["w"]) + shift, "name": name + p["tag"], "steps": p["steps"]}

    params = {"w": array(24, 16), "gain": 2.0, "tag": "!", "steps": jnp.arange(3)}
    adapter = lora(rule())
    own = filled(adapter, params)
    result = adapter.apply(fun)(params, own, X, shift=1.0, name="a")
    product, _ = dense(specs(rule(), {"w": params["w"]})["w"], **own["w"])
    expected = 2 * np.asarray(X, np.float64) @ (np.asarray(params["w"]) + product) + 1
    assert_close(result["y"], expected, 1e-5)
    assert result["name"] == "a!"
    np.testing.assert_array_equal(result["steps"], [0, 1, 2])
    merged = adapter.merge(params, own)
    assert merged["tag"] == "!" and merged["gain"] == 2.0


def test_vmap_over_adapters():
    """Many adapters of one model at once."""
    params = dict(w=array(24, 16))
    adapter = lora(rule())
    many = [filled(adapter, params, seed) for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
    run = adapter.apply(lambda p, x: x @ p["w"])
    found = jax.vmap(run, in_axes=(None, 0, None))(params, stacked, X)
    for y, own in zip(found, many, strict=True):
        assert_close(y, run(params, own, X), 1e-6)


PLAIN = dict(w=array(24, 16))


class TestErrors:
    def test_no_weight_to_adapt(self):
        with pytest.raises(ValueError, match=r"found none .*'w': 24 x 16 is below min_dim 128"):
            lora(4).init(jax.random.key(0), PLAIN)

    def test_a_path_that_is_not_there(self):
        adapter = lora(rule())
        own = {"v": adapter.init(jax.random.key(0), PLAIN)["w"]}
        with pytest.raises(ValueError, match=r"'v' has an adapter .* no parameter has this path"):
            adapter.merge(PLAIN, own)

    def test_factors_of_another_rank(self):
        own = lora(rule(3)).init(jax.random.key(0), PLAIN)
        with pytest.raises(
            ValueError, match=r"'w': .* shapes \(24, 4\) and \(4, 16\), found \(24, 3\)"
        ):
            lora(rule(4)).apply(lambda p: p["w"])(PLAIN, own)

    def test_a_leaf_that_is_left_whole(self):
        adapter = Adapter(
            lambda key, params: {},
            lambda params, own: {"w": Factors(jnp.ones((24, 4)), jnp.ones((4, 16)))},
            rule(mask=False),
        )
        with pytest.raises(ValueError, match="'w' has an adapter and should have none: masked"):
            adapter.merge(PLAIN, {})
