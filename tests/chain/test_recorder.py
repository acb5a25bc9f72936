"""What a chain says of itself: the projection and the number of micro-steps in an optimizer step."""

import jax
import jax.numpy as jnp
import optax
import pytest

import flora_jax
from flora_jax.chain.recorder import settings

PARAMS = {"kernel": jax.ShapeDtypeStruct((64, 48), jnp.float32)}
PROJECTION = flora_jax.Projection(4, min_dim=8, resample_every=6, seed=3)


@pytest.mark.parametrize("preset", ("paper", "advised"))
def test_of_flora(preset):
    tx = flora_jax.flora(
        0.1, projection=PROJECTION, accumulation_steps=3, preset=preset, skip_nonfinite=True
    )
    assert settings(tx, PARAMS) == (PROJECTION, 3)


def test_without_a_projection_or_accumulation():
    assert settings(optax.adam(0.1), PARAMS) == (None, 1)
    tx = flora_jax.flora(0.1, projection=PROJECTION)
    assert settings(tx, PARAMS) == (PROJECTION, 1)


def test_of_a_schedule():
    def every(step):
        return 2 + step // 100

    tx = flora_jax.flora(0.1, rank=4, accumulation_steps=every)
    assert settings(tx, PARAMS)[1] is every


def test_two_projections_are_refused():
    other = flora_jax.Projection(2, min_dim=8)
    tx = optax.partition(
        {
            "a": flora_jax.flora(0.1, projection=PROJECTION),
            "b": flora_jax.flora(0.1, projection=other),
        },
        {"kernel": "a", "head": "b"},
    )
    with pytest.raises(ValueError, match="must have one projection, found 2"):
        settings(tx, {**PARAMS, "head": PARAMS["kernel"]})
