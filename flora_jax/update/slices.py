"""Slices: the operations of one leaf, taken apart along a batch axis of its weight (layers, experts)."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.chain import products
from flora_jax.chain.blocks import Block
from flora_jax.chain.sketch import Spec
from flora_jax.fused.interpreter import apply
from flora_jax.sharding import manual, partition
from flora_jax.update.program import Atom, Const, Node, Values, Var, needed


class Unsliceable(Exception):
    pass


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
    """The operations of one leaf, taken apart along a batch axis of the weight.

    Variables are *sliced*, with the place of that axis, or whole. A slice keeps the axis, at
    length 1, or where the axis is cut over devices with one index of each device's own. A reduction
    over it ends in a whole variable, by a pass over all slices.
    """

    def __init__(self, program, values: Values, param: Var, mark: Node, nodes, goals):
        self.values, self.mark, self.nodes, self.goals = values, mark, nodes, goals
        self.spec: Spec = mark.eqn.params["spec"]
        self.axis = self.spec.batch[0]
        self.length = param.shape[self.axis]
        place = program.places[param]
        self.width = 1
        if place is not None:
            cut = partition.entries(place.spec, len(param.shape))[self.axis]
            self.width = math.prod(place.mesh.shape[name] for name in cut)
        self.count = self.length // self.width
        if self.count < 2 or self.length % self.width:
            raise Unsliceable
        self.buffers = dict(zip(program.outs, program.buffers, strict=True))
        self.maker = {out: node for node in nodes for out in node.outs}
        before = set(needed(self.maker, mark.ins, values.known))
        after = [node for node in nodes if node not in before]
        alike = {
            var
            for node in after
            for var in node.variables()
            if var in values.known and var.shape == param.shape
        }
        self.sources = alike | {param}
        self.axes: dict[Var, int] = dict.fromkeys(self.sources, self.axis)
        self.reductions: list[Node] = []
        for node in after:
            self._classify(node)
        cycle = values(mark.ins[0])
        self.keys = products.matrix_keys(self.spec, cycle)

    def run(self) -> list[Any]:
        whole = Values([], self.values.known)
        whole.maker = self.maker
        waiting = list(self.reductions)
        while waiting:
            ready = [node for node in waiting if self._ready(node, waiting, whole)]
            if not ready:
                raise Unsliceable
            for node, value in zip(ready, self._reduce(ready, whole), strict=True):
                whole.known[node.outs[0]] = value
            waiting = [node for node in waiting if node not in ready]
        return self._write(whole)

    def _classify(self, node: Node) -> None:
        if node is self.mark:
            self.axes[node.outs[0]] = self.axis
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
        """Whether it repeats what it has along the axis, up to the shape of the weight."""
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

    def _ready(self, node: Node, waiting: Sequence[Node], whole: Values) -> bool:
        nodes = needed(self.maker, node.ins, whole.known)
        return not any(other in waiting for other in nodes)

    def _block(self, i: Any) -> Block:
        return Block(self.length, self.width, i, 1, i)

    def _slice_of(self, i: Any, whole: Values, sources: dict[Var, Any]) -> Callable[[Atom], Any]:
        """Evaluates slice `i` of sliced variables."""
        found: dict[Var, Any] = {}
        cut = self._block(i).take

        def value(atom: Atom) -> Any:
            if isinstance(atom, Const) or atom not in self.axes:
                return whole(atom)
            if atom not in found:
                if atom in self.sources:
                    found[atom] = cut(sources.get(atom, whole(atom)), self.axes[atom])
                else:
                    self._step(self.maker[atom], value, cut, found)
            return found[atom]

        return value

    def _step(self, node: Node, value, cut, found) -> None:
        if node is self.mark:
            found[node.outs[0]] = self._decompressed(cut, value(node.ins[1]))
            return
        sliced_in = [var for var in node.variables() if var in self.axes]
        place, shape = (self.axes[sliced_in[0]], sliced_in[0].shape) if sliced_in else (0, None)
        ins = []
        for atom in node.ins:
            given = value(atom)
            sliced = isinstance(atom, Var) and atom in self.axes
            if not sliced and jnp.shape(given) == shape:
                given = cut(given, place)
            ins.append(given)
        changes = {}
        for name in ("shape", "new_sizes"):
            if name in node.eqn.params and node.name in ("broadcast_in_dim", "reshape"):
                sizes = list(node.eqn.params[name])
                sizes[self.axes[node.outs[0]]] = self.width
                changes[name] = tuple(sizes)
        found[node.outs[0]] = apply(node.eqn, *ins, **changes)

    def _decompressed(self, cut, data) -> jax.Array:
        shape, names = list(self.spec.shape), list(self.spec.sharded)
        shape[self.axis] = self.width  # each device has but one of them, of which a block is held
        if names:
            names[self.axis] = ()
        block = self.spec.block * self.width
        spec = dataclasses.replace(self.spec, shape=tuple(shape), sharded=tuple(names), block=block)
        place = products.data_batch(self.spec)[0]
        return products.decompress_with(spec, cut(self.keys, 0), cut(data, place))

    def _reduce(self, nodes: list[Node], whole: Values) -> list[Any]:
        """One pass over the slices for reductions that are ready."""
        for node in nodes:
            self._force_whole(node.ins, whole)

        def partial(i):
            value = self._slice_of(i, whole, {})
            return [apply(node.eqn, value(node.ins[0])) for node in nodes]

        def add(i, sums):
            return [
                _REDUCTIONS[node.name](old, new)
                for node, old, new in zip(nodes, sums, partial(i), strict=True)
            ]

        return manual.fori_loop(1, self.count, add, partial(0))

    def _force_whole(self, goals: Sequence[Atom], whole: Values) -> None:
        """Evaluates, outside of the loop, the whole variables that the loop will read."""
        for node in needed(self.maker, goals, whole.known):
            for atom in node.ins:
                if isinstance(atom, Var) and atom not in self.axes:
                    whole(atom)

    def _write(self, whole: Values) -> list[Any]:
        """The pass that writes the results, each into the buffer that it replaces."""
        sliced = [g for g in self.goals if isinstance(g, Var) and g in self.axes]
        self._force_whole(sliced, whole)
        for goal in self.goals:
            if goal not in sliced:
                whole(goal)
        start = []
        for goal in sliced:
            buffer = self.buffers.get(goal)
            alike = buffer and (buffer.shape, buffer.aval.dtype) == (goal.shape, goal.aval.dtype)
            if buffer and alike:
                start.append(whole(buffer))
            else:
                start.append(jnp.zeros(goal.shape, goal.aval.dtype))

        def put(i, arrays, parts):
            return [
                self._block(i).put(array, part, self.axes[goal])
                for goal, array, part in zip(sliced, arrays, parts, strict=True)
            ]

        def body(i, carry):
            """Writes slice `i − 1`, then computes slice `i` from what was written.

            Were both of one slice, XLA would copy each buffer that is read after it was written.
            """
            arrays = put(jnp.maximum(i - 1, 0), *carry)
            sources = {
                self.buffers[goal]: array
                for goal, array in zip(sliced, arrays, strict=True)
                if self.buffers.get(goal) in self.sources
            }
            value = self._slice_of(i, whole, sources)
            return arrays, [value(goal) for goal in sliced]

        first = [
            self._block(0).take(array, self.axes[goal])
            for goal, array in zip(sliced, start, strict=True)
        ]
        arrays, last = manual.fori_loop(0, self.count, body, (start, first))
        written = dict(zip(sliced, put(self.count - 1, arrays, last), strict=True))
        return [written[g] if isinstance(g, Var) and g in written else whole(g) for g in self.goals]
