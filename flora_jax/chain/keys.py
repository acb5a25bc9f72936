"""Keys: from a seed, a path and a cycle to the PRNG key of a projection `A`.

The key of a projection is a pure function of the seed, the path of the weight in the parameter
tree, and the cycle. It does not depend on the order of the leaves, on the devices, or on what was
sampled before.
"""

import contextlib
import contextvars
import hashlib
import struct
from collections.abc import Iterator
from typing import Any

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Key


def leaf_key(seed: int, path: str, cycle: ArrayLike, impl: str = "threefry2x32") -> Key[Array, ""]:
    """Derives the typed key of one leaf in one cycle.

    Args:
      seed: The seed of the `Projection`, any Python int that `jax.random.key` accepts.
      path: The name of the leaf, from `path_name`. 64 bits of its BLAKE2 hash are folded into the key.
      cycle: The number of the cycle, an int32 scalar, which may be traced.
      impl: The name of the PRNG implementation. Only with `threefry2x32` do the values not depend on
        `vmap` and on how arrays are sharded.

    Returns:
      A scalar typed key.
    """
    return jax.random.fold_in(fold_path(jax.random.key(seed, impl=impl), path), cycle)


def fold_path(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """Folds the name of a leaf into a key, so that each leaf has a key of its own."""
    for word in struct.unpack("<II", hashlib.blake2s(path.encode(), digest_size=8).digest()):
        key = jax.random.fold_in(key, word)
    return key


_layers: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "layers", default=None
)


@contextlib.contextmanager
def of_layers(layers: dict[str, Any]) -> Iterator[None]:
    """Makes leaves inside this context layers of stacks, so that their keys are those of the layer of this number."""
    token = _layers.set(layers)
    try:
        yield
    finally:
        _layers.reset(token)


def layer(path: str) -> Any:
    """Returns the number of the layer that a leaf is, or None where it is no layer of a stack."""
    return (_layers.get() or {}).get(path)
