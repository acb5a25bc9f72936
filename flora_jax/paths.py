"""Paths: how a leaf of a tree is named, in keys and in messages."""

from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """Names a leaf: the entries of its key path, joined by `/`.

    The last entry of a Flax NNX variable (`value`) is left out, so that a tree of variables and
    the same tree of bare arrays give the same names.
    """
    if path and getattr(path[-1], "name", None) in ("value", "raw_value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
