"""Manual: mesh axes inside `jax.shard_map`, over which the type of an array says whether it varies."""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp


def varying(array: Any) -> frozenset[str]:
    """The manual axes over which an array varies, or an array of this type does."""
    kind = array if isinstance(array, jax.core.AbstractValue) else jax.typeof(array)
    if hasattr(kind, "manual_axis_type"):  # as of jax 0.10
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())


def alike(tree: Any) -> Any:
    """Marks every leaf as varying over the axes that any leaf varies over.

    The transpose of this mark is the sum over devices that an ordinary gradient gets there.
    """
    every = frozenset().union(*map(varying, jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: _vary(leaf, every), tree)


def fori_loop(lower: int, upper: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`jax.lax.fori_loop`, whose carry may start with arrays that do not vary, such as zeros."""
    if getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()):
        result = jax.make_jaxpr(body)(jnp.int32(lower), carry).out_avals
        leaves, structure = jax.tree.flatten(carry)
        marked = [_vary(a, varying(b)) for a, b in zip(leaves, result, strict=True)]
        carry = jax.tree.unflatten(structure, marked)
    return jax.lax.fori_loop(lower, upper, body, carry)


def _vary(leaf: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - varying(leaf)))
    if not missing:
        return leaf
    if pvary := getattr(jax.lax, "pvary", None):  # before jax 0.9
        return pvary(leaf, missing)
    return jax.lax.pcast(leaf, missing, to="varying")
