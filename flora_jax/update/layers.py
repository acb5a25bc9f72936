"""Layers: one index after the other along an axis of arrays, and of weights in int8, taken and replaced in place."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

OWN, STATES = range(2)
"""The first arrays of a `Round`: parameters, and the leaves of the optimizer's state that are theirs."""
LANES, SUBLANES = 128, 8
"""The sides of a tile of a TPU's memory."""


def take(leaf: Any, axis: int, i: Any) -> Any:
    """Returns one index along an axis of an array, or of the arrays of a `qwix.QArray`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False), leaf)


class Round:
    """One round of `replace_each`: one index of each array, to be taken and replaced.

    Attributes:
      index: The index.
      arrays: The arrays, dicts in a list.
      parts: What replaces this index of each, where it is written later.
      early: Whether an index is written as soon as `put` is called.
    """

    def __init__(self, arrays: Any, axes: Any, index: Any, early: bool):
        self.arrays, self.axes = [dict(group) for group in arrays], axes
        self.parts: list[dict[Any, Any]] = [{} for _ in self.arrays]
        self.index, self.early = index, early

    def take(self, group: int, name: Any) -> Any:
        """Returns this index of an array."""
        return take(self.arrays[group][name], self.axes[group][name], self.index)

    def put(self, group: int, name: Any, part: Any) -> None:
        """Replaces this index of an array."""
        if self.early:
            array, axis = self.arrays[group][name], self.axes[group][name]
            self.arrays[group][name] = put(array, part, axis, self.index)
        else:
            self.parts[group][name] = part

    def update(
        self, leaf: int, grad: Any, owned: Iterable[int], update: Callable, index: Any
    ) -> list[tuple[int, int]]:
        """Replaces this index of a parameter, and of the leaves of the state that it owns; returns where they lie."""
        states = {place: self.take(STATES, place) for place in owned}
        new, states = update(leaf, grad, self.take(OWN, leaf), states, index)
        self.put(OWN, leaf, new)
        for place, part in states.items():
            self.put(STATES, place, part)
        return [(OWN, leaf), *((STATES, place) for place in states)]


def replace_each(
    count: int,
    order: Callable,
    arrays: Any,
    axes: Any,
    compute: Callable,
    rest: Any,
    shape_of: Callable[[int, Any, Any], Any],
):
    """Replaces the indices of arrays one after the other, in place.

    XLA copies an array that is written in a loop while it may yet be read, except for TPUs, where it looks at the
    schedule. So elsewhere an index is written at the beginning of the next round, and what is read there is what was
    written.

    Args:
      count: The number of indices.
      order: The function from the number of a round to the index.
      arrays: A list of dicts, of arrays or of `qwix.QArray`s.
      axes: The axis of each, in such a list.
      compute: The function `(round, rest) -> rest` that puts the new index of each array into the `Round`.
      rest: What else goes from one round to the next.
      shape_of: The function `(group, name, array)` to the shape of what one device has of it, None where that is not known.

    Returns:
      The arrays and the rest.
    """

    def write(arrays, parts, i):
        return jax.tree.map(lambda axis, x, part: put(x, part, axis, i), axes, arrays, parts)

    def kept(i, group):
        def one(name):
            return lambda array: _as_it_came(array, shape_of(i, name, array))

        return {name: jax.tree.map(one(name), x) for name, x in group.items()}

    def at_once(arrays, rest):
        def body(t, loop):
            arrays, rest = loop
            now = Round(arrays, axes, order(t), early=True)
            rest = compute(now, rest)
            return [kept(i, group) for i, group in enumerate(now.arrays)], rest

        return jax.lax.fori_loop(0, count, body, (arrays, rest))

    def later(arrays, rest):
        def body(t, loop):
            arrays, parts, rest = loop
            arrays = write(arrays, parts, order(jnp.maximum(t - 1, 0)))
            now = Round(arrays, axes, order(t), early=False)
            rest = compute(now, rest)
            return arrays, now.parts, rest

        first = jax.tree.map(lambda axis, x: take(x, axis, order(0)), axes, arrays)
        arrays, parts, rest = jax.lax.fori_loop(0, count, body, (arrays, first, rest))
        return write(arrays, parts, order(count - 1)), rest

    return jax.lax.platform_dependent(arrays, rest, tpu=at_once, default=later)


def _as_it_came(array: Any, shape: Any) -> Any:
    """Keeps an array in the layout that a TPU's params have; XLA may else take another for the loop, and copy the stack twice.

    That is row by row where neither of the last two axes is padded to the tiles of 8 x 128 so, else column by column where
    neither is so. Where both are padded, XLA chooses, as it does for an array of unknown `shape` on each device.
    """
    if shape is None:
        return array
    *_, rows, columns = (1, 1, *shape)
    axes = tuple(range(array.ndim))
    if columns % LANES == 0 and rows % SUBLANES == 0:
        order = axes
    elif rows % LANES == 0 and columns % SUBLANES == 0:
        order = (*axes[:-2], axes[-1], axes[-2])
    else:
        return array
    return with_layout_constraint(array, Layout(order))


def put(leaf: Any, part: Any, axis: int, i: Any) -> Any:
    """Returns the array, or the arrays of a `qwix.QArray`, with one index along an axis replaced."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, axis), leaf, part)
