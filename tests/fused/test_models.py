"""value_and_grad on whole models, against JAX's own gradient."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_jax
from flora_jax.chain.sketch import is_sketch
from flora_jax.models import attention, decoder, gpt2, t5
from tests.helpers import Naive, assert_close, matrix_of_a, normal, often

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 13)), jnp.int32)


def cross_entropy(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(
        jnp.asarray(logits, jnp.float32), targets
    ).mean()


def compare(loss, params, side="larger", whole=()):
    projection = flora_jax.Projection(4, min_dim=12, side=side)
    grad_fn = flora_jax.value_and_grad(loss, projection)
    value, grads = jax.jit(lambda p: grad_fn(p, cycle=jnp.int32(2)))(params)
    expected_value, expected = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    leaves = jax.tree.leaves(grads, is_leaf=is_sketch)
    assert sum(map(is_sketch, leaves)) >= 2
    for leaf, gradient in zip(leaves, jax.tree.leaves(expected), strict=True):
        if is_sketch(leaf):
            gradient = Naive(leaf.spec).project(matrix_of_a(leaf.spec, 2), gradient)
            leaf = leaf.data
        assert_close(leaf, gradient, 1e-4)
    assert {(use.path, use.primitive) for use in grad_fn.uses(params) if use.whole} == set(whole)


def init(model, *args):
    params = jax.jit(model.init)(jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda x: x + 0.02 * jnp.asarray(normal(x.size, x.shape)), params)


@pytest.mark.parametrize(
    ("scan", "remat", "side"),
    often(
        itertools.product([True, False], [True, False], ["input", "output"]),
        (True, True, "input"),
        (False, True, "output"),
    ),
)
def test_llama(scan, remat, side):
    """Rotary positions, grouped-query attention, SwiGLU, chunks of attention and of the loss."""
    shape = decoder.Shape(48, 32, 56, 2, 4, 2, jnp.float32, remat=remat, scan=scan)
    model = decoder.Decoder(shape)
    compare(lambda p: decoder.loss(model, p, TOKENS), init(model, TOKENS), side)


def test_llama_in_chunks(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 4)
    model = decoder.Decoder(decoder.Shape(48, 32, 56, 2, 4, 2, jnp.float32))
    compare(lambda p: decoder.loss(model, p, TOKENS), init(model, TOKENS))


class Experts(nn.Module):
    """Two of four experts for each token, by dense dispatch."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(48, 32, name="embed")(tokens)
        gates = jax.nn.softmax(nn.Dense(4, name="router")(x))
        best, index = jax.lax.top_k(gates, 2)
        dispatch = jnp.einsum("btk,btke->bte", best, jax.nn.one_hot(index, 4))
        make = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("experts_up", make, (4, 32, 64))
        down = self.param("experts_down", make, (4, 64, 32))
        y = nn.silu(jnp.einsum("btd,edf->btef", x, up))
        y = jnp.einsum("btef,efd,bte->btd", y, down, dispatch)
        return nn.Dense(48, name="head")(x + y)


class Vit(nn.Module):
    """A convolution cuts patches; a class token; attention without a mask."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(32, (4, 4), strides=(4, 4), padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, 32)
        token = self.param("class", nn.initializers.normal(), (1, 1, 32))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 32)), x], axis=1)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(16, name="head")(x[:, 0])


class Lstm(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(48, 32, name="embed")(tokens)
        return nn.Dense(48, name="head")(nn.RNN(nn.OptimizedLSTMCell(32), name="rnn")(x))


LANGUAGE = {"experts": Experts, "lstm": Lstm}


@pytest.mark.parametrize("side", often(["input", "output"], "input"))
@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name, side):
    model = LANGUAGE[name]()
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]

    def loss(params):
        return cross_entropy(model.apply({"params": params}, inputs), targets)

    compare(loss, init(model, inputs), side)


@pytest.mark.parametrize("side", often(["input", "output"], "output"))
def test_gpt2(side):
    """Learned positions, fused query, key and value, the head tied to the embedding."""
    model = gpt2.Gpt2(gpt2.Shape(48, 16, 32, 2, 4))
    compare(lambda p: gpt2.loss(model, p, TOKENS), init(model, TOKENS), side)


@pytest.mark.parametrize("side", often(["input", "output"], "input"))
def test_t5(side):
    """Encoder and decoder, relative position bias, cross-attention, tied embedding."""
    model = t5.T5(t5.Shape(48, 32, 64, 2, 4, 8))
    compare(lambda p: t5.loss(model, p, TOKENS), init(model, TOKENS, TOKENS), side)


@pytest.mark.parametrize("side", often(["input", "output"], "output"))
def test_vit(side):
    model, images = Vit(), jnp.asarray(normal(3, (2, 12, 12, 3)))

    def loss(params):
        return cross_entropy(model.apply({"params": params}, images), jnp.array([1, 2]))

    compare(loss, init(model, images), side)


# what a generated function does to a weight on the way to its use, each keeping a 16 x 16 matrix
MOVES = {
    "transpose": lambda w: w.T,
    "reverse": lambda w: w[::-1],
    "scale": lambda w: 0.7 * w,
    "scale_rows": lambda w: w * jnp.linspace(0.5, 1.5, 16)[:, None],
    "scale_columns": lambda w: w / jnp.linspace(0.5, 1.5, 16),
    "shift": lambda w: 0.1 - w,
    "reshape": lambda w: w.reshape(4, 4, 16).reshape(16, 16),
    "swap_halves": lambda w: jnp.stack([w[8:], w[:8]]).reshape(16, 16),
    "cast": lambda w: w.astype(jnp.float32),
    "add_axis": lambda w: w[None, :, :, None][0, :, :, 0],
    "jit": jax.jit(lambda w: w.T.reshape(16, 16)),
    "exp": jnp.exp,
}
USES = {
    "product": lambda x, w: jnp.tanh(x @ w / 4),
    "product_from_the_left": lambda x, w: jnp.tanh((w @ x.T / 4).T),
    "rows": lambda x, w: x + w[jnp.array([0, 3, 3, 15, 7])],
    "scan": lambda x, w: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w / 4), None), x, None, 2)[0],
    "remat": jax.checkpoint(lambda x, w: jnp.tanh(x @ w / 4)),
    "cond": lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w / 4, lambda: x - x @ w.T / 4),
    "norm": lambda x, w: x / (1 + jnp.linalg.norm(w)),
    "per_example": lambda x, w: jax.vmap(lambda row: jnp.tanh(w @ row / 4))(x),
}


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.lists(st.sampled_from(sorted(MOVES)), max_size=3),
            st.sampled_from(sorted(USES)),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["input", "output"]),
)
def test_generated_functions(steps, side):
    """Any moves, any uses, of two weights in turn; with a rule or without."""
    x = jnp.asarray(normal(0, (5, 16)))
    params = {name: jnp.asarray(normal(i, (16, 16))) / 4 for i, name in enumerate("ab")}

    def loss(params):
        y = x
        for name, moves, use in steps:
            w = params[name]
            for move in moves:
                w = MOVES[move](w)
            y = USES[use](y, w)
        return jnp.sum(jnp.sin(y))

    projection = flora_jax.Projection(4, min_dim=8, side=side)
    _, grads = flora_jax.value_and_grad(loss, projection)(params, cycle=1)
    expected = jax.grad(loss)(params)
    for name in "ab":
        spec = grads[name].spec
        goal = Naive(spec).project(matrix_of_a(spec, 1), expected[name])
        error = np.linalg.norm(np.asarray(grads[name].data) - goal)
        assert error <= 1e-4 * (1 + np.linalg.norm(goal))
