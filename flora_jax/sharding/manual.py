"""Manual: mesh axes inside `jax.shard_map`, where the type of an array says over which of them it varies."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp


def varying(array: Any) -> frozenset[str]:
    """Returns the manual axes over which an array, or an array of this type, varies."""
    kind: Any = array if isinstance(array, jax.core.AbstractValue) else jax.typeof(array)
    if hasattr(kind, "manual_axis_type"):  # as of jax 0.10
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())


def alike(tree: Any) -> Any:
    """Marks every leaf as varying over all axes that any leaf varies over.

    The transpose of this is the sum over devices that an ordinary gradient has there.
    """
    every = frozenset().union(*map(varying, jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: vary(leaf, every), tree)


def here(names: Iterable[str]) -> tuple[str, ...]:
    """Returns those of the mesh axes that are manual where this is called."""
    manual = _manual_axes()
    return tuple(name for name in names if name in manual)


def parts(names: Iterable[str]) -> int:
    """Returns the number of parts that an array sharded over these axes has here: 1 outside of `shard_map`."""
    return math.prod(jax.lax.axis_size(name) for name in here(names))


def index(names: Iterable[str]) -> Any:
    """Returns the number of the part that this device has: 0, or an int32 scalar."""
    names = here(names)
    return jax.lax.axis_index(names) if names else 0


def total(array: jax.Array, names: Iterable[str]) -> jax.Array:
    """Sums an array over the devices along these axes, as far as they are manual here."""
    names = here(names)
    return jax.lax.psum(array, names) if names else array


def fori_loop(lower: int, upper: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Runs `jax.lax.fori_loop` with a carry that may start with arrays that do not vary, such as zeros."""
    if _manual_axes():
        result = jax.make_jaxpr(body)(jnp.int32(lower), carry).out_avals
        leaves, structure = jax.tree.flatten(carry)
        marked = [vary(a, varying(b)) for a, b in zip(leaves, result, strict=True)]
        carry = jax.tree.unflatten(structure, marked)
    return jax.lax.fori_loop(lower, upper, body, carry)


def switch(index: Any, branches: Sequence[Callable], *operands: Any) -> Any:
    """Runs `jax.lax.switch` with branches whose results may vary over different axes, as zeros do.

    With two branches `index` may be a bool.
    """
    if _manual_axes():
        results = [jax.make_jaxpr(branch)(*operands).out_avals for branch in branches]
        every = [frozenset().union(*map(varying, each)) for each in zip(*results, strict=True)]
        branches = [functools.partial(_marked, branch, every) for branch in branches]
    return jax.lax.switch(jnp.asarray(index, jnp.int32), branches, *operands)


def _marked(branch: Callable, every: list[frozenset[str]], *operands: Any) -> Any:
    leaves, structure = jax.tree.flatten(branch(*operands))
    return jax.tree.unflatten(structure, map(vary, leaves, every))


def everywhere(condition: jax.Array) -> jax.Array:
    """Returns whether a condition holds on all devices along the axes that it varies over."""
    axes = tuple(sorted(varying(condition)))
    return jax.lax.pmin(condition.astype(jnp.int32), axes) > 0 if axes else condition


def vary(leaf: Any, axes: frozenset[str]) -> Any:
    """Marks an array as varying over these axes."""
    missing = tuple(sorted(axes - varying(leaf)))
    if not missing:
        return leaf
    if pvary := getattr(jax.lax, "pvary", None):  # before jax 0.9
        return pvary(leaf, missing)
    return jax.lax.pcast(leaf, missing, to="varying")


def _manual_axes() -> tuple[str, ...]:
    return tuple(getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()))
