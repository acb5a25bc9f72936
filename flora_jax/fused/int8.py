"""int8: weights as integers and scales, which are made floating point where they are used.

The format is `qwix.QArray`, of Google's quantization library for JAX. Each block of entries along the input side has
a scale, in the dtype of the weight.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax import rounding
from flora_jax.chain.leaf_plan import leaf_plans
from flora_jax.chain.projection import Projection
from flora_jax.fused.lazy import Lazy
from flora_jax.fused.leaves import trained
from flora_jax.qarray import is_int8, outline

LARGEST = 127
KEPT, AIM = 116, 122
"""A scale is kept while the largest integer of its block is between the first and `LARGEST`; a new one makes it the second."""


def to_int8(
    params: Any, *, block: int = 128, select: Callable[[str, tuple[int, ...]], bool] | None = None
) -> Any:
    """Quantizes the matrices of a model, for `flora_jax.make_train_step`.

    A step makes each of them floating point where it is used, one layer at a time, and with `rounding="stochastic"`
    rounds what it writes back at random, so that small updates are not lost.

    Args:
      params: The params of the model, or an Equinox module.
      block: The number of entries along the input side that share a scale.
      select: Says by name and shape which leaves are quantized. By default they are the matrices that are not
        an embedding or a head, and whose input side `block` divides.

    Returns:
      The params, with a `qwix.QArray` in the place of each such leaf. Its `dtype` is that of the weight.

    Raises:
      ValueError: `block` is below 1, or does not divide the input side of a leaf that `select` names.
      ModuleNotFoundError: `qwix` is not installed (`pip install flora-jax[quantized]`).
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, found {block}")
    plain = Projection(1, side="input", min_dim=2, embedding="whole", head="whole", select=select)

    def quantized(plan, leaf):
        if plan.spec is None or is_int8(leaf):
            return leaf
        axis = plan.spec.projected[-1]
        length = leaf.shape[axis]
        if length % block:
            if select is None:
                return leaf
            raise ValueError(f"block must divide the {length} of {plan.path!r}, found {block}")
        qwix = needed()
        shape = tuple(n // block if i == axis else n for i, n in enumerate(leaf.shape))
        empty = qwix.QArray(jnp.zeros(leaf.shape, jnp.int8), jnp.zeros(shape, leaf.dtype))
        return requantized(empty, leaf.astype(jnp.float32), None)

    own = trained(params)
    leaves, structure = jax.tree.flatten(params, is_leaf=is_int8)
    plans = iter(leaf_plans(jax.tree.map(outline, own, is_leaf=is_int8), plain))
    new = [
        leaf if one is None else quantized(next(plans), leaf)
        for one, leaf in zip(structure.flatten_up_to(own), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def needed() -> Any:
    """Returns the module `qwix`.

    Raises:
      ModuleNotFoundError: It is not installed.
    """
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "weights in int8 need qwix: pip install 'flora-jax[quantized]'", name=error.name
        ) from None
    return qwix


def from_int8(params: Any) -> Any:
    """Returns the params with ordinary arrays in the place of those that `to_int8` made, each in its dtype."""
    return jax.tree.map(as_array, params, is_leaf=is_int8)


def lazy(leaf: Any) -> Any:
    """Returns an array as it is, and for a `qwix.QArray` the array it stands for, to be computed where it is used."""
    return Lazy(leaf, value) if is_int8(leaf) else leaf


def as_array(leaf: Any) -> Any:
    """Returns an array as it is, and the one that a `qwix.QArray` stands for."""
    return value(leaf) if is_int8(leaf) else leaf


def value(leaf: Any, dtype: Any = None) -> jax.Array:
    """Computes the array that a `qwix.QArray` stands for, in its own dtype or another."""
    dtype = leaf.scale.dtype if dtype is None else dtype
    axis = _axis(leaf)
    split = _split(leaf.qvalue.astype(dtype), leaf.scale, axis)
    product = split * jnp.expand_dims(leaf.scale.astype(dtype), axis + 1)
    return product.reshape(leaf.qvalue.shape)


def requantized(leaf: Any, x: jax.Array, bits: Any) -> Any:
    """Returns a `qwix.QArray` like `leaf` that stands for other numbers.

    Rounded at random, a block keeps its scale while its integers fit: what has not changed then stays as it is, where on
    another grid all numbers of the block would be rounded anew.

    Args:
      leaf: What says the blocks, the scales so far and the dtype.
      x: The numbers, a float32 array.
      bits: Random uint32 numbers, of the shape of `x`; None to round to nearest, on the finest grid.
    """
    axis = _axis(leaf)
    split = _split(x, leaf.scale, axis)
    largest = jnp.max(jnp.abs(split), axis + 1, keepdims=True)
    scale = rounding.up(largest / (LARGEST if bits is None else AIM), leaf.scale.dtype)
    if bits is not None:
        old = jnp.expand_dims(leaf.scale, axis + 1)
        of_old = old.astype(jnp.float32)
        kept = (largest <= LARGEST * of_old) & (largest >= KEPT * of_old)
        scale = jnp.where(kept, old, scale)
    of_one = jnp.where(scale > 0, scale.astype(jnp.float32), 1.0)
    numbers = (split / of_one).reshape(x.shape)
    whole = jnp.round(numbers) if bits is None else rounding.to_integers(numbers, bits)
    qvalue = jnp.clip(whole, -LARGEST, LARGEST).astype(jnp.int8)
    return dataclasses.replace(leaf, qvalue=qvalue, scale=jnp.squeeze(scale, axis + 1))


def _axis(leaf: Any) -> int:
    """Returns the axis that is in blocks."""
    shapes = zip(leaf.qvalue.shape, leaf.scale.shape, strict=True)
    return next((i for i, (n, m) in enumerate(shapes) if n != m), len(leaf.qvalue.shape) - 2)


def _split(x: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    count = scale.shape[axis]
    return x.reshape(*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
