"""Sizes: what the very step that will run takes on each device, before any weight is read."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import psutil

from flora_jax import dtypes
from flora_jax.finetune.settings import EXACT, UNRANKED, Settings
from flora_jax.memory.compiled import compiled_bytes
from flora_jax.memory.estimate import GIB

SMALLEST = {"rank": 4, "length": 128}
"""Below these no smaller setting is looked for."""


class Sizes(NamedTuple):
    """Bytes on each device.

    Attributes:
      params: The weights, frozen or trained.
      state: All else that the method keeps between steps: the optimizer's state, sketches, adapters.
      batch: The micro-batch.
      temporaries: What the step needs besides: activations, gradients where they exist, buffers.
    """

    params: int
    state: int
    batch: int
    temporaries: int

    @property
    def total(self) -> int:
        """Returns the sum."""
        return sum(self)


def measure(lowered: Any, frozen: Any, state: Any, batch: Any) -> Sizes:
    """Compiles a lowered step and returns its sizes.

    Args:
      lowered: The step, lowered for these arguments.
      frozen: The frozen params, or None.
      state: The state; its entry `params` are the params where they are trained.
      batch: The micro-batch.
    """
    total = compiled_bytes(lowered.compile())
    params = _bytes(frozen) + _bytes(state.get("params"))
    others = _bytes({name: part for name, part in state.items() if name != "params"})
    data = _bytes(batch)
    return Sizes(params, others, data, max(0, total - params - others - data))


def capacity(settings: Settings) -> int | None:
    """Returns the bytes that this run may take on each device; None where nobody knows."""
    if settings.memory is not None:
        return round(settings.memory * GIB)
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return psutil.virtual_memory().available // jax.local_device_count()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def smaller(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Gives settings that take less, each with the flags that ask for them."""
    if settings.sketched and settings.state_dtype != "int4":
        yield "--state-dtype int4", dataclasses.replace(settings, state_dtype="int4")
    for name in ("rank", "length"):
        value = settings.ranked if name == "rank" else settings.length
        while value is not None and value // 2 >= SMALLEST[name]:
            value //= 2
            yield f"--{name} {value}", dataclasses.replace(settings, **{name: value})
    if not settings.remat:
        yield "--remat", dataclasses.replace(settings, remat=True)
    if settings.rows > 1:
        yield "--batch 1", dataclasses.replace(settings, batch=1)
    for method in ("exact", "lora"):
        if method != settings.method:
            changes: dict[str, Any] = {"method": method, "state_dtype": "float32"}
            changes["rank"] = None if method in UNRANKED else 8
            flags = f"--method {method}" + (" --rank 8" if method == "lora" else "")
            changes["micro_batches"] = None if method in EXACT else settings.micro_batches
            yield flags, dataclasses.replace(settings, **changes)


def fitting(
    settings: Settings, capacity: int | None, sizes: Callable[[Settings], Sizes | None]
) -> list[tuple[str, Sizes]]:
    """Returns the first setting of each kind that fits: a rank, a length, a method, …

    Args:
      settings: The settings that do not fit.
      capacity: The bytes of a device; None where only the compiler knows them.
      sizes: Returns the sizes of other settings, or None where they cannot be compiled.
    """
    found: dict[str, tuple[str, Sizes]] = {}
    for flags, other in smaller(settings):
        kind = flags if flags.startswith("--method") else flags.split()[0]
        if kind in found:
            continue
        size = sizes(other)
        if size is not None and (capacity is None or size.total <= capacity):
            found[kind] = (flags, size)
    return list(found.values())


def _bytes(tree: Any) -> int:
    """Returns the bytes of a tree on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += dtypes.nbytes(shape, leaf.dtype)
    return total
