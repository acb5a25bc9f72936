"""Plan: which leaves are compressed, and how many bytes the state takes, before a run."""

import dataclasses
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import dtypes
from flora_jax.chain import stack_axis, storage
from flora_jax.chain.flora import Preset, flora
from flora_jax.chain.leaf_plan import LeafPlan, leaf_plans
from flora_jax.chain.projection import Projection, check_projection
from flora_jax.qarray import outlines


class Use(NamedTuple):
    """Describes one use of a compressed weight in a loss function.

    Attributes:
      path: The name of the weight.
      primitive: The name of the JAX primitive that uses it.
      place: The file and line of the caller, where known.
      whole: Whether the weight's full gradient is materialized there, because the fused route has no
        rule for this use.
      reason: Why there is no such rule; empty where there is one.
    """

    path: str
    primitive: str
    place: str
    whole: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Says what will be compressed, and what the optimizer's state will take; `str()` gives it as a table.

    Attributes:
      leaves: A `LeafPlan` for each leaf, in the order of the tree.
      sketch_bytes: The bytes of one accumulator (or momentum) for each leaf, in the same order.
      state_bytes: The bytes of the optimizer's state, for Flora and for each method it is compared
        with.
      whole_uses: The uses of compressed weights at which a full gradient is materialized, because the
        fused route has no rule for them. Only `ValueAndGrad.plan` fills them in.
    """

    leaves: tuple[LeafPlan, ...]
    sketch_bytes: tuple[int, ...]
    state_bytes: dict[str, int]
    whole_uses: tuple[Use, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan as plain data, ready for JSON."""
        leaves = [
            {
                "path": leaf.path,
                "shape": list(leaf.shape),
                "dtype": leaf.dtype,
                "compressed": leaf.spec is not None,
                "side": leaf.side,
                "rank": leaf.spec.rank if leaf.spec else None,
                "sketch": list(leaf.data_shape),
                "bytes": size,
                "reason": leaf.reason,
            }
            for leaf, size in zip(self.leaves, self.sketch_bytes, strict=True)
        ]
        uses = [use._asdict() for use in self.whole_uses]
        return {"leaves": leaves, "state_bytes": dict(self.state_bytes), "whole_uses": uses}

    def to_json(self) -> str:
        """Returns the plan as JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        rows = [("parameter", "shape", "side", "rank", "sketch", "bytes", "uncompressed because")]
        for leaf, size in zip(self.leaves, self.sketch_bytes, strict=True):
            rows.append(
                (
                    leaf.path,
                    _by(leaf.shape),
                    leaf.side or "-",
                    str(leaf.spec.rank) if leaf.spec else "-",
                    _by(leaf.data_shape) if leaf.spec else "-",
                    f"{size:,}",
                    leaf.reason,
                )
            )
        totals = [("state", "bytes", "ratio to MultiSteps")]
        full = self.state_bytes["MultiSteps + Adafactor"]
        for name, size in self.state_bytes.items():
            totals.append((name, f"{size:,}", f"{size / full:.3f}" if full else "-"))
        tables = [rows, totals]
        if self.whole_uses:
            uses = [(use.path, use.primitive, use.place, use.reason) for use in self.whole_uses]
            tables.append([("full gradient of", "at operation", "in", "because"), *uses])
        said = stack_axis.sentence(self.leaves)
        return "\n\n".join([*map(_table, tables), *([f"Note: {said}."] if said else [])])


def plan(
    params: Any,
    projection: Projection,
    *,
    accumulation_steps: Any = 1,
    momentum: float | None = None,
    nesterov: bool | None = None,
    preset: Preset = "paper",
    dtype: storage.StateDtype = "float32",
    tx: optax.GradientTransformation | None = None,
) -> Plan:
    """Says before a run which leaves will be compressed, and how many bytes the state will take.

    Nothing is computed, and the parameters need not exist.

    Args:
      params: A pytree of arrays, or of `jax.ShapeDtypeStruct` (as `jax.eval_shape` of a model's `init`
        returns it).
      projection: The `Projection`.
      accumulation_steps: The number of micro-steps in an optimizer step, as in `flora`.
      momentum: The decay of the momentum, as in `flora`.
      nesterov: Whether the momentum is Nesterov's, as in `flora`.
      preset: The variant of the method, `paper` or `advised`, as in `flora`.
      dtype: The dtype of the sketches in the state, with the meaning of `state_dtype` in `flora`.
      tx: The transformation whose state is counted under the name `Flora`. By default it is
        `flora_jax.flora` with these arguments, over Adafactor.

    Returns:
      A `Plan`. Its bytes are those of the arrays that `init` of each method returns. `GaLore` is
      `optax.contrib.galore` at the same rank on the same matrices, each batch index being one matrix.

    Raises:
      ValueError: The mask or the dimension numbers of the projection do not fit the params.
    """
    check_projection(projection)
    params = jax.eval_shape(lambda tree: tree, outlines(params))
    leaves = leaf_plans(params, projection)
    if tx is None:
        tx = flora(
            1.0,
            projection=projection,
            accumulation_steps=accumulation_steps,
            momentum=momentum,
            nesterov=nesterov,
            preset=preset,
            state_dtype=dtype,
        )
    adafactor = optax.adafactor(1.0)
    steps = optax.MultiSteps(adafactor, every_k_schedule=2)
    state_bytes = {
        "Flora": tree_bytes(jax.eval_shape(tx.init, params)),
        "MultiSteps + Adafactor": tree_bytes(jax.eval_shape(steps.init, params)),
        "Adafactor alone": tree_bytes(jax.eval_shape(adafactor.init, params)),
        "Adam": tree_bytes(jax.eval_shape(optax.adam(1.0).init, params)),
        "GaLore": 8 + sum(galore_bytes(leaf) for leaf in leaves),
    }
    sizes = tuple(
        storage.nbytes(dtype, leaf.data_shape, leaf.data_dtype, leaf.rank_axis) for leaf in leaves
    )
    return Plan(tuple(leaves), sizes, state_bytes)


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree, which may also be given as shapes."""
    return sum(dtypes.nbytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def galore_bytes(leaf: LeafPlan) -> int:
    """Returns the bytes of a projector and two moments of `optax.contrib.galore` at the plan's rank."""
    itemsize = jnp.dtype(leaf.dtype).itemsize
    if leaf.spec is None:
        return 2 * math.prod(leaf.shape) * itemsize
    batch = math.prod(leaf.shape[axis] for axis in leaf.spec.batch)
    larger, smaller = leaf.spec.size, math.prod(leaf.shape) // batch // leaf.spec.size
    larger, smaller = max(larger, smaller), min(larger, smaller)
    rank = min(leaf.spec.rank, smaller)
    return batch * rank * (larger + 2 * smaller) * itemsize


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)
