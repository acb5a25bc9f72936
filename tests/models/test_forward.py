"""The forward computation that is compiled for a plan, against the experiments' models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import gpt2, llama, t5, vit
from flora_jax.models import forward, shapes

WIDTH, VOCABULARY = 64, 97


def test_llama():
    shape = llama.Shape(VOCABULARY, WIDTH, 96, 2, 4, 2, jnp.float32, epsilon=1e-6)
    config = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 96}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    given = windows(1025)  # two chunks
    params = llama.Llama(shape).init(jax.random.key(0), given[:, :4])["params"]
    same(config, params, (given,), llama.loss(llama.Llama(shape), params, given))


def test_gpt2():
    shape = gpt2.Shape(VOCABULARY, 32, WIDTH, 2, 4, dtype=jnp.float32, epsilon=1e-6)
    config = {"model_type": "gpt2", "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32}
    given = windows(33)
    params = gpt2.Gpt2(shape).init(jax.random.key(0), given[:, :4])["params"]
    same(config, params, (given,), gpt2.loss(gpt2.Gpt2(shape), params, given))


@pytest.mark.parametrize("gated", [False, True])
def test_t5(gated):
    shape = t5.Shape(VOCABULARY, WIDTH, 96, 2, 4, 8, 8, gated=gated, tied=not gated)
    config = {"model_type": "t5", "d_model": WIDTH, "d_ff": 96, "d_kv": 8, "num_layers": 2}
    config |= {"num_heads": 4, "relative_attention_num_buckets": 8}
    config |= {"feed_forward_proj": "gated-gelu" if gated else "relu"}
    config |= {"tie_word_embeddings": not gated}
    given = windows(33)
    model = t5.T5(shape)
    params = model.init(jax.random.key(0), given, given, given)["params"]
    renamed = {"shared_embed": params["shared_embed"]}
    if gated:
        renamed["head"] = params["head"]
    for stack in ("encoder", "decoder"):
        renamed[stack] = params[stack]["layers"]
        renamed[f"{stack}_norm"] = params[stack]["norm"]
        renamed[f"{stack}_bias"] = {"kernel": params[stack]["relative_bias"]}
    same(config, renamed, (given,), t5.loss(model, params, given))


def test_vit():
    shape = vit.Shape(8, 2, 1, WIDTH, 2, 4, 96, 10, epsilon=1e-6)
    config = {"model_type": "vit", "hidden_size": WIDTH, "intermediate_size": 96, "image_size": 8}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 2}
    config |= {"num_channels": 1, "num_labels": 10}
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    classes = jnp.array([1, 7, 0])
    model = vit.Vit(shape)
    params = model.init(jax.random.key(0), images)["params"]
    expected = vit.loss(model, params, images, classes)
    same(config, params, (vit.patches(images, 2), classes), expected)


@pytest.mark.parametrize("length", [7, 512, 1024, 1030, 1536])
def test_attention_in_parts_is_attention(length):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, length, 2, 4)) for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    expected = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    np.testing.assert_allclose(forward.attention(q, k, v), expected, atol=2e-6)


def windows(length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, length), 0, VOCABULARY)


def same(config, params, given, expected):
    model = shapes.from_config({"vocab_size": VOCABULARY, **config}, jnp.float32)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.params)
    size, length = given[0].shape[:2]
    made = forward.batch(model, size, length - 1)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, given)
    found = forward.loss(model)(params, *given)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert abs(float(expected) - np.log(model.outputs)) < 2 and float(expected) > 1
