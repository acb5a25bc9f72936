"""carry_over: moves an optimizer's state to params some of which are new, removed or frozen."""

from typing import Any

import jax
import optax

from flora_jax.paths import path_name


def carry_over(opt_state: Any, tx: optax.GradientTransformation, params: Any) -> Any:
    """Returns the state of `tx` for new params, keeping all of the old state that still applies.

    Since the keys of projections are derived from the weights' paths, all weights that stay go on as if
    nothing had happened, even in the middle of a cycle.

    Args:
      opt_state: The state so far, of the same chain for other params, for other labels of
        `optax.multi_transform`, or for another `mask`.
      tx: The transformation for the new params.
      params: The new params.

    Returns:
      The state `tx.init(params)`, in which every array that `opt_state` has under the same path, with
      the same shape and dtype, is replaced by the one in `opt_state`.

    Raises:
      ValueError: The two states have nothing in common but counts.

    Examples:
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
