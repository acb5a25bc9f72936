import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_jax
from flora_jax.chain.leaf_plan import leaf_plans
from tests.helpers import bytes_on_device

PARAMS = {
    "embed": {"embedding": jnp.ones((512, 64))},
    "heads": {"kernel": jnp.ones((64, 4, 16))},
    "layer": {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)},
    "stack": {"kernel": jnp.ones((3, 256, 64))},
    "none": jnp.ones((0, 256, 64)),
    "step": jnp.int32(3),
    "tiny": jnp.ones((4, 4)),
}
FLAT = {name: PARAMS[name] for name in ("embed", "layer", "tiny")}


def projection(rank=8, **others):
    return flora_jax.Projection(rank, **{"min_dim": 16, **others})


def by_path(params=PARAMS, rank=8, **others):
    return {leaf.path: leaf for leaf in leaf_plans(params, projection(rank, **others))}


def real_bytes(tree):
    return sum(map(bytes_on_device, jax.tree.leaves(tree)))


def test_who_is_compressed_and_how():
    leaves = by_path()
    found = {
        path: (leaf.side, leaf.data_shape, leaf.spec.batch if leaf.spec else None)
        for path, leaf in leaves.items()
    }
    assert found == {
        "embed/embedding": ("output", (512, 8), ()),
        "heads/kernel": ("input", (8, 4, 16), ()),
        "layer/bias": (None, (256,), None),
        "layer/kernel": ("output", (64, 8), ()),
        "stack/kernel": ("input", (3, 8, 64), (0,)),
        "none": (None, (0, 256, 64), None),
        "step": (None, (), None),
        "tiny": (None, (4, 4), None),
    }
    assert leaves["layer/bias"].reason == "vector"
    assert leaves["none"].reason == "empty"
    assert leaves["step"].reason == "int32 is no real floating type"
    assert leaves["tiny"].reason == "4 x 4 is below min_dim 16"


def test_shapes_are_enough():
    outline = jax.eval_shape(lambda: PARAMS)
    rule = projection()
    assert flora_jax.plan(outline, rule).as_dict() == flora_jax.plan(PARAMS, rule).as_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("steps", [1, 4])
def test_bytes_are_those_of_the_state(dtype, momentum, steps):
    rule = projection(resample_every=steps)
    arguments = {"accumulation_steps": steps, "momentum": momentum}
    tx = flora_jax.flora(1.0, projection=rule, state_dtype=dtype, **arguments)
    plan = flora_jax.plan(PARAMS, rule, dtype=dtype, **arguments)
    assert plan.state_bytes["Flora"] == real_bytes(tx.init(PARAMS))
    alone = real_bytes(optax.adafactor(1.0).init(PARAMS))
    copies = (steps > 1) + (momentum is not None)
    counts = 8 + 8 * (steps > 1) + 8 * (momentum is not None)
    assert plan.state_bytes["Flora"] == alone + counts + copies * sum(plan.sketch_bytes)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize(
    ("steps", "nesterov", "sketches"), [(4, None, 1), (4, True, 2), (1, None, 1)]
)
def test_bytes_of_the_advised_state(dtype, steps, nesterov, sketches):
    """Sketches alone for matrices; embeddings have Adafactor too, and uncompressed leaves are accumulated."""
    rule = projection(resample_every=steps)
    arguments = {"accumulation_steps": steps, "nesterov": nesterov, "preset": "advised"}
    tx = flora_jax.flora(1.0, projection=rule, state_dtype=dtype, **arguments)
    plan = flora_jax.plan(PARAMS, rule, dtype=dtype, **arguments)
    assert plan.state_bytes["Flora"] == real_bytes(tx.init(PARAMS))
    own = [bool(leaf.spec) for leaf in plan.leaves]
    matrices = [bool(leaf.spec) and "embed" not in leaf.path for leaf in plan.leaves]
    rest = [x for x, matrix in zip(jax.tree.leaves(PARAMS), matrices, strict=True) if not matrix]
    adafactor = real_bytes(optax.adafactor(1.0).init(rest))
    kept = sum(size for size, compressed in zip(plan.sketch_bytes, own, strict=True) if compressed)
    accumulated = sum(plan.sketch_bytes) - kept if steps > 1 else 0
    found = plan.state_bytes["Flora"] - adafactor - accumulated - sketches * kept
    assert 0 <= found <= 100  # counts, and a zero for each uncompressed leaf


def test_bytes_of_the_others():
    rule = projection()
    plan = flora_jax.plan(FLAT, rule)
    steps = optax.MultiSteps(optax.adafactor(1.0), 4)
    assert plan.state_bytes["MultiSteps + Adafactor"] == real_bytes(steps.init(FLAT))
    assert plan.state_bytes["Adam"] == real_bytes(optax.adam(1.0).init(FLAT))
    numbers = optax.contrib.GaLoreDimensionNumbers()
    dims = jax.tree.unflatten(
        jax.tree.structure(FLAT), [numbers if leaf.spec else None for leaf in plan.leaves]
    )
    galore = optax.contrib.galore(1.0, rank=8, weight_dimension_numbers=dims)
    assert plan.state_bytes["GaLore"] == real_bytes(galore.init(FLAT))


def test_as_text_and_as_data():
    plan = flora_jax.plan(PARAMS, projection())
    assert json.loads(plan.to_json()) == plan.as_dict()
    for leaf in plan.leaves:
        assert leaf.path in str(plan)
    assert f"{plan.state_bytes['Flora']:,}" in str(plan)


@pytest.mark.parametrize(
    ("embedding", "expected"),
    [("output", (512, 8)), ("whole", (512, 64)), ("matrix", (8, 64))],
)
def test_embeddings(embedding, expected):
    assert by_path(embedding=embedding)["embed/embedding"].data_shape == expected


def test_what_is_an_embedding_can_be_told():
    leaves = by_path(is_embedding=lambda path, shape: path == "layer/kernel", embedding="whole")
    assert leaves["layer/kernel"].reason == "embedding"
    assert leaves["embed/embedding"].side == "input"


@pytest.mark.parametrize(
    ("head", "expected"), [("input", (8, 512)), ("whole", (64, 512)), ("matrix", (64, 8))]
)
@pytest.mark.parametrize(
    "path", ["head/kernel", "lm_head/kernel", "unembed", "model/logits_dense/w"]
)
def test_heads(path, head, expected):
    params = {path: jnp.ones((64, 512))}
    assert by_path(params, head=head)[path].data_shape == expected
    assert by_path(params, head=head, side="output")[path].data_shape == (
        expected if head != "matrix" else (64, 8)
    )


@pytest.mark.parametrize(
    "path", ["heads/kernel", "head_norm/kernel", "attention/out_head_mix/kernel"]
)
def test_what_is_no_head(path):
    assert by_path({path: jnp.ones((64, 512))})[path].side == "output"


def test_what_is_a_head_can_be_told():
    leaves = by_path(is_head=lambda path, shape: path == "layer/kernel", head="whole")
    assert leaves["layer/kernel"].reason == "head"


def test_a_rule_that_is_given_goes_before_names():
    params = {"head": {"table": jnp.ones((512, 64))}, "unembed": jnp.ones((64, 512))}
    leaves = by_path(params, is_embedding=lambda path, shape: path == "head/table", head="whole")
    assert leaves["head/table"].data_shape == (512, 8)
    assert leaves["unembed"].reason == "head"
    assert by_path(params, is_head=lambda path, shape: False)["head/table"].side == "input"


@pytest.mark.parametrize(
    ("rank", "expected"), [(8, 8), (0.25, 16), (lambda path, shape: shape[-1] // 32 or 1, 8)]
)
def test_rank(rank, expected):
    assert by_path(rank=rank)["layer/kernel"].spec.rank == expected


def test_rank_of_the_full_side():
    assert by_path(rank=256)["layer/kernel"].reason == "rank 256 is not below the output side's 256"
    exact = by_path(rank=256, distribution="orthonormal")["layer/kernel"]
    assert exact.data_shape == (64, 256)
    assert exact.spec is not None


@pytest.mark.parametrize(
    "rule",
    [
        {"mask": {**dict.fromkeys(PARAMS, True), "layer": False}},
        {"mask": lambda params: {**dict.fromkeys(params, True), "layer": False}},
        {"select": lambda path, shape: not path.startswith("layer")},
    ],
)
def test_what_is_uncompressed_by_choice(rule):
    leaves = by_path(**rule)
    assert leaves["layer/kernel"].spec is None
    assert leaves["layer/kernel"].reason in ("masked", "not selected")
    assert leaves["stack/kernel"].spec is not None


def test_dimension_numbers():
    numbers = flora_jax.DimensionNumbers(0, (1, 2))
    for given_as in (
        numbers,
        optax.contrib.MuonDimensionNumbers(0, (1, 2)),
        {"w": numbers},
        lambda params: {"w": numbers},
    ):
        params = {"w": jnp.ones((64, 32, 32))}
        leaf = by_path(params, weight_dimension_numbers=given_as)["w"]
        assert (leaf.side, leaf.spec.projected, leaf.spec.batch) == ("output", (1, 2), ())
    last_two = flora_jax.DimensionNumbers(-2, -1)
    leaf = by_path({"w": jnp.ones((3, 3, 32, 64))}, weight_dimension_numbers=last_two)["w"]
    assert (leaf.data_shape, leaf.spec.batch) == ((3, 3, 32, 8), (0, 1))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(2, 40), min_size=2, max_size=4),
    rank=st.integers(1, 12),
    side=st.sampled_from(["input", "output", "larger"]),
)
def test_a_sketch_has_the_rank_in_place_of_one_side(shape, rank, side):
    leaf = by_path({"w": jax.ShapeDtypeStruct(tuple(shape), "float32")}, rank, side=side)["w"]
    if leaf.spec is None:
        assert leaf.reason and leaf.data_shape == tuple(shape)
        return
    gone = np.prod([shape[axis] for axis in leaf.spec.projected])
    assert np.prod(leaf.data_shape) * gone == np.prod(shape) * rank
    assert rank < gone == leaf.spec.size
    kept = [n for axis, n in enumerate(shape) if axis not in leaf.spec.projected]
    assert [n for axis, n in enumerate(leaf.data_shape) if axis != leaf.spec.projected[0]] == kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_bytes_of_complex_leaves(dtype):
    params = {"w": jnp.ones((64, 256)), "z": jnp.ones((8, 9), jnp.complex64)}
    arguments = {"projection": projection(resample_every=2), "accumulation_steps": 2}
    tx = flora_jax.flora(None, optimizer=optax.sgd(0.1), state_dtype=dtype, **arguments)
    plan = flora_jax.plan(params, **arguments, dtype=dtype, tx=tx)
    assert plan.sketch_bytes[1] == 8 * 72 + {"int8": 4, "int4": 2}.get(dtype, 0)
    assert plan.state_bytes["Flora"] == real_bytes(tx.init(params)) == 16 + sum(plan.sketch_bytes)
