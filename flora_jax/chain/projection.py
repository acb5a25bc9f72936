"""Projection: the settings that say which gradients are compressed, and how `A` is sampled for them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args, no_type_check

import jax
import numpy as np

from flora_jax.chain import distributions
from flora_jax.chain.sketch import Every

Side = Literal["input", "output", "larger"]


Embedding = Literal["output", "whole", "matrix"]


Head = Literal["input", "whole", "matrix"]


class DimensionNumbers(NamedTuple):
    """Says which axes of a weight form the two sides of a matrix, as in optax's Muon and GaLore.

    All axes that are named in neither are batch axes: each index along them (a layer stacked by
    `scan`, an expert, a head, a position in a convolution's window) is a matrix with a projection
    of its own.

    Attributes:
      reduction_axis: The axis or axes of the input side.
      output_axis: The axis or axes of the output side.
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


@no_type_check  # wrong values get a sentence of their own, below
@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """Says which gradients are compressed, on which side, to which rank, and how `A` is sampled.

    The gradient `G` of a matrix is `n × m`, with `m` the side that is projected; `A` is `r × m`, and
    the sketch is `C = G Aᵀ`, `n × r`.

    Attributes:
      rank: The rank `r`, the number of rows of `A`: an int, a fraction between 0 and 1 of the smaller
        side of each matrix, or a function of the leaf's path and shape that returns an int.
      distribution: The distribution of `A`: `gaussian` (entries `N(0, 1/r)`, as in the paper),
        `rademacher` (entries `±1/√r`), `orthonormal` (orthogonal rows, scaled by `√(m/r)`; exact when
        `r = m`), `srht` (a subsampled randomised Hadamard transform) or `srtt` (a trigonometric one, whose
        rows are orthogonal for every `m`, as those of `orthonormal`, at the cost of `srht`).
      side: The side of the matrix that is projected: `input`, `output`, or `larger`, which means the
        input side where the two are equal.
      resample_every: The number of micro-steps in a cycle, after which a new `A` is sampled: an int, or
        a schedule, a function of the number of the cycle.
      seed: The int from which all keys are derived, together with the path of the leaf and the cycle.
      min_dim: The least size of either side of a matrix that is compressed; smaller ones stay
        uncompressed.
      mask: A pytree of bools (or a prefix of one), or a function from the params to such a tree, as in
        `optax.masked`. Leaves with False stay uncompressed.
      select: A function of the leaf's path and shape. Leaves for which it returns False stay
        uncompressed.
      weight_dimension_numbers: A `DimensionNumbers` (optax's own are accepted too) for all leaves of two
        or more axes, a pytree of them with None where the default rule holds, or a function from the
        params to such a tree. By default the last two axes are the matrix, `(input, output)`, and all
        axes before them are batch axes. Where one of those two is smaller than `min_dim`, the axes are
        instead split into input and output axes such that the smaller side is as large as possible:
        `(embed, heads, head_dim)` becomes a matrix `embed × (heads · head_dim)`.
      embedding: The treatment of embedding tables. `output` projects each row, so that the rows which
        no token used keep a gradient of zero; `whole` leaves the tables uncompressed; `matrix` treats
        them as any other matrix.
      is_embedding: A function of the leaf's path and shape that says whether it is an embedding table.
        By default it is one if it has two axes and its path says so (`embed…`, `wte`, `wpe`).
      head: The treatment of the matrix that gives the logits. `input` projects its input side, even where
        that is the smaller one, so that the gradients of the classes are not mixed: projecting the
        vocabulary costs far more loss than the bytes it saves. `whole` leaves the matrix uncompressed;
        `matrix` treats it as any other.
      is_head: A function of the leaf's path and shape that says whether it is such a matrix. By default
        it is one if it has two axes and its path says so (`head`, `lm_head`, `unembed…`, `logits…`,
        `output_projection`, `classifier`).
      stacked: A function of the leaf's path that returns None, or the path and the index that this layer
        has where the model's layers are stacked. A layer sampled so has the same `A` as in the stack.
      prng: The name of the PRNG implementation of the keys. The entries of `A` are a hash of a key, which costs the same
        with each; keys of `unsafe_rbg` may depend on how arrays are sharded.
      block: The largest number of entries of `A` that are in memory at a time, for each weight.
      partition_specs: A pytree of `PartitionSpec` (or a prefix of one, with None for replicated weights),
        or a function from the params to such a tree: how the weights are sharded inside
        `jax.shard_map`, where the arrays themselves do not say it. Each device then samples its own
        part of one `A`. Without it each device's part is treated as a weight by itself.

    Raises:
      ValueError: One of the values is not valid.
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
        for name in ("rank", "resample_every", "seed", "min_dim", "block"):
            object.__setattr__(self, name, as_int(getattr(self, name)))
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


def check_projection(projection: Any) -> None:
    """Raises a ValueError unless this is a `Projection`."""
    if not isinstance(projection, Projection):
        found = projection if isinstance(projection, int | float | str | None) else type(projection)
        raise ValueError(f"projection must be a flora_jax.Projection, found {found!r}")


def check_every(name: str, every: Any) -> Any:
    """Returns `every`, as a Python int unless it is a schedule.

    Raises:
      ValueError: It is neither an int of at least 1 nor a schedule.
    """
    if callable(every):
        return every
    every = as_int(every)
    if not _is_int(every) or every < 1:
        raise ValueError(
            f"{name} must be an int of at least 1 or a schedule, found {_describe(every)}"
        )
    return every


def as_int(value: Any) -> Any:
    """Returns a NumPy integer as a Python int, and all else as it is."""
    return int(value) if isinstance(value, np.integer) else value


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
