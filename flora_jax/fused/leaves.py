"""Leaves: the arrays of any pytree, what is differentiated among them, and what is no array."""

from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.fused.made import is_made


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct) or hasattr(x, "__array__")


def is_differentiable(x: Any) -> bool:
    if isinstance(x, float):
        return True
    if not is_array(x):
        return False
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"parameters must be real, found one of dtype {x.dtype}")
    return jnp.issubdtype(x.dtype, jnp.floating)


def partition(tree: Any) -> tuple[Any, Any]:
    """Arrays (and numbers), and all else, each with None in place of the other."""

    def is_number(x):
        return is_array(x) or isinstance(x, int | float | complex)

    arrays = jax.tree.map(lambda x: x if is_number(x) else None, tree)
    return arrays, jax.tree.map(lambda x: None if is_number(x) else x, tree)


def combine(left: Any, right: Any) -> Any:
    """The leaves of the one, and where it has None those of the other."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, left, right, is_leaf=lambda x: x is None or is_made(x)
    )
