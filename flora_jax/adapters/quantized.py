"""Quantized: frozen weights in 8 or 4 bits under an adapter, as in QLoRA.

The integers and their scales come from `qwix`, Google's quantization library for JAX (which also has
kernels for quantized arithmetic). Here they take the place of a weight under an adapter: a weight is
converted to floating point where it is used, one matrix of one layer at a time, and once more in the
backward pass. This needs `qwix` (`pip install flora-jax[quantized]`).

Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA", arXiv 2305.14314, Section 3 (blocks of 64
entries, NF4).
"""

from typing import Any, Literal

import jax

from flora_jax.adapters.low_rank import Adapter, arrays_apart, plans_of
from flora_jax.chain.sketch import Spec
from flora_jax.fused.int8 import needed
from flora_jax.fused.lazy import Lazy, is_lazy
from flora_jax.fused.leaves import combine

Kind = Literal["int8", "int4", "nf4"]


def quantize(adapter: Adapter, params: Any, kind: Kind = "int8", *, tile: int | None = None) -> Any:
    """Quantizes every weight that has an adapter.

    Args:
      adapter: The `Adapter`, whose projection says which weights have one.
      params: The params of the model.
      kind: The number format: `int8`, `int4`, or `nf4` (quantiles of a normal distribution).
      tile: The number of entries along the input side that share a scale. By default all of them do for
        `int8`, and 64 for 4 bits, where 64 divides the input side.

    Returns:
      The params for `apply` and `merge` of an adapter, with a `Lazy` in the place of each such weight.

    Raises:
      ValueError: `kind` is none of the three, or `tile` does not divide the input side.
    """
    if kind not in ("int8", "int4", "nf4"):
        raise ValueError(f"kind must be one of int8, int4, nf4, found {kind!r}")
    arrays, rest = arrays_apart(params)
    leaves, structure = jax.tree.flatten(arrays, is_leaf=is_lazy)
    plans = plans_of(adapter.projection, arrays)
    results = [
        _quantized(plan.spec, leaf, kind, tile) if plan.spec and not is_lazy(leaf) else leaf
        for plan, leaf in zip(plans, leaves, strict=True)
    ]
    return combine(jax.tree.unflatten(structure, results), rest)


def _quantized(spec: Spec, leaf: Any, kind: Kind, tile: int | None) -> Lazy:
    qwix = needed()

    axis = spec.projected[-1]
    length = spec.shape[axis]
    if tile is None and kind != "int8" and length % 64 == 0:
        tile = 64
    if tile is not None and length % tile:
        raise ValueError(f"tile must divide the {length} of {spec.path!r}, found {tile}")
    others = tuple(i for i in range(len(spec.shape)) if i not in spec.projected)
    tiles = {axis: tile} if tile else None
    parts = qwix.quantize(leaf, kind, channelwise_axes=others, tiled_axes=tiles)
    return Lazy(parts, qwix.dequantize)
