"""Flax Linen: an optimizer whose state has the axis names of its own arrays, where params are in boxes (`nn.Partitioned`, …).

    tx = own_axis_names(flora_jax.flora(1e-2, rank=256, accumulation_steps=16))
    shapes = jax.eval_shape(make_train_state)
    state = jax.jit(make_train_state, out_shardings=nn.get_sharding(shapes, mesh))()

This needs `flax` (`pip install flora-jax[models]`).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import optax

from flora_jax.chain.sketch import is_sketch
from flora_jax.trainers.axis_names import of_state, owner_of

Box = nn.Partitioned


def own_axis_names(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that works on params in boxes, and puts each array of its state into a box of its own.

    Any optax transformation keeps, for arrays of its state, the boxes of the weights, whatever their own shapes: a sketch has the rank in
    the place of an axis of its weight, a factored moment lacks one, and a trainer that lays out state by boxes (as
    MaxText does) fails on a mesh. Here each axis has the name of the weight's axis that it came from, and the names of an axis
    that was replaced go to what replaced it, where the mesh in context divides it (logical names always go).

    Args:
      tx: Any optax transformation, whose `update` sees plain arrays.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: Any) -> Any:
        return _boxed(tx.init(_plain(params)), _owners(params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        found, new = tx.update(
            _plain(updates), _plain(state), None if params is None else _plain(params), **extra
        )
        return _like(updates, found), _like(state, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_box(x: Any) -> bool:
    return isinstance(x, Box)


def _plain(tree: Any) -> Any:
    """Returns the tree with the contents of boxes in their places."""
    return jax.tree.map(lambda x: x.value if _is_box(x) else x, tree, is_leaf=_is_box)


def _like(boxes: Any, tree: Any) -> Any:
    """Puts the values of a plain tree into boxes like these."""
    given, structure = jax.tree.flatten(boxes, is_leaf=lambda x: _is_box(x) or is_sketch(x))
    values = jax.tree.structure(_plain(boxes), is_leaf=is_sketch).flatten_up_to(tree)
    pairs = zip(given, values, strict=True)
    return jax.tree.unflatten(
        structure, [dataclasses.replace(x, value=y) if _is_box(x) else y for x, y in pairs]
    )


def _owners(params: Any) -> dict[Any, Any]:
    """Returns each box by the path of its weight."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box)
    return {path: box for path, box in leaves if _is_box(box)}


def _boxed(state: Any, owners: dict[Any, Any]) -> Any:
    """Puts each array of the state that belongs to a weight in a box, into a box of its own."""

    def of(path: Any, leaf: Any) -> Any:
        owner, shape = owner_of(path, owners), getattr(leaf, "shape", None)
        if owner is None or not shape:
            return leaf
        names = of_state(path, shape, owner.value.shape, owner.names)
        return dataclasses.replace(owner, value=leaf, names=names)

    return jax.tree_util.tree_map_with_path(of, state)
