"""Qarray: leaves that are a `qwix.QArray`, a weight as integers and scales, among the arrays of a tree of params."""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def is_int8(leaf: Any) -> bool:
    """Returns whether a leaf is a `qwix.QArray`."""
    return type(leaf).__name__ == "QArray" and "qwix" in sys.modules


def outline(leaf: Any, sharding: Any = None) -> Any:
    """Returns the shape and dtype of an array, or of the one that a `qwix.QArray` stands for."""
    if is_int8(leaf):
        return jax.ShapeDtypeStruct(leaf.qvalue.shape, leaf.scale.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=sharding)


def outlines(params: Any) -> Any:
    """Returns the params with the shape and dtype of what it stands for in the place of each `qwix.QArray`."""
    return jax.tree.map(lambda x: outline(x) if is_int8(x) else x, params, is_leaf=is_int8)


def first_of_each(params: Any, leaves: Sequence[Any]) -> list[Any]:
    """Returns what there is for the first array of each param, given a list of it for all their arrays."""
    counts = [len(jax.tree.leaves(x)) for x in jax.tree.leaves(params, is_leaf=is_int8)]
    starts = itertools.accumulate(counts, initial=0)
    return [leaves[start] for start, _ in zip(starts, counts, strict=False)]
