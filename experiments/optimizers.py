"""Flora and its baselines are built here, over the same accumulation."""

from functools import partial
from typing import Any, Literal

import optax

import flora_jax
from flora_jax.chain.distributions import Distribution
from flora_jax.chain.flora import ADVISED, KAPPA
from flora_jax.chain.projection import Side

Method = Literal["flora", "multisteps", "galore"]


def build(
    method: Method,
    learning_rate: optax.ScalarOrSchedule,
    *,
    accumulation: int,
    rank: Any,
    distribution: Distribution = "srht",
    shrink: bool = True,
    embedding: Literal["output", "whole", "matrix"] = "output",
    side: Side = "larger",
    resample: int | None = None,
    momentum: float | None = None,
    clipping: float | None = 1.0,
    decay: float = 0.8,
    skip_nonfinite: bool = False,
    seed: int = 0,
) -> tuple[optax.GradientTransformation, flora_jax.Projection | None]:
    """Gives the transformation of one method, and Flora's projection or None.

    Args:
      method: The method.
      learning_rate: The learning rate, or a schedule of it.
      accumulation: Number of micro-steps in an optimizer step.
      rank: Rank of Flora's and GaLore's projections.
      distribution: Distribution of Flora's projections.
      shrink: Whether Flora's updates are scaled as advised.
      embedding: What Flora does to embeddings, as in `flora_jax.Projection`.
      side: The side of a weight that Flora projects.
      resample: Number of optimizer steps that share a projection: by default that of the advised preset, or under
        momentum the paper's.
      momentum: Decay of Flora's momentum; None for none.
      clipping: Adafactor's clipping threshold.
      decay: Adafactor's decay rate.
      skip_nonfinite: Whether Flora leaves out micro-steps that are not finite.
      seed: Seed of Flora's projections.
    """
    base = partial(optax.adafactor, clipping_threshold=clipping, decay_rate=decay)
    if method == "multisteps":
        steps = optax.MultiSteps(base(learning_rate), accumulation)
        return steps.gradient_transformation(), None
    if method == "galore":
        galore = optax.contrib.galore(learning_rate, rank=rank)
        return optax.MultiSteps(galore, accumulation).gradient_transformation(), None
    if resample is None:
        resample = ADVISED if momentum is None else KAPPA
    projection = flora_jax.Projection(
        rank,
        distribution=distribution,
        side=side,
        embedding=embedding,
        resample_every=accumulation * resample,
        seed=seed,
    )
    chain = flora_jax.flora(
        learning_rate,
        projection=projection,
        accumulation_steps=accumulation,
        momentum=momentum,
        clipping_threshold=clipping,
        decay_rate=decay,
        preset="advised" if shrink else "paper",
        skip_nonfinite=skip_nonfinite,
    )
    return chain, projection


def cosine(peak, steps: int, warmup: int = 10) -> optax.Schedule:
    """Gives a linear warm-up to `peak` (it may be traced), then a cosine to zero at `steps` optimizer steps."""
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, min(warmup, steps // 2), max(steps, 1))
    return lambda step: peak * unit(step)
