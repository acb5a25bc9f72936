import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.models import families, t5
from tests.helpers import normal


def test_t5_buckets():
    """From the paper's description: a bucket each below 8 (of 16 a side), then log-spaced to 128."""
    distance = jnp.arange(-200, 201)
    found = np.asarray(t5.bucket(distance, True, 32, 128))
    past, future = found[:200][::-1], found[201:]
    assert past[:7].tolist() == [1, 2, 3, 4, 5, 6, 7] and (np.diff(past) >= 0).all()
    assert past[-1] == 15 and past[126] == 15 and past[30] < 15
    np.testing.assert_array_equal(future, past + 16)
    one_way = np.asarray(t5.bucket(distance, False, 32, 128))
    assert (one_way[200:] == 0).all() and one_way[0] == 31 and one_way[199] == 1


def test_a_decoder_of_other_length():
    """More layers in the decoder than in the encoder, of which only those there are run."""
    model = t5.T5(t5.Shape(48, 16, 24, 1, 2, 6, decoder_layers=3))
    shapes = families.outline(model)
    layers = {
        name: {x.shape[0] for x in jax.tree.leaves(shapes[name]["layers"])}
        for name in ("encoder", "decoder")
    }
    assert layers == {"encoder": {1}, "decoder": {3}}
    params = jax.tree.map(lambda x: jnp.asarray(normal(x.size, x.shape)) / 4, shapes)
    tokens = jnp.arange(10)[None]
    found = model.apply({"params": params}, tokens, tokens)
    started, cache = model.apply(
        {"params": params}, tokens, None, tokens[:, :4], 10, method="start"
    )
    np.testing.assert_allclose(started, found[:, :4], atol=1e-4)
    for i in range(4, 10):
        logits, cache = model.apply({"params": params}, tokens[:, i : i + 1], cache, method="step")
        np.testing.assert_allclose(logits[:, 0], found[:, i], atol=1e-4)
