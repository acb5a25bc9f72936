import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import decoder

SHAPE = decoder.Shape(width=32, layers=2, heads=2)


@pytest.fixture(scope="module")
def params():
    return decoder.model(SHAPE).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


def test_no_position_sees_what_comes_after_it(params):
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 256)
    changed = tokens.at[:, 7].add(1)
    one, two = (decoder.model(SHAPE).apply({"params": params}, t) for t in (tokens, changed))
    np.testing.assert_allclose(one[:, :7], two[:, :7], atol=1e-6)
    assert np.abs(one[:, 7:] - two[:, 7:]).max() > 1e-3


def test_loss_is_the_mean_surprise(params):
    windows = jax.random.randint(jax.random.key(2), (2, 9), 0, 256)
    logits = np.asarray(decoder.model(SHAPE).apply({"params": params}, windows[:, :-1]), np.float64)
    odds = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(odds, np.asarray(windows)[:, 1:, None], -1)
    expected = -np.log(picked).mean()
    assert float(decoder.loss(decoder.model(SHAPE), params, windows)) == pytest.approx(
        expected, 1e-5
    )


def test_sample_keeps_the_prompt_and_goes_on(params):
    prompt = jnp.arange(8)[None]
    sampled = decoder.sample(decoder.model(SHAPE), params, prompt, 5, jax.random.key(0), 1.0)
    assert sampled.shape == (1, 13)
    np.testing.assert_array_equal(sampled[:, :8], prompt)


def test_width_must_fit_the_heads():
    with pytest.raises(
        ValueError, match="width must be a multiple of twice the heads, found 30 and 4"
    ):
        decoder.Shape(width=30, heads=4)
