"""Sketch: the compressed gradient `C = G Aᵀ`, together with all that is needed to find the key of its `A`.

| paper | here |
|---|---|
| `C`, `n × r` | `Sketch.data`, the weight's axes with the rank in the place of the projected ones |
| `r` | `Spec.rank` |
| `m` | `Spec.size` |
| which `A` | `Sketch.cycle`, with `seed` and `key_path` of the `Spec` |
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from flora_jax.chain import distributions, tag
from flora_jax.sharding import manual

_trace_state = getattr(core, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state
_NUMBERS = (int, np.integer, np.ndarray)
Every = int | Callable[[Any], Any]
"""A number of micro-steps, or a schedule of that number, as in `optax.MultiSteps`."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """Describes the sketch of one weight: everything about it that does not change during a run.

    A `Spec` is hashable, and static under `jax.jit`.

    Attributes:
      path: The weight's name in the parameter tree.
      shape: The shape of the weight.
      dtype: The dtype of the weight's gradient, which `decompress` returns.
      projected: The axes of the weight that `A` contracts, in ascending order, which is also the order
        of the columns of `A`.
      batch: The axes along which each index has a projection of its own.
      rank: The rank `r`, the number of rows of `A`.
      distribution: The distribution of `A`, as in `Projection`.
      seed: The seed of the `Projection`.
      resample_every: The number of micro-steps that share one `A`, as in `Projection`.
      key_path: The path that the key is derived from. It differs from `path` where
        `Projection.stacked` says so.
      key_index: The index that is folded into the key: the place of an unstacked layer in its stack, or
        None.
      impl: The name of the PRNG implementation.
      block: The largest number of entries of `A` that are in memory at a time.
      sharded: For each axis of the weight, the manual mesh axes that it is sharded over inside
        `jax.shard_map`. It is empty where no axis is.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    projected: tuple[int, ...]
    batch: tuple[int, ...]
    rank: int
    distribution: distributions.Distribution
    seed: int
    resample_every: Every
    key_path: str
    key_index: int | None
    impl: str
    block: int
    sharded: tuple[tuple[str, ...], ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes of the weight that are neither projected nor batch axes."""
        other = self.projected + self.batch
        return tuple(axis for axis in range(len(self.shape)) if axis not in other)

    @property
    def size(self) -> int:
        """The number `m` of columns of `A`."""
        size = 1
        for axis in self.projected:
            size *= self.shape[axis]
        return size

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of the sketch: the weight's, with the rank in the place of the projected axes."""
        return self._compressed(self.shape)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of the part of the weight that a device has inside `shard_map`; `shape` elsewhere."""
        if not self.sharded:
            return self.shape
        return tuple(
            length // manual.parts(names)
            for length, names in zip(self.shape, self.sharded, strict=True)
        )

    @property
    def part_data_shape(self) -> tuple[int, ...]:
        """The shape of the part of the sketch that a device has inside `shard_map`; `data_shape` elsewhere."""
        return self._compressed(self.part_shape)

    @property
    def summed(self) -> tuple[str, ...]:
        """The mesh axes that projected axes are sharded over: a sketch is the sum over their devices."""
        return tuple(name for axis in self.projected if self.sharded for name in self.sharded[axis])

    def positions(self, axes: Sequence[int], first: Any = None) -> jax.Array:
        """Returns the positions in the full weight of the entries that this device has.

        Args:
          axes: The axes of the weight to index, in ascending order.
          first: The int32 indices to take along the first of these axes. By default all are taken.

        Returns:
          An int32 array with one axis for each of `axes`. Its entries are flat indices into those axes
          of the full weight, with the last axis varying fastest.
        """
        result: Any = jnp.zeros((), jnp.int32)
        for number, axis in enumerate(axes):
            length = self.part_shape[axis]
            index: Any = jnp.arange(length, dtype=jnp.int32)
            if number == 0 and first is not None:
                index = first
            if self.sharded:
                index = index + manual.index(self.sharded[axis]) * length
            result = result[..., None] * self.shape[axis] + index
        return result

    def _compressed(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            self.rank if axis == self.projected[0] else length
            for axis, length in enumerate(shape)
            if axis == self.projected[0] or axis not in self.projected
        )

    @property
    def variance(self) -> float:
        """The relative variance `E‖Ĝ − G‖² / ‖G‖²` of the estimate `Ĝ = C A`."""
        return distributions.variance(self.distribution, self.rank, self.size)


def _where() -> Any:
    return _trace_state(), jax.sharding.get_abstract_mesh()


class _Origin:
    """Remembers which cycle and tag a sketch had, through arithmetic in the trace in which it got them.

    It is part of the static description of a tree, where it must not make two trees differ, nor keep the
    values of a finished trace alive.
    """

    __slots__ = ("_cycle", "_tag", "_trace")

    def __init__(self, cycle: Any, tag: Any):
        self._cycle, self._tag = weakref.ref(cycle), weakref.ref(tag)
        self._trace = _where()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Origin)

    def __hash__(self) -> int:
        return 0

    @property
    def cycle(self) -> Any:
        """The cycle; None in another trace, or where explicit axes are automatic: there it means nothing."""
        return self._cycle() if self._trace == _where() else None

    def is_untouched(self, tag: Any) -> bool:
        return self._tag() is tag


@jax.tree_util.register_pytree_with_keys_class
class Sketch:
    """The compressed gradient `C = G Aᵀ` of one weight, as a pytree node.

    A sketch is linear in the gradient. So sums, means over devices, loss scaling, clipping by a norm, noise
    and whatever else is done to trees of gradients can be done to trees of sketches. The leaves of a sketch
    are its `data` and, once it is known, a tag of the cycle (see `flora_jax.chain.tag`).

    Attributes:
      data: The numbers of `C`, an array of shape `spec.data_shape`.
      spec: The static description of the sketch, a `Spec`.
    """

    def __init__(self, data: Any, cycle: Any, spec: Spec):
        """Makes the sketch of a cycle.

        Args:
          data: The numbers of `C`.
          cycle: The number of the cycle, an int32 scalar, or None.
          spec: The static description.
        """
        self.data = data
        self.spec = spec
        self._cycle = jnp.asarray(cycle, jnp.int32) if isinstance(cycle, _NUMBERS) else cycle
        self._tag: Any = None
        self._origin: _Origin | None = None
        self._checked = True

    @classmethod
    def unchecked(cls, data: Any, cycle: Any, spec: Spec) -> "Sketch":
        """Makes a sketch whose cycle `project` still has to compare with its own; `cycle` is None so far."""
        sketch = cls(data, cycle, spec)
        sketch._checked = False
        return sketch

    @property
    def cycle(self) -> Any:
        """The number of the cycle, an int32 scalar; None until `project` has set it."""
        return self.claimed if self._checked else None

    @property
    def claimed(self) -> Any:
        """The cycle whose projection made the sketch, as it says itself; None where it does not say."""
        if self._cycle is not None or self._tag is None:
            return self._cycle
        if isinstance(self._tag, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(self._tag.shape[:-1], jnp.int32)
        if not hasattr(
            self._tag, "astype"
        ):  # a tree of something else than arrays, such as their shapes
            return self._tag
        known = self._origin.cycle if self._origin is not None else None
        if known is not None and self._origin is not None and self._origin.is_untouched(self._tag):
            return known
        cycle, valid = tag.decode(self._tag)
        return jnp.where(valid, cycle, -1 if known is None else known)

    def resolved(self) -> "Sketch":
        """Returns the same sketch with its cycle read; its data are NaN where no cycle can be read any more.

        Raises:
          ValueError: No cycle can be read, outside of `jax.jit`.
        """
        cycle = self.claimed
        if cycle is None or self._cycle is not None:
            return self
        data = self.data
        if not (self._origin is not None and self._origin.cycle is not None):
            lost = cycle < 0
            if not isinstance(lost, jax.core.Tracer) and bool(lost):
                raise ValueError(
                    f"{self.spec.path!r}: the sketch's cycle cannot be read any more, found that something "
                    "other than a sum, a mean or a scale was done to it between two calls of jax.jit; "
                    "do it inside one"
                )
            data = jnp.where(lost, jnp.nan, data)
        result = Sketch(data, cycle, self.spec)
        result._checked = self._checked
        return result

    def tree_flatten_with_keys(self):
        leaves, static = self.tree_flatten()
        keys = (jax.tree_util.GetAttrKey("data"), jax.tree_util.GetAttrKey("cycle"))
        return tuple(zip(keys, leaves, strict=True)), static

    def tree_flatten(self):
        if self._tag is None and self._cycle is not None:
            self._tag = tag.encode(self._cycle)
            self._origin = _Origin(self._cycle, self._tag)
        return (self.data, self._tag), (self.spec, self._checked, self._origin)

    @classmethod
    def tree_unflatten(cls, static, leaves):
        sketch = cls(leaves[0], None, static[0])
        sketch._tag = leaves[1]
        _, sketch._checked, sketch._origin = static
        return sketch

    def __repr__(self) -> str:
        return f"Sketch(data={self.data!r}, cycle={self.cycle!r}, spec={self.spec!r})"

    def __add__(self, other: "Sketch") -> "Sketch":
        """Adds two sketches, which gives the sketch of the sum of the two gradients.

        Raises:
          TypeError: `other` is not a sketch.
          ValueError: The two sketches belong to different weights, projections or cycles, or one has
            its cycle set and the other has not. Of two traced cycles that differ the sum is NaN.
        """
        if not isinstance(other, Sketch):
            raise TypeError(
                f"{self.spec.path!r}: a Sketch can be added to a Sketch only, found "
                f"{type(other).__name__}; call flora_jax.decompress first"
            )
        for field in dataclasses.fields(Spec):
            mine, theirs = getattr(self.spec, field.name), getattr(other.spec, field.name)
            if mine != theirs:
                raise ValueError(
                    f"{self.spec.path!r}: sketches that are added must agree in {field.name}, "
                    f"found {mine!r} and {theirs!r}"
                )
        if (self.cycle is None) != (other.cycle is None):
            raise ValueError(
                f"{self.spec.path!r}: one sketch has its cycle set by project, the other has not"
            )
        mine, theirs = self.claimed, other.claimed
        data = jnp.add(self.data, other.data)
        if mine is not None and theirs is not None and mine is not theirs:
            if not any(isinstance(cycle, jax.core.Tracer) for cycle in (mine, theirs)):
                if len(found := {int(mine), int(theirs)}) > 1:
                    raise ValueError(
                        f"{self.spec.path!r}: sketches that are added must be of one cycle, found "
                        f"{' and '.join(map(str, sorted(found)))}; momentum transfers between cycles"
                    )
            else:
                data = jnp.where(mine == theirs, data, jnp.nan)
        result = Sketch(data, mine, self.spec)
        result._checked = self._checked
        return result


def is_sketch(node: Any) -> bool:
    """Returns whether a node of a tree is a `Sketch`, for `is_leaf=` of `jax.tree.map`."""
    return isinstance(node, Sketch)


def without_cycle(tree: Any) -> Any:
    """Returns a tree of gradients whose sketches say nothing of their cycle, so that `project` sets it unasked."""
    return jax.tree.map(
        lambda leaf: Sketch(leaf.data, None, leaf.spec) if is_sketch(leaf) else leaf,
        tree,
        is_leaf=is_sketch,
    )
