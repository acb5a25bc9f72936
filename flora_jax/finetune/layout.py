"""The layout of a run is its mesh, and the shardings of its params and batches."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES: tuple[str, ...] = ("data", "fsdp", "model")
BATCH = ("data", "fsdp")
"""Axes over which a batch is sharded."""
BY_ROWS = ("out", "down")
"""Layers whose input is sharded over `model`."""
MATRICES = ("kernel", "embedding", "gate", "up", "down")
"""Names of params that are matrices, those of experts among them."""


def parse(text: str) -> dict[str, int]:
    """Reads `data=4,model=2` as a dict of all three axes.

    Raises:
      ValueError: An axis has another name, or a size is no number of at least 1.
    """
    sizes: dict[str, int] = {name: 1 for name in AXES}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES:
            raise ValueError(f"mesh must name axes among {', '.join(AXES)}, found {name!r}")
        if not size.isdigit() or int(size) < 1:
            raise ValueError(f"mesh: {name} must be a number of at least 1, found {size!r}")
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Gives a mesh of all (or these) devices, or of one where `text` is empty and there is one process.

    Raises:
      ValueError: The sizes do not multiply to the number of devices.
    """
    sizes = parse(text)
    devices = list(devices or jax.devices())
    if not text:
        sizes["data"] = len(devices) if jax.process_count() > 1 else 1
        devices = devices[: sizes["data"]]
    shape = tuple(sizes.values())
    if np.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {text!r} has {np.prod(shape)} devices, found {len(devices)}; on a CPU "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=kinds)


def of_params(mesh: Mesh, params: Any) -> Any:
    """Gives shardings of a decoder's params, of arrays or their shapes.

    The outputs of a matrix are sharded over `fsdp` and those of heads and hidden units over `model` as well; the inputs of
    what follows these are over `model`. So Flora, which projects the inputs, exchanges no gradient over `fsdp`. A side that
    the axes do not divide is replicated.
    """

    def of(path, leaf):
        names = [getattr(key, "key", None) for key in path]
        if names[-1] not in MATRICES:
            return NamedSharding(mesh, PartitionSpec())
        sides: list[tuple[str, ...]] = [(), ("model", "fsdp")]
        if any(name in BY_ROWS for name in names):
            sides = [("model",), ("fsdp",)]
        axes = [_dividing(mesh, side, n) for side, n in zip(sides, leaf.shape[-2:], strict=True)]
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 2), *axes))

    return jax.tree_util.tree_map_with_path(of, params)


def _dividing(mesh: Mesh, names: tuple[str, ...], length: int) -> Any:
    """Gives those of the axes that divide a side, the first ones first."""
    found: list[str] = []
    for name in names:
        if mesh.shape[name] > 1 and length % math.prod(mesh.shape[n] for n in (*found, name)) == 0:
            found.append(name)
    return tuple(found) if len(found) > 1 else found[0] if found else None


def parts(mesh: Mesh) -> int:
    """Gives the number of shards of a batch."""
    return math.prod(mesh.shape[name] for name in BATCH)


def of_batch(mesh: Mesh, size: int = 0) -> NamedSharding:
    """Gives a batch's sharding: over `data` and `fsdp`, or replicated where they do not divide a batch of this size."""
    return NamedSharding(mesh, PartitionSpec() if size % parts(mesh) else PartitionSpec(BATCH))


def put(sharding: NamedSharding, array: np.ndarray) -> jax.Array:
    """Makes a global array from one that every process has completely; each device takes its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
