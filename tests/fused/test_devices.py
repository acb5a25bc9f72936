"""Sketches over devices: the sums that `shard_map` and `pmap` make of them."""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import flora_jax
from tests.fused.test_value_and_grad import (
    FUNCTIONS,
    SIDES,
    X,
    array,
    compare,
    numbers,
    rule,
    square,
)
from tests.helpers import Naive, assert_close, assert_tree_close, matrix_of_a

CYCLE = 3


def test_vmap_over_the_examples_of_a_batch():
    def loss(p, x):
        return square(x @ p["w"])

    params = dict(w=array(24, 16))
    grad_fn = flora_jax.value_and_grad(loss, rule(side="input"))
    _, grads = jax.vmap(lambda x: grad_fn(params, x, cycle=CYCLE))(X[:, None])
    spec = grads["w"].spec
    for i, data in enumerate(grads["w"].data):
        full = jax.grad(loss)(params, X[i : i + 1])["w"]
        assert_close(data, Naive(spec).project(matrix_of_a(spec, CYCLE), full), 1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_shard_map_sums_sketches_over_devices(side, check_vma):
    """Each device has two rows; with `check_vma` the sum over devices is JAX's, else the loop's."""
    loss, shapes, _ = FUNCTIONS["mlp"]
    params = {key: array(*shape) for key, shape in shapes.items()}
    x = array(8, 24)
    grad_fn = flora_jax.value_and_grad(loss, rule(side=side))

    def local(params, x):
        _, grads = grad_fn(params, x, cycle=CYCLE)
        return grads if check_vma else lax.psum(grads, "x")

    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    found = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("x")),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )
    )(params, x)
    expected = grad_fn(params, x, cycle=CYCLE)[1]
    assert_tree_close(numbers(found), numbers(expected), 1e-5)


def test_pmap_with_a_mean_of_sketches():
    loss, shapes, _ = FUNCTIONS["mlp"]
    params = {key: array(*shape) for key, shape in shapes.items()}
    x = array(4, 2, 24)
    grad_fn = flora_jax.value_and_grad(loss, rule())

    def local(params, x):
        return lax.pmean(grad_fn(params, x, cycle=CYCLE)[1], "x")

    found = jax.pmap(local, axis_name="x", in_axes=(None, 0), devices=jax.devices()[:4])(params, x)
    expected = grad_fn(params, x.reshape(8, 24), cycle=CYCLE)[1]
    total = jax.tree.map(lambda x: 4 * x[0], numbers(found))
    assert_tree_close(total, numbers(expected), 1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_shard_map_inside_the_function(side):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("d", "m"))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec("d", "m"), PartitionSpec("m", None)),
        out_specs=PartitionSpec("d", None),
    )
    def layer(x, w):
        return lax.psum(x @ w, "m")

    def loss(p, x):
        return square(layer(x, p["w"]))

    compare(loss, dict(w=array(24, 16)), array(8, 24), side=side)
