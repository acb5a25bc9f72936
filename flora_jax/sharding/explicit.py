"""Explicit: meshes whose axes are part of every array's type (`jax.sharding.AxisType.Explicit`).

There each operation must say where its result lies, or have only one answer to it. The transformations
of the chain, and the backward rules of fused gradients, run with those axes automatic inside, and
say of what they give where it lies: where the weight that it belongs to does (see `partition`).
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
    """Where an array lies by its type; None where no axis of its mesh is explicit."""
    found = getattr(leaf, "sharding", None)
    if not isinstance(leaf, jax.ShapeDtypeStruct) and hasattr(leaf, "dtype"):
        found = getattr(jax.typeof(leaf), "sharding", None)
    if isinstance(found, NamedSharding) and AxisType.Explicit in found.mesh.axis_types:
        return found
    return None


def put(array: Any, goal: NamedSharding | None) -> Any:
    """The array moved there, which changes its type."""
    return array if goal is None else jax.sharding.reshard(array, goal)


def everywhere(array: Any) -> Any:
    """The array whole on every device, so that nothing that is done with it is ambiguous."""
    found = sharding_of(array)
    if found is None or not any(found.spec):
        return array
    return put(array, NamedSharding(found.mesh, PartitionSpec()))


def call(fun: Callable, goals: Any, *args: Any) -> Any:
    """`fun(*args)` with explicit axes automatic inside; `goals` says where its result lies.

    Args:
      fun: function of trees of arrays.
      goals: tree of `NamedSharding` for its result, or a function of the arguments that gives it;
        None for whole on every device.
      *args: trees of arrays.
    """
    mesh = mesh_of(args)
    if mesh is None:
        return fun(*args)
    if callable(goals):
        goals = goals(*args)
    if goals is None:
        whole = NamedSharding(mesh, PartitionSpec())
        goals = jax.tree.map(lambda _: whole, _shapes(mesh, fun, args))

    def wrapped(*args):  # a result that may have no array at all
        return (fun(*args),)

    run: Any = jax.sharding.auto_axes(wrapped, axes=_explicit(mesh), out_sharding=(goals,))
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
        run = jax.jit(
            run, keep_unused=True
        )  # params that say where, though nothing is read of them
    return run(*args)[0]


def result_of(fun: Callable, owners: Any) -> Callable[..., Any]:
    """For `call`: each leaf of the result lies as the owner does whose path ends its own."""
    return functools.partial(_derived, fun, owners)


def _derived(fun: Callable, owners: Any, *args: Any) -> Any:
    mesh = mesh_of(args)
    places = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=found)
        for path, leaf in jax.tree_util.tree_flatten_with_path(owners)[0]
        if (found := sharding_of(leaf)) is not None
    }
    return partition.derived(_shapes(mesh, fun, args), places, mesh)


def _shapes(mesh: Any, fun: Callable, args: tuple[Any, ...]) -> Any:
    """`jax.eval_shape` of arrays that lie nowhere."""
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args)
    automatic = dict.fromkeys(_explicit(mesh), AxisType.Auto)
    with jax.sharding.use_abstract_mesh(_abstract(mesh).update_axis_types(automatic)):
        return jax.eval_shape(fun, *plain)


def _abstract(mesh: Any) -> Any:
    return getattr(mesh, "abstract_mesh", mesh)


def _explicit(mesh: Any) -> tuple[str, ...]:
    """Names of the axes that are."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def mesh_of(tree: Any) -> Any:
    """The mesh with explicit axes that arrays of a tree lie on; None where there is none."""
    found = (sharding_of(leaf) for leaf in jax.tree.leaves(tree))
    return next((one.mesh for one in found if one is not None), None)
