"""Forward: the loss of a `shapes.Model` as a function of its params, in plain JAX, for a compiler to weigh.

As `flora_jax.memory.estimate` has it: layers under `scan`, each one rematerialised, attention over `CHUNK` queries and
the logits of `CHUNK` tokens at a time. It computes what the model does, but for constants that weigh
nothing (the base of rotary frequencies, the epsilon of norms), which are the usual ones.

In the shape descriptions `B` is the batch, `T` the sequence, `D` the width, `V` the logits.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax.models.shapes import Model, Stack

CHUNK = 512
"""Tokens whose logits, and whose attention scores, exist at a time."""
_Params = Mapping[str, Any]


def loss(model: Model, place: Callable[[Any], Any] = lambda x: x) -> Callable[..., Any]:
    """`(params, *batch) -> scalar`: the mean cross-entropy, nats per token (or image).

    Args:
      model: of `flora_jax.models.shapes`.
      place: what is done to the states between layers, `(B, T, D)`: a sharding constraint.

    Returns:
      A function of params as `model.params` has them, and of a batch as `batch` does.
    """
    if "patches" in model.params:
        return partial(_vit, model, place)
    of = _t5 if "shared_embed" in model.params else _decoder
    return partial(of, model, place)


def batch(model: Model, size: int, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of what the loss takes: windows `(B, T + 1)`, or of a ViT patches and classes."""
    if "patches" not in model.params:
        return (jax.ShapeDtypeStruct((size, length + 1), jnp.int32),)
    kernel = model.params["patches"]["kernel"]
    assert model.length is not None
    patches = jax.ShapeDtypeStruct((size, model.length - 1, kernel.shape[0]), kernel.dtype)
    return patches, jax.ShapeDtypeStruct((size,), jnp.int32)


def _decoder(model: Model, place: Callable, params: _Params, windows: Any) -> Any:
    tokens, targets = windows[:, :-1], windows[:, 1:]
    (stack,) = model.stacks
    gpt2 = "wte" in params
    table = params["wte" if gpt2 else "embed"]["embedding"]
    x = table[tokens]
    if gpt2:
        x = x + params["wpe"]["embedding"][: x.shape[1]]
    mixed = attention if gpt2 else _rotary
    act = partial(jax.nn.gelu, approximate=True) if gpt2 else jax.nn.silu
    x = _run(place(x), params[stack.name], partial(_layer, stack, mixed, act), place)
    x = place(_norm(params["norm"], x))
    head = params["head"]["kernel"] if "head" in params else None
    return _losses(
        (lambda x: x @ head) if head is not None else (lambda x: x @ table.T), x, targets
    )


def _vit(model: Model, place: Callable, params: _Params, patches: Any, classes: Any) -> Any:
    (stack,) = model.stacks
    x = _dense(params["patches"], patches)
    token = jnp.broadcast_to(params["class_token"], (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([token, x], axis=1) + params["position_embedding"]
    act = partial(jax.nn.gelu, approximate=False)
    every = jax.nn.dot_product_attention
    x = _run(place(x), params[stack.name], partial(_layer, stack, every, act), place)
    logits = _dense(params["head"], _norm(params["norm"], x[:, 0])).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()


def _t5(model: Model, place: Callable, params: _Params, windows: Any) -> Any:
    source, targets = windows[:, :-1], windows[:, 1:]
    table = params["shared_embed"]["embedding"]
    x: Any = None
    for stack in model.stacks:  # the encoder, whose states the decoder sees
        bias = _relative(params[f"{stack.name}_bias"]["kernel"], source.shape[1], both=x is None)
        layer = partial(_t5_layer, stack, bias, x)
        x = _run(place(table[source]), params[stack.name], layer, place)
        x = place(_norm(params[f"{stack.name}_norm"], x))
    if "head" in params:
        return _losses(lambda x: x @ params["head"]["kernel"], x, targets)
    return _losses(lambda x: x @ table.T, x * table.shape[1] ** -0.5, targets)


def _run(x: Any, layers: Any, layer: Callable, place: Callable) -> Any:
    @partial(jax.checkpoint, prevent_cse=False)
    def step(x, params):
        return place(layer(params, x)), None

    return jax.lax.scan(step, x, layers)[0]


def _layer(stack: Stack, attention: Callable, act: Callable, p: _Params, x: Any) -> Any:
    y = _norm(p["attention_norm"], x)
    if "qkv" in p:
        parts = jnp.split(_dense(p["qkv"], y), 3, axis=-1)
    else:
        parts = [_dense(p[name], y) for name in ("query", "key", "value")]
    size = parts[0].shape[-1] // stack.heads
    q, k, v = (part.reshape(*part.shape[:-1], -1, size) for part in parts)
    if "query_norm" in p:
        q, k = _norm(p["query_norm"], q), _norm(p["key_norm"], k)
    x = x + _dense(p["out"], attention(q, k, v).reshape(*x.shape[:-1], -1))
    y = _norm(p["feed_forward_norm"], x)
    up = _dense(p["up"], y)
    return x + _dense(p["down"], act(_dense(p["gate"], y)) * up if "gate" in p else act(up))


def _t5_layer(stack: Stack, bias: Any, memory: Any, p: _Params, x: Any) -> Any:
    def attend(kind, of, bias):
        def heads(name, x):
            return _dense(p[f"{kind}_{name}"], x).reshape(*x.shape[:-1], stack.heads, -1)

        y = _norm(p[f"{kind}_norm"], x)
        of = y if of is None else of
        q, k, v = heads("query", y), heads("key", of), heads("value", of)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) + bias
        weights = jax.nn.softmax(scores).astype(q.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:-1], -1)
        return x + _dense(p[f"{kind}_out"], y)

    x = attend("self", None, bias)
    if memory is not None:
        x = attend("cross", memory, 0.0)
    y = _norm(p["feed_forward_norm"], x)
    up = _dense(p["up"], y)
    up = jax.nn.gelu(_dense(p["gate"], y)) * up if "gate" in p else jax.nn.relu(up)
    return x + _dense(p["down"], up)


def _relative(table: Any, length: int, both: bool) -> Any:
    """Bias of the scores `(heads, T, T)` by distance; causal unless `both` directions are seen."""
    distance = jnp.arange(length) - jnp.arange(length)[:, None]
    places = bucket(distance, both, table.shape[0], 128)
    bias = jnp.moveaxis(table[places], -1, 0).astype(jnp.float32)
    return bias if both else jnp.where(distance > 0, -1e9, bias)


def bucket(distance: jax.Array, both: bool, buckets: int, reach: int) -> jax.Array:
    """Buckets of key minus query positions: exact near by, logarithmic up to `reach`, then one.

    `both` directions (encoder) have half of the buckets each; else only the past has any.
    """
    result = jnp.zeros_like(distance)
    if both:
        buckets //= 2
        result = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = -jnp.minimum(distance, 0)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(distance, 1) / exact) / jnp.log(reach / exact) * (buckets - exact)
    far = jnp.minimum(exact + far.astype(jnp.int32), buckets - 1)
    return result + jnp.where(distance < exact, distance, far)


def attention(q: Any, k: Any, v: Any) -> Any:
    """Causal attention of `(B, T, heads, head_dim)`, the scores of `CHUNK` queries at a time."""
    count = q.shape[1] // CHUNK
    if count < 2 or q.shape[1] % CHUNK:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    @jax.checkpoint
    def some(i, q):
        mask = i * CHUNK + jnp.arange(CHUNK)[:, None] >= jnp.arange(k.shape[1])
        return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])

    queries = jnp.moveaxis(q.reshape(q.shape[0], count, CHUNK, *q.shape[2:]), 1, 0)
    results = jax.lax.map(lambda pair: some(*pair), (jnp.arange(count), queries))
    return jnp.moveaxis(results, 0, 1).reshape(q.shape)


def _rotary(q: Any, k: Any, v: Any) -> Any:
    return attention(rotate(q), rotate(k), v)


def rotate(x: Any, positions: Any = None, theta: float = 10000.0) -> Any:
    """Rotary positions on `(B, T, heads, head_dim)` (Su et al., arXiv 2104.09864).

    `positions` `(B, T)` count from 0 by default; `theta` is the base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half) / half)
    if positions is None:
        positions = jnp.arange(x.shape[1])[None]
    angles = positions[:, :, None, None] * frequencies
    left, right = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _losses(head: Callable, x: Any, targets: Any) -> Any:
    """Mean cross-entropy of `head(x)`; `x` `(B, T, D)`, `targets` `(B, T)`."""
    count = max(1, x.shape[1] // CHUNK)
    if x.shape[1] % count:
        count = 1

    def parts(array):
        return jnp.moveaxis(array.reshape(array.shape[0], count, -1, *array.shape[2:]), 1, 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def some(_, chunk):
        x, targets = chunk
        logits = head(x).astype(jnp.float32)
        return None, optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    return jax.lax.scan(some, None, (parts(x), parts(targets)))[1].mean()


def _dense(p: _Params, x: Any) -> Any:
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def _norm(p: _Params, x: Any) -> Any:
    """Layer norm where there is a bias, RMS norm where there is none; in float32."""
    y = x.astype(jnp.float32)
    if "bias" in p:
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)
    y = y.astype(x.dtype) * p["scale"]
    return y + p["bias"] if "bias" in p else y
