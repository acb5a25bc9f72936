"""flora: the chain with its arguments named as optax names them."""

from typing import Any, Literal, get_args

import jax
import optax

from flora_jax import explicit, official, storage, transforms
from flora_jax.projection import Projection, check_every
from flora_jax.sketch import Every

Preset = Literal["paper", "advised", "official"]
KAPPA = 1000
"""Boundaries between transfers under momentum: the paper's best κ."""
ADVISED = 64
"""Boundaries that share a projection in the advised preset."""


def flora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Any = None,
    projection: Projection | None = None,
    accumulation_steps: Every = 1,
    momentum: float | None = None,
    optimizer: optax.GradientTransformation | None = None,
    preset: Preset = "paper",
    seed: int = 0,
    use_grad_mean: bool = True,
    state_dtype: storage.StateDtype = "float32",
    skip_nonfinite: bool = False,
    min_dim_size_to_factor: int = 128,
    decay_rate: Any = 0.8,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Any = 1.0,
    weight_decay_rate: Any = None,
    weight_decay_mask: Any = None,
    eps: Any = 1e-30,
) -> optax.GradientTransformationExtraArgs:
    """Flora: project → accumulate → (momentum →) decompress → Adafactor.

    Args:
      learning_rate: a number or a schedule of the gradient step.
      rank: of the projections, as in `Projection`; this or `projection`.
      projection: for all other choices. Its `resample_every` counts micro-steps and must be a
        multiple of `accumulation_steps`. With `rank` alone it is one boundary, 64 in the advised
        preset, 1000 under momentum.
      accumulation_steps: micro-steps to a boundary: an int, or a schedule of the gradient step.
      momentum: `β` of Algorithm 2; None for none.
      optimizer: any optax optimizer in place of Adafactor; it then has its own learning rate, and
        `learning_rate` and the arguments from `min_dim_size_to_factor` on are not used.
      preset: `paper`: Gaussian projections, Algorithms 1 and 2. `advised`: the same chain with what was
        measured to be better at no memory: the updates of compressed leaves scaled by `shrink` and,
        where `rank` is given, `srht` projections, each kept for 64 boundaries. `official`: the authors' JAX
        optimizer as it is, see `flora_jax.official`.
      seed: of the projections, where `rank` is given.
      use_grad_mean: mean of the micro-steps, else their sum.
      state_dtype: of sketches between micro-steps: `float32`, `float64`, `bfloat16` or `int8`.
      skip_nonfinite: leave out every micro-step that has a NaN or an infinity, as if it had not been.
      min_dim_size_to_factor: of `optax.adafactor`, as all that follow.

    Returns:
      A `GradientTransformationExtraArgs`; updates between boundaries are zero.

    Raises:
      ValueError: a wrong argument.

    Example:
      >>> import flora_jax, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((256, 512)), "bias": jnp.zeros(512)}
      >>> tx = flora_jax.flora(1e-2, rank=16, accumulation_steps=4)
      >>> opt_state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Hao, Cao, Mou, arXiv 2402.03293.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"preset must be one of {', '.join(get_args(Preset))}, found {preset!r}")
    if (rank is None) == (projection is None):
        raise ValueError(
            "flora takes one of rank and projection, found "
            + ("neither" if rank is None else "both")
        )
    for name, value in (("accumulation_steps", accumulation_steps), ("seed", seed)):
        if isinstance(value, jax.Array):
            raise ValueError(
                f"{name} must be a Python value, found a jax.Array; under optax.inject_hyperparams "
                "name it in static_args"
            )
    check_every("accumulation_steps", accumulation_steps)
    storage.check("state_dtype", state_dtype)
    if preset == "official":
        if rank is None or momentum is None:
            raise ValueError("preset='official' takes rank and momentum, and no projection")
        return official.flora(learning_rate, rank=rank, decay=momentum, seed=seed)
    if projection is None:
        boundaries = ADVISED if preset == "advised" else 1
        if momentum is not None:
            boundaries = KAPPA
        projection = Projection(
            rank,
            distribution="srht" if preset == "advised" else "gaussian",
            resample_every=_cycle_length(accumulation_steps, boundaries),
            seed=seed,
        )
    if optimizer is None:
        optimizer = optax.adafactor(
            learning_rate,
            min_dim_size_to_factor=min_dim_size_to_factor,
            decay_rate=decay_rate,
            multiply_by_parameter_scale=multiply_by_parameter_scale,
            clipping_threshold=clipping_threshold,
            weight_decay_rate=weight_decay_rate,
            weight_decay_mask=weight_decay_mask,
            eps=eps,
        )
    links = [transforms.decompress(), optimizer]
    if preset == "advised":
        links.append(transforms.shrink(projection))
    if momentum is not None:
        links.insert(0, transforms.momentum(momentum, projection=projection, dtype=state_dtype))
    chain = optax.chain(*links)
    if accumulation_steps != 1:
        chain = transforms.accumulate(
            chain,
            accumulation_steps,
            projection=projection,
            use_grad_mean=use_grad_mean,
            accumulator_dtype=state_dtype,
        )
    chain = optax.chain(transforms.project(projection), chain)
    if skip_nonfinite:
        chain = transforms.skip_nonfinite(chain)
    return explicit.link(chain)


def _cycle_length(accumulation_steps: Every, boundaries: int) -> Every:
    if callable(accumulation_steps):
        if boundaries == 1:
            return accumulation_steps
        return transforms.Boundaries(accumulation_steps, boundaries)
    return boundaries * accumulation_steps
