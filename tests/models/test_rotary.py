import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.models.rotary import Rotary, rotate
from tests.helpers import normal


def test_a_score_of_rotated_states_depends_on_their_distance_alone():
    q, k = jnp.asarray(normal(0, (1, 1, 1, 8))), jnp.asarray(normal(1, (1, 1, 1, 8)))
    frequencies = Rotary(300.0).frequencies(8, 1)

    def score(first, second):
        left, right = (
            rotate(x, frequencies, jnp.array([[i]])) for x, i in ((q, first), (k, second))
        )
        return float((left * right).sum())

    assert score(3, 7) == pytest.approx(score(103, 107), rel=1e-4)
    assert score(3, 7) != pytest.approx(score(3, 8), rel=1e-2)
    np.testing.assert_allclose(rotate(q, frequencies), q)  # position 0


def test_a_share_of_a_head_is_turned():
    x = jnp.asarray(normal(0, (1, 5, 2, 8)))
    frequencies = Rotary(share=0.5).frequencies(8, 5)
    assert frequencies.shape == (2,)
    turned = rotate(x, frequencies)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_allclose(turned[..., :4], rotate(x[..., :4], frequencies))


def test_llama_3_stretches_long_waves_alone():
    plain = Rotary(5e5).frequencies(128, 1)
    found = Rotary(5e5, "llama3", 1.0, 8.0, 1.0, 4.0, 8192).frequencies(128, 1)
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(found[waves < 2048], plain[waves < 2048], rtol=1e-6)
    np.testing.assert_allclose(found[waves > 8192], plain[waves > 8192] / 8, rtol=1e-6)
    between = (waves > 2048) & (waves < 8192)
    assert between.sum() > 3
    assert ((found < plain) & (found > plain / 8))[between].all()


def test_dynamic_begins_where_the_old_length_ends():
    rotary = Rotary(1e4, "dynamic", factor=2.0, original=64)
    np.testing.assert_allclose(rotary.frequencies(16, 64), Rotary(1e4).frequencies(16, 64))
    longer = rotary.frequencies(16, 128)
    assert longer[0] == 1.0 and (longer[1:] < Rotary(1e4).frequencies(16, 1)[1:]).all()
    # the base grows by 3 ^ (16 / 14), so that the last frequency is 1 / 3 of what it was
    assert longer[-1] * 3 == pytest.approx(Rotary(1e4).frequencies(16, 1)[-1], rel=1e-5)
