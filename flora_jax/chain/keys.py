"""Keys: from a seed, a path and a cycle to the PRNG key of a projection `A`.

The key of a projection is a pure function of the seed, the path of the weight in the parameter
tree, and the cycle. It does not depend on the order of the leaves, on the devices, or on what was
sampled before.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Key

from flora_jax.paths import hash_words


def leaf_key(seed: int, path: str, cycle: ArrayLike, impl: str = "threefry2x32") -> Key[Array, ""]:
    """Derives the typed key of one leaf in one cycle.

    Args:
      seed: The seed of the `Projection`, any Python int that `jax.random.key` accepts.
      path: The name of the leaf, from `path_name`. 64 bits of its BLAKE2 hash are folded into the key.
      cycle: The number of the cycle, an int32 scalar, which may be traced.
      impl: The name of the PRNG implementation. With `unsafe_rbg` the key may depend on `vmap` and on how arrays are sharded.

    Returns:
      A scalar typed key.
    """
    if impl == "threefry2x32" and 0 <= seed < 2**31:
        key = (0, int(seed))
        for word in hash_words(path):
            key = threefry(key, (0, word))
        base = jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32), impl=impl)
    else:
        base = fold_path(jax.random.key(seed, impl=impl), path)
    return jax.random.fold_in(base, cycle)


def fold_path(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """Folds the name of a leaf into a key, so that each leaf has a key of its own."""
    for word in hash_words(path):
        key = jax.random.fold_in(key, word)
    return key


def threefry(key: tuple[int, int], count: tuple[int, int]) -> tuple[int, int]:
    """Returns the Threefry-2x32 hash of a count, as `jax.random` computes it, on the host.

    What does not depend on the cycle is so a constant of the program: a fifth of the operations of a step of Flora were
    those of keys.

    References:
      Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    left, right = (count[0] + keys[0]) & _MASK, (count[1] + keys[1]) & _MASK
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            left = (left + right) & _MASK
            right = ((right << turn | right >> 32 - turn) & _MASK) ^ left
        left = (left + keys[(group + 1) % 3]) & _MASK
        right = (right + keys[(group + 2) % 3] + group + 1) & _MASK
    return left, right


_MASK = 2**32 - 1


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
