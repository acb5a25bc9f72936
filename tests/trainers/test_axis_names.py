"""Names of axes: stacks, sides, embeddings and heads of MaxText's and Flax's conventions, from boxes and variables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flora_jax
from flora_jax.trainers.axis_names import axis_names, with_axis_names

PROJECTION = flora_jax.Projection(8, min_dim=16, side="input")
NAMES = {
    "query": ("embed", "layers", "heads", "kv"),
    "out": ("heads", "layers", "kv", "embed"),
    "wi": ("embed", "layers", "mlp"),
    "experts": ("exp", "layers", "embed_moe", "mlp"),
    "tokens": ("vocab", "embed"),
    "logits_dense": ("embed", "vocab"),
    "norm": ("embed", "layers"),
}
SIZES = {
    "embed": 64,
    "embed_moe": 64,
    "layers": 3,
    "heads": 4,
    "kv": 16,
    "mlp": 96,
    "exp": 5,
    "vocab": 100,
}
EXPECTED = {  # axes of the input side and of the output side
    "query": ((0,), (2, 3)),
    "out": ((0, 2), (3,)),
    "wi": ((0,), (2,)),
    "experts": ((2,), (3,)),
}


def shapes(names=NAMES):
    return {
        path: jax.ShapeDtypeStruct(tuple(SIZES[n] for n in axes), jnp.float32)
        for path, axes in names.items()
    }


def check(projection):
    found = {leaf.path: leaf for leaf in flora_jax.plan(shapes(), projection).leaves}
    for path, (inputs, outputs) in EXPECTED.items():
        spec = found[path].spec
        assert (spec.projected, spec.kept) == (inputs, outputs), path
        assert found[path].kind == "matrix"
    assert found["tokens"].kind == "embedding" and found["tokens"].side == "output"
    assert found["logits_dense"].kind == "head" and found["logits_dense"].side == "input"
    assert found["norm"].spec is None


def test_names_in_a_dict():
    assert "Note: " in str(flora_jax.plan(shapes({k: NAMES[k] for k in EXPECTED}), PROJECTION))
    projection = with_axis_names(PROJECTION, NAMES)
    check(projection)
    assert "Note: " not in str(flora_jax.plan(shapes(), projection))


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_names_in_linens_boxes(box):
    boxed = {path: box(x, names=NAMES[path]) for path, x in shapes().items()}
    assert axis_names(boxed) == NAMES
    check(with_axis_names(PROJECTION, boxed))


def test_names_in_nnx_variables():
    with nnx.use_eager_sharding(False):
        state = {
            path: nnx.Param(jnp.zeros(x.shape), out_sharding=NAMES[path])
            for path, x in shapes().items()
        }
    assert axis_names(state) == NAMES
    check(with_axis_names(PROJECTION, state))


def test_leaves_without_names_are_as_before():
    sizes = {
        **shapes(),
        "other": jax.ShapeDtypeStruct((2, 64, 32), jnp.float32),
        "wte": jax.ShapeDtypeStruct((50, 64), jnp.float32),
    }
    plain, named = (
        {leaf.path: leaf for leaf in flora_jax.plan(sizes, one).leaves}
        for one in (PROJECTION, with_axis_names(PROJECTION, NAMES))
    )
    for path in ("other", "wte"):
        assert plain[path] == named[path]


def test_maxtexts_layers_learn_as_layers_apart():
    """A stack along axis 1 with names gets, for each layer, the sketch of a stack along axis 0."""
    names = {"wi": ("embed", "layers", "mlp")}
    grads = jax.random.normal(jax.random.key(0), (64, 3, 96))
    middle, first = (
        flora_jax.project(with_axis_names(PROJECTION, names)),
        flora_jax.project(PROJECTION),
    )
    one, _ = middle.update({"wi": grads}, middle.init({"wi": grads}))
    moved = {"wi": jnp.moveaxis(grads, 1, 0)}
    other, _ = first.update(moved, first.init(moved))
    assert one["wi"].data.shape == (8, 3, 96)
    assert jnp.allclose(jnp.moveaxis(one["wi"].data, 1, 0), other["wi"].data, atol=1e-5)


def test_scales_of_stacked_layers_are_no_matrices():
    """A long stack of vectors looks like a matrix to shapes alone."""
    scale = {"norm": jax.ShapeDtypeStruct((64, 48), jnp.float32)}
    assert flora_jax.plan(scale, PROJECTION).leaves[0].spec is not None
    projection = with_axis_names(PROJECTION, {"norm": ("embed", "layers")})
    assert flora_jax.plan(scale, projection).leaves[0].reason == "not selected"


def test_no_names_are_refused():
    with pytest.raises(
        ValueError, match="params must have names of axes, in boxes or in variables"
    ):
        with_axis_names(PROJECTION, shapes())
