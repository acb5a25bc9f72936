"""Partition: the mesh axes of each axis of an array, and of arrays that came of it by replacing or dropping axes."""

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Entry = tuple[str, ...]
"""The mesh axes along which one axis of an array is cut."""


def derived(tree: Any, owners: dict[Any, Any], mesh: Any, manual_axes: Collection[str] = ()) -> Any:
    """Shardings for a tree of shapes: each leaf's after the owner whose path ends its own.

    A sketch's numbers stand one step below the path of its weight, at `data`.

    Args:
      tree: of `jax.ShapeDtypeStruct`.
      owners: `jax.ShapeDtypeStruct` with a `NamedSharding`, by key path.
      mesh: of them all; what has no owner is on every device of it.
      manual_axes: see `state_shardings`.
    """

    def owner_of(path):
        return next((owners[path[i:]] for i in range(len(path) + 1) if path[i:] in owners), None)

    def of(path, leaf):
        owner = owner_of(path)
        if owner is None and path and getattr(path[-1], "name", None) == "data":
            owner = owner_of(path[:-1])
        if owner is None or leaf.shape == ():
            return whole
        last = any(getattr(key, "name", None) == "v_col" for key in path)
        return _derived(owner.shape, owner.sharding, leaf.shape, last, manual_axes)

    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree_util.tree_map_with_path(of, tree)


def partition(
    shape: Sequence[int],
    cut: Sequence[Entry],
    state: Sequence[int],
    sizes: dict[str, int],
    last: bool = False,
    manual_axes: Collection[str] = (),
) -> PartitionSpec:
    """How a part of the state is cut that came of a weight by replacing or dropping axes.

    Args:
      shape: of the weight.
      cut: mesh axes of each of its axes.
      state: shape of the part.
      sizes: of the mesh axes.
      last: which of two equal axes has been dropped, the first (as in Adafactor's `v_col`) or the last.
      manual_axes: mesh axes that are not for the axis that was replaced.

    Returns:
      For each axis of the part the mesh axes of the weight's axis that it came from, if they divide
      it. Those of axes that are not there any more go to the axis that was replaced.
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
    result = [cut[axis] if same[i] else () for i, axis in enumerate(origin)]
    kept = {axis for axis, stays in zip(origin, same, strict=True) if stays}
    lost = [name for axis, names in enumerate(cut) if axis not in kept for name in names]
    if False in same:
        slot = same.index(False)
        for name in (name for name in lost if name not in manual_axes):
            together = (*result[slot], name)
            if state[slot] % math.prod(sizes[n] for n in together) == 0:
                result[slot] = together
    return spec_of(result)


def of_sketch(spec: Any, sharding: Any) -> NamedSharding | None:
    """Where the sketch of this `Spec` lies when its weight has this sharding; None where that is unknown."""
    if not isinstance(sharding, NamedSharding):
        return None
    return _derived(spec.shape, sharding, spec.data_shape)


def known(leaf: Any) -> NamedSharding | None:
    """The sharding of an array or of a shape, to be held to by constraints.

    None for a tracer, for what is on one device, and where the type says where an array lies.
    """
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit in sharding.mesh.axis_types:
        return None
    return sharding


def constrain(array: Any, sharding: NamedSharding | None) -> Any:
    """`jax.lax.with_sharding_constraint`, where there is an array and a sharding to hold to."""
    if array is None or sharding is None:
        return array
    return jax.lax.with_sharding_constraint(array, sharding)


def first_axis_dropped(sharding: NamedSharding | None) -> NamedSharding | None:
    """That of one index along the first axis."""
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def last_axis_replicated(sharding: NamedSharding | None, ndim: int) -> NamedSharding | None:
    """On the same mesh: the last of `ndim` axes on every device, the others as it comes."""
    if sharding is None:
        return None
    free = [PartitionSpec.UNCONSTRAINED] * (ndim - 1)
    return NamedSharding(sharding.mesh, PartitionSpec(*free, None))


def entries(spec: PartitionSpec, rank: int) -> tuple[Entry, ...]:
    """A partition spec as one tuple of mesh axes for each of `rank` axes."""
    listed = [
        (entry,) if isinstance(entry, str) else entry if isinstance(entry, tuple) else ()
        for entry in spec
    ]
    return (*listed, *[()] * (rank - len(listed)))


def spec_of(cut: Sequence[Entry]) -> PartitionSpec:
    """The inverse of `entries`."""
    names = [None if not entry else entry[0] if len(entry) == 1 else entry for entry in cut]
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
    """`partition` of a weight's sharding."""
    cut = entries(sharding.spec, len(shape))
    sizes = dict(sharding.mesh.shape)
    return NamedSharding(sharding.mesh, partition(shape, cut, state, sizes, last, manual_axes))
