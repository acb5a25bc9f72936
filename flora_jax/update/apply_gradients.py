"""apply_gradients: an update that makes no second copy of the parameters, nor of their gradients.

`tx.update` returns a tree as large as the params. Here it is traced and not run: its operations are
sorted by the leaf that they belong to, and evaluated leaf by leaf, `decompress` included; and slice by
slice along the stacked axis of a weight (layers, experts). Reductions over that axis, such as the root
mean square of an update in Adafactor, take a pass of their own over the slices. Any `tx` is possible in
which the update of a leaf needs no full gradient but its own. Single numbers that depend on several
leaves, such as a global norm, are computed first, leaf by leaf as well.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from flora_jax import dtypes
from flora_jax.chain import leaf_operations, project
from flora_jax.fused.int8 import from_int8
from flora_jax.fused.leaves import combine, partition
from flora_jax.fused.program import Atom, Const, Node, Values, Var, flatten, needed
from flora_jax.paths import path_name
from flora_jax.qarray import is_int8, of_each
from flora_jax.rounding import Rounding, check, key_of
from flora_jax.sharding import explicit, manual
from flora_jax.update import checked, rounded
from flora_jax.update.owners import NotLeafWise, Owners
from flora_jax.update.slices import Slices, Unsliceable

SLICE_ABOVE = 2**20
"""The number of entries from which on a stacked weight is updated slice by slice."""


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: Any,
    opt_state: Any,
    params: Any,
    *,
    slice_above: int = SLICE_ABOVE,
    shardings: Any = None,
    rounding: Rounding = "nearest",
    **extra_args: Any,
) -> tuple[Any, Any]:
    """Updates the params like `tx.update` and `optax.apply_updates`, but without a tree of updates.

    The result is the same as that of

        updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
        params = optax.apply_updates(params, updates)

    up to rounding, since sums over a stacked axis are taken in another order.

    Call it under `jax.jit` with `params` and `opt_state` donated, in this order among the arguments: JAX
    pairs donated buffers with results of the same shape in the order in which they come, and where it
    pairs a first moment with the params, XLA copies both.

    Args:
      tx: The transformation: `flora_jax.flora`, or any other chain.
      grads: A pytree of gradients, each either a sketch or uncompressed.
      opt_state: The state of `tx`.
      params: A pytree of arrays, and of what `flora_jax.to_int8` makes of them.
      slice_above: The number of entries from which on a stacked weight is updated slice by slice.
      shardings: A pytree of `NamedSharding` for the params, with None where one is unknown. Where a stack
        is sharded along its stacked axis (experts), a slice then has one layer from each device.
      rounding: How new bfloat16 params, and those in int8, are rounded: to nearest, or `stochastic`, by which an update
        much smaller than a param still arrives in the mean. The random numbers come from the counts in the state, so that they are
        the same on every layout of automatic or explicit mesh axes, and after a restart.
      **extra_args: Further arguments for `tx.update`.

    Returns:
      The new params and the new state.

    Raises:
      ValueError: `rounding` is stochastic and there is no count in the state; the update of one leaf needs the full gradient of another, or a transformation is given a
        sketch that cannot take one.
    """
    check(rounding)
    grads = project.checked(grads, opt_state)
    tx = optax.with_extra_args_support(tx)
    extra_args, other_args = partition(extra_args)

    def update(grads, opt_state, params, extra_args):
        key = key_of(opt_state) if rounding == "stochastic" else None
        updates, opt_state = checked.update(
            tx, grads, opt_state, from_int8(params), combine(extra_args, other_args)
        )
        return rounded.apply_updates(params, updates, key), opt_state

    leaves = jax.tree.leaves(params)
    known = list(map(explicit.sharding_of, leaves))
    if shardings is not None:
        given = jax.tree.leaves(shardings, is_leaf=lambda x: x is None)
        known = [own if one is None else one for one, own in zip(given, known, strict=True)]

    def by_leaf(*args):
        return _apply(update, args, slice_above, known)

    goals = explicit.result_of(update, params)
    return explicit.call(by_leaf, goals, grads, opt_state, params, extra_args)


def _apply(
    update: Callable, args: tuple[Any, ...], slice_above: int, shardings: Sequence[Any]
) -> tuple[Any, Any]:
    params = args[2]
    with leaf_operations.as_one_operation():
        closed, shapes = jax.make_jaxpr(update, return_shape=True)(*args)
    leaves = [jax.tree.leaves(arg) for arg in args]
    inputs = [Var(aval) for aval in closed.in_avals]
    starts = list(itertools.accumulate(map(len, leaves), initial=0))
    params_in = inputs[starts[2] : starts[3]]
    state_in = inputs[starts[1] : starts[2]]
    nodes, outs = flatten(closed.jaxpr, closed.consts, inputs)
    nodes = list(map(rounded.runnable, nodes))
    paths = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_int8)[0]
    program = _Program(
        nodes=nodes,
        outs=outs,
        buffers=[*params_in, *state_in],
        params=of_each(params, params_in),
        names=[path_name(path) for path, _ in paths],
        shardings=dict(zip(params_in, shardings, strict=True)),
        slice_above=slice_above,
    )
    known = dict(zip(inputs, itertools.chain(*leaves), strict=True))
    with dtypes.promoting():
        result = _evaluate(program, Values(nodes, known))
    return jax.tree.unflatten(jax.tree.structure(shapes), result)


@dataclasses.dataclass
class _Program:
    """The operations to evaluate, and what belongs to which leaf.

    Attributes:
      nodes: The operations.
      outs: The results: the new params, then the new state.
      buffers: The inputs that the results replace, in the order of `outs`.
      params: The arrays of each param: one, or integers and scales.
      names: The names of the params.
      shardings: The `NamedSharding` of each array of the params, or None where it is unknown.
      slice_above: The argument of `apply_gradients`.
    """

    nodes: list[Node]
    outs: list[Atom]
    buffers: list[Var]
    params: list[list[Var]]
    names: list[str]
    shardings: dict[Var, NamedSharding | None]
    slice_above: int


def _evaluate(program: _Program, values: Values) -> list[Any]:
    """Evaluates the program leaf by leaf, inside the `cond` that has the optimizer step, if there is one."""
    split = _optimizer_step(program)
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
        made = {out: node for node in nodes for out in node.outs}
        for node in after:
            ins = [_swapped(swap, atom) for atom in node.ins]
            if (old := rounded.unchanged(node, ins, made)) is not None:
                swap.update(zip(node.outs, old, strict=True))
                continue
            copied = Node(node.eqn, ins, [Var(out.aval) for out in node.outs])
            nodes.append(copied)
            made.update(dict.fromkeys(copied.outs, copied))
            swap.update(zip(node.outs, copied.outs, strict=True))
        outs = [
            _swapped(swap, out) if i in inside else Const(0) for i, out in enumerate(program.outs)
        ]
        branches.append(dataclasses.replace(program, nodes=nodes, outs=outs))
    integers = [var for var, *scales in program.params if scales]
    as_numbers = {out for node in _depending(program.nodes, integers) for out in node.outs}
    free = dict.fromkeys(  # in an order that every process has: compilation caches, and hosts, must agree
        atom
        for branch in branches
        for atom in [*(a for node in branch.nodes for a in node.ins), *branch.outs]
        if isinstance(atom, Var) and atom in maker and atom not in as_numbers
    )
    for atom in free:  # and not params in int8 as numbers, which are computed leaf by leaf
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


def _optimizer_step(program: _Program) -> Node | None:
    """Returns the first `cond` with a decompression in it; where there is none at all, the last `cond`."""
    conds = [node for node in program.nodes if node.name == "cond"]
    for node in conds:
        if any(_has_decompress(branch.jaxpr) for branch in node.eqn.params["branches"]):
            return node
    if not conds or any(map(_is_decompress, (node.eqn for node in program.nodes))):
        return None
    return conds[-1]


def _has_decompress(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        if _is_decompress(eqn):
            return True
        bodies = itertools.chain(
            *(p if isinstance(p, tuple) else (p,) for p in eqn.params.values())
        )
        if any(_has_decompress(getattr(b, "jaxpr", b)) for b in bodies if hasattr(b, "eqns")):
            return True
    return False


def _is_decompress(equation: Any) -> bool:
    operation = leaf_operations.of(equation)
    return operation is not None and operation.expands


def _depending(nodes: Sequence[Node], roots: Sequence[Var]) -> list[Node]:
    reached, found = set(roots), []
    for node in nodes:
        if reached.intersection(node.variables()):
            found.append(node)
            reached.update(node.outs)
    return found


def _by_leaf(program: _Program, values: Values) -> list[Any]:
    """Evaluates the outputs, one leaf after another; first the single numbers that several leaves need."""
    owners = Owners.find(program.nodes, program.params, program.names)
    values.maker.update((out, node) for node in owners.nodes for out in node.outs)
    place = {buffer: i for i, buffer in enumerate(program.buffers)}
    groups = [[place[array] for array in arrays] for arrays in program.params]
    count = sum(map(len, groups))
    shared: list[int] = []
    numbers: list[Var] = []
    for i, out in enumerate(program.outs[count:], count):
        owner = owners.of.get(out, frozenset()) if isinstance(out, Var) else frozenset()
        found = [] if owner else _foreign(program, values, owners, [out], None)
        owner = owner or frozenset().union(*(owners.of[number] for number in found))
        if len(owner) == 1:
            groups[min(owner)].append(i)
        else:
            shared.append(i)
            numbers += found
    for leaf, group in enumerate(groups):
        outs = [program.outs[i] for i in group]
        numbers += _foreign(program, values, owners, outs, leaf)
    for leaf, level in _levels(program, values, owners, numbers):
        found = _leaf(program, values, leaf, level)
        values.known.update(zip(level, found, strict=True))
    results: list[Any] = [None] * len(program.outs)
    for leaf, group in enumerate(groups):
        outs = [program.outs[i] for i in group]
        found = _leaf(program, values, leaf, outs)
        for i, value in zip(group, found, strict=True):
            results[i] = value
    for i in shared:
        results[i] = values(program.outs[i])
    return results


def _levels(
    program: _Program, values: Values, owners: Owners, numbers: Sequence[Var]
) -> list[tuple[int, list[Any]]]:
    """Returns the numbers of each leaf that can be computed together, in an order in which they can be."""
    depth: dict[Var, int] = {}

    def visit(number: Var) -> int:
        if number not in depth:
            (leaf,) = owners.of[number]
            needed = _foreign(program, values, owners, [number], leaf)
            depth[number] = 1 + max(map(visit, needed), default=0)
        return depth[number]

    for number in numbers:
        visit(number)
    levels: dict[tuple[int, int], list[Any]] = {}
    for number, level in depth.items():
        levels.setdefault((level, min(owners.of[number])), []).append(number)
    return [(leaf, levels[level, leaf]) for level, leaf in sorted(levels)]


def _foreign(
    program: _Program, values: Values, owners: Owners, goals: Sequence[Atom], leaf: int | None
) -> list[Var]:
    try:
        return owners.foreign(values.maker, goals, leaf, values.known)
    except NotLeafWise as error:
        own, *others = sorted(error.args[0])
        if leaf is not None:
            own, others = leaf, [other for other in (own, *others) if other != leaf]
        raise ValueError(
            f"tx must be leaf-wise, found that the update of {program.names[own]!r} needs the full "
            f"gradient of {program.names[others[0]]!r}; use tx.update and optax.apply_updates"
        ) from None


def _leaf(program: _Program, values: Values, leaf: int, goals: list[Atom]) -> list[Any]:
    """Evaluates what belongs to one leaf, slice by slice if its operations allow it."""
    nodes = needed(values.maker, goals, values.known)
    marks = [node for node in nodes if leaf_operations.of(node.eqn)]
    stacked = marks[0].eqn.params["spec"].batch if marks else ()
    if stacked and math.prod(program.params[leaf][0].shape) >= program.slice_above:
        try:
            return Slices(program, values, leaf, marks, nodes, goals).run()
        except Unsliceable:
            pass
    local = Values([], values.known)
    local.maker = values.maker
    for node in nodes:
        if leaf_operations.of(node.eqn):
            outs = [leaf_operations.run(node.eqn, *(local(atom) for atom in node.ins))]
        elif node.name == rounded.NAME and stacked:
            ins = (local(atom) for atom in node.ins)
            outs = rounded.run(*ins, **node.eqn.params, axis=stacked[0])
        else:
            outs = node.run([local(atom) for atom in node.ins])
        local.known.update(zip(node.outs, outs, strict=True))
    return [local(goal) for goal in goals]
