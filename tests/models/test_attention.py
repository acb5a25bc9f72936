import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.models.attention import CHUNK, Sight, attention


@pytest.mark.parametrize("length", [7, 512, 1024, 1030, 1536])
def test_attention_in_chunks_is_attention(length):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, length, 2, 4)) for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    expected = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    np.testing.assert_allclose(attention(q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize("length", [7, 1024, 1030])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 3, "array"])
def test_documents_windows_and_caps(length, cap, window):
    """Against a loop over queries, of heads that share keys."""
    random = np.random.default_rng(0)
    q = random.normal(size=(2, length, 4, 6)).astype(np.float32)
    k, v = random.normal(size=(2, 2, length, 2, 6)).astype(np.float32)
    segments = np.sort(random.integers(0, 4, (2, length)))
    reach = length if window is None else 3
    expected = np.zeros(q.shape)
    for row in range(2):
        for i in random.choice(length, 7, replace=False):
            seen = [
                j
                for j in range(max(0, i - reach + 1), i + 1)
                if segments[row, j] == segments[row, i]
            ]
            for head in range(4):
                scores = 0.3 * k[row, seen, head // 2].astype(float) @ q[row, i, head]
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                weights = np.exp(scores - scores.max())
                expected[row, i, head] = weights @ v[row, seen, head // 2] / weights.sum()
    sight = Sight(segments=jnp.asarray(segments))
    window = jnp.int32(3) if window == "array" else window
    found = np.asarray(attention(*map(jnp.asarray, (q, k, v)), sight, window, 0.3, cap))
    looked = expected != 0
    assert looked.sum() == 2 * 7 * 4 * 6
    np.testing.assert_allclose(found[looked], expected[looked], atol=2e-6)


def sizes(function, *arguments):
    """The numbers in each float32 array of a function's jaxpr."""
    shapes = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(function)(*arguments)))
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


@pytest.mark.parametrize("length", [1024, 1030, 1600])
def test_no_more_than_a_chunk_of_scores_exists(length):
    x = jax.ShapeDtypeStruct((1, length, 3, 4), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def total(x, segments):
        return attention(x, x, x, Sight(segments=segments)).sum()

    most = max(sizes(jax.grad(total), x, segments))
    assert 3 * length * 300 < most <= 3 * length * CHUNK


@pytest.mark.parametrize("described", [False, True])
def test_the_kernel_is_of_the_machine_that_is_compiled_for(monkeypatch, described):
    """On a host with a GPU the kernel is taken, but not where the mesh is one of devices that are none."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jax.ShapeDtypeStruct((1, 16, 2, 64), jnp.bfloat16)
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), kinds, devices=jax.devices()[:1])
    if not described:
        with pytest.raises(RuntimeError, match=r"(?i)cudnn|gpu|cuda"):  # here is none
            jax.eval_shape(lambda x: attention(x, x, x), x)
        return
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda x: attention(x, x, x)).lower(x)
    assert "cudnn" not in lowered.as_text().lower()
