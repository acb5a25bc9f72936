"""Slices: evaluates the update of one leaf slice by slice along a batch axis (layers, experts)."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.chain import leaf_operations, products
from flora_jax.chain.blocks import Block
from flora_jax.chain.sketch import Spec
from flora_jax.fused.interpreter import apply
from flora_jax.fused.program import Atom, Const, Node, Values, Var, needed
from flora_jax.sharding import manual, partition
from flora_jax.update import rounded


class Unsliceable(Exception):
    """Raised where the operations of a leaf cannot be evaluated slice by slice."""


_ELEMENTWISE = frozenset(
    [
        "abs",
        "add",
        "add_any",
        "and",
        "cbrt",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "cos",
        "div",
        "eq",
        "erf",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "pcast",
        "pow",
        "pvary",
        "reduce_precision",
        rounded.NAME,
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    ]
)


_REDUCTIONS = {
    "reduce_sum": jnp.add,
    "reduce_max": jnp.maximum,
    "reduce_min": jnp.minimum,
    "reduce_and": jnp.logical_and,
    "reduce_or": jnp.logical_or,
}


class Slices:
    """The operations of one leaf, to be evaluated slice by slice along a batch axis of the weight.

    Each variable is either *sliced*, and then `axes` has the position of that axis in it, or *full*. A
    slice keeps the axis with length 1, or, where the axis is sharded over devices, with one index from
    each device. A reduction over the axis takes a pass over all slices, and its result is a full
    variable.
    """

    def __init__(self, program, values: Values, leaf: int, marks: list[Node], nodes, goals):
        param, *scales = program.params[leaf]
        self.values, self.marks, self.nodes, self.goals = values, marks, nodes, goals
        self.spec: Spec = marks[0].eqn.params["spec"]
        self.axis = self.spec.batch[0]
        self.length = param.shape[self.axis]
        sharding = program.shardings[param]
        self.width = 1
        if sharding is not None:
            names = partition.entries(sharding.spec, len(param.shape))[self.axis]
            self.width = math.prod(sharding.mesh.shape[name] for name in names)
        self.count = self.length // self.width
        if self.count < 2 or self.length % self.width:
            raise Unsliceable
        # not strict: some states have more in them after their first update
        self.buffers = dict(zip(program.outs, program.buffers, strict=False))
        self.maker = {out: node for node in nodes for out in node.outs}
        before = set(needed(self.maker, marks[0].ins, values.known))
        after = [node for node in nodes if node not in before]
        alike = {
            var
            for node in after
            for var in node.variables()
            if var in values.known and var.shape == param.shape
        }
        self.sources = alike | {param, *scales}
        self.axes: dict[Var, int] = dict.fromkeys(self.sources, self.axis)
        self.reductions: list[Node] = []
        for node in after:
            self._classify(node)
        cycle = marks[0].ins[0]
        if any(mark.ins[0] is not cycle for mark in marks):
            raise Unsliceable
        self.keys = products.matrix_keys(self.spec, values(cycle))

    def run(self) -> list[Any]:
        """Evaluates the goals; raises `Unsliceable` where that is not possible slice by slice."""
        full = Values([], self.values.known)
        full.maker = self.maker
        waiting = list(self.reductions)
        while waiting:
            ready = [node for node in waiting if self._ready(node, waiting, full)]
            if not ready:
                raise Unsliceable
            for node, value in zip(ready, self._reduce(ready, full), strict=True):
                full.known[node.outs[0]] = value
            waiting = [node for node in waiting if node not in ready]
        return self._write(full)

    def _classify(self, node: Node) -> None:
        if node in self.marks:
            place = products.data_batch(self.spec)[0]
            data = node.ins[1]
            if isinstance(data, Var) and self.axes.get(data, place) != place:
                raise Unsliceable
            operation = leaf_operations.of(node.eqn)
            assert operation is not None
            self.axes[node.outs[0]] = self.axis if operation.expands else place
            return
        places = {self.axes[var] for var in node.variables() if var in self.axes}
        if not places:
            if self._is_filled(node):
                self.axes[node.outs[0]] = self.axis
            return
        if len(places) > 1:
            raise Unsliceable
        (place,) = places
        new: int | None = None
        params = node.eqn.params
        if node.name in _ELEMENTWISE:
            new = place
        elif node.name == "broadcast_in_dim" and len(node.ins) == 1:
            new = params["broadcast_dimensions"][place]
            if params["shape"][new] != self.length:
                raise Unsliceable
        elif node.name in _REDUCTIONS:
            if place in params["axes"]:
                self.reductions.append(node)
                return
            new = place - sum(axis < place for axis in params["axes"])
        elif node.name == "transpose":
            new = params["permutation"].index(place)
        elif node.name == "squeeze" and place not in params["dimensions"]:
            new = place - sum(axis < place for axis in params["dimensions"])
        elif node.name == "expand_dims":
            new = [i for i in range(len(node.outs[0].shape)) if i not in params["dimensions"]][
                place
            ]
        elif node.name == "reshape":
            new = self._reshaped(node.ins[0].shape, params["new_sizes"], place)  # type: ignore[union-attr]
        if new is None:
            raise Unsliceable
        for out in node.outs:
            self.axes[out] = new

    def _is_filled(self, node: Node) -> bool:
        """Returns whether the node broadcasts something along the axis, to the shape of the weight."""
        if node.name != "broadcast_in_dim" or node.outs[0].shape != self.spec.part_shape:
            return False
        dims = node.eqn.params["broadcast_dimensions"]
        return len(node.ins) == 1 and self.axis not in dims

    def _reshaped(self, old: Sequence[int], new: Sequence[int], place: int) -> int:
        before = math.prod(old[:place])
        for i, length in enumerate(new):
            if length == self.length and math.prod(new[:i]) == before:
                return i
        raise Unsliceable

    def _ready(self, node: Node, waiting: Sequence[Node], full: Values) -> bool:
        nodes = needed(self.maker, node.ins, full.known)
        return not any(other in waiting for other in nodes)

    def _block(self, i: Any) -> Block:
        return Block(self.length, self.width, i, 1, i)

    def _slice_of(self, i: Any, full: Values, sources: dict[Var, Any]) -> Callable[[Atom], Any]:
        """Returns a function that evaluates slice `i` of sliced variables."""
        found: dict[Var, Any] = {}
        take = self._block(i).take

        def value(atom: Atom) -> Any:
            if isinstance(atom, Const) or atom not in self.axes:
                return full(atom)
            if atom not in found:
                if atom in self.sources:
                    found[atom] = take(sources.get(atom, full(atom)), self.axes[atom])
                else:
                    self._step(self.maker[atom], value, take, found)
            return found[atom]

        return value

    def _step(self, node: Node, value, take, found) -> None:
        if node in self.marks:
            data = value(node.ins[1])
            if node.ins[1] not in self.axes:
                data = take(data, products.data_batch(self.spec)[0])
            found[node.outs[0]] = self._run(node, take, data)
            return
        sliced_in = [var for var in node.variables() if var in self.axes]
        place, shape = (self.axes[sliced_in[0]], sliced_in[0].shape) if sliced_in else (0, None)
        ins = []
        for atom in node.ins:
            given = value(atom)
            sliced = isinstance(atom, Var) and atom in self.axes
            if not sliced and jnp.shape(given) == shape:
                given = take(given, place)
            ins.append(given)
        if node.name == rounded.NAME:
            index = take(jnp.arange(self.length), 0)
            new = rounded.run(*ins, **node.eqn.params, axis=self.axis, index=index)
            found.update(zip(node.outs, new, strict=True))
            return
        changes = {}
        for name in ("shape", "new_sizes"):
            if name in node.eqn.params and node.name in ("broadcast_in_dim", "reshape"):
                sizes = list(node.eqn.params[name])
                sizes[self.axes[node.outs[0]]] = self.width
                changes[name] = tuple(sizes)
        found[node.outs[0]] = apply(node.eqn, *ins, **changes)

    def _run(self, mark: Node, take, data) -> jax.Array:
        shape, names = list(self.spec.shape), list(self.spec.sharded)
        shape[self.axis] = self.width  # one for each device, which has a block of its own in memory
        if names:
            names[self.axis] = ()
        block = self.spec.block * self.width
        spec = dataclasses.replace(self.spec, shape=tuple(shape), sharded=tuple(names), block=block)
        return leaf_operations.run_with(mark.eqn, spec, take(self.keys, 0), data)

    def _reduce(self, nodes: list[Node], full: Values) -> list[Any]:
        """Computes the reductions that are ready, in one pass over the slices."""
        for node in nodes:
            self._compute_full(node.ins, full)

        def partial(i):
            value = self._slice_of(i, full, {})
            return [apply(node.eqn, value(node.ins[0])) for node in nodes]

        def add(i, sums):
            return [
                _REDUCTIONS[node.name](old, new)
                for node, old, new in zip(nodes, sums, partial(i), strict=True)
            ]

        return manual.fori_loop(1, self.count, add, partial(0))

    def _compute_full(self, goals: Sequence[Atom], full: Values) -> None:
        """Evaluates, outside the loop, the full variables that the loop will read."""
        for node in needed(self.maker, goals, full.known):
            for atom in node.ins:
                if isinstance(atom, Var) and atom not in self.axes:
                    full(atom)

    def _write(self, full: Values) -> list[Any]:
        """Takes the pass that writes the results, each into the buffer that it replaces."""
        sliced = [g for g in self.goals if isinstance(g, Var) and g in self.axes]
        self._compute_full(sliced, full)
        for goal in self.goals:
            if goal not in sliced:
                full(goal)
        start = []
        for goal in sliced:
            buffer = self.buffers.get(goal)
            alike = buffer and (buffer.shape, buffer.aval.dtype) == (goal.shape, goal.aval.dtype)
            if buffer and alike:
                start.append(full(buffer))
            else:
                start.append(jnp.zeros(goal.shape, goal.aval.dtype))

        def put(i, arrays, parts):
            return [
                self._block(i).put(array, part, self.axes[goal])
                for goal, array, part in zip(sliced, arrays, parts, strict=True)
            ]

        def body(i, carry):
            """Writes slice `i − 1`, then computes slice `i` from what was written.

            If both were of the same slice, XLA would copy each buffer that is read after it is written.
            """
            arrays = put(jnp.maximum(i - 1, 0), *carry)
            sources = {
                self.buffers[goal]: array
                for goal, array in zip(sliced, arrays, strict=True)
                if self.buffers.get(goal) in self.sources
            }
            value = self._slice_of(i, full, sources)
            return arrays, [value(goal) for goal in sliced]

        first = [
            self._block(0).take(array, self.axes[goal])
            for goal, array in zip(sliced, start, strict=True)
        ]
        arrays, last = manual.fori_loop(0, self.count, body, (start, first))
        written = dict(zip(sliced, put(self.count - 1, arrays, last), strict=True))
        return [written[g] if isinstance(g, Var) and g in written else full(g) for g in self.goals]
