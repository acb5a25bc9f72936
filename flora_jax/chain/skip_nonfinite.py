"""skip_nonfinite: leaves out micro-steps whose gradients have a NaN or an infinity."""

import jax
import jax.numpy as jnp
import optax

from flora_jax.chain import states
from flora_jax.chain.transformation import transformation
from flora_jax.sharding import manual


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Leaves out each micro-step whose gradients have a NaN or an infinity, as if it had not been taken.

    On such a micro-step the updates are zero, and the state of `inner` stays as it was. It differs from
    `optax.apply_if_finite` in that sketches are allowed, and that there is no limit to the number of
    micro-steps left out.

    Args:
      inner: The transformation to wrap. It should be the entire chain, so that all counts in its state
        agree.

    Returns:
      A transformation with the state of `optax.apply_if_finite`, whose `total_notfinite` is the number
      of micro-steps left out so far.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        count = jnp.zeros([], jnp.int32)
        return optax.ApplyIfFiniteState(count, jnp.array(True), jnp.copy(count), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        finite = jnp.array(True)
        for leaf in jax.tree.leaves(states.numbers(updates)):
            finite &= jnp.all(jnp.isfinite(leaf))
        finite = manual.everywhere(finite)

        def proceed(inner_state):
            return inner.update(updates, inner_state, params, **extra_args)

        shapes, _ = jax.eval_shape(proceed, state.inner_state)

        def skip(inner_state):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), inner_state

        result, inner_state = manual.switch(finite, (skip, proceed), state.inner_state)
        bad = optax.safe_increment(state.notfinite_count)
        total = optax.safe_increment(state.total_notfinite)
        return result, optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, bad),
            last_finite=finite,
            total_notfinite=jnp.where(finite, state.total_notfinite, total),
            inner_state=inner_state,
        )

    return transformation(optax.GradientTransformationExtraArgs(init_fn, update_fn))
