"""Inside `jax.shard_map`: weights sharded over manual axes, equal to one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flora_jax
from flora_jax.chain import products
from flora_jax.sharding import manual
from tests.helpers import assert_tree_close, normal, often

MESH = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
SPECS = {
    "up": P(None, "model"),
    "down": P("model", None),
    "experts": P("model", None, None),
    "heads": P(None, "model", None),
    "bias": P("model"),
}
VALUES = {
    "up": normal(1, (32, 64)) / 6,
    "down": normal(2, (64, 32)) / 8,
    "experts": normal(3, (4, 32, 32)) / 6,
    "heads": normal(4, (32, 4, 16)) / 6,
    "bias": normal(5, (64,)),
}
X = normal(6, (16, 32))


def loss(params, x, total=lambda y: y):
    """Columns sharded, then rows; experts; heads, whose outputs are summed."""
    y = total(jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"])
    y += total(jnp.einsum("bd,edf->bf", x, jnp.tanh(params["experts"])))
    y += total(jnp.einsum("bd,dhk->bk", x, params["heads"]) @ jnp.eye(16, 32))
    return jnp.mean(y**2)


def inside(params, x):
    return jax.lax.pmean(loss(params, x, lambda y: jax.lax.psum(y, "model")), "data")


def numbers(grads):
    return jax.tree.map(
        lambda leaf: leaf.data if isinstance(leaf, flora_jax.Sketch) else leaf,
        grads,
        is_leaf=lambda leaf: isinstance(leaf, flora_jax.Sketch),
    )


def specs_of_state(tx):
    shapes = {
        name: jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(MESH, SPECS[name])
        )
        for name, value in VALUES.items()
    }
    shardings = flora_jax.state_shardings(tx, shapes, manual_axes=("model",))
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


ADVISED = {"learning_rate": 1e-2, "optimizer": optax.sgd(1e-2), "preset": "advised"}


def naive(projection, grads):
    """`G Aᵀ` in numpy float64 of full gradients, with all of `A` as one device samples it."""
    sketches = flora_jax.project(projection)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = sketches.update(zeros, sketches.init(zeros), zeros)
    result = {}
    for name, grad in grads.items():
        spec = getattr(updates[name], "spec", None)
        if spec is None:
            result[name] = grad
            continue
        a = np.asarray(products.sample(spec, 0), np.float64)
        count = len(spec.projected)
        letters = "abcd"[: grad.ndim]
        projected = "".join(letters[axis] for axis in spec.projected)
        batch = "".join(letters[axis] for axis in spec.batch)
        goal = "".join(
            "r" if axis == spec.projected[0] else letter
            for axis, letter in enumerate(letters)
            if axis not in spec.projected[1:]
        )
        assert a.ndim == len(batch) + 1 + count
        result[name] = np.einsum(
            f"{letters},{batch}r{projected}->{goal}", np.asarray(grad, np.float64), a
        )
    return result


@pytest.mark.parametrize(
    "distribution, block",
    [("gaussian", 2**22), ("srht", 2**22), ("orthonormal", 2**22), ("gaussian", 2**8)],
)
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_device_has_its_part_of_the_one_sketch(side, distribution, block):
    """By the ordinary route, and by the fused one: both are what a single device would compute."""
    projection = flora_jax.Projection(
        8, min_dim=16, side=side, distribution=distribution, block=block, partition_specs=SPECS
    )
    expected = naive(projection, jax.grad(loss)(VALUES, X))

    def ordinary(params, x):
        tx = flora_jax.project(projection)
        return numbers(tx.update(jax.grad(inside)(params, x), tx.init(params), params)[0])

    def fused(params, x):
        return numbers(flora_jax.value_and_grad(inside, projection)(params, x, cycle=0)[1])

    specs = specs_of_state(flora_jax.momentum(0.9, projection=projection)).momentum
    for route in (ordinary, fused):
        run = jax.shard_map(route, mesh=MESH, in_specs=(SPECS, P("data")), out_specs=specs)
        assert_tree_close(jax.jit(run)(VALUES, X), expected, 1e-4)


OTHERS = {
    "accumulation": ("input", {"optimizer": optax.adamw(1e-2), "accumulation_steps": 2}),
    "momentum": ("output", {"optimizer": optax.sgd(1.0), "momentum": 0.9, "skip_nonfinite": True}),
    "advised": ("input", ADVISED),
    "advised, accumulation": ("output", {**ADVISED, "accumulation_steps": 2}),
}


@pytest.mark.parametrize("name", often(OTHERS, "momentum", "advised, accumulation"))
def test_training_is_that_of_one_device(name):
    """Five micro-steps over cycles of two; the state is created, and stays, sharded as the weights are."""
    side, others = OTHERS[name]
    projection = flora_jax.Projection(
        8, min_dim=16, side=side, resample_every=2, partition_specs=SPECS
    )
    tx = flora_jax.flora(**{"learning_rate": None, **others}, projection=projection)

    def step(of, params, state, x):
        gradient = flora_jax.value_and_grad(of, projection)
        _, grads = gradient(params, x, cycle=flora_jax.cycle(state))
        return flora_jax.apply_gradients(tx, grads, state, params)

    states = specs_of_state(tx)
    init = jax.shard_map(tx.init, mesh=MESH, in_specs=(SPECS,), out_specs=states)
    mapped = jax.shard_map(
        functools.partial(step, inside),
        mesh=MESH,
        in_specs=(SPECS, states, P("data")),
        out_specs=(SPECS, states),
    )
    params = jax.tree.map(jnp.asarray, VALUES)
    expected, found = (params, tx.init(params)), (params, jax.jit(init)(params))
    alone, together = jax.jit(functools.partial(step, loss)), jax.jit(mapped)
    for _ in range(5):
        expected, found = alone(*expected, X), together(*found, X)
    assert_tree_close(found, expected, 1e-4)


def test_a_part_that_is_not_finite_is_left_out_by_all():
    tx = flora_jax.skip_nonfinite(optax.sgd(1.0))
    grads = jnp.ones((4, 8)).at[3, 5].set(jnp.nan)

    def update(grads):
        updates, state = tx.update(grads, tx.init(grads), grads)
        return updates, state.total_notfinite

    specs = P("data", "model")
    run = jax.shard_map(update, mesh=MESH, in_specs=(specs,), out_specs=(specs, P()))
    updates, skipped = jax.jit(run)(grads)
    assert (np.asarray(updates) == 0).all() and int(skipped) == 1


def test_a_part_that_is_not_told_is_a_weight_of_its_own():
    """Without specs each device's sketch is that of its part, and none is summed with another's."""
    projection = flora_jax.Projection(8, min_dim=16, side="input")

    def both(params, x):
        tx = flora_jax.project(projection)
        ordinary, _ = tx.update(jax.grad(inside)(params, x), tx.init(params), params)
        fused = flora_jax.value_and_grad(inside, projection)(params, x, cycle=0)[1]
        return tuple(
            jax.tree.map(lambda leaf: leaf[None], numbers(grads)) for grads in (ordinary, fused)
        )

    run = jax.shard_map(both, mesh=MESH, in_specs=(SPECS, P("data")), out_specs=P("model"))
    ordinary, fused = jax.jit(run)(VALUES, X)
    assert_tree_close(fused, ordinary, 1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
def test_loops_start_from_what_does_not_vary(check_vma):
    def run(x):
        return manual.fori_loop(0, 3, lambda i, sums: sums + i * x, jnp.zeros(x.shape))

    mapped = jax.shard_map(
        run, mesh=MESH, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
    )
    np.testing.assert_allclose(jax.jit(mapped)(X), 3 * X, rtol=1e-6)


def test_outside_nothing_is_sharded():
    assert manual.parts(("data", "model")) == 1 and manual.index(("model",)) == 0
    assert manual.here(("data", "model")) == ()
    assert manual.total(jnp.ones(3), ("model",)).sum() == 3
    plan = flora_jax.plan(
        {"w": jnp.ones((64, 32))}, flora_jax.Projection(8, min_dim=16, partition_specs=P("model"))
    )
    assert plan.leaves[0].data_shape == (8, 32)


def test_specs_that_do_not_fit():
    projection = flora_jax.Projection(8, min_dim=16, partition_specs={"w": P("a", "b", "c")})
    message = "partition_specs of 'w' must be a PartitionSpec of at most 2 entries, found"
    with pytest.raises(ValueError, match=message):
        flora_jax.plan({"w": jnp.ones((64, 32))}, projection)


def test_the_part_of_a_is_that_of_one_device_to_the_last_bit():
    """Columns and matrices of `A` by `sample`, inside and outside."""
    projection = flora_jax.Projection(8, min_dim=16, side="input", partition_specs=SPECS)
    specs = {
        leaf.path: leaf.spec for leaf in flora_jax.plan(VALUES, projection).leaves if leaf.spec
    }

    def all_of():
        return {name: products.sample(spec, 3) for name, spec in specs.items()}

    out_specs = {"up": P(), "down": P(None, "model"), "experts": P("model"), "heads": P()}
    run = jax.shard_map(all_of, mesh=MESH, in_specs=(), out_specs=out_specs)
    found, expected = jax.jit(run)(), jax.jit(all_of)()
    assert set(found) == set(specs)
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])
