"""Sketch: the compressed gradient `C = G Aᵀ`, together with all that is needed to find the key of its `A`.

| paper | here |
|---|---|
| `C`, `n × r` | `Sketch.data`, the weight's axes with the rank in the place of the projected ones |
| `r` | `Spec.rank` |
| `m` | `Spec.size` |
| which `A` | `Sketch.cycle`, with `seed` and `key_path` of the `Spec` |
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from flora_jax.chain import distributions
from flora_jax.sharding import manual

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


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class Sketch:
    """The compressed gradient `C = G Aᵀ` of one weight, as a pytree node.

    A sketch is linear in the gradient. So sums, means over devices, loss scaling, clipping and
    whatever else is done to trees of gradients can be done to trees of sketches.

    Attributes:
      data: The numbers of `C`, an array of shape `spec.data_shape`.
      cycle: The number of the cycle, an int32 scalar, from which the key of `A` is derived. It is None
        until `project` sets it.
      spec: The static description of the sketch, a `Spec`.
    """

    data: Any
    cycle: Any
    spec: Spec

    def tree_flatten_with_keys(self):
        keys = (jax.tree_util.GetAttrKey("data"), jax.tree_util.GetAttrKey("cycle"))
        return tuple(zip(keys, (self.data, self.cycle), strict=True)), self.spec

    def tree_flatten(self):
        return (self.data, self.cycle), self.spec

    @classmethod
    def tree_unflatten(cls, spec, leaves):
        data, cycle = leaves
        return cls(data, cycle, spec)

    def __add__(self, other: "Sketch") -> "Sketch":
        """Adds two sketches, which gives the sketch of the sum of the two gradients.

        Raises:
          TypeError: `other` is not a sketch.
          ValueError: The two sketches belong to different weights, projections or cycles, or one has
            its cycle set and the other has not. Two traced cycles cannot be compared and are taken
            as equal.
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
        cycles = (self.cycle, other.cycle)
        known = self.cycle is not None and not any(isinstance(c, jax.core.Tracer) for c in cycles)
        if known and len(found := {int(cycle) for cycle in cycles}) > 1:
            raise ValueError(
                f"{self.spec.path!r}: sketches that are added must be of one cycle, found "
                f"{' and '.join(map(str, sorted(found)))}; momentum transfers between cycles"
            )
        return Sketch(jnp.add(self.data, other.data), self.cycle, self.spec)


def is_sketch(node: Any) -> bool:
    return isinstance(node, Sketch)
