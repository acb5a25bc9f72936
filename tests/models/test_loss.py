"""The loss over chunks of tokens, against the logits of all tokens at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.models import decoder, families, gpt2
from flora_jax.models.attention import CHUNK
from flora_jax.models.loss import losses
from tests.models.test_attention import sizes

DECODER = decoder.Shape(vocabulary=40, width=16, hidden=24, layers=1, heads=2, key_heads=1)
SHAPES = {
    "decoder": DECODER,
    "gpt2": gpt2.Shape(vocabulary=40, width=16, layers=1, heads=2, positions=1536),
}


def cross_entropy(logits, targets):
    """Minus the log of the probability of each target, in float64 on the host."""
    logits = np.asarray(logits, np.float64)
    total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return total - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


class Head(nn.Module):
    """Its losses and its logits."""

    @nn.compact
    def __call__(self, x, targets):
        head = nn.Dense(11, name="head")
        return losses(head, x, targets), head(x)


@pytest.mark.parametrize("length", [1, 7, 512, 1024, 1030, 1536])
def test_each_token_has_its_own_loss(length):
    x = jax.random.normal(jax.random.key(0), (3, length, 5))
    targets = jax.random.randint(jax.random.key(1), (3, length), 0, 11)
    (found, logits), _ = Head().init_with_output(jax.random.key(2), x, targets)
    assert found.shape == (3, length)
    np.testing.assert_allclose(found, cross_entropy(logits, targets), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_weighted_losses_of_long_sequences(name, rows):
    """Two chunks of tokens of which some have no loss, the last document's and the padding among them."""
    model = families.module(SHAPES[name])
    tokens = jax.random.randint(jax.random.key(0), (rows, 1025), 0, 40)
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    weights = jax.random.bernoulli(jax.random.key(1), 0.3, targets.shape) & (
        jnp.arange(1024) < 1000
    )
    params = jax.jit(model.init)(jax.random.key(2), tokens[:, :4])["params"]
    variables = {"params": params}
    found = jax.jit(model.apply)(variables, tokens, targets, weights)
    each = cross_entropy(jax.jit(model.apply)(variables, tokens), targets)
    expected = each[np.asarray(weights)].mean()
    assert abs(float(found) / expected - 1) < 1e-5


@pytest.mark.parametrize("length", [1024, 1030, 1600])
def test_no_more_than_a_chunk_of_logits_exists(length):
    """Of a vocabulary that is larger than all else."""
    x = jnp.zeros((1, length, 5))
    targets = jnp.zeros((1, length), jnp.int32)

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return losses(nn.Dense(1000), x, targets).sum()

    params = {"params": {"Dense_0": {"kernel": jnp.zeros((5, 1000)), "bias": jnp.zeros(1000)}}}
    most = max(sizes(jax.grad(Wide().apply), params, x))
    assert 1000 * 300 < most <= 1000 * CHUNK
