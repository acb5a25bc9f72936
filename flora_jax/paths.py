"""Paths: the name of each leaf of a pytree, which its PRNG key and all messages about it are made from."""

import hashlib
import struct
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf: the entries of its key path, joined by `/`.

    The last entry of a Flax NNX variable (`value`) is left out, so that a tree of variables and
    the same tree of plain arrays give the same names.
    """
    if path and getattr(path[-1], "name", None) in ("value", "raw_value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def hash_words(path: str) -> tuple[int, int]:
    """Returns 64 bits of the BLAKE2 hash of the name of a leaf, as two numbers below 2³²."""
    return struct.unpack("<II", hashlib.blake2s(path.encode(), digest_size=8).digest())
