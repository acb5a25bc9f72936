"""Made: a value that is made where it is used, and made again for the backward pass.

What is held is what it is made of: a frozen weight and the key of its noise, or integers and scales. A
product with it keeps neither the value nor a copy for the backward pass, and makes no more of it at
a time than a block, where blocks can be made.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.sharding import manual

BLOCK = 2**22
"""Largest number of entries that are made at a time."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Made:
    """A value and how it is made; it has no gradient.

    Attributes:
      parts: tree of arrays. The batch axes come first in each, so that `scan` may cut them.
      make: `(parts) -> value`; static.
      piece: `(parts, start, length) -> value[…, start : start + length, …]` along `axis`; static.
        None where it can only be made whole.
      axis: of the value, counted from the end.
      cast: dtype that the value is turned into; None for what `make` gives.
      block: largest number of entries to make at a time.
    """

    parts: Any
    make: Callable[[Any], Any]
    piece: Callable[[Any, Any, int], Any] | None = None
    axis: int = -2
    cast: Any = None
    block: int = BLOCK

    def tree_flatten(self):
        return (self.parts,), (self.make, self.piece, self.axis, self.cast, self.block)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(children[0], *static)

    def value(self) -> jax.Array:
        """The whole of it."""
        return self._cast(self.make(self.parts))

    def slab(self, start: Any, length: int) -> jax.Array:
        assert self.piece is not None
        return self._cast(self.piece(self.parts, start, length))

    def astype(self, dtype: Any) -> "Made":
        return dataclasses.replace(self, cast=jnp.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return jax.eval_shape(self.make, self.parts).shape

    @property
    def dtype(self) -> Any:
        return self.cast or jax.eval_shape(self.make, self.parts).dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def _cast(self, value: jax.Array) -> jax.Array:
        return value if self.cast is None else value.astype(self.cast)


def is_made(value: Any) -> bool:
    return isinstance(value, Made)


def value_of(value: Any) -> Any:
    """An array as it is; a `Made` one made."""
    return value.value() if isinstance(value, Made) else value


def product(made: Made, x: jax.Array, bind: Callable, labels: tuple[str, str, str]) -> jax.Array:
    """`bind(x, value)`, a contraction that is linear in `x`; differentiable in `x` alone.

    Args:
      made: the value.
      x: the other factor.
      bind: the contraction itself.
      labels: einsum's, of `x`, of the value and of the result.
    """
    of_x, of_value, of_y = labels
    outcome = jax.eval_shape(lambda made, x: bind(x, made.value()), made, x)
    label = of_value[made.axis]
    in_blocks = made.piece is not None and (label in of_x) != (label in of_y)
    size = made.shape[made.axis]
    step = max(1, made.block * size // max(1, _entries(made)))

    def whole(made, x):
        if in_blocks and step < size:
            return _by_slabs(made, x, (of_x, of_value, of_y), step, outcome)
        return bind(x, made.value())

    @jax.custom_vjp
    def run(made, x):
        return whole(made, x)

    def forward(made, x):
        return whole(made, x), made

    def backward(made, delta):
        if in_blocks and step < size:
            return None, _by_slabs(made, delta, (of_y, of_value, of_x), step, x)
        (of_input,) = jax.linear_transpose(lambda x: bind(x, made.value()), x)(delta)
        return None, of_input

    run.defvjp(forward, backward)
    return run(made, x)


def _entries(made: Made) -> int:
    count = 1
    for length in made.shape:
        count *= length
    return count


def _by_slabs(made: Made, x: jax.Array, labels: tuple[str, str, str], step: int, outcome: Any):
    """The einsum, `step` of the value's axis at a time; the last slab is drawn back so that it fits."""
    of_x, of_value, of_y = labels
    label, total = of_value[made.axis], made.shape[made.axis]
    sums = jnp.promote_types(outcome.dtype, jnp.float32)
    equation = f"{of_x},{of_value}->{of_y}"

    def slab_of(start):
        return made.slab(start, step).astype(x.dtype)

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
