"""Dtypes: in which dtype the products of a sketch are computed and summed.

A sketch is as accurate as the gradient it is of. So integers, booleans and floats of 8 bits are computed in
float32, as is float16, in which `x Aᵀ` overflows where `x` does not; bfloat16 stays, with sums in float32.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def promoting() -> Iterator[None]:
    """Lets arrays of different dtypes and ranks be combined, whatever the user has set for their own code.

    Those settings are `jax.numpy_rank_promotion` and `jax.numpy_dtype_promotion`.
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Returns the bytes that an array takes on a device, where two integers of four bits share a byte."""
    dtype = jnp.dtype(dtype)
    bits = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize
    return -(-bits * math.prod(shape) // 8)


@promoting()
def sums(*dtypes: Any) -> Any:
    """Returns the dtype that products of arrays of these dtypes are summed in: float32 at least."""
    return jnp.promote_types(operands(*dtypes), jnp.float32)


@promoting()
def operands(*dtypes: Any) -> Any:
    """Returns the dtype that arrays of these dtypes are multiplied in."""
    found = None
    for dtype in map(jnp.dtype, dtypes):
        exact = dtype == jnp.bfloat16 or (
            jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
        )
        dtype = dtype if exact else jnp.dtype(jnp.float32)
        found = dtype if found is None else jnp.promote_types(found, dtype)
    return found


@promoting()
def einsum(equation: str, left: jax.Array, right: jax.Array, precision: Any = None) -> jax.Array:
    """Contracts two arrays in `operands` of their dtypes; the result is in `sums` of them.

    XLA's CPU backend has no products of bfloat16 with sums in float32 for all layouts; there the factors are
    widened first, when the program is lowered for it.
    """
    dtype = operands(left.dtype, right.dtype)
    total = sums(dtype)
    if precision is not None and {left.dtype, right.dtype} != {dtype}:
        precision = None  # it was chosen for other dtypes

    def contract(left, right):
        return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=total)

    def widened(left, right):
        return contract(left.astype(total), right.astype(total))

    left, right = left.astype(dtype), right.astype(dtype)
    if dtype == total:
        return contract(left, right)
    return jax.lax.platform_dependent(left, right, cpu=widened, default=contract)
