"""States: what `accumulate` and `momentum` keep, and the check that incoming leaves fit it.

Their states hold plain arrays only. Since optax passes nothing but the params to `init`, they are given
the projection too, so that they know the shapes of the sketches before the first one arrives. A sketch
that does not belong to this projection is refused at trace time.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from flora_jax import bits, rounding
from flora_jax.chain import keys, storage
from flora_jax.chain.leaf_plan import LeafPlan, leaf_plans
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import Every, Sketch, is_sketch
from flora_jax.paths import path_name


def of_kind(opt_state: Any, kind: type) -> list[Any]:
    """Returns all states of this type in `opt_state`."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def only(opt_state: Any, kind: type, name: str) -> Any:
    """Returns the one state of this type in `opt_state`; raises a ValueError if there is not exactly one."""
    found = of_kind(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold the state of one flora_jax.{name}, found {len(found)}"
        )
    return found[0]


def count(scalar: Any) -> Any:
    """Returns a count of a state as an array, which Flax NNX keeps as the only leaf of a variable."""
    return jax.tree.leaves(scalar)[0]


def at(every: Every, step: Any) -> Any:
    """Returns the value of a number or a schedule at this step."""
    return every(step) if callable(every) else every


def check_kind(plan: LeafPlan, leaf: Sketch) -> None:
    """Raises a ValueError unless the sketch is the one that the plan describes."""
    if plan.spec == leaf.spec:
        found = getattr(leaf.data, "shape", None)
        if found is not None and found != leaf.spec.part_data_shape:
            raise ValueError(
                f"{plan.path!r}: found a sketch whose data have shape {found}, expected "
                f"{leaf.spec.part_data_shape}"
            )
        return
    if plan.spec is None:
        raise ValueError(
            f"{plan.path!r}: found a sketch, expected an uncompressed gradient, since the leaf is not "
            f"compressed ({plan.reason})"
        )
    for field in dataclasses.fields(plan.spec):
        found, expected = getattr(leaf.spec, field.name), getattr(plan.spec, field.name)
        if found != expected:
            raise ValueError(
                f"{plan.path!r}: found a sketch of {field.name} {found!r}, expected {expected!r}"
            )


def check_shapes(name: str, updates: Any, params: Any) -> None:
    """Raises a ValueError unless each gradient, or what a sketch is of, has the shape of its param."""
    paths = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_sketch)[0]
    others = jax.tree.leaves(params)
    if len(paths) != len(others):
        return  # optax says it
    for (path, leaf), param in zip(paths, others, strict=True):
        found = leaf.spec.part_shape if is_sketch(leaf) else getattr(leaf, "shape", ())
        if found != getattr(param, "shape", ()):
            kind = "a sketch of a gradient" if is_sketch(leaf) else "a gradient"
            raise ValueError(
                f"{path_name(path)!r}: {name} found {kind} of shape {found}, expected that of the param, "
                f"{param.shape}"
            )


def check_fits(name: str, sketches: Any, kept: Any, compressed_only: bool = False) -> None:
    """Raises a ValueError unless each sketch, or uncompressed gradient, has the shape of the kept numbers."""
    paths = jax.tree_util.tree_flatten_with_path(sketches, is_leaf=is_sketch)[0]
    others = jax.tree.leaves(kept.values if storage.is_quantized(kept) else kept)
    if len(paths) != len(others):
        return  # JAX says it
    for (path, leaf), other in zip(paths, others, strict=True):
        found = leaf.data.shape if is_sketch(leaf) else leaf.shape
        if compressed_only and not is_sketch(leaf):
            continue
        if found != other.shape:
            kind = "a sketch" if is_sketch(leaf) else "an uncompressed gradient"
            raise ValueError(
                f"{path_name(path)!r}: {name} found {kind} of shape {found}, expected that of its state, "
                f"{other.shape}; tx.init was given params of another shape"
            )


def expected(name: str, projection: Projection | None) -> Callable[[LeafPlan, Any], Any]:
    """Returns a function that checks whether a leaf fits the state of the transformation of this name."""

    def check(plan: LeafPlan, leaf):
        if is_sketch(leaf) and projection is None:
            raise ValueError(
                f"{plan.path!r}: {name} found a sketch, expected an uncompressed gradient; give {name} "
                "the projection that flora_jax.project has"
            )
        if is_sketch(leaf):
            check_kind(plan, leaf)
            return leaf.resolved()
        if plan.spec is not None:
            raise ValueError(
                f"{plan.path!r}: {name} found an uncompressed gradient, expected a sketch; put "
                "flora_jax.project with the same projection before it"
            )
        return leaf

    return check


def map_leaves(visit: Callable, projection: Projection | None, updates: Any) -> Any:
    """Maps `visit(plan, leaf)` over the gradient leaves, where each sketch is one leaf."""
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_sketch)
    plans = _plans(updates, projection)
    visited = [visit(plan, leaf) for plan, leaf in zip(plans, leaves, strict=True)]
    return jax.tree.unflatten(structure, visited)


def _plans(tree: Any, projection: Projection | None) -> list[LeafPlan]:
    return leaf_plans(tree, projection or Projection(rank=1, mask=False))


def leaves(tree: Any) -> list[Any]:
    """Returns the leaves of a tree, where each sketch is one leaf."""
    return jax.tree.leaves(tree, is_leaf=is_sketch)


def numbers(tree: Any) -> Any:
    """Returns the tree with each sketch replaced by its array."""
    return jax.tree.map(
        lambda leaf: leaf.data if is_sketch(leaf) else leaf, tree, is_leaf=is_sketch
    )


def with_numbers(sketches: Any, numbers: Any) -> Any:
    """Replaces the arrays of `sketches` by those of `numbers`; uncompressed leaves keep their dtype."""

    def put(leaf, data):
        if is_sketch(leaf):
            return Sketch(data, leaf.cycle, leaf.spec)
        return data.astype(leaf.dtype)

    return jax.tree.map(put, sketches, numbers, is_leaf=is_sketch)


def zeros(
    tree: Any,
    projection: Projection | None,
    dtype: storage.StateDtype,
    compressed_only: bool = False,
) -> Any:
    """Returns zeros, as they are kept in this dtype, for each leaf of the params or gradients.

    With `compressed_only` there is a single zero for an uncompressed leaf.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_sketch)
    plans = _plans(tree, projection)
    zeros = [
        storage.zeros(
            dtype,
            (1,) if compressed_only and not plan.spec else plan.data_shape,
            plan.data_dtype,
            plan.rank_axis,
        )
        for plan, _ in zip(plans, leaves, strict=True)
    ]
    return storage.transposed(dtype, zeros, structure)


def load(kept: Any, projection: Projection | None, sketches: Any, counts: tuple[Any, ...]) -> Any:
    """Returns the numbers of each leaf of what `store` returned, given the counts that it was given."""
    structure = jax.tree.structure(sketches, is_leaf=is_sketch)
    key = partial(_rounding_key, projection, counts)
    plans, leaves = _plans(sketches, projection), storage.separated(kept, structure)
    numbers = [
        storage.load(leaf, key(plan) if storage.is_quantized(leaf) else None, plan.rank_axis)
        for plan, leaf in zip(plans, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, numbers)


def store(
    numbers: Any,
    projection: Projection | None,
    sketches: Any,
    dtype: storage.StateDtype,
    counts: tuple[Any, ...],
) -> Any:
    """Returns each leaf as it is kept in this dtype, rounded with a key of its own where that is at random.

    None stands for a leaf of zeros. The counts are those of the state that keeps them.
    """
    structure = jax.tree.structure(sketches, is_leaf=is_sketch)
    key = partial(_rounding_key, projection, counts)
    leaves = zip(_plans(sketches, projection), structure.flatten_up_to(numbers), strict=True)
    kept = [
        storage.zeros(dtype, plan.data_shape, plan.data_dtype, plan.rank_axis)
        if leaf is None
        else storage.store(
            dtype, leaf, None if dtype in ("float32", "float64") else key(plan), plan.rank_axis
        )
        for plan, leaf in leaves
    ]
    return storage.transposed(dtype, kept, structure)


def _rounding_key(
    projection: Projection | None, counts: tuple[Any, ...], plan: LeafPlan
) -> bits.Words:
    seed = projection.seed if projection else 0
    key = rounding.of_leaf((seed, seed >> 32), plan.path)
    layer = keys.layer(plan.path)
    for number in (*counts, *([] if layer is None else [layer])):
        key = bits.fold(key, number)
    return key
