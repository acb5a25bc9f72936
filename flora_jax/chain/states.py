"""States: what the transformations of the chain keep of sketches and of uncompressed gradients.

They see numbers only, and optax gives their `init` nothing but params: the projection is named to them
again, so that they know the shapes of the sketches before the first one comes. A sketch that is not of the
kind it says is refused at trace time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from flora_jax.chain import keys, storage
from flora_jax.chain.leaf_plan import LeafPlan, leaf_plans
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import Every, Sketch, is_sketch


def of_kind(opt_state: Any, kind: type) -> list[Any]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def only(opt_state: Any, kind: type, link: str) -> Any:
    found = of_kind(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold the state of one flora_jax.{link}, found {len(found)}"
        )
    return found[0]


def at(every: Every, step: Any) -> Any:
    return every(step) if callable(every) else every


def check_kind(plan: LeafPlan, leaf: Sketch) -> None:
    if plan.spec == leaf.spec:
        return
    if plan.spec is None:
        raise ValueError(
            f"{plan.path!r}: found a sketch, expected a whole gradient, since the leaf is not "
            f"compressed ({plan.reason})"
        )
    for field in dataclasses.fields(plan.spec):
        found, expected = getattr(leaf.spec, field.name), getattr(plan.spec, field.name)
        if found != expected:
            raise ValueError(
                f"{plan.path!r}: found a sketch of {field.name} {found!r}, expected {expected!r}"
            )


def expected(link: str, projection: Projection | None) -> Callable[[LeafPlan, Any], Any]:
    """A check that what comes in fits the state of `link`."""

    def check(plan: LeafPlan, leaf):
        if is_sketch(leaf) and projection is None:
            raise ValueError(
                f"{plan.path!r}: {link} found a sketch, expected a whole gradient; give {link} the "
                "projection that flora_jax.project has"
            )
        if is_sketch(leaf):
            check_kind(plan, leaf)
        elif plan.spec is not None:
            raise ValueError(
                f"{plan.path!r}: {link} found a whole gradient, expected a sketch; put "
                "flora_jax.project with the same projection before it"
            )
        return leaf

    return check


def map_leaves(visit: Callable, projection: Projection | None, updates: Any) -> Any:
    """Maps `visit(plan, leaf)` over the gradient leaves, sketches being leaves."""
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_sketch)
    plans = _plans(updates, projection)
    visited = [visit(plan, leaf) for plan, leaf in zip(plans, leaves, strict=True)]
    return jax.tree.unflatten(structure, visited)


def _plans(tree: Any, projection: Projection | None) -> list[LeafPlan]:
    return leaf_plans(tree, projection or Projection(rank=1, mask=False))


def leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=is_sketch)


def numbers(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.data if is_sketch(leaf) else leaf, tree, is_leaf=is_sketch
    )


def with_numbers(sketches: Any, numbers: Any) -> Any:
    """Puts numbers in the places of those of `sketches`; whole leaves keep their dtype."""

    def put(leaf, data):
        if is_sketch(leaf):
            return Sketch(data, leaf.cycle, leaf.spec)
        return data.astype(leaf.dtype)

    return jax.tree.map(put, sketches, numbers, is_leaf=is_sketch)


def zeros(tree: Any, projection: Projection | None, dtype: storage.StateDtype) -> Any:
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_sketch)
    plans = _plans(tree, projection)
    zeros = [storage.zeros(dtype, plan.data_shape) for plan, _ in zip(plans, leaves, strict=True)]
    return storage.transposed(zeros, structure)


def store(
    numbers: Any,
    projection: Projection | None,
    sketches: Any,
    dtype: storage.StateDtype,
    counts: tuple[Any, ...],
) -> Any:
    """Keeps each leaf, rounded under a key of its own where the dtype is narrow."""
    if dtype in ("float32", "float64"):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), numbers)
    leaves, structure = jax.tree.flatten(numbers)
    seed = projection.seed if projection else 0
    kept = []
    for plan, leaf in zip(_plans(sketches, projection), leaves, strict=True):
        key = keys.leaf_key(seed, f"rounding/{plan.path}", counts[0])
        for count in counts[1:]:
            key = jax.random.fold_in(key, count)
        kept.append(storage.store(dtype, leaf, key))
    return storage.transposed(kept, structure)
