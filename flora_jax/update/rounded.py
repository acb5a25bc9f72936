"""Rounded: params plus updates, rounded to bfloat16 or int8, as one operation that knows the leaf and its layers."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from flora_jax import bits, rounding
from flora_jax.fused.int8 import requantized, value
from flora_jax.fused.program import Atom, Const, Node, Var
from flora_jax.paths import path_name
from flora_jax.qarray import is_int8
from flora_jax.sharding import manual

NAME = "rounded"
_ROUNDED = core.Primitive(NAME)
_ROUNDED.multiple_results = True
_ROUNDED.def_abstract_eval(lambda *avals, structure: list(avals[: structure.num_leaves]))


def apply_updates(params: Any, updates: Any, key: Any) -> Any:
    """Returns `params + updates`, with one operation for each leaf in int8, and for each in bfloat16 if there is a key.

    Others are as optax has them.
    """

    def one(path, param, update):
        if param is None or update is None:
            return param
        if not is_int8(param) and (key is None or param.dtype != jnp.bfloat16):
            return optax.apply_updates(param, update)
        words = [] if key is None else [jnp.stack(rounding.of_leaf(key, path_name(path)))]
        arrays, structure = jax.tree.flatten(param)
        new = _ROUNDED.bind(*arrays, update, *words, structure=structure)
        return jax.tree.unflatten(structure, new)

    def is_leaf(x):
        return x is None or is_int8(x)

    return jax.tree_util.tree_map_with_path(one, params, updates, is_leaf=is_leaf)


def run(*values: Any, structure: Any, axis: int | None = None, index: Any = None) -> list[Any]:
    """Computes the operation.

    Args:
      values: The arrays of the param, what is added, and the two words of a key, if it is rounded at random.
      structure: That of the param, as `jax.tree.structure` says it.
      axis: The axis of the layers, each of which has a key of its own; None where there is none.
      index: The layers that the arrays have; None for all.
    """
    count = structure.num_leaves
    param, update = jax.tree.unflatten(structure, values[:count]), values[count]
    random = None
    if words := values[count + 1 :]:
        key = words[0][0], words[0][1]
        if own := sorted(
            manual.varying(values[0])
        ):  # parts of it, whose places in the whole are not known here
            key = bits.fold(key, manual.index(own))
        random = bits.random(key, update.shape, axis, index)
    return jax.tree.leaves(added(param, update, random))


def added(param: Any, update: jax.Array, random: Any) -> Any:
    """Returns a param plus its update; rounded with these random numbers, or to nearest where there are none."""
    if is_int8(param):
        return requantized(param, value(param, jnp.float32) + update.astype(jnp.float32), random)
    if random is None:
        return optax.apply_updates(param, update)
    return rounding.applied(param, update, random)


def runnable(node: Node) -> Node:
    """Returns a node that can be evaluated, in the place of the operation that was traced."""
    if node.name != NAME:
        return node
    return Node(SimpleNamespace(primitive=_RUN, params=node.eqn.params), node.ins, node.outs)


def unchanged(node: Node, ins: Sequence[Atom], made: Mapping[Var, Node]) -> list[Atom] | None:
    """Returns the arrays of the param where the operation adds zeros, as it does between optimizer steps; else None.

    Args:
      node: Any operation.
      ins: Its inputs.
      made: The operation that makes each value.
    """
    if node.name != NAME:
        return None
    count = node.eqn.params["structure"].num_leaves
    update = ins[count]
    while isinstance(update, Var) and update in made and made[update].name in _KEEP_ZEROS:
        update = made[update].ins[0]
    zero = isinstance(update, Const) and not np.any(update.value)
    return list(ins[:count]) if zero else None


_KEEP_ZEROS = {"broadcast_in_dim", "convert_element_type", "copy", "neg", "reshape", "transpose"}
_RUN = SimpleNamespace(name=NAME, multiple_results=True, get_bind_params=dict, bind=run)
