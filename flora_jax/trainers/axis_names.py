"""Axis names: which axes of a weight are stacks, which the two sides of its matrix, which the vocabulary.

Flax's boxes (`nn.Partitioned`, `nn.LogicallyPartitioned`) and NNX's variables carry names of axes; MaxText's and Flax's own are
known here, and others can be given.

| axes | what it is |
|---|---|
| `(embed, layers, mlp)` | a matrix `embed × mlp` for each layer |
| `(embed, layers, heads, kv)` | a matrix `embed × (heads · kv)` for each layer |
| `(heads, layers, kv, embed)` | a matrix `(heads · kv) × embed` for each layer |
| `(exp, embed, mlp)` | a matrix for each expert |
| `(vocab, embed)`, `(embed, vocab)` | an embedding, a head |
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from flora_jax.chain.leaf_plan import dimension_numbers, names_embedding, names_head
from flora_jax.chain.projection import DimensionNumbers, Projection
from flora_jax.paths import path_name
from flora_jax.sharding.partition import entries, partition

STACKS = frozenset(
    [
        "layers",
        "layer",
        "layer_group",
        "blocks",
        "block",
        "stack",
        "stage",
        "stages",
        "circular_repeats",
        "exp",
        "expert",
        "experts",
        "num_experts",
    ]
)
"""Names of axes of which each index is a matrix of its own."""
VOCABULARY = frozenset(("vocab", "vocabulary"))
"""Names of the axis of tokens."""
WIDTH = frozenset(
    ["embed", "embed_no_exp", "embed_moe", "emb", "d_model", "model_dim", "width", "embedding"]
)
"""Names of the axis of the states between layers."""
METADATA = ("out_sharding", "sharding_names", "sharding")
"""The metadata of an NNX variable in which the names of its axes may be."""

Names = tuple[str | None, ...]


def axis_names(params: Any) -> dict[str, Names]:
    """Returns the names of the axes of each leaf that has some, by its path.

    Args:
      params: A tree with Flax's boxes or NNX's variables, of arrays or of their shapes.
    """
    found: dict[str, Names] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: bool(_names_of(x))
    ):
        if names := _names_of(leaf):
            found[path_name(path)] = tuple(_one(name) for name in names)
    return found


def with_axis_names(
    projection: Projection,
    params: Any,
    *,
    stacks: Collection[str] = STACKS,
    vocabulary: Collection[str] = VOCABULARY,
    width: Collection[str] = WIDTH,
) -> Projection:
    """Returns a projection that takes stacks, sides, embeddings and heads from the names of axes.

    Leaves without names are treated as before.

    Args:
      projection: The `Projection`; its `weight_dimension_numbers`, `is_embedding` and `is_head` hold for leaves without names.
      params: The params with their names, or a dict from paths to names. Later trees may be without boxes.
      stacks: Names of axes of which each index is a matrix of its own.
      vocabulary: Names of the axis of tokens.
      width: Names of the axis of the states between layers; in weights of more axes all others are the other side.

    Raises:
      ValueError: There are no names.

    Examples:
      >>> import flora_jax, jax, jax.numpy as jnp
      >>> from flora_jax.trainers.axis_names import with_axis_names
      >>> params = {"wi": jnp.ones((256, 4, 512))}
      >>> named = with_axis_names(flora_jax.Projection(16), {"wi": ("embed", "layers", "mlp")})
      >>> flora_jax.plan(params, named).leaves[0].data_shape  # 512 is projected, for each of 4 layers
      (256, 4, 16)
    """
    known: dict[str, Names] = dict(params) if _is_names(params) else axis_names(params)
    if not known:
        raise ValueError("params must have names of axes, in boxes or in variables, found none")
    numbers = {path: _numbers(names, stacks, width) for path, names in known.items()}
    before = projection.weight_dimension_numbers

    def of_tree(tree: Any) -> Any:
        plain = dataclasses.replace(projection, weight_dimension_numbers=before)
        given = dimension_numbers(plain, tree)
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        own = [
            numbers.get(path_name(path), other)
            for (path, _), other in zip(paths, given, strict=True)
        ]
        return jax.tree.unflatten(structure, own)

    def is_kind(place: int, default: Any) -> Any:
        def of(path: str, shape: tuple[int, ...]) -> bool:
            names = [name for name in known.get(path, ()) if name not in stacks]
            if path in known:
                return len(names) == 2 and names[place] in vocabulary
            return default(path, shape)

        return of

    return dataclasses.replace(
        projection,
        weight_dimension_numbers=of_tree,
        is_embedding=is_kind(0, projection.is_embedding or names_embedding),
        is_head=is_kind(1, projection.is_head or names_head),
    )


def of_state(
    path: tuple[Any, ...],
    state: tuple[int, ...],
    shape: tuple[int, ...],
    names: Any,
    mesh: Any = None,
) -> tuple[Any, ...]:
    """Returns the names of the axes of an array of an optimizer's state, from those of its weight.

    Each axis has the names of the weight's axis that it came from; those of axes that were replaced or dropped go to what
    replaced them, where the mesh in context divides it. Logical names, which no mesh has, always go.

    Args:
      path: The path of the array in the state.
      state: Its shape.
      shape: The shape of the weight.
      names: The names of the weight's axes.
      mesh: The mesh, where it is not the one in context.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    known = {} if mesh.empty else dict(mesh.shape)
    sharded = entries(PartitionSpec(*names), len(shape))
    sizes = {name: known.get(name, 1) for axis in sharded for name in axis}
    last = any(getattr(key, "name", None) == "v_col" for key in path)
    spec = partition(shape, sharded, state, sizes, last)
    return (*spec, *[None] * (len(state) - len(spec)))


def owner_of(path: tuple[Any, ...], owners: Mapping[Any, Any]) -> Any:
    """Returns the weight that an array of the state belongs to, whose path ends the array's own; or None."""
    return next((owners[path[i:]] for i in range(len(path)) if path[i:] in owners), None)


def _numbers(names: Names, stacks: Collection[str], width: Collection[str]) -> Any:
    """Returns the axes of the two sides; None where there are no two."""
    axes = [axis for axis, name in enumerate(names) if name not in stacks]
    if len(axes) < 2:
        return None
    if len(axes) == 2:
        return DimensionNumbers((axes[0],), (axes[1],))
    wide = [axis for axis in axes if names[axis] in width]
    if not wide:
        return None
    others = tuple(axis for axis in axes if axis not in wide)
    if not others:
        return DimensionNumbers((axes[0],), tuple(axes[1:]))
    first, second = tuple(wide), others
    return (
        DimensionNumbers(first, second) if wide[0] < others[0] else DimensionNumbers(second, first)
    )


def _names_of(leaf: Any) -> Any:
    """Returns the names that a box or a variable carries, or None."""
    names = getattr(leaf, "names", None)
    if names is None and hasattr(leaf, "get_metadata"):
        metadata = leaf.get_metadata()
        names = next((metadata[key] for key in METADATA if metadata.get(key)), None)
    return names if isinstance(names, tuple) and any(names) else None


def _one(name: Any) -> str | None:
    """Returns the name of an axis; of several mesh axes none, since they do not say what the axis is."""
    return name if isinstance(name, str) else None


def _is_names(params: Any) -> bool:
    return isinstance(params, Mapping) and all(
        isinstance(value, tuple) and all(isinstance(x, str | None) for x in value)
        for value in params.values()
    )
