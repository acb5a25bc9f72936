"""Partition: how arrays are sharded that have the axes of a weight, some of them replaced or dropped."""

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Entry = tuple[str, ...]
"""The mesh axes that one axis of an array is sharded over."""


def derived(tree: Any, owners: dict[Any, Any], mesh: Any, manual_axes: Collection[str] = ()) -> Any:
    """Returns shardings for a tree of shapes, each derived from the owner whose path ends the leaf's own.

    The numbers of a sketch are one step below the path of its weight, at `data`.

    Args:
      tree: A pytree of `jax.ShapeDtypeStruct`.
      owners: The `jax.ShapeDtypeStruct`s of the owners, each with a `NamedSharding`, by key path.
      mesh: The mesh of all owners. Leaves without an owner are replicated over it.
      manual_axes: The manual mesh axes, as in `state_shardings`.
    """

    def owner_of(path):
        return next((owners[path[i:]] for i in range(len(path) + 1) if path[i:] in owners), None)

    def of(path, leaf):
        owner = owner_of(path)
        if owner is None and path and getattr(path[-1], "name", None) == "data":
            owner = owner_of(path[:-1])
        if owner is None or leaf.shape == ():
            return replicated
        last = any(getattr(key, "name", None) == "v_col" for key in path)
        return _derived(owner.shape, owner.sharding, leaf.shape, last, manual_axes)

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree_util.tree_map_with_path(of, tree)


def partition(
    shape: Sequence[int],
    sharded: Sequence[Entry],
    state: Sequence[int],
    sizes: dict[str, int],
    last: bool = False,
    manual_axes: Collection[str] = (),
) -> PartitionSpec:
    """Returns how an array of the state is sharded that has a weight's axes, some replaced or dropped.

    Args:
      shape: The shape of the weight.
      sharded: The mesh axes that each axis of the weight is sharded over.
      state: The shape of the array of the state.
      sizes: The sizes of the mesh axes.
      last: Whether, of two equal axes, the last one is in the state (as in Adafactor's `v_col`) rather
        than the first.
      manual_axes: The mesh axes that the replaced axis must not be sharded over.

    Returns:
      A `PartitionSpec`. Each axis of the state has the mesh axes of the weight's axis that it came
      from, if they divide it. The mesh axes of axes that were dropped or replaced go to the replaced
      axis.
    """
    if len(state) > len(shape):
        return PartitionSpec()
    choices = list(itertools.combinations(range(len(shape)), len(state)))
    if last:
        choices.reverse()
    origin = max(
        choices, key=lambda axes: sum(shape[a] == n for a, n in zip(axes, state, strict=True))
    )
    same = [shape[axis] == length for axis, length in zip(origin, state, strict=True)]
    result = [sharded[axis] if same[i] else () for i, axis in enumerate(origin)]
    kept = {axis for axis, stays in zip(origin, same, strict=True) if stays}
    lost = [name for axis, names in enumerate(sharded) if axis not in kept for name in names]
    if False in same:
        slot = same.index(False)
        for name in (name for name in lost if name not in manual_axes):
            together = (*result[slot], name)
            if state[slot] % math.prod(sizes[n] for n in together) == 0:
                result[slot] = together
    return spec_of(result)


def of_sketch(spec: Any, sharding: Any) -> NamedSharding | None:
    """Returns the sharding of a sketch, given that of its weight, or None where that is unknown."""
    if not isinstance(sharding, NamedSharding):
        return None
    return _derived(spec.shape, sharding, spec.data_shape)


def known(leaf: Any) -> NamedSharding | None:
    """Returns the sharding of an array or of a shape, for use in sharding constraints.

    It is None for a tracer, for an array on one device, and where the sharding is part of the array's
    type. Equal layouts give equal shardings, so that a function that is compiled for one is not compiled again for
    another way to write it: `PartitionSpec()` and `PartitionSpec(None, None)` are the same.
    """
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit in sharding.mesh.axis_types:
        return None
    axes = list(sharding.spec)
    while axes and axes[-1] in (None, ()):
        axes.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*axes), memory_kind=sharding.memory_kind)


def constrain(array: Any, sharding: NamedSharding | None) -> Any:
    """Applies `jax.lax.with_sharding_constraint`, where there is an array and a sharding."""
    if array is None or sharding is None:
        return array
    return jax.lax.with_sharding_constraint(array, sharding)


def without_axis(sharding: NamedSharding | None, axis: int) -> NamedSharding | None:
    """Returns the sharding of one index along an axis of an array."""
    if sharding is None:
        return None
    names = (*sharding.spec[:axis], *sharding.spec[axis + 1 :])
    return NamedSharding(sharding.mesh, PartitionSpec(*names))


def last_axis_replicated(sharding: NamedSharding | None, ndim: int) -> NamedSharding | None:
    """Returns a sharding with the last of `ndim` axes replicated and the others unconstrained."""
    if sharding is None:
        return None
    free = [PartitionSpec.UNCONSTRAINED] * (ndim - 1)
    return NamedSharding(sharding.mesh, PartitionSpec(*free, None))


def entries(spec: PartitionSpec, rank: int) -> tuple[Entry, ...]:
    """Returns a partition spec as a tuple of mesh axes for each of `rank` axes."""
    listed = [
        (entry,) if isinstance(entry, str) else entry if isinstance(entry, tuple) else ()
        for entry in spec
    ]
    return (*listed, *[()] * (rank - len(listed)))


def spec_of(sharded: Sequence[Entry]) -> PartitionSpec:
    """Returns the partition spec of a tuple of mesh axes for each axis; the inverse of `entries`."""
    names = [None if not entry else entry[0] if len(entry) == 1 else entry for entry in sharded]
    while names and names[-1] is None:
        names.pop()
    return PartitionSpec(*names)


def _derived(
    shape: Sequence[int],
    sharding: NamedSharding,
    state: Sequence[int],
    last: bool = False,
    manual_axes: Collection[str] = (),
) -> NamedSharding:
    """Applies `partition` to a weight's `NamedSharding`."""
    sharded = entries(sharding.spec, len(shape))
    sizes = dict(sharding.mesh.shape)
    return NamedSharding(sharding.mesh, partition(shape, sharded, state, sizes, last, manual_axes))
