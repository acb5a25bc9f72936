"""Lazy: an array that is computed where it is used, and computed again for the backward pass.

What is stored is what the array is computed from: a frozen weight and the key of its noise, or integers
and scales. A product with it stores neither the array nor a copy for the backward pass, and where the
array can be computed in blocks, no more than a block of it is in memory at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax import dtypes
from flora_jax.sharding import manual

BLOCK = 2**22
"""The largest number of entries that are computed at a time."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is not computed yet, and has no gradient; a pytree node.

    Attributes:
      parts: A pytree of the arrays that it is computed from. The batch axes come first in each, so that
        `scan` may slice them.
      compute: The function `(parts) -> array`; static.
      piece: The function `(parts, start, length) -> array[…, start : start + length, …]`, sliced along
        `axis`; static. It is None where the array can only be computed as a whole.
      axis: The axis of the array that `piece` slices, counted from the end.
      cast: The dtype that the array is converted to, or None for the one that `compute` gives.
      block: The largest number of entries to compute at a time.
    """

    parts: Any
    compute: Callable[[Any], Any]
    piece: Callable[[Any, Any, int], Any] | None = None
    axis: int = -2
    cast: Any = None
    block: int = BLOCK

    def tree_flatten(self):
        return (self.parts,), (self.compute, self.piece, self.axis, self.cast, self.block)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(children[0], *static)

    def materialize(self) -> jax.Array:
        """Computes the whole array."""
        return self._cast(self.compute(self.parts))

    def slab(self, start: Any, length: int) -> jax.Array:
        """Computes `length` indices along `axis`, beginning at `start`."""
        assert self.piece is not None
        return self._cast(self.piece(self.parts, start, length))

    def astype(self, dtype: Any) -> "Lazy":
        """Returns the same array in another dtype, still not computed."""
        return dataclasses.replace(self, cast=jnp.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return jax.eval_shape(self.compute, self.parts).shape

    @property
    def dtype(self) -> Any:
        return self.cast or jax.eval_shape(self.compute, self.parts).dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def _cast(self, value: jax.Array) -> jax.Array:
        return value if self.cast is None else value.astype(self.cast)


def is_lazy(value: Any) -> bool:
    return isinstance(value, Lazy)


def materialized(value: Any) -> Any:
    """Returns an array as it is, and computes a `Lazy` one."""
    return value.materialize() if isinstance(value, Lazy) else value


def product(lazy: Lazy, x: jax.Array, bind: Callable, labels: tuple[str, str, str]) -> jax.Array:
    """Returns `bind(x, array)`, a contraction that is linear in `x` and differentiable in `x` alone.

    Args:
      lazy: The `Lazy` array.
      x: The other factor.
      bind: The contraction itself, a function of two arrays.
      labels: The einsum labels of `x`, of the lazy array and of the result.
    """
    of_x, of_value, of_y = labels
    outcome = jax.eval_shape(lambda lazy, x: bind(x, lazy.materialize()), lazy, x)
    label = of_value[lazy.axis]
    in_blocks = lazy.piece is not None and (label in of_x) != (label in of_y)
    size = lazy.shape[lazy.axis]
    step = max(1, lazy.block * size // max(1, _entries(lazy)))

    def contraction(lazy, x):
        if in_blocks and step < size:
            return _by_slabs(lazy, x, (of_x, of_value, of_y), step, outcome)
        return bind(x, lazy.materialize())

    @jax.custom_vjp
    def run(lazy, x):
        return contraction(lazy, x)

    def forward(lazy, x):
        return contraction(lazy, x), lazy

    def backward(lazy, delta):
        if in_blocks and step < size:
            return None, _by_slabs(lazy, delta, (of_y, of_value, of_x), step, x)
        (of_input,) = jax.linear_transpose(lambda x: bind(x, lazy.materialize()), x)(delta)
        return None, of_input

    run.defvjp(forward, backward)
    return run(lazy, x)


def _entries(lazy: Lazy) -> int:
    count = 1
    for length in lazy.shape:
        count *= length
    return count


def _by_slabs(lazy: Lazy, x: jax.Array, labels: tuple[str, str, str], step: int, outcome: Any):
    """Computes the einsum with `step` indices of the lazy axis at a time.

    The last slab begins earlier where it would not fit, and then repeats indices of the one before.
    """
    of_x, of_value, of_y = labels
    label, total = of_value[lazy.axis], lazy.shape[lazy.axis]
    sums = dtypes.sums(outcome.dtype)
    equation = f"{of_x},{of_value}->{of_y}"

    def slab_of(start):
        return lazy.slab(start, step).astype(x.dtype)

    if label in of_x:
        axis = of_x.index(label)

        def add(i, y):
            first = i * step
            start = jnp.minimum(first, total - step)
            part = jax.lax.dynamic_slice_in_dim(x, start, step, axis)
            seen = (start + jnp.arange(step) < first).reshape(-1, *[1] * (x.ndim - axis - 1))
            part = jnp.where(seen, 0, part)
            return y + jnp.einsum(equation, part, slab_of(start), preferred_element_type=sums)

        body, zeros = add, jnp.zeros(outcome.shape, sums)
    else:
        axis = of_y.index(label)

        def write(i, y):
            start = jnp.minimum(i * step, total - step)
            part = jnp.einsum(equation, x, slab_of(start), preferred_element_type=sums)
            return jax.lax.dynamic_update_slice_in_dim(y, part.astype(y.dtype), start, axis)

        body, zeros = write, jnp.zeros(outcome.shape, outcome.dtype)
    return manual.fori_loop(0, -(-total // step), body, zeros).astype(outcome.dtype)
