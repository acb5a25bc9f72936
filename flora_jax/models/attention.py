"""Attention goes over a chunk of queries at a time.

In the shape descriptions `B` is the batch, `T` the sequence, `L` the tokens that may be attended to.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 512
"""Queries whose scores, and tokens whose logits, exist at a time."""
FUSED = (jnp.bfloat16, jnp.float16)
"""The dtypes for which GPUs have attention as one kernel."""


def chunks(length: int) -> tuple[int, int]:
    """Returns how many chunks a sequence has, of at most `CHUNK` tokens, and the tokens of each; the last may be padded."""
    count = max(1, -(-length // CHUNK))
    return count, -(-length // count)


def split(array: jax.Array, count: int, size: int) -> jax.Array:
    """Returns `(B, T, ...)` as `(count, B, size, ...)`, with zeros after the last token."""
    missing = count * size - array.shape[1]
    if missing:
        array = jnp.pad(array, ((0, 0), (0, missing), *((0, 0),) * (array.ndim - 2)))
    return jnp.moveaxis(array.reshape(array.shape[0], count, size, *array.shape[2:]), 1, 0)


def join(parts: jax.Array, length: int) -> jax.Array:
    """Returns `(B, length, ...)` of what `split` made."""
    together = jnp.moveaxis(parts, 0, 1)
    whole = together.reshape(parts.shape[1], -1, *parts.shape[3:])
    return whole if whole.shape[1] == length else whole[:, :length]


class Sight(NamedTuple):
    """Says what queries may attend to; never to a later token.

    Attributes:
      first: int32, the slot of the first query; None for 0.
      valid: Bools `(B, L)`, which tokens may be attended to; None for all.
      segments: int32 `(B, T)`, the document of each token, where a sequence holds several: tokens attend to their own alone.
    """

    first: jax.Array | None = None
    valid: jax.Array | None = None
    segments: jax.Array | None = None

    def everything(self) -> bool:
        """Returns whether all earlier tokens may be attended to."""
        return self.first is None and self.valid is None and self.segments is None

    def seen(
        self, start: Any, count: int, length: int, window: Any, own: jax.Array | None
    ) -> jax.Array:
        """Returns bools `(B or 1, 1, count, L)`: what `count` queries from `start` on attend to.

        Args:
          start: The index of the first of them in `T`.
          count: How many there are, of which some may be padding after `T`.
          length: `L`.
          window: How many tokens back a query reaches, itself among them; None for all.
          own: Their documents, `(B, count)`, where there are segments.
        """
        slots = start + jnp.arange(count) + (0 if self.first is None else self.first)
        distance = slots[:, None] - jnp.arange(length)
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        seen = seen[None]
        if self.valid is not None:
            seen = seen & self.valid[:, None]
        if self.segments is not None and own is not None:
            seen = seen & (own[:, :, None] == self.segments[:, None])
        return seen[:, None]


EVERYTHING = Sight()
"""All earlier tokens may be attended to."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sight: Sight = EVERYTHING,
    window: Any = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Attends, `(B, T, heads, head_dim)`, to `k` and `v` `(B, L, key heads, head_dim)`.

    The scores of at most `CHUNK` queries exist at a time; on a GPU, where all earlier tokens or a
    window of them are attended to and the dtype is a narrow one, none do.

    Args:
      q: The queries.
      k: The keys.
      v: The values.
      sight: Which tokens may be attended to.
      window: How many tokens back a query reaches, itself among them; None for all. An array where it differs by layer.
      scale: What multiplies the scores; by default one over the root of `head_dim`.
      cap: The scores become `cap * tanh(scores / cap)`, if it is given.
    """
    length, slots = q.shape[1], k.shape[1]
    if _has_kernel(q, sight, window, cap):
        reach = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, local_window_size=reach, implementation="cudnn"
        )
    count, size = chunks(length)
    if count == 1:
        if sight.everything() and window is None and cap is None:
            return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True)
        return _attend(q, k, v, sight.seen(0, length, slots, window, sight.segments), scale, cap)

    @jax.checkpoint
    def some(i, q, own):
        return _attend(q, k, v, sight.seen(i * size, size, slots, window, own), scale, cap)

    own = None if sight.segments is None else split(sight.segments, count, size)
    queries = jnp.arange(count), split(q, count, size), own
    return join(jax.lax.map(lambda each: some(*each), queries), length)


def _has_kernel(q: jax.Array, sight: Sight, window: Any, cap: float | None) -> bool:
    plain = sight.everything() and cap is None and (window is None or isinstance(window, int))
    fits = q.dtype in FUSED and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    several = q.shape[1] > 1  # one token is traced for its shapes, which must not start a backend
    return plain and fits and several and _on_gpu()


def _on_gpu() -> bool:
    """Returns whether the program is for a GPU: that of the mesh that is set, which may be a description of another machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend() == "gpu"
    return not device.device_kind.lower().startswith(("cpu", "tpu"))


def _attend(q, k, v, seen, scale, cap) -> jax.Array:
    if cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=seen, scale=scale)
    rows, length, heads, size = q.shape
    q = q.reshape(rows, length, k.shape[2], -1, size)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k, preferred_element_type=jnp.float32)
    scores = cap * jnp.tanh(scores * (size**-0.5 if scale is None else scale) / cap)
    scores = jnp.where(seen[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(rows, length, heads, size)
