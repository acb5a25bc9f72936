import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flora_jax
from experiments.bench import traffic
from flora_jax.sharding.partition import partition

SIZES = {"fsdp": 4, "model": 2}


def make_mesh():
    return jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(AxisType.Auto,) * 2)


def sharded_params(mesh):
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
    "sharded, state, expected",
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
def test_axes_of_a_state_are_sharded_as_those_of_the_weight(sharded, state, expected):
    assert partition((256, 512), sharded, state, SIZES) == expected


def test_adafactors_vectors_of_a_square_weight_are_told_apart():
    mesh = make_mesh()
    tx = optax.adafactor(1e-2)
    shardings = flora_jax.state_shardings(tx, sharded_params(mesh))
    factored = shardings[0]
    assert factored.v_row["square"].spec == PartitionSpec("fsdp")
    assert factored.v_col["square"].spec == PartitionSpec("model")


@pytest.mark.parametrize(
    "tx",
    [
        flora_jax.flora(1e-2, rank=16, accumulation_steps=2),
        flora_jax.flora(1e-2, rank=16, accumulation_steps=2, momentum=0.9, state_dtype="int8"),
        flora_jax.flora(1e-2, rank=16, accumulation_steps=2, preset="advised", state_dtype="int4"),
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
def test_a_state_has_its_shardings_and_no_large_array_is_replicated(tx):
    mesh = make_mesh()
    abstract = sharded_params(mesh)
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


def compiled_step(mesh, loss, params, x, **others):
    """Text of the compiled train step, and the most random words that a device samples at a time."""
    projection = flora_jax.Projection(64, side="input", resample_every=2, **others)
    tx = flora_jax.flora(1e-2, projection=projection, accumulation_steps=2)

    def shape(lengths, axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(lengths, jnp.float32, sharding=sharding)

    params = {"w": shape(*params)}
    shardings = flora_jax.state_shardings(tx, params)
    state = jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    step = flora_jax.make_train_step(loss, tx, projection)
    program = step.lower(params, state, shape(*x)).compile().as_text()
    words = re.findall(r"u32\[([\d,]+)\]", program)
    return program, max(np.prod([int(n) for n in sizes.split(",")]) for sizes in words)


def gathered(program):
    """Bytes of each array that moves between devices without being summed, single numbers left out."""
    return [
        size
        for one in traffic.collectives(program, 8)
        if one.kind in ("all-gather", "all-to-all", "collective-permute")
        for shape, size in one.arrays
        if size > 1024
    ]


@pytest.mark.parametrize("block", [2**22, 2**14], ids=["one block", "blocks"])
@pytest.mark.parametrize("distribution", ["gaussian", "srht", "rademacher"])
def test_a_device_samples_its_own_part_and_gathers_nothing_but_a_sketch(distribution, block):
    """A weight of 1024 x 512 sharded over eight devices along the side that is projected, to 64 rows."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    program, words = compiled_step(
        mesh,
        lambda params, x: jnp.mean((x @ params["w"]) ** 2),
        ((1024, 512), ("model",)),
        ((16, 1024), (None, "model")),
        distribution=distribution,
        block=block,
    )
    # srht has one number for each row of the Hadamard matrix besides its part
    assert words <= max(min(64 * 1024, block) // 8, 1024 if distribution == "srht" else 0)
    assert gathered(program) == [4 * 64 * 512]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_device_samples_for_its_own_experts_and_gathers_nothing(kind):
    """Eight experts of 256 x 512, one on each device, with the tokens that were sent to them."""
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        program, words = compiled_step(
            mesh,
            lambda params, x: jnp.mean(jnp.einsum("ecd,edf->ecf", x, params["w"]) ** 2),
            ((8, 256, 512), ("expert",)),
            ((8, 16, 256), ("expert",)),
        )
    assert words <= 64 * 256
    assert gathered(program) == []


@pytest.mark.parametrize("experts, axes", [((8,), ("expert",)), ((3, 8), (None, "expert"))])
@pytest.mark.parametrize("block", [2**22, 2**15, 2**11])
def test_the_chain_gathers_no_expert(experts, axes, block):
    """Uncompressed gradients, each on the device of its expert, through all transformations."""
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(*axes))
    params = {"w": jax.ShapeDtypeStruct((*experts, 64, 128), jnp.float32, sharding=place)}
    projection = flora_jax.Projection(32, min_dim=64, block=block, resample_every=2)
    tx = flora_jax.flora(1e-2, projection=projection, accumulation_steps=2)
    state = jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        jax.eval_shape(tx.init, params),
        flora_jax.state_shardings(tx, params),
    )
    program = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert gathered(program) == []
