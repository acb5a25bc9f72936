"""Greedy search, sampling and beam search for T5, GPT-2 and decoders are compiled, with a cache of keys and values.

In the shape descriptions `B` is the batch, `S` the prompt (for T5 the source), `N` the new tokens,
`K` the beams, `V` the vocabulary.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.models import decoder, gpt2, t5
from flora_jax.models.cache import Cache

START = 0
"""The token that T5's decoder begins with."""
NEVER = -1e9
"""Score of a token that may not be chosen."""


@partial(jax.jit, static_argnums=0, static_argnames=("count", "end", "pad"))
def greedy(
    model: Any,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    count: int,
    end: int | tuple[int, ...] | None = None,
    pad: int = 0,
) -> jax.Array:
    """Generates the likeliest token, again and again.

    Args:
      model: A T5, GPT-2 or decoder module.
      params: The model's params.
      tokens: Prompts (for T5 the sources), `(B, S)`; a decoder's are padded on the left.
      mask: Bools `(B, S)`, True where a token counts; None where all do.
      count: The number of new tokens, `N`.
      end: The token, or the tokens, after which a sequence has ended; None where none ends.
      pad: The token that stands after the end.

    Returns:
      int32 `(B, N)`, the end among them.
    """
    return _write(model, params, tokens, mask, count, end, pad, lambda i, logits: logits.argmax(-1))


@partial(jax.jit, static_argnums=0, static_argnames=("count", "end", "pad"))
def sample(
    model: Any,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    count: int,
    key: jax.Array,
    heat: jax.typing.ArrayLike = 1.0,
    end: int | tuple[int, ...] | None = None,
    pad: int = 0,
) -> jax.Array:
    """Generates tokens by their probabilities, one after the other.

    Args:
      model: A T5, GPT-2 or decoder module.
      params: The model's params.
      tokens: Prompts (for T5 the sources), `(B, S)`; a decoder's are padded on the left.
      mask: Bools `(B, S)`, True where a token counts; None where all do.
      count: The number of new tokens, `N`.
      key: The key of all samples.
      heat: The temperature, by which logits are divided, above 0.
      end: The token, or the tokens, after which a sequence has ended; None where none ends.
      pad: The token that stands after the end.

    Returns:
      int32 `(B, N)`, the end among them.
    """

    def choose(i: jax.Array, logits: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, i), logits.astype(jnp.float32) / heat)

    return _write(model, params, tokens, mask, count, end, pad, choose)


def _write(model, params, tokens, mask, count, end, pad, choose) -> jax.Array:
    """Generates what `choose` takes of the number of each new token and its logits `(B, V)`."""
    logits, cache = _begin(model, params, tokens, mask, count)
    rows = tokens.shape[0]
    ends = () if end is None else (end,) if isinstance(end, int) else end

    def unfinished(state):
        i, _, _, _, ended = state
        return (i < count) & ~ended.all()

    def step(state):
        i, logits, cache, found, ended = state
        token = jnp.where(ended, pad, choose(i, logits).astype(jnp.int32))
        found = found.at[:, i].set(token)
        for one in ends:
            ended = ended | (token == one)
        return i + 1, *_next(model, params, token, cache), found, ended

    found = jnp.full((rows, count), pad, jnp.int32)
    state = (jnp.int32(0), logits, cache, found, jnp.zeros(rows, bool))
    return jax.lax.while_loop(unfinished, step, state)[3]


class _Search(NamedTuple):
    """State of a beam search: the sequences that run and those that have ended, each best first."""

    i: jax.Array
    logits: jax.Array  # (B * K, V)
    cache: Cache
    running: jax.Array  # (B, K, N)
    scores: jax.Array  # (B, K), sums of log-probabilities
    ended: jax.Array  # (B, K, N)
    ended_scores: jax.Array  # (B, K), over length ** length_penalty
    full: jax.Array  # (B, K), whether there is one
    open: jax.Array  # (B,), whether what runs may still be better


_SEARCH = ("count", "beams", "end", "pad", "length_penalty", "early_stopping")


@partial(jax.jit, static_argnums=0, static_argnames=_SEARCH)
def beam(
    model: Any,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    count: int,
    beams: int,
    end: int,
    pad: int = 0,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Generates the best of `beams` sequences, by log-probability over length to the power `length_penalty`.

    At each step the `2 K` best continuations are looked at. Of the first `K` those that end are kept
    apart, the `K` best ever; the best `K` that do not end go on. A sequence of `count` tokens ends. The
    search is over where `K` have ended and (without `early_stopping`) the best that goes on has
    a score, over its length now, that is no better than the worst of them. These are the rules of
    `transformers`.

    Args:
      model: A T5, GPT-2 or LLaMA module.
      params: The model's params.
      tokens: Prompts (for T5 the sources), `(B, S)`; a decoder's are padded on the left.
      mask: Bools `(B, S)`, True where a token counts; None where all do.
      count: The number of new tokens, `N`.
      beams: The number of beams, `K`.
      end: The token after which a sequence has ended.
      pad: The token that stands after the end.
      length_penalty: Power of the length by which a sum of log-probabilities is divided.
      early_stopping: Whether the search is over as soon as `K` sequences have ended.

    Returns:
      int32 `(B, N)`, and scores float32 `(B,)`.
    """
    b = tokens.shape[0]
    logits, cache = _begin(model, params, tokens, mask, count)
    rows = jnp.repeat(jnp.arange(b), beams)
    blank = jnp.full((b, beams, count), pad, jnp.int32)
    never = jnp.full((b, beams), NEVER)
    search = _Search(
        i=jnp.int32(0),
        logits=logits[rows],
        cache=_rows(cache, rows),
        running=blank,
        scores=never.at[:, 0].set(0.0),
        ended=blank,
        ended_scores=never,
        full=jnp.zeros((b, beams), bool),
        open=jnp.ones(b, bool),
    )

    def unfinished(search: _Search) -> jax.Array:
        going_on = search.open
        if early_stopping:
            going_on = going_on & ~search.full.all(1)
        return (search.i < count) & going_on.any()

    def step(search: _Search) -> _Search:
        i = search.i
        vocabulary = search.logits.shape[-1]
        gains = jax.nn.log_softmax(search.logits.astype(jnp.float32))
        sums = search.scores[..., None] + gains.reshape(b, beams, vocabulary)
        best, index = jax.lax.top_k(sums.reshape(b, -1), 2 * beams)
        parent, token = index // vocabulary, index % vocabulary
        candidates = _take(search.running, parent).at[:, :, i].set(token)
        ends = (token == end) | (i + 1 == count)

        scores, chosen = jax.lax.top_k(jnp.where(ends, NEVER, best), beams)
        running, token = _take(candidates, chosen), _take(token, chosen)
        parent = _take(parent, chosen)

        new = ends & (jnp.arange(2 * beams) < beams) & search.open[:, None]
        if early_stopping:
            new = new & ~search.full.all(1, keepdims=True)
        length = (i + 1).astype(jnp.float32) ** length_penalty
        merged = jnp.concatenate([search.ended_scores, jnp.where(new, best / length, NEVER)], 1)
        ended_scores, kept = jax.lax.top_k(merged, beams)
        ended = _take(jnp.concatenate([search.ended, candidates], 1), kept)
        full = _take(jnp.concatenate([search.full, new], 1), kept)

        worst = jnp.where(full, ended_scores, NEVER).min(1)
        rows = (jnp.arange(b)[:, None] * beams + parent).reshape(-1)
        logits, cache = _next(model, params, token.reshape(-1), _rows(search.cache, rows))
        return _Search(
            i + 1,
            logits,
            cache,
            running,
            scores,
            ended,
            ended_scores,
            full,
            search.open & (scores[:, 0] / length > worst),
        )

    search = jax.lax.while_loop(unfinished, step, search)
    return search.ended[:, 0], search.ended_scores[:, 0]


def _begin(model: Any, params: Any, tokens: Any, mask: Any, count: int) -> tuple[jax.Array, Cache]:
    """Gives logits `(B, V)` of the first new token, and a cache with room for all."""
    variables, rows = {"params": params}, tokens.shape[0]
    found: Any
    if isinstance(model, t5.T5):
        start = jnp.full((rows, 1), START, jnp.int32)
        found = model.apply(variables, tokens, mask, start, count, method="start")
    else:
        module: Any = decoder if isinstance(model, decoder.Decoder) else gpt2
        cache = module.make_cache(model.shape, rows, tokens.shape[1] + count)
        found = model.apply(variables, tokens, mask=mask, cache=cache)
    return found[0][:, -1], found[1]


def _next(model: Any, params: Any, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Gives logits `(B, V)` of the token after this one `(B,)`."""
    variables, token = {"params": params}, token[:, None]
    found: Any
    if isinstance(model, t5.T5):
        found = model.apply(variables, token, cache, method="step")
    else:
        found = model.apply(variables, token, cache=cache)
    return found[0][:, 0], found[1]


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Takes from each row of `(B, M, ...)` the entries at `index` `(B, K)`."""
    return jax.vmap(lambda row, index: row[index])(x, index)


def _rows(cache: Cache, rows: jax.Array) -> Cache:
    layers = jax.tree.map(lambda x: x[:, rows], cache.layers)
    return cache._replace(layers=layers, valid=cache.valid[rows])
