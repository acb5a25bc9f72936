"""An axis that looks like stacked layers: MaxText's layout is named, heads, convolutions and experts are not."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import flora_jax

PROJECTION = flora_jax.Projection(16, min_dim=64)
MAXTEXT = {  # layers along axis 1
    "query": (256, 4, 8, 32),
    "key": (256, 4, 8, 32),
    "out": (8, 4, 32, 256),
    "wi": (256, 4, 512),
    "wo": (512, 4, 256),
    "norm": (256, 4),
}
STACKED = {  # along axis 0, with heads apart
    "query": (4, 256, 8, 32),
    "out": (4, 8, 32, 256),
    "wi": (4, 256, 512),
    "wo": (4, 512, 256),
}
DEEP = {"wi": (512, 80, 1024), "wo": (1024, 80, 512), "query": (512, 80, 8, 64)}
"""More layers along axis 1 than a matrix needs rows to be compressed."""
APART = {
    "query": (256, 8, 32),
    "key": (256, 8, 32),
    "value": (256, 8, 32),
    "out": (8, 32, 256),
    "wi": (256, 512),
    "wo": (512, 256),
    "embed": (1000, 256),
    "logits": (256, 1000),
}
CONVOLUTIONS = {f"conv{i}": (3, 3, 64, 128) for i in range(6)} | {"wide": (3, 64, 256)}
EXPERTS = {"gate": (4, 8, 256, 512), "up": (4, 8, 256, 512), "down": (4, 8, 512, 256)}


def shapes(sizes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            MAXTEXT,
            r"'key' of shape \(256, 4, 8, 32\) gets one sketch across its axis 1, whose length 4",
        ),
        (
            STACKED,
            r"'out' of shape \(4, 8, 32, 256\) gets one sketch across its axis 0, whose length 4",
        ),
        (
            DEEP,
            r"'\w+' of shape \(\d+, 80, .*\) gets one sketch across its axis 1, whose length 80",
        ),
    ],
)
def test_stacked_layers_are_named(sizes, said):
    with pytest.warns(UserWarning, match=said):
        jax.eval_shape(flora_jax.project(PROJECTION).init, shapes(sizes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "Note: " in str(flora_jax.plan(shapes(sizes), PROJECTION))


@pytest.mark.parametrize("sizes", [APART, CONVOLUTIONS, EXPERTS, {"a": (256, 4, 512)}])
def test_others_are_not(sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(flora_jax.project(PROJECTION).init, shapes(sizes))
        assert "Note: " not in str(flora_jax.plan(shapes(sizes), PROJECTION))


def test_dimension_numbers_silence_it():
    def numbers(tree):
        return jax.tree.map(
            lambda x: flora_jax.DimensionNumbers(0, 2) if len(x.shape) == 3 else None, tree
        )

    sizes = {name: shape for name, shape in MAXTEXT.items() if len(shape) < 4}
    projection = flora_jax.Projection(16, min_dim=64, weight_dimension_numbers=numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(flora_jax.project(projection).init, shapes(sizes))
