"""flora: the transformations of this folder put together, with arguments named as optax names them."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from flora_jax.chain import official, storage
from flora_jax.chain import skip_nonfinite as skipping
from flora_jax.chain.accumulate import StepsPerCycle, accumulate, check_cycles
from flora_jax.chain.decompress import decompress
from flora_jax.chain.leaf_plan import leaf_plans
from flora_jax.chain.momentum import AtNewProjection, check_decay
from flora_jax.chain.momentum import momentum as sketched_momentum
from flora_jax.chain.orthogonalize import orthogonalize
from flora_jax.chain.project import project
from flora_jax.chain.projection import Projection, as_int, check_every, check_projection
from flora_jax.chain.scale_by_shape import scale_by_shape
from flora_jax.chain.shrink import shrink
from flora_jax.chain.sketch import Every, is_sketch
from flora_jax.chain.transformation import transformation

Preset = Literal["paper", "advised", "official"]
KAPPA = 1000
"""The number of optimizer steps between transfers under momentum: the paper's best κ."""
ADVISED = 64
"""The number of optimizer steps that share a projection in the advised preset."""
DECAY = 0.8
"""The decay of the momentum in the advised preset."""


def flora(
    learning_rate: optax.ScalarOrSchedule | None,
    *,
    rank: Any = None,
    projection: Projection | None = None,
    accumulation_steps: Every = 1,
    momentum: float | None = None,
    nesterov: bool | None = None,
    at_new_projection: AtNewProjection | None = None,
    iterations: int = 5,
    optimizer: optax.GradientTransformation | None = None,
    preset: Preset = "paper",
    seed: int = 0,
    use_grad_mean: bool = True,
    state_dtype: storage.StateDtype = "float32",
    skip_nonfinite: bool = False,
    min_dim_size_to_factor: int = 128,
    adafactor_learning_rate: optax.ScalarOrSchedule | None = None,
    decay_rate: Any = 0.8,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Any = 1.0,
    weight_decay_rate: Any = None,
    weight_decay_mask: Any = None,
    eps: Any = 1e-30,
) -> optax.GradientTransformationExtraArgs:
    """The Flora optimizer: gradients are accumulated, and averaged, as low-rank sketches.

    In the paper's preset it is the chain `project → accumulate → (momentum →) decompress → Adafactor`, where the
    middle two are present as `accumulation_steps` and `momentum` say. In the advised one it is
    `project → accumulate → (momentum →) orthogonalize → decompress → scale_by_shape`, with Adafactor for
    all other leaves: uncompressed ones, and embeddings and heads, whose sketches are not orthogonalized. Each
    micro-step's gradient `G` is kept as the sketch `C = G Aᵀ` only.

    Args:
      learning_rate: The learning rate: a number, or a schedule of the optimizer step. None where
        `optimizer` is given, which has its own; in the advised preset it then gets the orthogonalized updates of
        compressed leaves too.
      rank: The rank `r` of the projections, with the same meaning as in `Projection`. Give either this
        or `projection`.
      projection: A `Projection`, for all other choices. Its `resample_every` counts micro-steps and must
        be a multiple of `accumulation_steps`. Where `rank` is given instead, a new `A` is sampled after
        every 64 optimizer steps in the advised preset; in the paper's after each one, and after every 1000
        under momentum.
      accumulation_steps: The number of micro-steps in an optimizer step: an int, or a schedule of the
        optimizer step.
      momentum: The decay `β` of the momentum. By default it is 0.8 in the advised preset, where it is kept in the
        accumulator itself, and in the paper's there is none; there it is that of Algorithm 2.
      nesterov: Whether the momentum is Nesterov's, which beside an accumulator takes a second sketch of each
        weight. By default it is so in the advised preset without accumulation.
      at_new_projection: What is done to the momentum when a new projection is sampled, as in `flora_jax.momentum`. By default
        it is reset in the advised preset, and transferred in the paper's.
      iterations: The number of Newton–Schulz iterations of the advised preset.
      optimizer: An optax optimizer to use in place of Adafactor. The arguments from
        `min_dim_size_to_factor` on are then not used, except that in the advised preset the weight decay is that of
        compressed leaves.
      preset: The variant of the method. `paper` has Gaussian projections and Algorithms 1 and 2.
        `advised` is what was measured to be best in runs of some hundred optimizer steps: matrices have orthogonalized momentum, compressed embeddings
        and heads Adafactor shortened by `shrink`, and where `rank` is given, the projections are `srtt` and of
        the input side. `official` is the authors' JAX optimizer as it behaves; see
        `flora_jax.chain.official`.
      seed: The seed of the projections, used where `rank` is given.
      use_grad_mean: Whether the optimizer receives the mean of the micro-steps' gradients rather than
        their sum.
      state_dtype: The dtype of the sketches between micro-steps: `float32`, `float64`, `bfloat16`,
        `int8` or `int4`. The last three are rounded at random, without bias.
      skip_nonfinite: Whether to leave out every micro-step whose gradients have a NaN or an infinity, as
        if it had not been taken.
      min_dim_size_to_factor: An argument of `optax.adafactor`, like all those below.
      adafactor_learning_rate: The learning rate of Adafactor in the advised preset, where it shall be another
        than that of orthogonalized leaves.
      decay_rate: An argument of `optax.adafactor`.
      multiply_by_parameter_scale: An argument of `optax.adafactor`.
      clipping_threshold: An argument of `optax.adafactor`.
      weight_decay_rate: An argument of `optax.adafactor`: the share of each parameter that an optimizer step subtracts,
        whatever the learning rate is. A schedule of the optimizer step, such as `lambda step: 0.1 * learning_rate(step)`,
        makes it follow the learning rate, as in AdamW and Muon.
      weight_decay_mask: An argument of `optax.adafactor`.
      eps: An argument of `optax.adafactor`.

    Returns:
      A `GradientTransformationExtraArgs`. Its updates are zero on all micro-steps that do not complete
      an optimizer step.

    Raises:
      ValueError: An argument is not valid.

    Examples:
      >>> import flora_jax, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((256, 512)), "bias": jnp.zeros(512)}
      >>> tx = flora_jax.flora(1e-2, rank=16, accumulation_steps=4)
      >>> opt_state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", arXiv 2402.03293.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"preset must be one of {', '.join(get_args(Preset))}, found {preset!r}")
    if (rank is None) == (projection is None):
        raise ValueError(
            "flora takes one of rank and projection, found "
            + ("neither" if rank is None else "both")
        )
    seed = as_int(seed)
    for name, value in (("accumulation_steps", accumulation_steps), ("seed", seed)):
        if isinstance(value, jax.Array):
            raise ValueError(
                f"{name} must be a Python value, found a jax.Array; under optax.inject_hyperparams "
                "name it in static_args"
            )
    accumulation_steps = check_every("accumulation_steps", accumulation_steps)
    check_decay(0.0 if momentum is None else momentum)
    _check_learning_rate(learning_rate, optimizer, preset)
    storage.check("state_dtype", state_dtype)
    if adafactor_learning_rate is not None and (preset != "advised" or optimizer is not None):
        raise ValueError(
            "adafactor_learning_rate must be None without preset='advised' or beside optimizer, found "
            f"{adafactor_learning_rate!r}; give learning_rate, or the optimizer its own"
        )
    if preset == "official":
        if rank is None or momentum is None or nesterov:
            raise ValueError(
                "preset='official' takes rank and momentum, and neither projection nor nesterov"
            )
        assert learning_rate is not None  # as was checked
        return official.flora(learning_rate, rank=rank, decay=momentum, seed=seed)
    advised = preset == "advised"
    if advised and momentum is None:
        momentum = DECAY
    if nesterov is None:
        nesterov = advised and accumulation_steps == 1
    if at_new_projection is None:
        at_new_projection = "reset" if advised else "transfer"
    if nesterov and momentum is None:
        raise ValueError("momentum must be given beside nesterov=True, found None")
    if projection is None:
        steps = ADVISED if advised else KAPPA if momentum is not None else 1
        projection = Projection(
            rank,
            distribution="srtt" if advised else "gaussian",
            side="input" if advised else "larger",
            resample_every=_cycle_length(accumulation_steps, steps),
            seed=seed,
        )
    check_projection(projection)
    if accumulation_steps != 1:
        check_cycles(projection.resample_every, accumulation_steps, "accumulation_steps")
    own = optimizer is not None
    if optimizer is None:
        apart = advised and adafactor_learning_rate is not None
        optimizer = optax.adafactor(
            adafactor_learning_rate if apart else learning_rate,
            min_dim_size_to_factor=min_dim_size_to_factor,
            decay_rate=decay_rate,
            multiply_by_parameter_scale=multiply_by_parameter_scale,
            clipping_threshold=clipping_threshold,
            weight_decay_rate=None if advised else weight_decay_rate,
            weight_decay_mask=weight_decay_mask,
            eps=eps,
        )
    inner: list[Any] = [decompress(), optimizer]
    if advised:
        if learning_rate is not None:
            optimizer = _by_kind(projection, learning_rate, optimizer)
        kind = partial(_orthogonalized, projection)
        inner = [
            optax.masked(orthogonalize(iterations), kind),
            decompress(),
            scale_by_shape(projection),
        ]
        inner.append(optimizer)
        if weight_decay_rate is not None:
            mask = _both(kind, weight_decay_mask) if own else weight_decay_mask
            inner.append(optax.add_decayed_weights(_negative(weight_decay_rate), mask))
    # in the advised preset the accumulator is the momentum as well
    in_accumulator = advised and accumulation_steps != 1 and not nesterov
    if momentum is not None and not in_accumulator:
        sketched = sketched_momentum(
            momentum,
            projection=projection,
            dtype=state_dtype,
            nesterov=nesterov,
            at_new_projection=at_new_projection,
            compressed_only=advised,
        )
        inner.insert(0, sketched)
    chain = optax.chain(*inner)
    if accumulation_steps != 1:
        chain = accumulate(
            chain,
            accumulation_steps,
            projection=projection,
            use_grad_mean=use_grad_mean,
            accumulator_dtype=state_dtype,
            decay=momentum if momentum is not None and in_accumulator else 0.0,
            at_new_projection=at_new_projection if in_accumulator else "reset",
        )
    chain = optax.chain(project(projection), chain)
    if skip_nonfinite:
        chain = skipping.skip_nonfinite(chain)
    return transformation(chain)


def _by_kind(
    projection: Projection,
    learning_rate: optax.ScalarOrSchedule,
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Returns a step of this rate for orthogonalized leaves, and `optimizer`, shrunk, for all others."""

    def labels(tree):
        names = {True: "orthogonalized", False: "other"}
        return jax.tree.map(names.__getitem__, _orthogonalized(projection, tree))

    step = optax.scale_by_learning_rate(learning_rate)
    parts = optax.partition({"orthogonalized": step, "other": optimizer}, labels)
    return optax.chain(parts, shrink(projection, ("embedding", "head")))


def _orthogonalized(projection: Projection, tree: Any) -> Any:
    """Returns a tree of bools: which leaves of the params, or of their gradients, are orthogonalized."""
    leaves = [bool(plan.spec) and plan.kind == "matrix" for plan in leaf_plans(tree, projection)]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_sketch), leaves)


def _negative(rate: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    return (lambda step: -jnp.asarray(rate(step))) if callable(rate) else -rate


def _both(first: Callable[[Any], Any], mask: Any) -> Callable[[Any], Any]:
    """Returns a mask of the leaves that are in both masks; `mask` may be None, a tree, or a function of the params."""

    def chosen(tree):
        ours = first(tree)
        if mask is None:
            return ours
        given = mask(tree) if callable(mask) else mask
        return jax.tree.map(
            lambda one, part: jax.tree.map(lambda leaf: one and leaf, part), given, ours
        )

    return chosen


def _check_learning_rate(learning_rate: Any, optimizer: Any, preset: str) -> None:
    if learning_rate is None and (optimizer is None or preset == "official"):
        raise ValueError(
            "learning_rate must be a number or a schedule without optimizer, found None"
        )
    used = optimizer is None or preset != "paper"
    if learning_rate is not None and not used:
        warnings.warn(
            "flora does not use learning_rate beside optimizer, which has its own; give learning_rate=None",
            UserWarning,
            stacklevel=3,
        )


def _cycle_length(accumulation_steps: Every, steps: int) -> Every:
    if callable(accumulation_steps):
        if steps == 1:
            return accumulation_steps
        return StepsPerCycle(accumulation_steps, steps)
    return steps * accumulation_steps
