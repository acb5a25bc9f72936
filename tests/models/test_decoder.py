"""The decoder family against its formulas in numpy, float64, one token's layer after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from flora_jax.models import decoder, families
from flora_jax.models.rotary import Rotary
from tests.helpers import normal

SHAPE = decoder.Shape(31, 24, 40, 2, 4, 2, jnp.float32, rotary=Rotary(300.0), epsilon=1e-5)
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
        q, k = turned(q, shape.rotary.theta), turned(k, shape.rotary.theta)
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


MIXED = dataclasses.replace(
    SHAPE,
    layers=3,
    window=4,
    local=(True, False, True),
    local_rotary=Rotary(40.0),
    post_norms=True,
    centred=True,
    scaled=True,
    score_cap=1.5,
    logit_cap=2.0,
)
EXPERTS = dataclasses.replace(SHAPE, experts=5, chosen=2)


@pytest.mark.parametrize("shape", [SHAPE, MIXED, EXPERTS], ids=["plain", "mixed", "experts"])
def test_documents_in_one_sequence_are_as_alone(shape):
    params = params_of(shape)
    model = decoder.Decoder(shape)
    documents = [TOKENS[0, :4], TOKENS[1, :9], TOKENS[0, 4:9]]
    row = np.concatenate([*documents, [0, 0]])[None]
    segments = np.repeat([1, 2, 3, 0], [4, 9, 5, 2])[None]
    positions = np.concatenate([np.arange(n) for n in (4, 9, 5, 2)])[None]
    together = model.apply(
        {"params": params}, jnp.asarray(row), positions=positions, segments=segments
    )
    alone = [model.apply({"params": params}, jnp.asarray(one)[None])[0] for one in documents]
    np.testing.assert_allclose(together[0, :18], np.concatenate(alone), atol=2e-5)


@pytest.mark.parametrize("shape", [MIXED, EXPERTS], ids=["mixed", "experts"])
def test_a_cache_goes_on_where_the_prompt_ends(shape):
    params = params_of(shape)
    model = decoder.Decoder(shape)
    expected = model.apply({"params": params}, jnp.asarray(TOKENS))
    cache = decoder.make_cache(shape, 2, 12)
    found, cache = model.apply({"params": params}, jnp.asarray(TOKENS[:, :5]), cache=cache)
    parts = [found]
    for i in range(5, 9):
        one, cache = model.apply({"params": params}, jnp.asarray(TOKENS[:, i : i + 1]), cache=cache)
        parts.append(one)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=2e-5)


def test_local_layers_do_not_see_what_is_far():
    """With a window of 2 in all of three layers, a token depends on the three before it and no more."""
    shape = dataclasses.replace(SHAPE, layers=3, window=2)
    params = params_of(shape)
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 31
    one, two = (
        np.asarray(decoder.Decoder(shape).apply({"params": params}, jnp.asarray(t)))
        for t in (TOKENS, changed)
    )
    differs = (one != two).any((0, 2))
    assert differs.tolist() == [False] * 3 + [True] * 4 + [False] * 2


@pytest.mark.parametrize("shape", [MIXED, EXPERTS], ids=["mixed", "experts"])
def test_unrolled_layers_of_every_kind(shape):
    params = params_of(shape)
    apart = {name: x for name, x in params.items() if name != "layers"}
    for i in range(shape.layers):
        apart[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i], params["layers"])
    unrolled = decoder.Decoder(dataclasses.replace(shape, scan=False))
    found, expected = (
        model.apply({"params": p}, jnp.asarray(TOKENS))
        for model, p in ((unrolled, apart), (decoder.Decoder(shape), params))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match="heads must be a multiple of the key heads, found 4 and 3"
    ):
        dataclasses.replace(SHAPE, key_heads=3)
    with pytest.raises(ValueError, match="local must have a bool for each of 2 layers, found 1"):
        dataclasses.replace(SHAPE, local=(True,))
    with pytest.raises(ValueError, match=r"width of a head must be even, .* found 7"):
        dataclasses.replace(SHAPE, head_size=7)
