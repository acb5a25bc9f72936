"""Leaves: which leaves of a pytree are arrays, which of those are differentiated, and what is neither."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from flora_jax.fused.lazy import is_lazy
from flora_jax.paths import path_name
from flora_jax.qarray import is_int8


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct) or hasattr(x, "__array__")


def trained(tree: Any) -> Any:
    """Returns the tree with None for each leaf that is not differentiated.

    As `jax.grad` does, it takes floating-point arrays and Python floats. A float that is an attribute of an
    object, such as the rate of an Equinox `Dropout`, is a setting and not a parameter.

    Raises:
      ValueError: A leaf is complex.
    """

    def pick(path, x):
        if is_int8(x):
            return x
        if isinstance(x, float) and not is_array(x):
            return None if path and isinstance(path[-1], GetAttrKey) else x
        if not is_array(x):
            return None
        dtype = jnp.result_type(x)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            name = path_name(path)
            raise ValueError(f"parameters must be real, found {name!r} of dtype {dtype}")
        return x if jnp.issubdtype(dtype, jnp.floating) else None

    return jax.tree_util.tree_map_with_path(pick, tree, is_leaf=is_int8)


def without(tree: Any, taken: Any) -> Any:
    """Returns the tree with None for each leaf that `taken` has."""
    return jax.tree.map(
        lambda own, x: x if own is None else None, taken, tree, is_leaf=lambda x: x is None
    )


def partition(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into one of arrays and one of all else, each with None for the other's leaves.

    Python numbers are not arrays: as with `jax.grad`, a function that is traced still sees `train=True`
    or `axis=0` as they are.
    """
    arrays = jax.tree.map(lambda x: x if is_array(x) else None, tree)
    return arrays, jax.tree.map(lambda x: None if is_array(x) else x, tree)


def combine(left: Any, right: Any) -> Any:
    """Puts two trees together again: the leaves of `left`, and where it has None, those of `right`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, left, right, is_leaf=lambda x: x is None or is_lazy(x)
    )


def refuse_changing_modules(tree: Any) -> None:
    """Raises a TypeError for an NNX module with variables that a call changes: the changes would be lost."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Module)):
        if not isinstance(node, nnx.Module):
            continue
        kinds = {type(variable).__name__ for _, variable in nnx.to_flat_state(nnx.state(node))}
        kinds -= {"Param", "LoRAParam"}
        if kinds:
            raise TypeError(
                f"fun must not be given the NNX module {type(node).__name__} itself, found that it has "
                f"{' and '.join(sorted(kinds))} variables, whose changes would be lost; take value_and_grad or "
                "make_train_step of flora_jax.trainers.nnx"
            )
