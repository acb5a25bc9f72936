"""Compiled: what the TPU compiler says that a training step of a plan takes. Needs `libtpu`; no TPU."""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flora_jax.chain.plan import plan
from flora_jax.chain.projection import Projection
from flora_jax.fused.int8 import to_int8
from flora_jax.memory.chips import CHIPS
from flora_jax.memory.methods import (
    GIB,
    INSIDE,
    METHODS,
    Setting,
    adapter_of,
    adapter_params,
    projection_of,
    transformation,
)
from flora_jax.models import families
from flora_jax.sharding.state import state_shardings
from flora_jax.update.ordinary_step import ordinary_step
from flora_jax.update.train_step import make_train_step

TOPOLOGIES = {
    "v4": ("v4:2x2x1", "v4:2x2x4", "v4:4x4x4", "v4:4x8x8"),
    "v5e": ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"),
    "v5p": ("v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8"),
    "v6e": ("v6e:2x2", "v6e:4x4", "v6e:8x8", "v6e:16x16"),
    "v7x": ("tpu7x:2x2x1", "tpu7x:2x2x4", "tpu7x:4x4x4", "tpu7x:4x8x8"),
}
"""Topologies of each chip, the smallest first."""
LARGEST = "v5p"
"""The chip for which a step is compiled that the asked one cannot hold."""
MEASURED = tuple(name for name in METHODS if name != "GaLore")
"""Methods that are compiled. GaLore's singular value decompositions take the compiler longer than anyone waits."""


def obstacle(setting: Setting, method: str, chip: str | None) -> str:
    """Says why `measure` cannot compile this; the text is empty where it can. No chip is known by its memory alone."""
    if chip is None:
        return "hbm names no chip to compile for"
    if importlib.util.find_spec("libtpu") is None:
        return "the package libtpu is not installed"
    if chip not in TOPOLOGIES:
        return f"{chip} is none of {', '.join(TOPOLOGIES)}"
    if setting.chips > _count(TOPOLOGIES[chip][-1]):
        return f"{setting.chips} chips are more than those of {TOPOLOGIES[chip][-1]}"
    return "" if method in MEASURED else f"{method} takes the compiler too long"


def measure(setting: Setting, method: str, chip: str = "v5e") -> int | None:
    """Returns the bytes on each chip of one program that does the micro-step and the optimizer step.

    Where the chip cannot hold it, they are those that it takes of a v5p chip (but more than the chip has); None
    where that cannot hold it either.

    Weights are sharded over all chips along the axis that Flora keeps, the state with them, and the batch where
    the chips divide it. It takes some minutes for billions of parameters.

    Args:
      setting: What is trained; its capacity is not looked at.
      method: A name in `MEASURED`.
      chip: A key of `TOPOLOGIES`.

    Raises:
      ValueError: An unknown method or chip, or more chips than there is a topology of.
      ModuleNotFoundError: There is no `libtpu`.
    """
    if method not in MEASURED:
        raise ValueError(f"method must be one of {'; '.join(MEASURED)}, found {method!r}")
    if (size := _bytes(_lowered(setting, method, _mesh(chip, setting.chips)))) is not None:
        return size
    if chip == LARGEST:
        return None
    size = _bytes(_lowered(setting, method, _mesh(LARGEST, setting.chips)))
    return None if size is None else max(size, round(CHIPS[chip] * GIB) + 1)


def _lowered(setting: Setting, method: str, mesh: Mesh) -> Any:
    model = setting.model.model
    everywhere = batched = NamedSharding(mesh, PartitionSpec())
    if setting.chips > 1 and setting.batch % setting.chips == 0:
        batched = NamedSharding(mesh, PartitionSpec("chips"))
        model = families.module(dataclasses.replace(model.shape, sharded=("chips",)))
    projection = projection_of(setting, setting.rank, setting.steps(method))
    weights = _sharded(setting.model.params, projection, mesh)
    batch = families.batch(model, setting.batch, setting.length)
    batch = jax.tree.map(lambda x: _placed(x, batched), batch)
    step, init, tx, params = _step(
        method, families.loss(model), weights, projection, setting, batch
    )
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init, params)
    shardings = jax.tree.map(lambda _: everywhere, shapes)
    if setting.chips > 1 and method not in INSIDE:
        shardings = state_shardings(tx, params)
    elif setting.chips > 1:
        shardings = jax.tree.map(lambda x: _largest(x.shape, mesh), shapes)
    state = jax.tree.map(_placed, shapes, shardings)
    frozen = () if params is weights else (weights,)
    if setting.int8(method):
        params = jax.eval_shape(to_int8, params)
        params = jax.tree.map(lambda x: _placed(x, _largest(x.shape, mesh)), params)
    with jax.set_mesh(mesh):
        return step.lower(params, state, *frozen, *batch)


def _step(
    method: str, loss: Callable, params: Any, projection: Projection, setting: Setting, batch: Any
) -> tuple[Any, Any, optax.GradientTransformation, Any]:
    """Returns the compiled step, the function that makes its state, its transformation, and what is trained.

    Where that is an adapter, the weights are the first part of the step's batch.
    """
    tx = transformation(setting, method, setting.rank)
    rounding = "stochastic" if setting.int8(method) else "nearest"
    if method == "Flora, fused":
        step = make_train_step(loss, tx, projection, rounding=rounding)
        return step, tx.init, tx, params
    if method in INSIDE:
        step = make_train_step(loss, tx, update="backward", rounding=rounding)
        return step, lambda params: step.init(params, *batch), tx, params
    if method != "LoRA + Adam":
        return ordinary_step(loss, tx), tx.init, tx, params
    adapter = adapter_of(setting.model, setting.rank)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    own = adapter_params(setting.model, setting.rank)
    own = jax.tree.map(lambda x: _placed(x, _largest(x.shape, mesh)), own)
    adapted = adapter.apply(loss)
    step = ordinary_step(lambda own, frozen, *batch: adapted(frozen, own, *batch), tx)
    return step, tx.init, tx, own


def _sharded(params: Any, projection: Projection, mesh: Mesh) -> Any:
    """Shards each weight over the chips, along its longest axis that Flora keeps and the chips divide."""
    leaves = []
    for leaf, x in zip(plan(params, projection).leaves, jax.tree.leaves(params), strict=True):
        leaves.append(_placed(x, _largest(x.shape, mesh, leaf.spec.kept if leaf.spec else ())))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _largest(shape: tuple[int, ...], mesh: Mesh, first: tuple[int, ...] = ()) -> NamedSharding:
    """Shards the longest axis that the chips divide, one of those in `first` where there is one."""
    axes = [axis for axis, n in enumerate(shape) if n % mesh.size == 0 and len(shape) > 1]
    best = max(axes, key=lambda axis: (axis in first, shape[axis]), default=None)
    names = ("chips" if axis == best else None for axis in range(len(shape)))
    return NamedSharding(mesh, PartitionSpec(*names))


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _mesh(chip: str, count: int) -> Mesh:
    kinds = (jax.sharding.AxisType.Auto,)
    return Mesh(np.array(devices(chip, count)), ("chips",), axis_types=kinds)


def devices(chip: str, count: int) -> list[Any]:
    """Returns so many described chips, of the smallest topology in `TOPOLOGIES` that has them.

    Raises:
      ValueError: An unknown chip, or more chips than there is a topology of.
    """
    from jax.experimental import topologies

    if chip not in TOPOLOGIES:
        raise ValueError(f"chip must be one of {', '.join(TOPOLOGIES)} to compile, found {chip!r}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no one which TPU this machine has
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor waits for who compiles beside it
    for name in TOPOLOGIES[chip]:
        if _count(name) >= count:
            # without it the cores of a v4 chip are two devices, as no one runs them
            one = {"chip_config_name": "megacore"} if chip == "v4" else {}
            described = topologies.get_topology_desc(platform="tpu", topology_name=name, **one)
            return list(described.devices[:count])
    raise ValueError(f"chips must be at most those of {TOPOLOGIES[chip][-1]}, found {count}")


def _count(topology: str) -> int:
    """Returns the devices of a topology."""
    kind, sides = topology.split(":")
    return math.prod(map(int, sides.split("x"))) * (2 if kind == "tpu7x" else 1)


def _bytes(lowered: Any) -> int | None:
    """Returns the bytes of a program; None where the compiler runs out of the chip's memory."""
    try:
        return compiled_bytes(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def compiled_bytes(program: Any) -> int:
    """Returns the bytes that XLA holds at the worst moment of a compiled step."""
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
