"""Optimizers: Flora, and what it is compared with, over the same accumulation."""

from typing import Literal

import optax

import flora_jax
from flora_jax.distributions import Distribution

Method = Literal["flora", "multisteps", "galore"]


def build(
    method: Method,
    learning_rate: optax.ScalarOrSchedule,
    *,
    accumulation: int,
    rank: int,
    distribution: Distribution = "srht",
    shrink: bool = True,
    embedding: Literal["output", "whole", "matrix"] = "output",
    momentum: float | None = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    """The transformation of one method; `rank` and what follows serve those that have a rank."""
    if method == "multisteps":
        steps = optax.MultiSteps(optax.adafactor(learning_rate), accumulation)
        return steps.gradient_transformation()
    if method == "galore":
        galore = optax.contrib.galore(learning_rate, rank=rank)
        return optax.MultiSteps(galore, accumulation).gradient_transformation()
    cycle = accumulation * (1 if momentum is None else 1000)
    return flora_jax.flora(
        learning_rate,
        projection=flora_jax.Projection(
            rank,
            distribution=distribution,
            embedding=embedding,
            resample_every=cycle,
            seed=seed,
        ),
        accumulation_steps=accumulation,
        momentum=momentum,
        preset="advised" if shrink else "paper",
    )


def cosine(peak, steps: int, warmup: int = 10) -> optax.Schedule:
    """Linear warm-up to `peak` (may be traced), then a cosine to zero at `steps` boundaries."""
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, min(warmup, steps // 2), max(steps, 1))
    return lambda step: peak * unit(step)
