"""State: how the state of an optimizer is sharded, given how the params are sharded.

A sketch has the axes of its weight, with the rank in the place of the projected ones, and second
moments and momenta have the weight's axes too. So each axis of the state has the mesh axes of the
weight's axis that it came from. The mesh axes of a projected axis go to the rank: where a weight is
sharded along the axis that `A` contracts, the sum over devices is reduce-scattered over the rank.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.core
import optax
from jax.sharding import NamedSharding

from flora_jax.paths import path_name
from flora_jax.qarray import is_int8, outline
from flora_jax.sharding.partition import derived


def state_shardings(
    tx: optax.GradientTransformation, params: Any, *, manual_axes: Collection[str] = ()
) -> Any:
    """Returns shardings for the state of any transformation, derived from those of the params.

    Use them in `jax.jit(tx.init, out_shardings=...)`, as shardings of a train step's arguments, or to
    restore a checkpoint onto another mesh. Nothing is computed.

    Args:
      tx: The transformation: `flora_jax.flora`, or any other optax transformation.
      params: A pytree of arrays, or of `jax.ShapeDtypeStruct`, each with a `NamedSharding` on the same
        mesh.
      manual_axes: The mesh axes that are manual where `tx.update` runs, inside `jax.shard_map` (see
        `Projection.partition_specs`). The rank is not sharded over them.

    Returns:
      A pytree of `NamedSharding` with the structure of `tx.init(params)`. A leaf of the state belongs to
      the param whose path ends the leaf's own. Leaves that belong to no param (counts) are replicated.

    Raises:
      ValueError: A param has no `NamedSharding`, the params are on several meshes, or there are none.

    Examples:
      >>> import flora_jax, jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> kernel = jax.device_put(jnp.ones((256, 512)), NamedSharding(mesh, P(None, "model")))
      >>> params = {"kernel": kernel}
      >>> tx = flora_jax.flora(1e-2, rank=16, accumulation_steps=4)
      >>> shardings = flora_jax.state_shardings(tx, params)
      >>> opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    mesh, owners = None, {}
    params = jax.tree.map(
        lambda x: outline(x, x.qvalue.sharding) if is_int8(x) else x, params, is_leaf=is_int8
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            found = type(sharding).__name__ if sharding is not None else type(leaf).__name__
            raise ValueError(f"{path_name(path)!r}: found {found}, expected a NamedSharding")
        if mesh is not None and sharding.mesh != mesh:
            raise ValueError(
                f"{path_name(path)!r}: found a mesh {sharding.mesh}, expected that of the params "
                f"before it, {mesh}"
            )
        mesh = sharding.mesh
        owners[path] = leaf
    if mesh is None:
        raise ValueError("params must have at least one array, found none")

    return derived(jax.eval_shape(tx.init, params), owners, mesh, manual_axes)
