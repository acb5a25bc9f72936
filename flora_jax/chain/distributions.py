"""Distributions: how the entries of a projection `A` are sampled from a key.

| paper | here |
|---|---|
| `A`, `r × m` | `scale(...) * columns(...)`, transposed: each row of that array is a column of `A` |
| `r` | `rank` |
| `m` | `size` |

All of them are unbiased, `E[AᵀA] = I`. Any set of columns of `A` can be sampled without the others
(except in `orthonormal`), since the entries of column `j` depend on the key and on `j` alone. So each
device samples the columns that it needs, and a loop holds no more of `A` than a block.

The entries are computed in integers and converted to floating point by one exact step. A compiler
rounds floating-point formulas (an inverse error function, say) differently as it fuses them; integers
come out the same to the last bit on every backend and for every sharding. `orthonormal` is the
exception, since its QR decomposition is in floating point. Those of `srtt` are looked up in a table that
the host computes.

`srht` is the fastest. An entry of a subsampled randomised Hadamard transform is the parity of
`popcount(row & column)`: integer arithmetic, with no random bits but `r` row numbers and one sign for
each column, and the contraction stays a dense one, which accelerators are built for. (A sparse sign
sketch would need scatters, which are slow there.)

`srtt`, a subsampled randomised trigonometric transform, has orthogonal rows for every `m`, without a QR
decomposition. With `m = q 2ᵏ` and `q` odd, its rows are those of `H_q ⊗ H_2 ⊗ … ⊗ H_2`, where `H_q` is
the Hartley matrix, `cos + sin` of `2π a c / q`, and `H_2` that of Hadamard; each column has a random
sign. Where `m` is a power of two it is `srht`.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Key

from flora_jax import bits
from flora_jax.tracing import once

Distribution = Literal["gaussian", "rademacher", "orthonormal", "srht", "srtt"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)


def is_columnwise(distribution: Distribution) -> bool:
    """Returns whether a block of columns can be sampled without the others."""
    return distribution != "orthonormal"


def is_orthogonal(distribution: Distribution, size: int) -> bool:
    """Returns whether the rows of `A` are orthogonal, so that `A Aᵀ = (m/r) I`."""
    power_of_two = size & (size - 1) == 0
    return distribution in ("orthonormal", "srtt") or (distribution == "srht" and power_of_two)


def scale(distribution: Distribution, rank: int, size: int) -> float:
    """Returns the factor by which `columns` is multiplied to give the unbiased `A`."""
    if distribution == "orthonormal":
        return (size / rank) ** 0.5
    return rank**-0.5


def variance(distribution: Distribution, rank: int, size: int) -> float:
    """Returns the relative variance of the estimate, `E‖g AᵀA − g‖² / ‖g‖²`.

    It is the same for any row `g` of `size` numbers, and follows from the variances of the entries of
    `AᵀA`. An off-diagonal entry has variance `1/r` (Gaussian and Rademacher) or
    `(M − r) / (r (M − 1))` (`srht`, where `M` is the next power of two), a diagonal one `2/r` (Gaussian)
    or 0. For orthogonal rows `AᵀA AᵀA = (m/r) AᵀA`.
    """
    if distribution == "gaussian":
        return (size + 1) / rank
    if distribution == "rademacher":
        return (size - 1) / rank
    if is_orthogonal(distribution, size):
        return size / rank - 1
    padded = _next_power_of_two(size)
    return (size - 1) * (padded - rank) / (rank * (padded - 1)) if padded > 1 else 0.0


def columns(
    distribution: Distribution,
    key: Key[Array, ""],
    rank: int,
    size: int,
    indices: Int32[Array, "*indices"],
) -> Float32[Array, "*indices {rank}"]:
    """Samples columns of `A`, before they are multiplied by `scale`.

    Args:
      distribution: The name of the distribution.
      key: A scalar typed key.
      rank: The rank `r`, the number of rows of `A`.
      size: The number `m` of columns of `A`.
      indices: The numbers of the columns to sample: an int32 array of any shape, with entries below
        `size`.

    Returns:
      A float32 array of shape `indices.shape + (rank,)`.
    """
    return _columns(distribution, key, rank, size, indices)


@functools.partial(once, static_argnums=(0, 2, 3))
def _columns(distribution, key, rank, size, indices):
    return _RULES[distribution](bits.words(key), rank, size, indices)


def _gaussian(key: bits.Words, rank: int, size: int, indices: jax.Array) -> jax.Array:
    """Turns each random word into one approximately normal number, in integer arithmetic.

    The count of set bits of a word is binomial with variance 8. Two fractions, taken from a product
    of the word, fill the steps between its values (variance 1/6), and a cubic polynomial (the
    expansion of Cornish and Fisher) removes the fourth cumulant. Over all 2³² words the mean is 1e-8,
    the variance 1 − 2e-5, the kurtosis 3.0001, the distribution function is within 2.3e-4 of the
    normal one, and no entry is beyond ±6.47.
    """
    del size
    word = _by_column(key, indices, rank)
    mixed = word * jnp.uint32(0x9E3779B1)
    fractions = (mixed >> 22) + ((mixed >> 12) & 1023)
    total = (jax.lax.population_count(word) << 10) + fractions
    total = total.astype(jnp.int32) - 17407  # the mean; a standard deviation is 2926
    slope = 45502 + (121 * (total * total >> 15) >> 8)
    return (total * slope + 32 >> 6).astype(jnp.float32) * 2.0**-21  # 24 bits: both steps exact


def _rademacher(key: bits.Words, rank: int, size: int, indices: jax.Array) -> jax.Array:
    del size
    words = -(-rank // 32)
    word = _by_column(key, indices, words)[..., None] >> jnp.arange(32, dtype=jnp.uint32)
    return _sign(word.reshape(*indices.shape, 32 * words)[..., :rank])


def _orthonormal(key: bits.Words, rank: int, size: int, indices: jax.Array) -> jax.Array:
    normal = _gaussian(key, rank, size, jnp.arange(size, dtype=jnp.int32))
    q, r = jnp.linalg.qr(normal)
    diagonal = jnp.diagonal(r)
    q = q * jnp.where(diagonal < 0, -1.0, 1.0).astype(q.dtype)  # Haar: Mezzadri, math-ph/0609050
    return q[indices]


def _srht(key: bits.Words, rank: int, size: int, indices: jax.Array) -> jax.Array:
    rows = _rows(key, rank, _next_power_of_two(size))
    signs = _by_column(key, indices, 1)
    hadamard = jax.lax.population_count(indices[..., None].astype(jnp.uint32) & rows)
    return _sign(hadamard ^ signs)


def _srtt(key: bits.Words, rank: int, size: int, indices: jax.Array) -> jax.Array:
    rows = _rows(key, rank, size)
    signs = _by_column(key, indices, 1)
    columns = indices[..., None].astype(jnp.uint32)
    power = (size & -size).bit_length() - 1
    odd, low = size >> power, jnp.uint32((1 << power) - 1)
    signed = _sign(jax.lax.population_count(columns & rows & low) ^ signs)
    if odd == 1:
        return signed
    angles = 2 * np.pi * np.arange(odd) / odd
    table = jnp.asarray(np.float32(np.cos(angles) + np.sin(angles)))
    if odd < indices.size:  # look up rows of all of H_q, which is smaller than what is asked for
        each = jnp.arange(odd, dtype=jnp.uint32)[:, None]
        return signed * table[_times(each, rows >> power, odd)][indices >> power]
    return signed * table[_times(columns >> power, rows >> power, odd)]


def _times(left: jax.Array, right: jax.Array, modulus: int) -> jax.Array:
    """Returns `left · right` modulo a number below 2²⁴; both are below it."""
    if modulus >= 2**24:
        raise ValueError(f"srtt takes sides whose odd factor is below 2**24, found {modulus}")
    if modulus < 2**16:
        return left * right % modulus
    product = jnp.zeros((), jnp.uint32)
    for shift in (16, 8, 0):
        product = ((product << 8) % modulus + left * (right >> shift & 255) % modulus) % modulus
    return product


_RULES = {
    "gaussian": _gaussian,
    "rademacher": _rademacher,
    "orthonormal": _orthonormal,
    "srht": _srht,
    "srtt": _srtt,
}


def _by_column(key: bits.Words, indices: jax.Array, count: int) -> jax.Array:
    """Returns so many random words for each column, along a new last axis."""
    return bits.at(bits.fold(key, indices[..., None]), jnp.arange(count, dtype=jnp.uint32))


def _rows(key: bits.Words, rank: int, size: int) -> jax.Array:
    """Returns the uint32 numbers of `rank` rows out of `size`, in the order of a random word of each."""
    numbers = jnp.arange(size, dtype=jnp.uint32)
    word = bits.at(bits.fold(key, 2**32 - 1), numbers)  # no column has this number
    return jax.lax.sort((word, numbers), num_keys=1)[1][:rank]


def _sign(bits: jax.Array) -> jax.Array:
    """Returns +1 where the lowest bit is 0, and −1 where it is 1."""
    return 1.0 - 2.0 * (bits & 1).astype(jnp.float32)


def _next_power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
