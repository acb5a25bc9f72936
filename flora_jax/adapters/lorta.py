"""LoRTA: one CP tensor for the updates of all attention matrices of a model.

| paper | here |
|---|---|
| `T = Σ_r a_r ∘ b_r ∘ c_r^H ∘ c_r^L ∘ c_r^M`, `d × d/H × H × L × 4` | the five factors |
| update of head `h` of layer `l`: `T[:, :, h, l, m]`, `m` one of Q, K, V | `(d, head_dim)` of the kernel |
| the same of the output projection, transposed | `(head_dim, d)` of the kernel |
| `r (d + d/H + H + L + 4)` parameters | `count` |

Source: Hounie, Kanatsoulis, Tandon, Ribeiro, "LoRTA: Low Rank Tensor Adaptation of Large Language
Models", arXiv 2410.04060, Section 4.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.adapters.low_rank import (
    Adapter,
    Factors,
    as_projection,
    from_matrices,
    layer_name,
    layer_names,
    specs,
)
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import Spec

NAMES = ("query", "key", "value", "out")


def lorta(
    rank: int | Projection,
    heads: int,
    *,
    alpha: float | None = None,
    names: Sequence[str] = NAMES,
    layer_of: Callable[[str], str] | None = None,
) -> Adapter:
    """Returns LoRTA: one low-rank tensor for the updates of all attention kernels.

    Args:
      rank: The rank `r` of the tensor; or a `Projection` with side `input`, which may leave matrices out.
      heads: The number `H` of heads in each layer, for all four of its matrices.
      alpha: The number `α`, with which the update is scaled by `α / r`. None scales it by 1.
      names: The names of the query, key, value and output projections. Each is a part of a leaf's path,
        or what follows the last underscore in one (`self_query`, `cross_query`).
      layer_of: A function from a leaf's path to the name of its layer. The default is the same as in
        `xgb_lora`.

    Returns:
      An `Adapter`, whose params are `{"input": (d, r), "head_dim": (d/H, r), "heads": (H, r),
      "layers": (L, r), "matrices": (4, r)}`. `head_dim` is zero at the start, and the others are random.

    Raises:
      ValueError: On `init`, a matrix has other sizes than the first, `heads` does not divide the width,
        or no matrix has one of the names.
    """
    projection = as_projection(rank)
    name_of = layer_of or layer_name

    def init(key: jax.Array, params: Any) -> dict[str, jax.Array]:
        known = _matrices(projection, params, names)
        width, rank, _ = _sizes(known, heads)
        layers = _layers(known, name_of)
        lengths = {
            "input": width,
            "head_dim": width // heads,
            "heads": heads,
            "layers": len(layers),
            "matrices": len(names),
        }
        keys = jax.random.split(key, len(lengths))
        dtype = jnp.dtype(next(iter(known.values()))[0].dtype)

        def start(key, name, length):
            if name == "head_dim":
                return jnp.zeros((length, rank), dtype)
            values = jax.random.normal(key, (length, rank), dtype)
            return values * width**-0.5 if name == "input" else values

        pairs = zip(keys, lengths.items(), strict=True)
        return {name: start(key, name, length) for key, (name, length) in pairs}

    def factors(params: Any, own: Any) -> dict[str, Factors]:
        known = _matrices(projection, params, names)
        _, rank, _ = _sizes(known, heads)
        layers = _layers(known, name_of)
        found = {}
        for path, (spec, matrix) in known.items():
            index = jnp.array([layers.index(name) for name in layer_names(spec, name_of)])
            of_layer = own["layers"][index] * own["matrices"][matrix]
            of_layer = of_layer if spec.batch else of_layer[0]
            if alpha is not None:
                of_layer = of_layer * (alpha / rank)
            within = jnp.einsum("hr,kr->hkr", own["heads"], own["head_dim"])
            sides = own["input"], within.reshape(-1, rank)
            if matrix == len(names) - 1:
                sides = sides[::-1]
            batch = of_layer.shape[:-1]
            down = jnp.broadcast_to(sides[0], (*batch, *sides[0].shape))
            up = jnp.einsum("nr,...r->...rn", sides[1], of_layer)
            found[path] = Factors(*from_matrices(spec, down, up))
        return found

    return Adapter(init, factors, projection)


def count(rank: int, width: int, heads: int, layers: int, matrices: int = 4) -> int:
    """Returns the number of trained parameters, `r (d + d/H + H + L + 4)`."""
    return rank * (width + width // heads + heads + layers + matrices)


def _matrices(
    projection: Projection, params: Any, names: Sequence[str]
) -> dict[str, tuple[Spec, int]]:
    """Returns the attention kernels by path, each with the position of its name among `names`."""
    found = {}
    for path, spec in specs(projection, params).items():
        parts = path.split("/")
        places = [
            i
            for i, name in enumerate(names)
            if any(part == name or part.endswith(f"_{name}") for part in parts)
        ]
        if places:
            found[path] = (spec, places[0])
    if not found:
        raise ValueError(f"no weight has one of the names {', '.join(names)} in its path")
    return found


def _sizes(known: dict[str, tuple[Spec, int]], heads: int) -> tuple[int, int, str]:
    """Returns the width and the rank, which are the same for all matrices, and the path of the first."""
    width = rank = 0
    first = ""
    for path, (spec, _) in known.items():
        entries = 1
        for axis, length in enumerate(spec.shape):
            entries *= 1 if axis in spec.batch else length
        sides = (spec.size, entries // spec.size)
        if not first:
            width, rank, first = sides[0], spec.rank, path
        if sides != (width, width) or len(spec.batch) > 1:
            raise ValueError(
                f"{path!r}: lorta needs matrices of {width} x {width} as {first!r} begins, found "
                f"{sides[0]} x {sides[1]}"
            )
    if width % heads:
        raise ValueError(f"heads must divide the width {width} of {first!r}, found {heads}")
    return width, rank, first


def _layers(known: dict[str, tuple[Spec, int]], name_of: Callable[[str], str]) -> list[str]:
    """Returns the names of all layers, in the order of their numbers."""
    names = {name for spec, _ in known.values() for name in layer_names(spec, name_of)}

    def order(name: str):
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return sorted(names, key=order)
