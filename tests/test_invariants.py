"""The lines of "what holds, always": exact at full rank, deterministic, resumable, small."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import flora_jax
from flora_jax.chain import storage
from tests.helpers import (
    assert_tree_close,
    assert_tree_equal,
    make_gradients,
    make_params,
    often,
    run,
)

EVERY = 3


def projection(rank=8, **others):
    return flora_jax.Projection(rank, min_dim=8, resample_every=EVERY, **others)


def chain(rule, optimizer, every=EVERY):
    return optax.chain(
        flora_jax.project(rule),
        flora_jax.accumulate(
            optax.chain(flora_jax.decompress(), optimizer), every, projection=rule
        ),
    )


@pytest.mark.parametrize(
    ("optimizer", "tolerance"),
    [
        (optax.sgd(0.1), 1e-6),
        (optax.adafactor(0.1), 1e-5),
        # adam divides by the gradient's own size, so that rounding counts most where it is smallest
        (optax.adamw(0.01), 1e-4),
    ],
    ids=["sgd", "adafactor", "adamw"],
)
def test_full_rank_is_multisteps(optimizer, tolerance):
    params = make_params()

    def rank(path, shape):
        return max(shape)

    rule = projection(rank, distribution="orthonormal")
    assert sum(leaf.spec is not None for leaf in flora_jax.plan(params, rule).leaves) == 2
    gradients = make_gradients(params, 4 * EVERY)
    found, _ = run(chain(rule, optimizer), params, gradients)
    steps = optax.MultiSteps(optimizer, EVERY).gradient_transformation()
    expected, _ = run(steps, params, gradients)
    assert_tree_close(found, expected, tolerance)


@pytest.mark.parametrize("stop", often([1, EVERY, EVERY + 2], EVERY + 2))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_restored_run_is_bit_equal(stop, dtype, momentum, monkeypatch):
    monkeypatch.setattr(storage, "MIN_SIZE", 1)
    params = make_params()
    gradients = make_gradients(params, 3 * EVERY)
    tx = flora_jax.flora(
        0.1,
        projection=projection(),
        accumulation_steps=EVERY,
        momentum=momentum,
        state_dtype=dtype,
    )
    expected = run(tx, params, gradients)
    half = run(tx, params, gradients[:stop])
    saved = jax.tree.map(lambda x: np.array(x), half)
    restored = jax.tree.map(jnp.asarray, saved)
    found = run(tx, restored[0], gradients[stop:], restored[1])
    assert_tree_equal(found, expected)


def test_micro_steps_that_are_not_finite_have_not_been():
    params = make_params()
    gradients = make_gradients(params, 2 * EVERY)
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), gradients[0])
    worse = jax.tree.map(lambda x: x * jnp.inf, gradients[1])
    tx = flora_jax.flora(
        0.1, projection=projection(), accumulation_steps=EVERY, skip_nonfinite=True
    )
    mixed = [gradients[0], bad, *gradients[1:4], worse, worse, *gradients[4:]]
    found, state = run(tx, params, mixed)
    expected, clean = run(tx, params, gradients)
    assert_tree_equal(found, expected)
    assert_tree_equal(state.inner_state, clean.inner_state)
    assert int(state.total_notfinite) == 3


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "srht", "orthonormal"])
def test_mean_of_sketches_over_devices_is_the_sketch_of_the_mean(distribution):
    params = make_params()
    gradients = make_gradients(params, 8)
    rule = projection(distribution=distribution)
    tx = flora_jax.project(rule)
    rest = chain(rule, optax.sgd(0.1), EVERY)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)

    def one_device(gradient):
        gradient = jax.tree.map(lambda x: x[0], gradient)
        sketches, _ = tx.update(gradient, tx.init(params))
        fresh = jax.tree.map(
            lambda leaf: flora_jax.Sketch(leaf.data, None, leaf.spec) if _is(leaf) else leaf,
            sketches,
            is_leaf=_is,
        )
        fresh = jax.lax.pmean(fresh, "data")
        return rest.update(fresh, rest.init(params), params)[1]

    mesh = Mesh(np.array(jax.devices()), ("data",))
    parallel = jax.jit(
        jax.shard_map(
            one_device,
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )
    mean = jax.tree.map(lambda x: jnp.mean(x, 0), stacked)
    expected = jax.jit(rest.update)(mean, rest.init(params), params)[1]
    assert_tree_close(parallel(stacked), expected, 1e-5)
    same = jax.pmap(lambda g: one_device(jax.tree.map(lambda x: x[None], g)), axis_name="data")
    first = jax.tree.map(lambda x: x[0], same(stacked))
    assert_tree_close(first, expected, 1e-5)


def test_another_layer_changes_nothing_here():
    params = make_params()
    larger = {"added": jnp.ones((16, 16)), **params, "zzz": jnp.ones(3)}
    gradients = make_gradients(params, EVERY)
    more = [{"added": jnp.ones((16, 16)), **g, "zzz": jnp.ones(3)} for g in gradients]
    tx = chain(projection(), optax.sgd(0.1))
    alone, _ = run(tx, params, gradients)
    beside, _ = run(tx, larger, more)
    assert_tree_equal({name: beside[name] for name in params}, alone)


def test_nothing_of_the_weights_size_is_kept():
    params = make_params()
    tx = flora_jax.flora(0.1, projection=projection(2), accumulation_steps=EVERY, momentum=0.9)
    matrices = [leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    large = [
        leaf for leaf in jax.tree.leaves(tx.init(params)) if leaf.ndim == 2 and leaf.size > 48 * 2
    ]
    assert min(matrices) > 48 * 2
    assert [leaf.shape for leaf in large if leaf.size in matrices] == [
        leaf.shape for leaf in _unfactored(params)
    ]


def _unfactored(params):
    """Adafactor keeps unfactored second moments of matrices below 128: its own, not Flora's."""
    state = optax.adafactor(0.1).init(params)
    sizes = {leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2}
    return [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2 and leaf.size in sizes]


def _is(node):
    return isinstance(node, flora_jax.Sketch)
