"""From (seed, path, cycle) to a key.

The key of a projection is a pure function of the seed, the path of the weight in the parameter
tree, and the cycle: never of the order of the leaves, of the devices, or of what was drawn before.
"""

import hashlib
import struct

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Key


def leaf_key(seed: int, path: str, cycle: ArrayLike, impl: str = "threefry2x32") -> Key[Array, ""]:
    """Derives the typed key of one leaf in one cycle.

    Args:
      seed: of the projection; any Python int that `jax.random.key` takes.
      path: the leaf's name, from `path_name`; 64 bits of its BLAKE2 hash are folded in.
      cycle: int32 scalar, may be traced.
      impl: name of the PRNG implementation. Only `threefry2x32` gives values that do not depend on
        `vmap` and on the layout over devices.

    Returns:
      A scalar typed key.
    """
    return jax.random.fold_in(fold_path(jax.random.key(seed, impl=impl), path), cycle)


def fold_path(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """A key of its own for the leaf of this name."""
    for word in struct.unpack("<II", hashlib.blake2s(path.encode(), digest_size=8).digest()):
        key = jax.random.fold_in(key, word)
    return key
