import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.models.attention import attention, rotate
from tests.helpers import normal


@pytest.mark.parametrize("length", [7, 512, 1024, 1030, 1536])
def test_attention_in_chunks_is_attention(length):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, length, 2, 4)) for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    expected = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    np.testing.assert_allclose(attention(q, k, v), expected, atol=2e-6)


def test_a_score_of_rotated_states_depends_on_their_distance_alone():
    q, k = jnp.asarray(normal(0, (1, 1, 1, 8))), jnp.asarray(normal(1, (1, 1, 1, 8)))

    def score(first, second):
        left, right = (rotate(x, jnp.array([[i]]), 300.0) for x, i in ((q, first), (k, second)))
        return float((left * right).sum())

    assert score(3, 7) == pytest.approx(score(103, 107), rel=1e-4)
    assert score(3, 7) != pytest.approx(score(3, 8), rel=1e-2)
    np.testing.assert_allclose(rotate(q), q)  # position 0
