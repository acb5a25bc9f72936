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


def has_int8(params: Any) -> bool:
    """Returns whether there is a `qwix.QArray` among the leaves."""
    return any(map(is_int8, jax.tree.leaves(params, is_leaf=is_int8)))


def of_each(params: Any, arrays: Sequence[Any]) -> list[list[Any]]:
    """Returns what there is for the arrays of each param (one, or integers and scales), given a list of it for all arrays."""
    rest = iter(arrays)
    leaves = jax.tree.leaves(params, is_leaf=is_int8)
    return [list(itertools.islice(rest, len(jax.tree.leaves(leaf)))) for leaf in leaves]


def first_of_each(params: Any, arrays: Sequence[Any]) -> list[Any]:
    """Returns what there is for the first array of each param, given a list of it for all arrays."""
    return [first for first, *_ in of_each(params, arrays)]
