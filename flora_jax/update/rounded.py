"""Rounded: params plus updates, rounded at random, as one operation that knows the leaf and its layers."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from flora_jax import bits, rounding
from flora_jax.fused.program import Node
from flora_jax.paths import path_name
from flora_jax.sharding import manual

NAME = "rounded"
_ROUNDED = core.Primitive(NAME)
_ROUNDED.def_abstract_eval(lambda param, update, words: param)


def apply_updates(params: Any, updates: Any, key: Any) -> Any:
    """Returns `params + updates`, with one operation for each bfloat16 leaf; others are as optax has them."""

    def one(path, param, update):
        if param is None or update is None:
            return param
        if param.dtype != jnp.bfloat16:
            return optax.apply_updates(param, update)
        own = rounding.of_leaf(key, path_name(path))
        return _ROUNDED.bind(param, update, jnp.stack(own))

    return jax.tree_util.tree_map_with_path(one, params, updates, is_leaf=lambda x: x is None)


def run(param: Any, update: Any, words: Any, axis: int | None = None, index: Any = None) -> Any:
    """Computes the operation.

    Args:
      param: A bfloat16 array.
      update: What is added.
      words: The two words of a key.
      axis: The axis of the layers, each of which has a key of its own; None where there is none.
      index: The layers that the arrays have; None for all.
    """
    key = words[0], words[1]
    if own := sorted(
        manual.varying(param)
    ):  # parts of it, whose places in the whole are not known here
        key = bits.fold(key, manual.index(own))
    return rounding.applied(param, update, bits.random(key, param.shape, axis, index))


def runnable(node: Node) -> Node:
    """Returns a node that can be evaluated, in the place of the operation that was traced."""
    return Node(_RUN, node.ins, node.outs) if node.name == NAME else node


_RUN: Any = SimpleNamespace(
    primitive=SimpleNamespace(name=NAME, multiple_results=False, get_bind_params=dict, bind=run),
    params={},
)
