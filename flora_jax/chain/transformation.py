"""Transformation: what each transformation of the chain is wrapped in, so that it runs on meshes of explicit axes."""

import jax
import optax

from flora_jax.chain.sketch import is_sketch
from flora_jax.sharding import explicit


def transformation(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation whose `init` and `update` run with explicit axes automatic inside.

    Updates and state lie where the params do that they belong to.

    Raises:
      ValueError: (on update) explicit axes, sketches, and no params.
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
                "where a weight lies that the sketch is of"
            )

        def update(updates, state, params, extra_args):
            return tx.update(updates, state, params, **extra_args)

        goals = explicit.result_of(update, owners)
        return explicit.call(update, goals, updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
