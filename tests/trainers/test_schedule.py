"""Schedules that a trainer counts, read by a chain that counts optimizer steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from flora_jax.trainers.schedule import in_micro_steps


def test_the_rate_is_what_the_trainers_log_says():
    """Of gradients that are all one, each update of SGD is the rate that the log shows at the step that applies it."""
    logged = optax.linear_schedule(1.0, 0.0, 64)
    params = {"bias": jnp.zeros(())}
    schedule = in_micro_steps(logged, 4)
    tx = flora_jax.flora(None, rank=4, accumulation_steps=4, optimizer=optax.sgd(schedule))
    state, update, found = tx.init(params), jax.jit(tx.update), {}
    for step in range(64):
        updates, state = update({"bias": jnp.ones(())}, state, params)
        if updates["bias"] != 0:
            found[step] = -float(updates["bias"])
    np.testing.assert_allclose(
        [found[step] for step in range(3, 64, 4)],
        [1 - step / 64 for step in range(3, 64, 4)],
        rtol=1e-6,
    )
    assert len(found) == 16


def test_a_constant_is_a_constant():
    assert in_micro_steps(0.5, 4) == 0.5


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match=r"accumulation_steps must be positive, found 0"):
        in_micro_steps(optax.constant_schedule(1.0), 0)
