"""Contraction: products of arrays with `Aᵀ`, and of two arrays to a sketch, by einsum labels.

A label `Z` stands for the rank. In the shape descriptions `B` are the batch axes of a weight and `P` its
projected axes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax import dtypes
from flora_jax.chain import distributions
from flora_jax.chain.blocks import Block, over_blocks
from flora_jax.chain.sketch import Spec
from flora_jax.fused.weight import Weight


def contract(
    weight: Weight,
    source: Any,
    array: jax.Array,
    labels: str,
    of_weight: str,
    precision: Any = None,
):
    """Contracts an array with `Aᵀ` over the projected axes, in blocks of `spec.block` entries of `A`.

    Args:
      weight: The `Weight`, of which only the static parts are used.
      source: The tuple `(keys, columns, factors)`.
      array: The array, which is multiplied and summed as `flora_jax.dtypes` says.
      labels: The einsum labels of `array`.
      of_weight: The einsum labels of the weight.
      precision: As in `jax.lax.dot_general`.

    Returns:
      The result, with the labels that `contracted_labels` gives.
    """
    keys, columns, factors = source
    spec = weight.spec
    projected = "".join(of_weight[axis] for axis in weight.axes("projected"))
    batch = "".join(of_weight[axis] for axis in weight.axes("batch"))
    result = contracted_labels(weight, labels, of_weight)
    dtype = dtypes.operands(array.dtype, *complex_dtypes(factors))
    array = array.astype(dtype)
    sums = dtypes.sums(dtype)
    if columns is None:
        columns = weight.indices()
    scale = distributions.scale(spec.distribution, spec.rank, spec.size)
    most = max(1, spec.block // (spec.rank * math.prod(keys.shape[:-1])))
    if most >= columns.size or not distributions.is_columnwise(spec.distribution):
        sampled = _sample(spec, keys, columns, factors).astype(dtype)
        equation = f"{labels},{batch}{projected}Z->{result}"
        return dtypes.einsum(equation, array, sampled, precision) * scale
    total = columns.size
    flat = [None if x is None else x.reshape(-1) for x in (columns, factors)]
    order = "".join(label for label in labels if label not in projected)
    array = jnp.einsum(f"{labels}->{order}{projected}", array).reshape(
        *(array.shape[labels.index(label)] for label in order), total
    )
    equation = f"{order}Y,{batch}YZ->{result}"

    def add(block, sketch):
        part = [None if x is None else block.take(x, 0) for x in flat]
        slab = jnp.where(block.fresh(), block.take(array, array.ndim - 1), 0)
        sampled = _sample(spec, keys, *part).astype(dtype)
        return sketch + dtypes.einsum(equation, slab, sampled, precision)

    shape = jax.eval_shape(lambda: add(Block(total, 1, 0, total, 0), jnp.zeros([], sums))).shape
    return over_blocks(total, most, add, jnp.zeros(shape, sums)) * scale


def sample(weight: Weight, source: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Samples all of the weight's `Aᵀ`, scaled, of shape `(*B, *P, r)` and in this dtype.

    For an adapter it returns the down factor as it is. `source` is the tuple `(keys, columns, factors)`.
    """
    keys, columns, factors = source
    if weight.adapter:
        return _adapter_down(weight, keys, columns, factors)
    columns = weight.indices() if columns is None else columns
    spec = weight.spec
    scale = distributions.scale(spec.distribution, spec.rank, spec.size)
    sampled = _sample(spec, keys, columns, factors)
    return (sampled.astype(jnp.promote_types(sampled.dtype, dtype)) * scale).astype(dtype)


def _adapter_down(weight: Weight, flat, columns, factors) -> jax.Array:
    batch, rank = flat.shape[:-1], weight.spec.rank
    if columns is None:
        lengths = [weight.value.shape[axis] for axis in weight.axes("projected")]
        down = flat.reshape(*batch, *lengths, rank)
    else:
        down = jnp.take(flat.reshape(*batch, -1, rank), columns, axis=len(batch))
    if factors is None:
        return down
    return down * factors[..., None].astype(dtypes.operands(down.dtype, *complex_dtypes(factors)))


def _sample(spec: Spec, keys, columns, factors) -> jax.Array:
    def one(words):
        key = jax.random.wrap_key_data(words, impl=spec.impl)
        return distributions.columns(spec.distribution, key, spec.rank, spec.size, columns)

    for _ in keys.shape[:-1]:
        one = jax.vmap(one)
    sampled = one(keys)
    return sampled if factors is None else sampled * factors[..., None]


def down_labels(weight: Weight, of_weight: str) -> str:
    """Returns the labels of the down factor: the batch axes, the projected axes, and `Z` for the rank."""
    axes = (*weight.axes("batch"), *weight.axes("projected"))
    return "".join(of_weight[axis] for axis in axes) + "Z"


def contracted_labels(weight: Weight, labels: str, of_weight: str) -> str:
    """Returns the labels of the result of `contract`.

    They are those of `labels` that are not projected, those of batch axes that it lacks, and `Z`, the rank.
    """
    projected = {of_weight[axis] for axis in weight.axes("projected")}
    left = "".join(label for label in labels if label not in projected)
    batch = (of_weight[axis] for axis in weight.axes("batch"))
    return left + "".join(label for label in batch if label not in left) + "Z"


def complex_dtypes(factors: Any) -> list[Any]:
    """The dtype of complex factors, which no product may lose; real ones are cast."""
    if factors is None or not jnp.issubdtype(factors.dtype, jnp.complexfloating):
        return []
    return [factors.dtype]


def outer(
    weight: Weight,
    left: jax.Array,
    of_left: str,
    right: jax.Array,
    of_right: str,
    of_weight: str,
    precision: Any = None,
) -> jax.Array:
    """Multiplies two arrays, one of which has the rank, to a cotangent of the up factor."""
    goal = up_labels(weight, of_weight)
    result = dtypes.einsum(f"{of_left},{of_right}->{goal}", left, right, precision)
    return to_up(weight, result, goal, of_weight)


def to_up(weight: Weight, array: jax.Array, labels: str, of_weight: str) -> jax.Array:
    array = jnp.einsum(f"{labels}->{up_labels(weight, of_weight)}", array)
    return jnp.expand_dims(array, weight.axes("projected")[1:])


def up_labels(weight: Weight, of_weight: str) -> str:
    return "".join(
        "Z" if axis == weight.slot else label
        for axis, label in enumerate(of_weight)
        if axis == weight.slot or weight.kinds[axis] != "projected"
    )
