import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import flora_jax
from flora_jax.sharding import partition

SIZES = {"fsdp": 4, "model": 2}


def make_mesh():
    return jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def cut_params(mesh):
    shapes = {
        "square": ((256, 256), PartitionSpec("fsdp", "model")),
        "heads": ((256, 4, 128), PartitionSpec("fsdp", "model")),
        "stack": ((3, 256, 512), PartitionSpec(None, "fsdp", "model")),
        "experts": ((8, 128, 256), PartitionSpec("fsdp", None, "model")),
        "bias": ((512,), PartitionSpec("model")),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in shapes.items()
    }


@pytest.mark.parametrize(
    "cut, state, expected",
    [
        ((("fsdp",), ("model",)), (256, 512), PartitionSpec("fsdp", "model")),
        ((("fsdp",), ("model",)), (16, 512), PartitionSpec("fsdp", "model")),
        ((("fsdp",), ("model",)), (256, 16), PartitionSpec("fsdp", "model")),
        ((("fsdp",), ("model",)), (6, 512), PartitionSpec(None, "model")),
        ((("fsdp", "model"), ()), (16, 512), PartitionSpec(("fsdp", "model"))),
        ((("fsdp",), ("model",)), (512,), PartitionSpec("model")),
        ((("fsdp",), ("model",)), (1,), PartitionSpec()),
        ((("fsdp",), ("model",)), (), PartitionSpec()),
    ],
)
def test_axes_of_a_state_lie_where_those_of_the_weight_lie(cut, state, expected):
    assert partition((256, 512), cut, state, SIZES) == expected


def test_adafactors_vectors_of_a_square_weight_are_told_apart():
    mesh = make_mesh()
    tx = optax.adafactor(1e-2)
    shardings = flora_jax.state_shardings(tx, cut_params(mesh))
    factored = shardings[0]
    assert factored.v_row["square"].spec == PartitionSpec("fsdp")
    assert factored.v_col["square"].spec == PartitionSpec("model")


@pytest.mark.parametrize(
    "tx",
    [
        flora_jax.flora(1e-2, rank=16, accumulation_steps=2),
        flora_jax.flora(1e-2, rank=16, accumulation_steps=2, momentum=0.9, state_dtype="int8"),
        optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        optax.multi_transform(
            {"flora": flora_jax.flora(1e-2, rank=16), "sgd": optax.sgd(1e-2, momentum=0.9)},
            {
                "square": "flora",
                "heads": "flora",
                "stack": "flora",
                "experts": "sgd",
                "bias": "sgd",
            },
        ),
        optax.masked(
            optax.adafactor(1e-2), lambda params: {name: name != "heads" for name in params}
        ),
    ],
)
def test_a_state_is_made_where_it_shall_lie_and_no_part_is_whole_that_can_be_cut(tx):
    mesh = make_mesh()
    abstract = cut_params(mesh)
    params = jax.tree.map(lambda x: jax.device_put(jnp.ones(x.shape), x.sharding), abstract)
    shardings = flora_jax.state_shardings(tx, abstract)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        if leaf.ndim > 1 and leaf.size > 4096:
            assert len({str(shard.index) for shard in leaf.addressable_shards}) == 8
    jax.tree.map(np.testing.assert_array_equal, state, jax.jit(tx.init)(params))


def test_params_without_a_named_sharding_are_refused():
    with pytest.raises(ValueError, match="'w': found SingleDeviceSharding, expected a NamedShard"):
        flora_jax.state_shardings(optax.sgd(1.0), {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="params must have at least one array, found none"):
        flora_jax.state_shardings(optax.sgd(1.0), {})


def test_params_on_two_meshes_are_refused():
    meshes = [jax.make_mesh((n,), ("data",)) for n in (2, 4)]
    params = [
        jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
        for mesh in meshes
    ]
    with pytest.raises(
        ValueError, match=r"'1': found a mesh .* expected that of the params before"
    ):
        flora_jax.state_shardings(optax.sgd(1.0), params)
