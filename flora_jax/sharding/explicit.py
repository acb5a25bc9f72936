"""Explicit: meshes whose axes are part of every array's type (`jax.sharding.AxisType.Explicit`).

On such a mesh the sharding of each result must be stated, unless the operands leave only one
possibility. The transformations of the chain and the backward rules of the fused route run with
explicit axes made automatic, and state the sharding of their results: that of the weight which each
belongs to (see `partition`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flora_jax.sharding import partition


def sharding_of(leaf: Any) -> NamedSharding | None:
    """Returns the sharding that an array's type has, or None where no axis of its mesh is explicit."""
    # of a tracer the attribute is an error, whose message takes JAX longer than all else here
    array = hasattr(leaf, "dtype") and not isinstance(leaf, jax.ShapeDtypeStruct)
    found = getattr(jax.typeof(leaf) if array else leaf, "sharding", None)
    if isinstance(found, NamedSharding) and AxisType.Explicit in found.mesh.axis_types:
        return found
    return None


def put(array: Any, goal: NamedSharding | None) -> Any:
    """Reshards an array, which changes its type; None leaves it as it is."""
    return array if goal is None else jax.sharding.reshard(array, goal)


def everywhere(array: Any) -> Any:
    """Replicates an array, so that the sharding of every result is unambiguous."""
    found = sharding_of(array)
    if found is None or not any(found.spec):
        return array
    return put(array, NamedSharding(found.mesh, PartitionSpec()))


def call(fun: Callable, goals: Any, *args: Any) -> Any:
    """Calls `fun(*args)` with explicit axes made automatic inside.

    Args:
      fun: A function of pytrees of arrays.
      goals: A pytree of `NamedSharding` for the result, or a function from the arguments to it; None for
        a replicated result.
      *args: Pytrees of arrays.

    Returns:
      The result of `fun`.
    """
    mesh = mesh_of(args)
    if mesh is None:
        return fun(*args)
    if callable(goals):
        goals = goals(*args)
    if goals is None:
        replicated = NamedSharding(mesh, PartitionSpec())
        goals = jax.tree.map(lambda _: replicated, _shapes(mesh, fun, args))

    def wrapped(*args):
        result = fun(*args)
        jax.tree.leaves(result)  # in here a sketch can make its tag, of a cycle that is automatic
        return (result,)  # which may have no array at all

    run: Any = jax.sharding.auto_axes(wrapped, axes=_explicit(mesh), out_sharding=(goals,))
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
        run = jax.jit(
            run, keep_unused=True
        )  # params whose values are not read still tell the shardings
    return run(*args)[0]


def result_of(fun: Callable, owners: Any) -> Callable[..., Any]:
    """Returns a `goals` for `call` that shards each leaf as the owner whose path ends the leaf's own."""
    return functools.partial(_derived, fun, owners)


def _derived(fun: Callable, owners: Any, *args: Any) -> Any:
    mesh = mesh_of(args)
    shaped = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=found)
        for path, leaf in jax.tree_util.tree_flatten_with_path(owners)[0]
        if (found := sharding_of(leaf)) is not None
    }
    return partition.derived(_shapes(mesh, fun, args), shaped, mesh)


def _shapes(mesh: Any, fun: Callable, args: tuple[Any, ...]) -> Any:
    """Returns `jax.eval_shape` of a function, for arrays without a sharding."""
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args)
    automatic = dict.fromkeys(_explicit(mesh), AxisType.Auto)
    with jax.sharding.use_abstract_mesh(_abstract(mesh).update_axis_types(automatic)):
        return jax.eval_shape(fun, *plain)


def _abstract(mesh: Any) -> Any:
    return getattr(mesh, "abstract_mesh", mesh)


def _explicit(mesh: Any) -> tuple[str, ...]:
    """Returns the names of the explicit axes."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def mesh_of(tree: Any) -> Any:
    """Returns the mesh with explicit axes that arrays of a tree are sharded over, or None if there is none."""
    found = (sharding_of(leaf) for leaf in jax.tree.leaves(tree))
    return next((one.mesh for one in found if one is not None), None)
