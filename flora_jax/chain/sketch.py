"""Sketch: the compressed gradient `C = G Aᵀ`, which knows how to find the key of its `A`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from flora_jax.chain import distributions
from flora_jax.sharding import manual

Every = int | Callable[[Any], Any]
"""A number of micro-steps, or a schedule of it, as in `optax.MultiSteps`."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """All that is fixed about the sketch of one weight; hashable, and static under `jit`.

    Attributes:
      path: the weight's name in the parameter tree.
      shape: of the weight.
      dtype: of the weight's gradient, which `decompress` gives back.
      projected: axes of the weight that `A` contracts, ascending: the order of its columns.
      batch: axes along which each index has a projection of its own.
      rank: rows of `A`.
      distribution: which rule draws `A`.
      seed: of the projection.
      resample_every: micro-steps that share one `A`.
      key_path: the path that the key is made from; differs from `path` where layers are told to agree.
      key_index: folded into the key where not None: the place of an unstacked layer in its stack.
      impl: name of the PRNG implementation.
      block: largest number of entries of `A` that are held at a time.
      cut: for each axis the mesh axes that cut it where they are manual; empty for none at all.
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
    cut: tuple[tuple[str, ...], ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """Axes of the weight that are neither projected nor batch axes."""
        other = self.projected + self.batch
        return tuple(axis for axis in range(len(self.shape)) if axis not in other)

    @property
    def size(self) -> int:
        """`m`: columns of `A`."""
        size = 1
        for axis in self.projected:
            size *= self.shape[axis]
        return size

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The weight's shape, with the rank in place of the projected axes."""
        return self._compressed(self.shape)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of the part of the weight that a device has here, inside `shard_map`; `shape` elsewhere."""
        if not self.cut:
            return self.shape
        return tuple(
            length // manual.parts(names)
            for length, names in zip(self.shape, self.cut, strict=True)
        )

    @property
    def part_data_shape(self) -> tuple[int, ...]:
        """Of the sketch's part here."""
        return self._compressed(self.part_shape)

    @property
    def summed(self) -> tuple[str, ...]:
        """The mesh axes that cut projected axes: a sketch is the sum over the devices along them."""
        return tuple(name for axis in self.projected if self.cut for name in self.cut[axis])

    def positions(self, axes: Sequence[int], first: Any = None) -> jax.Array:
        """Where in the whole weight each index of some axes is that a device has here.

        Args:
          axes: of the weight, ascending.
          first: int32 indices of the first of them; by default all.

        Returns:
          int32 array, one axis for each; its entries count the whole weight's, the last axis fastest.
        """
        result: Any = jnp.zeros((), jnp.int32)
        for number, axis in enumerate(axes):
            length = self.part_shape[axis]
            index: Any = jnp.arange(length, dtype=jnp.int32)
            if number == 0 and first is not None:
                index = first
            if self.cut:
                index = index + manual.index(self.cut[axis]) * length
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
        """`E‖Ĝ − G‖² / ‖G‖²` of the estimate `Ĝ = C A`."""
        return distributions.variance(self.distribution, self.rank, self.size)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class Sketch:
    """The compressed gradient of one weight; a pytree node.

    All arithmetic on trees does the right thing to it, since it is linear in the gradient.

    Attributes:
      data: `C`, of shape `spec.data_shape`.
      cycle: int32 scalar that finds the key of `A`; None until `project` sets it.
      spec: the static rest.
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
        """The sketch of the sum of two gradients.

        Raises:
          TypeError: `other` is no sketch.
          ValueError: the two are of different weights or projections, or one has its cycle set
            and the other has not. Two traced cycles cannot be compared and are taken as equal.
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
