"""Shardings: where the state of an optimizer lies, given where the params lie.

A sketch has the axes of its weight, with the rank in place of the projected ones, and so have
second moments and momenta; so each axis of a state takes the mesh axes of the axis that it came
from. What is lost with a projected axis goes to the rank: where a weight is cut along the axis that
`A` contracts, the sums over devices are then scattered over the rank.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.core
import optax
from jax.sharding import NamedSharding

from flora_jax.paths import path_name
from flora_jax.sharding.partition import derived


def state_shardings(
    tx: optax.GradientTransformation, params: Any, *, manual_axes: Collection[str] = ()
) -> Any:
    """Shardings for the state of any transformation, made from those of the params.

    For `jax.jit(tx.init, out_shardings=...)`, for a train step's arguments, and for restoring a
    checkpoint onto another mesh. Nothing is computed.

    Args:
      tx: `flora_jax.flora`, or any optax transformation.
      params: tree of arrays, or of `jax.ShapeDtypeStruct`, each with a `NamedSharding` on one mesh.
      manual_axes: mesh axes that are manual where `tx.update` runs, inside `jax.shard_map` (see
        `Projection.partition_specs`): there each device holds all of the rank.

    Returns:
      A tree of `NamedSharding`, of the structure of `tx.init(params)`. A leaf of the state belongs to
      the param whose path ends its own; what belongs to none (counts) is on every device.

    Raises:
      ValueError: a param without a `NamedSharding`, or params on several meshes; no params.

    Example:
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
