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
    """Gives shardings of the decoder's params: heads and hidden units over `model`, the other side over `fsdp`."""

    def of(path, leaf):
        if leaf.ndim != 2:
            return NamedSharding(mesh, PartitionSpec())
        names = ["fsdp", "model"]
        if any(getattr(key, "key", None) in BY_ROWS for key in path):
            names.reverse()
        axes = [
            name if length % mesh.shape[name] == 0 else None
            for name, length in zip(names, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(of, params)


def parts(mesh: Mesh) -> int:
    """Gives the number of shards of a batch."""
    return math.prod(mesh.shape[name] for name in BATCH)


def of_batch(mesh: Mesh, size: int = 0) -> NamedSharding:
    """Gives a batch's sharding: over `data` and `fsdp`, or replicated where they do not divide a batch of this size."""
    return NamedSharding(mesh, PartitionSpec() if size % parts(mesh) else PartitionSpec(BATCH))


def put(sharding: NamedSharding, array: np.ndarray) -> jax.Array:
    """Makes a global array from one that every process has completely; each device takes its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
