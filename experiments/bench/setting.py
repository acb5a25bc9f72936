"""What the benches share: a LLaMA of few layers on bytes, and the ordinary step."""

from functools import partial
from typing import Any

import jax
import optax

from experiments.models import llama


def small(width: int, layers: int, **others: Any) -> llama.Llama:
    shape = llama.Shape(
        vocabulary=256,
        width=width,
        hidden=4 * width,
        layers=layers,
        heads=8,
        key_heads=8,
        **others,
    )
    return llama.Llama(shape)


def ordinary_step(loss: Any, tx: optax.GradientTransformation) -> Any:
    """`(params, state, windows) -> (params, state, loss)` with whole gradients; compiled."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, windows):
        value, grads = jax.value_and_grad(loss)(params, windows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step
