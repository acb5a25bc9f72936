"""carry_over: an optimizer's state for params of which some are new, gone or frozen."""

from typing import Any

import jax
import optax

from flora_jax.paths import path_name


def carry_over(opt_state: Any, tx: optax.GradientTransformation, params: Any) -> Any:
    """The state of `tx` for these params, with all that `opt_state` already knows.

    Keys come from a weight's path, so what is there for the others goes on as if nothing had happened.

    Args:
      opt_state: the state so far, of the same chain for other params, other labels of
        `optax.multi_transform` or another `mask`.
      tx: the transformation.
      params: the params from now on.

    Returns:
      `tx.init(params)`, in which each array that `opt_state` has under the same path, of the same
      shape and dtype, is the one that it has.

    Raises:
      ValueError: they have nothing in common but counts.

    Example:
      >>> import flora_jax, jax.numpy as jnp
      >>> tx = flora_jax.flora(1e-2, rank=16, accumulation_steps=4)
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> opt_state = tx.init(params)
      >>> params["head"] = jnp.ones((512, 256))
      >>> opt_state = flora_jax.carry_over(opt_state, tx, params)
    """
    known = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(opt_state)}
    carried = 0

    def pick(path, fresh):
        nonlocal carried
        leaf = known.get(path_name(path))
        if leaf is None or (leaf.shape, leaf.dtype) != (fresh.shape, fresh.dtype):
            return fresh
        carried += leaf.ndim > 0
        return leaf

    result = jax.tree_util.tree_map_with_path(pick, tx.init(params))
    if not carried and jax.tree.leaves(params):
        raise ValueError(
            f"opt_state must be of a chain like tx, found none of the {len(jax.tree.leaves(result))} "
            "arrays that tx keeps under a path and of a shape that opt_state has"
        )
    return result
