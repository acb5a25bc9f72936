"""apply_gradients: an update that makes no second copy of the parameters, nor of their gradient.

`tx.update` returns a tree as large as the params. Here it is traced, not run: what it computes is
sorted by the leaf that it is for, and evaluated leaf by leaf, `decompress` included; and along the
stacked axis of a weight (layers, experts) slice by slice. Reductions over that axis (Adafactor's
root mean square of an update) take a pass over the slices of their own. What `tx` consists of does
not matter, so long as the update of a leaf needs no whole gradient but its own; numbers made of
several leaves, such as a global norm, are computed first, leaf by leaf as well.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from jax.sharding import NamedSharding

from flora_jax import explicit, manual, sharding
from flora_jax import projection as projections
from flora_jax.blocks import Block
from flora_jax.interpreter import apply
from flora_jax.keys import path_name
from flora_jax.program import Atom, Const, Node, Values, Var, flatten, needed
from flora_jax.sketch import Spec

SLICE_ABOVE = 2**20
"""Entries from which on a stacked weight is updated slice by slice."""

_tracing = contextvars.ContextVar("tracing", default=False)
_decompress_p = core.Primitive("flora_decompress")


@_decompress_p.def_abstract_eval
def _(cycle, data, *, spec):
    return jax.make_jaxpr(functools.partial(projections.decompress, spec))(cycle, data).out_avals[0]


def decompress(spec: Spec, cycle: Any, data: jax.Array) -> jax.Array:
    """`projection.decompress`; while `apply_gradients` traces, one operation that it can find."""
    if _tracing.get():
        return _decompress_p.bind(jnp.asarray(cycle), data, spec=spec)
    return projections.decompress(spec, cycle, data)


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: Any,
    opt_state: Any,
    params: Any,
    *,
    slice_above: int = SLICE_ABOVE,
    shardings: Any = None,
    **extra_args: Any,
) -> tuple[Any, Any]:
    """`tx.update` and `optax.apply_updates` in one, without a tree of updates.

    To be called under `jax.jit` with `params` and `opt_state` donated, as arguments in this order:
    JAX pairs donated buffers with results of the same shape as they come, and where it pairs a first
    moment with the params XLA copies both. The result is that of

        updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
        params = optax.apply_updates(params, updates)

    to rounding: sums over a stacked axis are taken in another order.

    Args:
      tx: `flora_jax.flora`, or any chain.
      grads: sketches or whole gradients.
      opt_state: of `tx`.
      params: tree of arrays.
      slice_above: entries from which on a stacked weight is updated slice by slice.
      shardings: tree of `NamedSharding` of the params, None in it where one is unknown. A slice of a
        stack that is cut over devices (experts) then has one layer of each device's own.
      **extra_args: for `tx.update`.

    Returns:
      New params and state.

    Raises:
      ValueError: the update of one leaf needs the whole gradient of another.
    """
    tx = optax.with_extra_args_support(tx)

    def whole(grads, opt_state, params, extra_args):
        updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
        return optax.apply_updates(params, updates), opt_state

    leaves = jax.tree.leaves(params)
    places = list(map(explicit.place, leaves))
    if shardings is not None:
        given = jax.tree.leaves(shardings, is_leaf=lambda x: x is None)
        places = [own if one is None else one for one, own in zip(given, places, strict=True)]

    def by_leaf(*args):
        return _apply(whole, args, slice_above, places)

    goals = explicit.result_of(whole, params)
    return explicit.call(by_leaf, goals, grads, opt_state, params, extra_args)


def _apply(
    whole: Callable, args: tuple[Any, ...], slice_above: int, places: Sequence[Any]
) -> tuple[Any, Any]:
    params = args[2]
    with _as_one_operation():
        closed, shapes = jax.make_jaxpr(whole, return_shape=True)(*args)
    leaves = [jax.tree.leaves(arg) for arg in args]
    inputs = [Var(aval) for aval in closed.in_avals]
    starts = list(itertools.accumulate(map(len, leaves), initial=0))
    params_in = inputs[starts[2] : starts[3]]
    state_in = inputs[starts[1] : starts[2]]
    nodes, outs = flatten(closed.jaxpr, closed.consts, inputs)
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    program = _Program(
        nodes=nodes,
        outs=outs,
        buffers=[*params_in, *state_in],
        names=[path_name(path) for path, _ in paths],
        places=dict(zip(params_in, places, strict=True)),
        slice_above=slice_above,
    )
    known = dict(zip(inputs, itertools.chain(*leaves), strict=True))
    result = _evaluate(program, Values(nodes, known))
    return jax.tree.unflatten(jax.tree.structure(shapes), result)


@contextlib.contextmanager
def _as_one_operation() -> Iterator[None]:
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


@dataclasses.dataclass
class _Program:
    """What is to be evaluated.

    Attributes:
      nodes: operations.
      outs: of the params, then of the state.
      buffers: the inputs in the places of `outs`.
      names: of the params.
      places: the `NamedSharding` of each param, None where it is unknown.
      slice_above: see `apply_gradients`.
    """

    nodes: list[Node]
    outs: list[Atom]
    buffers: list[Var]
    names: list[str]
    places: dict[Var, NamedSharding | None]
    slice_above: int

    @property
    def params(self) -> list[Var]:
        return self.buffers[: len(self.names)]


def _evaluate(program: _Program, values: Values) -> list[Any]:
    """Enters the `cond` at whose end the parameters change, if there is one; else goes leaf by leaf."""
    split = _boundary(program)
    if split is None:
        return _by_leaf(program, values)
    maker = {out: node for node in program.nodes for out in node.outs}
    after = _depending(program.nodes, split.outs)
    dependent = {out for node in after for out in node.outs} | set(split.outs)
    inside = [i for i, out in enumerate(program.outs) if out in dependent]
    branches = []
    for branch in split.eqn.params["branches"]:
        nodes, outs = flatten(branch.jaxpr, branch.consts, split.ins[1:])
        swap: dict[Var, Atom] = dict(zip(split.outs, outs, strict=True))
        for node in after:
            copied = [Var(out.aval) for out in node.outs]
            nodes.append(Node(node.eqn, [_swapped(swap, atom) for atom in node.ins], copied))
            swap.update(zip(node.outs, copied, strict=True))
        outs = [
            _swapped(swap, out) if i in inside else Const(0) for i, out in enumerate(program.outs)
        ]
        branches.append(dataclasses.replace(program, nodes=nodes, outs=outs))
    free = {
        atom
        for branch in branches
        for atom in [*(a for node in branch.nodes for a in node.ins), *branch.outs]
        if isinstance(atom, Var) and (atom in maker or atom in values.known)
    }
    for atom in free:
        values(atom)

    def taken(branch: _Program) -> Callable[[], list[Any]]:
        def run():
            held = Values([*program.nodes, *branch.nodes], values.known)
            results = _evaluate(branch, held)
            return [
                jnp.asarray(results[i], program.outs[i].aval.dtype)  # type: ignore[union-attr]
                for i in inside
            ]

        return run

    results = iter(manual.switch(values(split.ins[0]), [taken(branch) for branch in branches]))
    return [next(results) if i in inside else values(out) for i, out in enumerate(program.outs)]


def _swapped(swap: dict[Var, Atom], atom: Atom) -> Atom:
    return swap.get(atom, atom) if isinstance(atom, Var) else atom


def _boundary(program: _Program) -> Node | None:
    """The first `cond` with a decompression in it; where there is none at all, the last `cond`."""
    conds = [node for node in program.nodes if node.name == "cond"]
    for node in conds:
        if any(_has_decompress(branch.jaxpr) for branch in node.eqn.params["branches"]):
            return node
    if not conds or any(node.eqn.primitive is _decompress_p for node in program.nodes):
        return None
    return conds[-1]


def _has_decompress(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive is _decompress_p:
            return True
        bodies = itertools.chain(
            *(p if isinstance(p, tuple) else (p,) for p in eqn.params.values())
        )
        if any(_has_decompress(getattr(b, "jaxpr", b)) for b in bodies if hasattr(b, "eqns")):
            return True
    return False


def _depending(nodes: Sequence[Node], roots: Sequence[Var]) -> list[Node]:
    reached, found = set(roots), []
    for node in nodes:
        if reached.intersection(node.variables()):
            found.append(node)
            reached.update(node.outs)
    return found


def _by_leaf(program: _Program, values: Values) -> list[Any]:
    """Evaluates the outputs, those of one leaf after those of another."""
    places = {name: i for i, name in enumerate(program.names)}
    owners: dict[Var, frozenset[int]] = {
        var: frozenset([i]) for i, var in enumerate(program.params)
    }
    numbers: list[Var] = []  # single numbers of one leaf that several leaves need
    for node in program.nodes:
        if node.eqn.primitive is _decompress_p:
            owner = frozenset([places[node.eqn.params["spec"].path]])
        else:
            owner = frozenset().union(*(owners.get(var, frozenset()) for var in node.variables()))
        if len(owner) > 1 and all(math.prod(v.shape) == 1 for v in node.variables() if v in owners):
            numbers += [v for v in node.variables() if owners.get(v)]
            owner = frozenset()
        owners.update((out, owner) for out in node.outs)
    count = len(program.names)
    groups: list[list[int]] = [[i] for i in range(count)]
    shared: list[int] = []
    for i, out in enumerate(program.outs):
        owner = owners.get(out, frozenset()) if isinstance(out, Var) else frozenset()
        others = sorted(owner - {i}) if i < count else sorted(owner)[1:]
        if others:
            name = program.names[i if i < count else min(owner)]
            raise ValueError(
                f"tx must be leaf-wise, found that the update of {name!r} needs the whole gradient "
                f"of {program.names[others[0]]!r}; use tx.update and optax.apply_updates"
            )
        if i >= count:
            (groups[min(owner)] if owner else shared).append(i)
    for number in dict.fromkeys(numbers):
        if number not in values.known:
            (leaf,) = owners[number]
            values.known[number] = _leaf(program, values, program.params[leaf], [number])[0]
    results: list[Any] = [None] * len(program.outs)
    for group in groups:
        outs = [program.outs[i] for i in group]
        found = _leaf(program, values, program.params[group[0]], outs)
        for i, value in zip(group, found, strict=True):
            results[i] = value
    for i in shared:
        results[i] = values(program.outs[i])
    return results


def _leaf(program: _Program, values: Values, param: Var, goals: list[Atom]) -> list[Any]:
    """Evaluates what belongs to one leaf, by slices if its operations can be taken apart so."""
    nodes = needed(values.maker, goals, values.known)
    marks = [node for node in nodes if node.eqn.primitive is _decompress_p]
    if len(marks) == 1 and math.prod(param.shape) >= program.slice_above:
        spec = marks[0].eqn.params["spec"]
        if spec.batch:
            try:
                return _Slices(program, values, param, marks[0], nodes, goals).run()
            except _Unsliceable:
                pass
    local = Values([], values.known)
    local.maker = values.maker
    for node in nodes:
        if node.eqn.primitive is _decompress_p:
            cycle, data = (local(atom) for atom in node.ins)
            outs = [projections.decompress(node.eqn.params["spec"], cycle, data)]
        else:
            outs = node.run([local(atom) for atom in node.ins])
        local.known.update(zip(node.outs, outs, strict=True))
    return [local(goal) for goal in goals]


class _Unsliceable(Exception):
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


class _Slices:
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
            cut = sharding.entries(place.spec, len(param.shape))[self.axis]
            self.width = math.prod(place.mesh.shape[name] for name in cut)
        self.count = self.length // self.width
        if self.count < 2 or self.length % self.width:
            raise _Unsliceable
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
        self.keys = projections.matrix_keys(self.spec, cycle)

    def run(self) -> list[Any]:
        whole = Values([], self.values.known)
        whole.maker = self.maker
        waiting = list(self.reductions)
        while waiting:
            ready = [node for node in waiting if self._ready(node, waiting, whole)]
            if not ready:
                raise _Unsliceable
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
            raise _Unsliceable
        (place,) = places
        new: int | None = None
        params = node.eqn.params
        if node.name in _ELEMENTWISE:
            new = place
        elif node.name == "broadcast_in_dim" and len(node.ins) == 1:
            new = params["broadcast_dimensions"][place]
            if params["shape"][new] != self.length:
                raise _Unsliceable
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
            raise _Unsliceable
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
        raise _Unsliceable

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
        shape, names = list(self.spec.shape), list(self.spec.cut)
        shape[self.axis] = self.width  # each device has but one of them, of which a block is held
        if names:
            names[self.axis] = ()
        block = self.spec.block * self.width
        spec = dataclasses.replace(self.spec, shape=tuple(shape), cut=tuple(names), block=block)
        place = projections.data_batch(self.spec)[0]
        return projections.decompress_with(spec, cut(self.keys, 0), cut(data, place))

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
