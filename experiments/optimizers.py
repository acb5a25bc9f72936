"""Flora and its baselines are built here, over the same accumulation."""

from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
import optax

import flora_jax
from flora_jax.chain import sketched_muon, storage
from flora_jax.chain.distributions import Distribution
from flora_jax.chain.flora import ADVISED, KAPPA
from flora_jax.chain.momentum import AtNewProjection
from flora_jax.chain.projection import Side
from flora_jax.finetune.muon import matrices as of_muon
from flora_jax.finetune.muon import muon

MATRICES, OF_TRAINED = 0.035, 0.01
"""Peak of the learning rate of the matrices that Flora orthogonalizes, in all experiments, from random weights and from
trained ones. That of all other leaves is searched for, on the same grid as that of the baselines."""
Method = Literal["flora", "flora_adafactor", "exact", "multisteps", "muon", "adam", "galore"]
"""`flora` is the advised preset, `flora_adafactor` Adafactor after `decompress`, and `exact` `flora_jax.sketched_muon`,
which takes exact gradients and does not accumulate; the others are baselines: `multisteps` is uncompressed Adafactor."""


def build(
    method: Method,
    learning_rate: optax.ScalarOrSchedule,
    *,
    accumulation: int,
    rank: Any,
    distribution: Distribution = "srtt",
    shrink: bool = True,
    embedding: Literal["output", "whole", "matrix"] = "output",
    head: Literal["input", "whole", "matrix"] = "input",
    side: Side = "input",
    resample: int | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    at_new_projection: AtNewProjection = "reset",
    iterations: int = 5,
    block: int | None = None,
    matrices: Any = None,
    clipping: float | None = 1.0,
    decay: float = 0.8,
    skip_nonfinite: bool = False,
    weight_decay: float | None = None,
    state_dtype: storage.StateDtype = "float32",
    seed: int = 0,
) -> tuple[optax.GradientTransformation, flora_jax.Projection | None]:
    """Gives the transformation of one method, and Flora's projection or None.

    Args:
      method: The method.
      learning_rate: The learning rate, or a schedule of it.
      accumulation: Number of micro-steps in an optimizer step.
      rank: Rank of Flora's and GaLore's projections.
      distribution: Distribution of Flora's projections.
      shrink: Whether the updates of Adafactor after `decompress` are shortened by `flora_jax.shrink`.
      embedding: What Flora does to embeddings, as in `flora_jax.Projection`.
      side: The side of a weight that Flora projects.
      resample: Number of optimizer steps that share a projection: by default that of the advised preset, or before
        Adafactor under momentum the paper's.
      head: What Flora does to the matrix of the logits.
      momentum: Decay of Flora's and Muon's momentum; None for the method's own.
      nesterov: Whether the momentum is Nesterov's; None for the method's own choice.
      at_new_projection: What Flora does to its momentum when the projection changes.
      iterations: Number of Newton-Schulz iterations of Flora.
      block: The longest side that exact gradients are orthogonalized at, None for all.
      matrices: Learning rate, or a schedule, of the matrices that Flora or Muon orthogonalizes; None for that of all
        other leaves.
      clipping: Adafactor's clipping threshold.
      decay: Adafactor's decay rate.
      skip_nonfinite: Whether Flora leaves out micro-steps that are not finite.
      weight_decay: Decay of the matrices, times their learning rate; for `flora`, `muon` and `multisteps`.
      state_dtype: Dtype of Flora's sketches between micro-steps.
      seed: Seed of Flora's projections.
    """
    base = partial(optax.adafactor, clipping_threshold=clipping, decay_rate=decay)
    if method == "multisteps":
        inner = base(learning_rate, **_decay(learning_rate, weight_decay))
        steps = optax.MultiSteps(inner, accumulation)
        return steps.gradient_transformation(), None
    if method in ("muon", "adam"):
        if method == "muon":
            tx = muon(
                learning_rate if matrices is None else matrices,
                base(learning_rate),
                momentum=0.95 if momentum is None else momentum,
                nesterov=nesterov is not False,
                weight_decay=weight_decay,
            )
        else:
            tx = optax.adam(learning_rate, b2=0.99)
        return optax.MultiSteps(tx, accumulation).gradient_transformation(), None
    if method == "exact":
        exact = flora_jax.sketched_muon(
            learning_rate if matrices is None else matrices,
            rank=rank,
            adafactor_learning_rate=learning_rate,
            iterations=iterations,
            block=block,
            min_dim=2,
            seed=seed,
            momentum=sketched_muon.DECAY if momentum is None else momentum,
        )
        return exact, None
    if method == "galore":
        galore = optax.contrib.galore(learning_rate, rank=rank)
        return optax.MultiSteps(galore, accumulation).gradient_transformation(), None
    if resample is None:
        resample = KAPPA if method == "flora_adafactor" and momentum is not None else ADVISED
    projection = flora_jax.Projection(
        rank,
        distribution=distribution,
        side=side,
        embedding=embedding,
        head=head,
        resample_every=accumulation * resample,
        seed=seed,
    )
    own = learning_rate if matrices is None else matrices
    if method == "flora":
        chain = flora_jax.flora(
            own,
            projection=projection,
            accumulation_steps=accumulation,
            momentum=momentum,
            nesterov=nesterov,
            at_new_projection=at_new_projection,
            iterations=iterations,
            preset="advised",
            adafactor_learning_rate=learning_rate,
            clipping_threshold=clipping,
            decay_rate=decay,
            skip_nonfinite=skip_nonfinite,
            state_dtype=state_dtype,
            **_decay(own, weight_decay),
        )
        return chain, projection
    steps = [base(learning_rate)] + ([flora_jax.shrink(projection)] if shrink else [])
    chain = flora_jax.flora(
        None,
        projection=projection,
        accumulation_steps=accumulation,
        momentum=momentum,
        optimizer=optax.chain(*steps),
        skip_nonfinite=skip_nonfinite,
        state_dtype=state_dtype,
    )
    return chain, projection


def _decay(learning_rate: Any, share: float | None) -> dict[str, Any]:
    """Gives Adafactor's arguments for a decay of matrices times their learning rate; none where there is no decay."""
    if share is None:
        return {}
    rate = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    return {
        "weight_decay_rate": lambda step: jnp.asarray(rate(step)) * share,
        "weight_decay_mask": of_muon,
    }


def cosine(peak, steps: int, warmup: int = 10) -> optax.Schedule:
    """Gives a linear warm-up to `peak` (it may be traced), then a cosine to zero at `steps` optimizer steps."""
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, min(warmup, steps // 2), max(steps, 1))
    return lambda step: peak * unit(step)
