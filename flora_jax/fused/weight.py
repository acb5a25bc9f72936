"""Weight: what stands for a weight inside a function whose gradients are compressed in the backward pass.

A linear layer `y = x W` is the same as `y = x W + (x Aᵀ) U` with `U = 0`, which is LoRA at its start:
`A` is its down factor, and `U` its up factor. The derivative with respect to `U` is `(x Aᵀ)ᵀ δ`, where
`δ` is the cotangent of `y`, and that is the sketch of the gradient of `W`. So each weight has an up
factor of zeros here, and is itself not differentiated. The up factor takes no part in the forward
computation: each use of a weight has a backward rule of its own that gives the cotangent of the up
factor. JAX then sums these over all uses, over the steps of a `scan`, over micro-batches and over
devices.

An adapter (`flora_jax.adapters`) is the same array with down and up factors that are parameters, in
place of a sampled `A` and zero. It takes part in the forward computation, and all its derivatives are
JAX's.

In the descriptions of shapes `B` stands for the batch axes of a weight, `P` for its projected axes, and
`r` for the rank.

Source: arXiv 2402.03293, Section 2 and Algorithm 1.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from flora_jax.chain import products
from flora_jax.chain.sketch import Spec
from flora_jax.sharding import partition

Kind = Literal["projected", "batch", "kept"]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight, or the result of operations on one that do not mix its projected axes with others.

    Attributes:
      value: The array; for an adapter it may be `Lazy`.
      up: The up factor: of the shape of `value`, with the rank in the place of the first projected axis
        and 1 in the place of the others. It is zero, except for an adapter.
      keys: The uint32 data of the keys of `A`, of shape `(*B, words)`; for an adapter the down factor
        itself, of shape `(*B, m · r)`.
      columns: The column of `A` that each index along the projected axes belongs to, an int32 array of
        shape `(*P,)`; None where none has been moved.
      factors: The factor that each of these columns is multiplied by, a float array of shape `(*P,)`;
        None for 1.
      spec: The `Spec` of the weight.
      kinds: For each axis of `value`, whether it is a projected axis, a batch axis, or neither (`kept`).
      looked_up: Whether the array is rows of the weight, found by index, rather than (a part of) the
        weight.
      sharding: The `NamedSharding` of the cotangent of the up factor, or None where it is not known.
      adapter: Whether the factors are those of an adapter, so that the weight is `value` plus their
        product.
      order: For an adapter, the function that computes `x (W + F G)` from matrices of shapes `(t, p)`,
        `(p, q)`, `(p, r)` and `(r, q)`; static. None stands for `x W + (x F) G`.
      differentiated: Whether `value` has a gradient of its own besides that of the weight, as the sum of
        the weight and another product has.
    """

    value: Any
    up: Any
    keys: Any
    columns: Any
    factors: Any
    spec: Spec
    kinds: tuple[Kind, ...]
    looked_up: bool = False
    sharding: NamedSharding | None = None
    adapter: bool = False
    order: Callable[..., jax.Array] | None = None
    differentiated: bool = False

    def tree_flatten(self):
        children = (self.value, self.up, self.keys, self.columns, self.factors)
        static = (self.spec, self.kinds, self.looked_up, self.sharding, self.adapter, self.order)
        static += (self.differentiated,)
        return children, static

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)

    @classmethod
    def start(cls, spec: Spec, cycle: Any, value: Any, up: Any, sharding: Any = None) -> "Weight":
        """Makes a `Weight` of a parameter, or of the part of it that this device has.

        Args:
          spec: The `Spec` of the weight.
          cycle: The number of the cycle.
          value: The parameter.
          up: Zeros of shape `spec.part_data_shape`.
          sharding: The `NamedSharding` of the sketch, or None where it is not known.
        """
        if sharding is not None:
            names = list(partition.entries(sharding.spec, up.ndim))
            for axis in spec.projected[1:]:
                names.insert(axis, ())
            sharding = NamedSharding(sharding.mesh, partition.spec_of(names))
        up = jnp.expand_dims(up, spec.projected[1:])
        keys = jax.random.key_data(products.matrix_keys(spec, cycle))
        columns = spec.positions(spec.projected) if spec.summed else None
        return cls(value, up, keys, columns, None, spec, kinds_of(spec), sharding=sharding)

    @classmethod
    def adapted(cls, spec: Spec, value: Any, down: Any, up: Any) -> "Weight":
        """Makes a `Weight` that is `value` plus the product of an adapter's factors.

        Args:
          spec: The `Spec` of the weight.
          value: The frozen weight.
          down: The down factor, of shape `(*B, *P, r)`.
          up: The up factor, of shape `spec.data_shape`.
        """
        up = jnp.expand_dims(up, spec.projected[1:])
        flat = down.reshape(*down.shape[: len(spec.batch)], -1)
        return cls(value, up, flat, None, None, spec, kinds_of(spec), adapter=True)

    def axes(self, kind: Kind) -> tuple[int, ...]:
        """Returns the axes of `value` that are of this kind."""
        return tuple(axis for axis, other in enumerate(self.kinds) if other == kind)

    @property
    def slot(self) -> int:
        """The axis of the up factor that has the rank."""
        return self.kinds.index("projected")

    def indices(self) -> jax.Array:
        """Returns `columns`, or the array that None stands for."""
        if self.columns is not None:
            return self.columns
        lengths = [self.value.shape[axis] for axis in self.axes("projected")]
        return jnp.arange(math.prod(lengths), dtype=jnp.int32).reshape(lengths)

    def replace(self, **changes) -> "Weight":
        """Returns a changed copy. A new up factor has no known sharding unless one is given with it."""
        if "up" in changes:
            changes.setdefault("sharding", None)
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Joined:
    """Weights (and arrays) that are concatenated along an axis, and kept apart until they are used.

    Attributes:
      parts: The weights and arrays.
      axis: The axis that they are concatenated along.
    """

    parts: tuple[Any, ...]
    axis: int

    def tree_flatten(self):
        return self.parts, self.axis

    @classmethod
    def tree_unflatten(cls, axis, parts):
        return cls(tuple(parts), axis)


def kinds_of(spec: Spec) -> tuple[Kind, ...]:
    """Returns the kind of each axis of the weight itself."""
    kinds: list[Kind] = ["kept"] * len(spec.shape)
    for axis in spec.projected:
        kinds[axis] = "projected"
    for axis in spec.batch:
        kinds[axis] = "batch"
    return tuple(kinds)


def up_shape(shape: Sequence[int], kinds: Sequence[Kind], rank: int) -> tuple[int, ...]:
    """Returns the shape of the up factor of a weight whose axes are of these kinds."""
    slot = tuple(kinds).index("projected")
    return tuple(
        rank if axis == slot else 1 if kinds[axis] == "projected" else length
        for axis, length in enumerate(shape)
    )
