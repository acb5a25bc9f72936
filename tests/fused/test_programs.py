"""Random programs: uses × dtypes × sides × distributions × control flow, against the projection of `jax.grad`."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

import flora_jax
from flora_jax.chain.sketch import is_sketch
from tests.helpers import Naive, matrix_of_a, normal

WIDTH, OTHER, ROWS = 12, 10, 5
CYCLE = 3

# Each step is a function of the state `(ROWS, WIDTH)` and of a weight, to a state.
SQUARE = {
    "product": lambda x, w: x @ w,
    "transposed": lambda x, w: x @ w.T,
    "twice": lambda x, w: jnp.tanh(x @ w) @ w,
    "scaled": lambda x, w: x @ (w * 0.5),
    "rows scaled": lambda x, w: x @ (w * jnp.arange(1.0, WIDTH + 1)[:, None] / WIDTH),
    "columns scaled": lambda x, w: x @ (w / jnp.arange(1.0, WIDTH + 1)),
    "shifted": lambda x, w: x @ (0.5 - w),
    "reversed": lambda x, w: x[:, ::-1] @ w[::-1, ::-1],
    "sliced": lambda x, w: jnp.pad(x[:, 2:9] @ w[2:9, 1:], ((0, 0), (0, 1))),
    "padded": lambda x, w: (jnp.pad(x, ((0, 0), (1, 0))) @ jnp.pad(w, ((1, 0), (0, 3))))[:, :WIDTH],
    "split": lambda x, w: jnp.concatenate([x @ part for part in jnp.split(w, 3, axis=1)], 1),
    "masked": lambda x, w: x @ jnp.where(jnp.arange(WIDTH) % 2 > 0, w, 0.0),
    "masked on both sides": lambda x, w: x @ jnp.where(jnp.tri(WIDTH) > 0, w, 0.0),
    "overwritten": lambda x, w: x @ w.at[jnp.array([1, 4])].set(0.0),
    "looked up": lambda x, w: x + w[jnp.arange(ROWS) % 3],
    "elementwise": lambda x, w: x @ jnp.sin(w),
    "penalty": lambda x, w: x * (1 + 0.01 * jnp.sum(w**2)),
    "heads": lambda x, w: jnp.einsum("bi,ihk->bhk", x, w.reshape(WIDTH, 3, 4)).reshape(ROWS, WIDTH),
    "rounded": lambda x, w: x @ (w + lax.stop_gradient(jnp.round(4 * w) / 4 - w)),
    "beside its own product": lambda x, w: x @ (w + x.T @ jnp.tanh(x)),
    "grouped by rows": lambda x, w: lax.ragged_dot(x, jnp.stack([w, w.T]), jnp.array([2, 3])),
    "convolution": lambda x, w: lax.conv_general_dilated(
        x[:, None, None], w[None, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[:, 0, 0],
}
STACKED = {
    "scan": lambda step, x, w: lax.scan(lambda h, v: (step(h, v), None), x, w)[0],
    "scan with remat": lambda step, x, w: lax.scan(
        jax.checkpoint(lambda h, v: (step(h, v), None)), x, w
    )[0],
    "one by one": lambda step, x, w: step(step(x, w[0]), w[1]),
    "last first": lambda step, x, w: lax.scan(lambda h, v: (step(h, v), None), x, w, reverse=True)[
        0
    ],
    "by index": lambda step, x, w: lax.fori_loop(0, 2, lambda i, h: step(h, w[i]), x),
    "branches": lambda step, x, w: lax.cond(
        x[0, 0] > 0, lambda: step(x, w[0]), lambda: 2 * step(x, w[1])
    ),
    "vmap": lambda step, x, w: jax.vmap(step, in_axes=(None, 0))(x, w).sum(0),
}
WRAPPERS = {
    "none": lambda step: step,
    "jit": jax.jit,
    "remat": jax.checkpoint,
}


@st.composite
def programs(draw):
    step = st.tuples(
        st.sampled_from(sorted(SQUARE)),
        st.sampled_from(sorted(WRAPPERS)),
        st.none() | st.sampled_from(sorted(STACKED)),
    )
    # JAX 0.8 has no batching rule for ragged products whose matrices are mapped over
    step = step.filter(lambda drawn: (drawn[0], drawn[2]) != ("grouped by rows", "vmap"))
    steps = draw(st.lists(step, min_size=1, max_size=3))
    settings = dict(
        side=draw(st.sampled_from(["input", "output", "larger"])),
        distribution=draw(st.sampled_from(["gaussian", "rademacher", "orthonormal", "srht"])),
        block=draw(st.sampled_from([1, 64, 2**22])),
    )
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"]))
    shared = draw(st.booleans())
    return steps, settings, dtype, shared


def check(program):
    steps, settings, dtype, shared = program
    params = {}
    names = []
    for i, (_, _, stack) in enumerate(steps):
        kind = "stack" if stack else "matrix"
        name = kind if shared else f"{kind}{i}"
        names.append(name)
        shape = (2, WIDTH, WIDTH) if stack else (WIDTH, WIDTH)
        params[name] = (jnp.asarray(normal(i, shape)) / WIDTH**0.5).astype(dtype)
    x = jnp.asarray(normal(9, (ROWS, WIDTH)))

    def loss(params, x):
        for name, (use, wrapper, stack) in zip(names, steps, strict=True):
            step = WRAPPERS[wrapper](SQUARE[use])
            wide = params[name].astype(jnp.float32)
            x = STACKED[stack](step, x, wide) if stack else step(x, wide)
            x = jnp.tanh(x)
        return jnp.sum(x**2)

    rule = flora_jax.Projection(3, min_dim=4, **settings)
    grad_fn = flora_jax.value_and_grad(loss, rule)
    value, sketches = jax.jit(functools.partial(grad_fn, cycle=jnp.int32(CYCLE)))(params, x)
    expected_value, gradients = jax.jit(jax.value_and_grad(loss))(params, x)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    tolerance = {"float32": 2e-4, "bfloat16": 3e-2, "float16": 4e-3}[dtype]
    for name, sketch in sketches.items():
        assert is_sketch(sketch), name
        gradient = np.asarray(gradients[name].astype(jnp.float32), np.float64)
        expected = Naive(sketch.spec).project(matrix_of_a(sketch.spec, CYCLE), gradient)
        error = np.linalg.norm(np.asarray(sketch.data, np.float64) - expected)
        # a gradient that cancels is as exact as what it is the difference of
        assert error <= tolerance * (
            np.linalg.norm(expected) + 1e-2 * float(np.sqrt(expected.size))
        )


@hypothesis.settings(max_examples=12, derandomize=True)
@hypothesis.given(programs())
def test_programs(program):
    check(program)


@pytest.mark.long
@hypothesis.settings(max_examples=600, derandomize=True)
@hypothesis.given(programs())
def test_many_programs(program):
    check(program)


@pytest.mark.parametrize("stack", [None, *sorted(STACKED)][::3])
@pytest.mark.parametrize("use", sorted(SQUARE))
def test_each_use_alone(use, stack):
    check(([(use, "none", stack)], dict(side="input"), "float32", False))
