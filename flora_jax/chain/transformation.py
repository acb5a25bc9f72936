"""Transformation: the wrapper that makes each transformation of the chain run on meshes with explicit axes."""

import jax
import optax

from flora_jax.chain.sketch import is_sketch
from flora_jax.sharding import explicit


def transformation(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps a transformation so that explicit mesh axes are automatic inside its `init` and `update`.

    Updates and state are sharded as the params that they belong to. Without explicit axes nothing
    changes.

    Raises:
      ValueError: On `update`, there are sketches on explicit axes, but no params were given.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        if explicit.mesh_of(params) is None:
            return tx.init(params)
        return explicit.call(tx.init, explicit.result_of(tx.init, params), params)

    def update_fn(updates, state, params=None, **extra_args):
        if explicit.mesh_of((updates, params)) is None:
            return tx.update(updates, state, params, **extra_args)
        owners = updates if params is None else params
        if any(is_sketch(leaf) for leaf in jax.tree.leaves(owners, is_leaf=is_sketch)):
            raise ValueError(
                "params must be given to tx.update on a mesh of explicit axes, found None: they say "
                "how the weight of each sketch is sharded"
            )

        def update(updates, state, params, extra_args):
            return tx.update(updates, state, params, **extra_args)

        goals = explicit.result_of(update, owners)
        return explicit.call(update, goals, updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
