"""The decoder family against its formulas in numpy, float64, one token's layer after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from flora_jax.models import decoder, families
from tests.helpers import normal

SHAPE = decoder.Shape(31, 24, 40, 2, 4, 2, jnp.float32, theta=300.0, epsilon=1e-5)
SHAPES = {
    "llama": SHAPE,
    "qwen2": dataclasses.replace(SHAPE, bias=True, tied=True),
    "qwen3": dataclasses.replace(SHAPE, normed_heads=True, head_size=10),
    "all biases": dataclasses.replace(SHAPE, bias=True, out_bias=True, feed_forward_bias=True),
    "no gate": dataclasses.replace(SHAPE, gated=False, activation="gelu"),
    "a head a query": dataclasses.replace(SHAPE, key_heads=4),
}
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9))


def params_of(shape):
    shapes = families.outline(decoder.Decoder(shape))
    return jax.tree.map(lambda x: jnp.asarray(normal(x.size, x.shape)) / 3, shapes)


def norm(scale, x, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def turned(x, theta):
    """Rotary positions: pairs `(i, i + size / 2)` of `(B, T, heads, size)`, turned by position times frequency."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    pairs = pairs * np.exp(1j * angles)[None, :, None]
    return np.concatenate([pairs.real, pairs.imag], -1)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def logits_of(shape, params, tokens):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x, (rows, length) = params["embed"]["embedding"][tokens], tokens.shape
    act = {"silu": silu, "gelu": gelu}[shape.activation]
    for i in range(shape.layers):
        p = jax.tree.map(lambda x, i=i: x[i], params["layers"])
        y = norm(p["attention_norm"]["scale"], x, shape.epsilon)
        q, k, v = (
            dense(p[n], y).reshape(rows, length, -1, shape.size) for n in ("query", "key", "value")
        )
        if shape.normed_heads:
            q = norm(p["query_norm"]["scale"], q, shape.epsilon)
            k = norm(p["key_norm"]["scale"], k, shape.epsilon)
        q, k = turned(q, shape.theta), turned(k, shape.theta)
        heads = []
        for head in range(shape.heads):
            own = head // (shape.heads // shape.key_heads)
            scores = np.einsum("bqd,bkd->bqk", q[:, :, head], k[:, :, own]) / np.sqrt(shape.size)
            weights = np.exp(np.where(np.tri(length, dtype=bool), scores, -np.inf))
            weights /= weights.sum(-1, keepdims=True)
            heads.append(weights @ v[:, :, own])
        x = x + dense(p["out"], np.concatenate(heads, -1))
        y = norm(p["feed_forward_norm"]["scale"], x, shape.epsilon)
        up = dense(p["up"], y)
        x = x + dense(p["down"], act(dense(p["gate"], y)) * up if shape.gated else act(up))
    x = norm(params["norm"]["scale"], x, shape.epsilon)
    return x @ (params["embed"]["embedding"].T if shape.tied else params["head"]["kernel"])


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_the_formulas(name):
    shape = SHAPES[name]
    params = params_of(shape)
    found = decoder.Decoder(shape).apply({"params": params}, jnp.asarray(TOKENS))
    expected = logits_of(shape, params, TOKENS)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_loss_in_chunks_is_the_mean_surprise():
    windows = np.random.default_rng(1).integers(0, 31, (2, 1025))  # two chunks
    params = params_of(SHAPE)
    found = decoder.loss(decoder.Decoder(SHAPE), params, jnp.asarray(windows))
    logits = logits_of(SHAPE, params, windows[:, :-1])
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logits, windows[:, 1:, None], -1).mean()
    assert float(found) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("remat", [True, False])
def test_unrolled_layers_are_the_stacked_ones(remat):
    params = params_of(SHAPE)
    apart = {name: x for name, x in params.items() if name != "layers"}
    for i in range(2):
        apart[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i], params["layers"])
    unrolled = decoder.Decoder(dataclasses.replace(SHAPE, scan=False, remat=remat))
    assert jax.tree.map(jnp.shape, apart) == jax.tree.map(jnp.shape, families.outline(unrolled))
    found, expected = (
        model.apply({"params": p}, jnp.asarray(TOKENS))
        for model, p in ((unrolled, apart), (decoder.Decoder(SHAPE), params))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sharded", [("data",), ("data", "model")])
def test_sharded_activations_are_the_same_numbers(sharded):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"), axis_types=kinds)
    params = params_of(SHAPE)
    model = decoder.Decoder(dataclasses.replace(SHAPE, sharded=sharded))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, jnp.asarray(TOKENS))
    expected = decoder.Decoder(SHAPE).apply({"params": params}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_sequence_longer_than_the_window_is_refused():
    model = decoder.Decoder(dataclasses.replace(SHAPE, window=9))
    params = params_of(SHAPE)
    found = model.apply({"params": params}, jnp.asarray(TOKENS))
    np.testing.assert_array_equal(
        found, decoder.Decoder(SHAPE).apply({"params": params}, jnp.asarray(TOKENS))
    )
    with pytest.raises(ValueError, match=r"must have at most 9 tokens, the window of .*, found 10"):
        model.apply({"params": params}, jnp.zeros((1, 10), jnp.int32))
    cache = decoder.make_cache(model.shape, 1, 12)
    with pytest.raises(ValueError, match="found 12"):
        model.apply({"params": params}, jnp.zeros((1, 1), jnp.int32), cache=cache)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match="heads must be a multiple of the key heads, found 4 and 3"
    ):
        dataclasses.replace(SHAPE, key_heads=3)
    with pytest.raises(ValueError, match=r"width of a head must be even, .* found 7"):
        dataclasses.replace(SHAPE, head_size=7)
