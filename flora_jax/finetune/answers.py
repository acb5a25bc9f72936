"""Answers: what a model writes after prompts of the validation side."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.finetune.batches import Data
from flora_jax.finetune.problem import Problem
from flora_jax.finetune.tokenizer import Tokenizer
from flora_jax.models import families, generate, gpt2


def answers(given: Problem, data: Data, tokenizer: Tokenizer, params: Any) -> list[dict[str, str]]:
    """Returns prompts of the validation side, what the data has after them, and what the model writes."""
    settings = given.settings
    if jax.process_count() > 1 or not settings.samples:
        return []
    shape = given.model.shape
    room = settings.length
    if isinstance(shape, gpt2.Shape):
        room = max(1, shape.positions - settings.sample_tokens)
    prompts = [(prompt[-room:], goal) for prompt, goal in data.prompts(settings.samples)]
    model = families.module(dataclasses.replace(shape, sharded=(), remat=False))
    longest = max((len(prompt) for prompt, _ in prompts), default=0)
    tokens = np.full((len(prompts), longest), tokenizer.pad, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, (prompt, _) in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = True
    ends = tuple(tokenizer.eos) or None
    options: dict[str, Any] = {"count": settings.sample_tokens, "end": ends, "pad": tokenizer.pad}
    if not prompts:
        return []
    if settings.heat:
        options |= {"key": jax.random.key(settings.seed), "heat": settings.heat}
        written = generate.sample(model, params, jnp.asarray(tokens), jnp.asarray(mask), **options)
    else:
        written = generate.greedy(model, params, jnp.asarray(tokens), jnp.asarray(mask), **options)
    return [
        {
            "prompt": tokenizer.decode(prompt),
            "goal": tokenizer.decode(goal[: settings.sample_tokens]),
            "text": tokenizer.decode(_until(row, ends)),
        }
        for (prompt, goal), row in zip(prompts, np.asarray(written).tolist(), strict=True)
    ]


def _until(tokens: list[int], ends: tuple[int, ...] | None) -> list[int]:
    for i, token in enumerate(tokens):
        if token in (ends or ()):
            return tokens[:i]
    return tokens
