"""Leaf plan: for each leaf, on which side and to which rank it is compressed, or why it is not."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flora_jax.chain.projection import DimensionNumbers, Projection, as_int
from flora_jax.chain.sketch import Spec, is_sketch
from flora_jax.paths import path_name
from flora_jax.qarray import is_int8
from flora_jax.sharding import manual, partition

_HEAD = re.compile(
    r"(^|[/.])(head|lm_head|unembed\w*|logits\w*|output_projection|classifier)([/.]|$)",
    re.IGNORECASE,
)


_EMBEDDING = re.compile(r"(^|[/_.])(\w*embed\w*|wte|wpe)([/_.]|$)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """Says what happens to one leaf of the parameters.

    Attributes:
      path: The name of the leaf.
      shape: The shape of the weight; inside `jax.shard_map`, of the part that the device has.
      dtype: The name of the weight's dtype.
      spec: The `Spec` of its sketch, or None where the leaf is uncompressed.
      side: The side that is projected, `input` or `output`, or None where the leaf is uncompressed.
      reason: The reason why the leaf is uncompressed; empty where it is compressed.
      kind: `embedding` or `head` where the leaf is compressed by the rule of those, else `matrix`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: Spec | None
    side: str | None
    reason: str
    kind: str = "matrix"

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of what is accumulated: that of the sketch, or of the uncompressed gradient."""
        return self.spec.part_data_shape if self.spec else self.shape

    @property
    def data_dtype(self) -> str:
        """The dtype of what is accumulated, before it is converted to that of the state."""
        return "float32" if self.spec else self.dtype

    @property
    def rank_axis(self) -> int | None:
        """The axis of what is accumulated that has the rank; None where it is no sketch."""
        return int(self.spec.projected[0]) if self.spec else None

    @property
    def too_small(self) -> bool:
        """Whether the leaf is a matrix that is uncompressed because of its size, the rank and `min_dim`."""
        return self.reason.startswith("rank ") or "below min_dim" in self.reason


def leaf_plans(tree: Any, projection: Projection) -> list[LeafPlan]:
    """Returns the plan of every leaf of a tree of params, gradients or sketches, in the tree's order.

    Raises:
      ValueError: The mask, the dimension numbers or the partition specs of the projection do not fit, or a leaf is in int8.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: is_sketch(x) or is_int8(x)
    )
    for path, leaf in paths:
        if is_int8(leaf):
            raise ValueError(
                f"params must be floating point here, found {path_name(path)!r} in int8; make the state by step.init(params) "
                "of flora_jax.make_train_step, which trains weights in int8"
            )
    here = [
        jax.ShapeDtypeStruct(leaf.spec.part_shape, leaf.spec.dtype) if is_sketch(leaf) else leaf
        for _, leaf in paths
    ]
    names = [path_name(path) for path, _ in paths]
    shardings = _shardings(projection, jax.tree.unflatten(structure, here), names)
    shapes = [
        jax.ShapeDtypeStruct(_full_shape(part.shape, sharded), part.dtype)
        for part, sharded in zip(here, shardings, strict=True)
    ]
    outline = jax.tree.unflatten(structure, shapes)
    masks = _broadcast("mask", projection.mask, outline, lambda x: isinstance(x, bool), True)
    numbers = dimension_numbers(projection, outline)
    return [
        _leaf_plan(name, part, leaf, sharded, masked, number, projection)
        for name, part, leaf, sharded, masked, number in zip(
            names, here, shapes, shardings, masks, numbers, strict=True
        )
    ]


def _leaf_plan(
    path: str, here: Any, leaf: Any, sharded: Any, masked: Any, numbers: Any, projection: Projection
):
    shape, dtype = tuple(leaf.shape), str(jnp.dtype(leaf.dtype))

    def uncompressed(reason: str) -> LeafPlan:
        return LeafPlan(path, tuple(here.shape), dtype, None, None, reason)

    if not masked:
        return uncompressed("masked")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return uncompressed(f"{dtype} is no real floating type")
    if projection.select is not None and not projection.select(path, shape):
        return uncompressed("not selected")
    if len(shape) < 2:
        return uncompressed("vector" if shape else "scalar")
    if not math.prod(shape):
        return uncompressed("empty")
    kind = _kind(path, shape, projection)
    rule = {"embedding": projection.embedding, "head": projection.head}.get(kind, "matrix")
    if rule == "whole":
        return uncompressed(kind)
    reduction, output = _matrix_axes(path, shape, numbers, projection.min_dim)
    inputs = math.prod(shape[axis] for axis in reduction)
    outputs = math.prod(shape[axis] for axis in output)
    if min(inputs, outputs) < projection.min_dim:
        return uncompressed(f"{inputs} x {outputs} is below min_dim {projection.min_dim}")
    side = projection.side if rule == "matrix" else rule
    if side == "larger":
        side = "input" if inputs >= outputs else "output"
    size = inputs if side == "input" else outputs
    rank = _rank(path, shape, min(inputs, outputs), projection)
    exact = rank == size and projection.distribution in ("orthonormal", "srtt")
    if rank >= size and not exact:
        return uncompressed(f"rank {rank} is not below the {side} side's {size}")
    key_path, key_index = path, None
    if projection.stacked is not None and (told := projection.stacked(path)) is not None:
        key_path, key_index = told
    spec = Spec(
        path=path,
        shape=shape,
        dtype=dtype,
        projected=reduction if side == "input" else output,
        batch=tuple(axis for axis in range(len(shape)) if axis not in reduction + output),
        rank=rank,
        distribution=projection.distribution,
        seed=projection.seed,
        resample_every=projection.resample_every,
        key_path=key_path,
        key_index=key_index,
        impl=projection.prng,
        block=projection.block,
        sharded=sharded,
    )
    return LeafPlan(
        path, spec.part_shape, dtype, spec, side, "", "matrix" if rule == "matrix" else kind
    )


def _shardings(projection: Projection, tree: Any, names: list[str]) -> list[Any]:
    """Returns `Spec.sharded` for each leaf; `tree` has the arrays as this device sees them."""

    def is_leaf(node):
        return node is None or isinstance(node, PartitionSpec | NamedSharding)

    given = _broadcast("partition_specs", projection.partition_specs, tree, is_leaf, None)
    return [
        _sharded(name, len(leaf.shape), getattr(one, "spec", one))
        for name, leaf, one in zip(names, jax.tree.leaves(tree), given, strict=True)
    ]


def _sharded(name: str, axes: int, spec: PartitionSpec | None) -> tuple[tuple[str, ...], ...]:
    if spec is None or not any(spec):
        return ()
    if not isinstance(spec, PartitionSpec) or len(spec) > axes:
        raise ValueError(
            f"partition_specs of {name!r} must be a PartitionSpec of at most {axes} entries, found "
            f"{spec}"
        )
    return partition.entries(spec, axes)


def _full_shape(shape: tuple[int, ...], sharded: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
    """Returns the shape of the full weight, given the shape of the part that a device has."""
    if not sharded:
        return tuple(shape)
    return tuple(length * manual.parts(names) for length, names in zip(shape, sharded, strict=True))


def names_embedding(path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a leaf is an embedding by its path."""
    return len(shape) == 2 and bool(_EMBEDDING.search(path))


def names_head(path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a leaf is a head by its path."""
    return len(shape) == 2 and bool(_HEAD.search(path))


def _kind(path: str, shape: tuple[int, ...], projection: Projection) -> str:
    """Returns `head`, `embedding` or `matrix`; functions that were given go before names in the path."""
    rules = (
        ("head", projection.is_head, names_head),
        ("embedding", projection.is_embedding, names_embedding),
    )
    for kind, rule, _ in rules:
        if rule and rule(path, shape):
            return kind
    for kind, rule, by_path in rules:
        if rule is None and by_path(path, shape):
            return kind
    return "matrix"


def _matrix_axes(path: str, shape: tuple[int, ...], numbers: Any, min_dim: int):
    """Returns the axes of the input side and those of the output side."""
    rank = len(shape)
    if numbers is not None:
        reduction = _axes(path, shape, numbers.reduction_axis)
        output = _axes(path, shape, numbers.output_axis)
        if set(reduction) & set(output) or not reduction or not output:
            raise ValueError(
                f"weight_dimension_numbers of {path!r}: reduction and output axes must be disjoint "
                f"and not empty, found {reduction} and {output} for shape {shape}"
            )
        return reduction, output
    if min(shape[-2:]) >= min_dim or rank == 2:
        return (rank - 2,), (rank - 1,)
    split = max(range(1, rank), key=lambda i: min(math.prod(shape[:i]), math.prod(shape[i:])))
    return tuple(range(split)), tuple(range(split, rank))


def _axes(path: str, shape: tuple[int, ...], axes: Any) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int | np.integer) else tuple(axes)
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"weight_dimension_numbers of {path!r}: axis {axis} is not among the {len(shape)} "
                f"axes of shape {shape}"
            )
    return tuple(sorted({axis % len(shape) for axis in axes}))


def _rank(path: str, shape: tuple[int, ...], smaller: int, projection: Projection) -> int:
    rank = projection.rank
    if isinstance(rank, float):
        return max(1, round(rank * smaller))
    if isinstance(rank, int):
        return rank
    found = as_int(rank(path, shape))
    if not isinstance(found, int) or found < 1:
        raise ValueError(f"rank of {path!r} must be an int of at least 1, found {found!r}")
    return found


def dimension_numbers(projection: Projection, tree: Any) -> list[Any]:
    """Returns the `DimensionNumbers` that a projection gives each leaf of a tree, None for the default rule."""
    numbers = projection.weight_dimension_numbers
    if _is_numbers(numbers):
        return [numbers if len(leaf.shape) >= 2 else None for leaf in jax.tree.leaves(tree)]
    return _broadcast(
        "weight_dimension_numbers", numbers, tree, lambda x: x is None or _is_numbers(x), None
    )


def _is_numbers(node: Any) -> bool:
    return isinstance(node, DimensionNumbers) or (
        hasattr(node, "reduction_axis") and hasattr(node, "output_axis")
    )


def _broadcast(name: str, prefix: Any, tree: Any, is_leaf: Any, default: Any) -> list[Any]:
    """Returns one value for each leaf of `tree`, from a prefix tree or a function that returns one."""
    leaves = jax.tree.leaves(tree)
    if leaves and callable(prefix) and not _is_numbers(prefix):
        prefix = prefix(tree)
    if prefix is None or not leaves:
        return [default] * len(leaves)
    result: list[Any] = []
    try:
        jax.tree.map(
            lambda value, sub: result.extend([value] * len(jax.tree.leaves(sub))),
            prefix,
            tree,
            is_leaf=is_leaf,
        )
    except ValueError as error:
        found, expected = jax.tree.structure(prefix, is_leaf=is_leaf), jax.tree.structure(tree)
        raise ValueError(
            f"{name} must be a prefix of the params' tree {expected}, found {found}"
        ) from error
    return result
