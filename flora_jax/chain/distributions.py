"""The rules that draw a projection `A`, of shape `(r, m)`.

| paper | here |
|---|---|
| `A`, `r × m` | `scale(...) * columns(...)`, transposed: one row of the array a column of `A` |
| `r` | `rank` |
| `m` | `size` |

Each rule makes any set of columns of `A` without the others (`orthonormal` cannot), so that a
device draws what it owns and a loop holds no more than a block. The entry of column `j` depends
on the key and on `j` alone. All are unbiased, `E[AᵀA] = I`.

The entries are made in integers and turned into floating point by one exact step, for a compiler
rounds floating-point formulas (an inverse error function, say) as it happens to fuse them: these
come out the same to the last bit on every backend and in every layout. `orthonormal` cannot, its
QR is in floating point.

`srht` is the fast one. A sparse sign sketch would need scatters, which accelerators do badly;
an entry of a subsampled randomised Hadamard transform is the parity of `popcount(row & column)`,
integer arithmetic with no random bits but `r` row numbers and one sign a column, and the
contraction stays the dense one that matrix units are built for.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key

Distribution = Literal["gaussian", "rademacher", "orthonormal", "srht"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)


def is_columnwise(distribution: Distribution) -> bool:
    """Whether a block of columns can be drawn without the rest."""
    return distribution != "orthonormal"


def scale(distribution: Distribution, rank: int, size: int) -> float:
    """The factor between `columns` and the unbiased `A`."""
    if distribution == "orthonormal":
        return (size / rank) ** 0.5
    return rank**-0.5


def variance(distribution: Distribution, rank: int, size: int) -> float:
    """Relative error of the estimate: `E‖g AᵀA − g‖² / ‖g‖²` for any row `g` of `size` numbers.

    From the second moments of the entries of `AᵀA`: each off-diagonal one has `1/r` (Gaussian and
    Rademacher) or `(M − r) / (r (M − 1))` (`srht`, `M` the next power of two), each diagonal one
    `2/r` (Gaussian) or 0; for orthonormal rows `AᵀA AᵀA = (m/r) AᵀA`.
    """
    if distribution == "gaussian":
        return (size + 1) / rank
    if distribution == "rademacher":
        return (size - 1) / rank
    if distribution == "orthonormal":
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
    """Draws columns of `A`, before `scale`.

    Args:
      distribution: which rule.
      key: scalar typed key.
      rank: rows of `A`.
      size: columns of the whole `A`.
      indices: int32 array of any shape, entries below `size`: which columns.

    Returns:
      Array of shape `indices.shape + (rank,)`.
    """
    return _RULES[distribution](key, rank, size, indices)


def _gaussian(key: jax.Array, rank: int, size: int, indices: jax.Array) -> jax.Array:
    """One normal number from each random word, in integers.

    The set bits of a word are a binomial number of variance 8; two fractions, taken from a product
    of the word, fill the steps (variance 1/6); a cubic (Cornish and Fisher's) takes out the fourth
    cumulant. Over all 2³² words: mean 1e-8, variance 1 − 2e-5, kurtosis 3.0001, and a distribution
    function within 2.3e-4 of the normal one; no entry is beyond ±6.47.
    """
    del size
    word = _by_column(key, indices, lambda k: jax.random.bits(k, (rank,), jnp.uint32))
    mixed = word * jnp.uint32(0x9E3779B1)
    fractions = (mixed >> 22) + ((mixed >> 12) & 1023)
    total = (jax.lax.population_count(word) << 10) + fractions
    total = total.astype(jnp.int32) - 17407  # the mean; a standard deviation is 2926
    slope = 45502 + (121 * (total * total >> 15) >> 8)
    return (total * slope + 32 >> 6).astype(jnp.float32) * 2.0**-21  # 24 bits: both steps exact


def _rademacher(key: jax.Array, rank: int, size: int, indices: jax.Array) -> jax.Array:
    del size
    words = -(-rank // 32)
    bits = _by_column(key, indices, lambda k: jax.random.bits(k, (words,), jnp.uint32))
    bits = bits[..., None] >> jnp.arange(32, dtype=jnp.uint32)
    bits = bits.reshape(*indices.shape, 32 * words)[..., :rank]
    return _sign(bits)


def _orthonormal(key: jax.Array, rank: int, size: int, indices: jax.Array) -> jax.Array:
    normal = _gaussian(key, rank, size, jnp.arange(size, dtype=jnp.int32))
    q, r = jnp.linalg.qr(normal)
    diagonal = jnp.diagonal(r)
    q = q * jnp.where(diagonal < 0, -1.0, 1.0).astype(q.dtype)  # Haar: Mezzadri, math-ph/0609050
    return q[indices]


def _srht(key: jax.Array, rank: int, size: int, indices: jax.Array) -> jax.Array:
    row_key, sign_key = jax.random.split(key)
    order = jax.random.permutation(row_key, _next_power_of_two(size))
    rows = order[:rank].astype(jnp.uint32)
    signs = _by_column(sign_key, indices, lambda k: jax.random.bits(k, (), jnp.uint32))
    hadamard = jax.lax.population_count(indices[..., None].astype(jnp.uint32) & rows)
    return _sign(hadamard ^ signs[..., None])


_RULES = {
    "gaussian": _gaussian,
    "rademacher": _rademacher,
    "orthonormal": _orthonormal,
    "srht": _srht,
}


def _by_column(key: jax.Array, indices: jax.Array, draw) -> jax.Array:
    flat = indices.reshape(-1)
    drawn = jax.vmap(lambda j: draw(jax.random.fold_in(key, j)))(flat)
    return drawn.reshape(indices.shape + drawn.shape[1:])


def _sign(bits: jax.Array) -> jax.Array:
    """+1 where the lowest bit is 0, −1 where it is 1."""
    return 1.0 - 2.0 * (bits & 1).astype(jnp.float32)


def _next_power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
