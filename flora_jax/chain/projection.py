"""Projection: which gradients are compressed, on which side, to which rank, and how `A` is sampled."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args, no_type_check

import jax

from flora_jax.chain import distributions
from flora_jax.chain.sketch import Every

Side = Literal["input", "output", "larger"]


Embedding = Literal["output", "whole", "matrix"]


Head = Literal["input", "whole", "matrix"]


class DimensionNumbers(NamedTuple):
    """Which axes of a weight are the two sides of a matrix, after optax's convention.

    All axes that are named in neither are batch axes: each index along them (a layer stacked by
    `scan`, an expert, a head, a tap of a convolution) is a matrix with a projection of its own.

    Attributes:
      reduction_axis: axis or axes of the input side.
      output_axis: axis or axes of the output side.
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


@no_type_check  # wrong values get a sentence of their own, below
@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """Which leaves are compressed, on which side, to which rank, and how `A` is drawn.

    Attributes:
      rank: rows of `A`: an int, a fraction (0, 1) of the smaller side of each matrix, or a
        function of the leaf's path and shape that gives an int.
      distribution: `gaussian` (entries N(0, 1/r), the paper's), `rademacher` (±1/√r), `orthonormal`
        (rows scaled by √(m/r); exact when r = m), `srht` (subsampled randomised Hadamard transform).
      side: which side of the matrix is projected away; `larger` takes the input side of a square.
      resample_every: micro-steps of a cycle; an int, or a schedule of the cycle.
      seed: int.
      min_dim: both sides of a matrix must have at least so many rows for it to be compressed.
      mask: pytree of bools (or a prefix of one), or a function of the params that gives it, as in
        `optax.masked`; False leaves a leaf whole.
      select: function of path and shape; False leaves a leaf whole.
      weight_dimension_numbers: a `DimensionNumbers` (optax's own are taken as well) for all leaves
        of two or more axes, a pytree of them with None where the rule below holds, or a function
        of the params that gives it. Without it the last two axes are the matrix, `(input, output)`,
        and all before are batch axes; where those two are smaller than `min_dim`, the array is cut
        in two where the smaller part is largest: `(embed, heads, head_dim)` is embed × (heads · head_dim).
      embedding: what is done to lookup tables: `output` projects each row, so that rows which did
        not occur keep a gradient of zero; `whole` leaves them whole; `matrix` has no rule of its own.
      is_embedding: function of path and shape. By default a table of two axes whose path names it
        so (`embed…`, `wte`, `wpe`).
      head: what is done to the matrix that gives the logits: `input` projects its input side, whichever is
        larger, so that the gradients of the classes are not mixed: projecting the vocabulary away costs
        far more loss than the bytes it saves; `whole` leaves it whole; `matrix` has no rule of its own.
      is_head: function of path and shape. By default a matrix of two axes whose path names it so
        (`head`, `lm_head`, `unembed…`, `logits…`, `output_projection`, `classifier`).
      stacked: function of the path that gives None, or the path and index of this layer in the
        stacked form of the model; layers so told draw what the stacked ones draw.
      prng: name of the PRNG implementation. With others than `threefry2x32` (`rbg` is faster on TPU)
        values may differ between layouts over devices.
      block: largest number of entries of `A` that is held at a time, per weight.
      partition_specs: pytree of `PartitionSpec` (or a prefix of one, None for whole), or a function of
        the params that gives it: how weights are cut inside `jax.shard_map`, where the arrays do not
        tell. Each device then draws its own part of the one `A`. Without it a part counts as a weight.
    """

    rank: int | float | Callable[[str, tuple[int, ...]], int]
    _: dataclasses.KW_ONLY
    distribution: distributions.Distribution = "gaussian"
    side: Side = "larger"
    resample_every: Every = 1
    seed: int = 0
    min_dim: int = 128
    mask: Any = None
    select: Callable[[str, tuple[int, ...]], bool] | None = None
    weight_dimension_numbers: Any = None
    embedding: Embedding = "output"
    is_embedding: Callable[[str, tuple[int, ...]], bool] | None = None
    head: Head = "input"
    is_head: Callable[[str, tuple[int, ...]], bool] | None = None
    stacked: Callable[[str], tuple[str, int] | None] | None = None
    prng: str = "threefry2x32"
    block: int = 2**22
    partition_specs: Any = None

    def __post_init__(self):
        _check_rank(self.rank)
        _check_choice("distribution", self.distribution, distributions.DISTRIBUTIONS)
        _check_choice("side", self.side, get_args(Side))
        _check_choice("embedding", self.embedding, get_args(Embedding))
        _check_choice("head", self.head, get_args(Head))
        check_every("resample_every", self.resample_every)
        for name, least in (("min_dim", 1), ("block", 1)):
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, found {value!r}")
        if not _is_int(self.seed):
            raise ValueError(f"seed must be an int, found {_describe(self.seed)}")


def check_every(name: str, every: Any) -> None:
    """Raises ValueError unless `every` is an int of at least 1 or a schedule."""
    if callable(every):
        return
    if not _is_int(every) or every < 1:
        raise ValueError(
            f"{name} must be an int of at least 1 or a schedule, found {_describe(every)}"
        )


def _check_rank(rank: Any) -> None:
    if callable(rank) or (_is_int(rank) and rank >= 1):
        return
    if isinstance(rank, float) and 0 < rank < 1:
        return
    hint = ""
    if isinstance(rank, jax.Array):
        hint = "; under optax.inject_hyperparams name it in static_args"
    raise ValueError(
        "rank must be an int of at least 1, a fraction between 0 and 1, or a function of path and "
        f"shape, found {_describe(rank)}{hint}"
    )


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, found {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(value: Any) -> str:
    return "a jax.Array" if isinstance(value, jax.Array) else repr(value)
