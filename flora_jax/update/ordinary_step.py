"""ordinary_step: full gradients, `tx.update` and `optax.apply_updates`; other steps are compared with it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

from flora_jax.sharding.partition import constrain


def ordinary_step(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    shardings: tuple[Any, Any] = (None, None),
) -> Any:
    """Returns a compiled training step as optax's users write it, in which every gradient exists in full.

    An adapter's step is one as well: its own params are trained, the model's are the first part of the
    batch.

    Args:
      loss: The function `(params, *batch) -> scalar`.
      tx: Any optax transformation.
      shardings: Trees of the shardings of the params, which hold for their gradients too, and of the state;
        None leaves them to the compiler.

    Returns:
      `step(params, state, *batch)`, which gives `(params, state, loss)` and overwrites the params and the
      state that it gets.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> step = ordinary_step(lambda p, x: jnp.sum((p - x) ** 2), optax.sgd(0.25))
      >>> params = jnp.zeros(2)
      >>> params, state, loss = step(params, optax.sgd(0.25).init(params), jnp.array([2.0, 4.0]))
      >>> params.tolist(), float(loss)
      ([1.0, 2.0], 20.0)
    """
    of_params, of_state = shardings

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(_put(grads, of_params), state, params)
        params = optax.apply_updates(params, updates)
        return _put(params, of_params), _put(state, of_state), value

    return step


def _put(tree: Any, shardings: Any) -> Any:
    return tree if shardings is None else jax.tree.map(constrain, tree, shardings)
