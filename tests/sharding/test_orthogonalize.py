"""Orthogonalized sketches over devices: what one device computes, and no more than Gram matrices exchanged."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flora_jax
from flora_jax.chain.sketch import Sketch
from tests.helpers import assert_close, make_spec, normal

RANK = 16
COLLECTIVE = re.compile(r"= \(?(\w+\[[\d,]*\]).*? (all-\w+|reduce-scatter|collective-permute)\(")
LAYOUTS = {  # shape of the weight, projected and batch axes, how the sketch is sharded
    "kept side": ((128, 256), (0,), (), P(None, "x")),
    "kept side, layers": ((3, 128, 256), (1,), (0,), P(None, None, "x")),
    "two kept axes": ((128, 16, 16), (0,), (), P(None, "x", None)),
    "layers": ((8, 128, 64), (1,), (0,), P("x")),
}
MESHES = {
    "auto": lambda: Mesh(np.array(jax.devices()[:8]), "x"),
    "explicit": lambda: jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,)),
}


def orthogonalized(spec, cycle, data, weight=None):
    tx = flora_jax.orthogonalize()
    sketch = Sketch(data, cycle, spec)
    params = None if weight is None else {"w": weight}
    return tx.update({"w": sketch}, optax.EmptyState(), params)[0]["w"].data


@pytest.mark.parametrize("distribution", ["gaussian", "srtt"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_gram_matrices_are_exchanged(layout, mesh, distribution):
    shape, projected, batch, partition = LAYOUTS[layout]
    spec = make_spec(shape, projected, batch, rank=RANK, distribution=distribution)
    data = normal(1, spec.data_shape)
    sharding = NamedSharding(MESHES[mesh](), partition)
    with jax.set_mesh(sharding.mesh) if mesh == "explicit" else contextlib.nullcontext():
        cycle = jax.device_put(np.int32(2), NamedSharding(sharding.mesh, P()))
        given = (cycle, *jax.device_put((data, np.zeros(shape, np.float32)), sharding))
        compiled = (
            jax.jit(functools.partial(orthogonalized, spec), out_shardings=sharding)
            .lower(*given)
            .compile()
        )
        found = compiled(*given)
    assert_close(found, orthogonalized(spec, jnp.int32(2), jnp.asarray(data)), 1e-4)
    exchanged = COLLECTIVE.findall(compiled.as_text())
    assert (layout == "layers") == (not exchanged)
    for array, kind in exchanged:
        assert kind.startswith("all-reduce")
        lengths = [int(n) for n in re.findall(r"\d+", array.split("[")[1])]
        assert [n for n in lengths if n != 1][-2:] == [RANK, RANK]
        assert np.prod(lengths) <= RANK**2 * (shape[0] if batch else 1)


def test_gram_matrices_on_manual_axes():
    mesh = MESHES["auto"]()
    specs = {"w": P(None, "x"), "u": P("x", None)}
    values = {"w": jnp.asarray(normal(0, (64, 96))), "u": jnp.asarray(normal(1, (64, 96)))}
    rule = flora_jax.Projection(8, min_dim=16, side="input", partition_specs=specs)
    alone = flora_jax.Projection(8, min_dim=16, side="input")

    def update(rule, grads):
        inner = (flora_jax.project(rule), flora_jax.orthogonalize(), flora_jax.decompress())
        tx = optax.chain(*inner)
        return tx.update(grads, tx.init(grads), grads)[0]

    run = jax.shard_map(
        functools.partial(update, rule), mesh=mesh, in_specs=(specs,), out_specs=specs
    )
    found, expected = jax.jit(run)(values), update(alone, values)
    for name in values:
        assert_close(found[name], expected[name], 1e-4)
