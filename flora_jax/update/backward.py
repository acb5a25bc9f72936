"""backward: exact gradients, each of which updates its parameter inside the backward pass, and is gone.

An ordinary step has all gradients at one time, as many numbers as there are parameters. Here the function is
differentiated by our own walk through its operations, from the last to the first. When all uses of a parameter
are behind, its gradient is complete, and the parameter and its state are updated before the walk goes on. A scan over layers
is walked through from the last layer to the first, and what is one layer's is updated in place.

Source: the idea is that of LOMO (Lv et al., arXiv 2306.09782); asked for in JAX in jax-ml/jax 30338.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.fused.int8 import as_array
from flora_jax.fused.interpreter import is_inexact
from flora_jax.fused.program import JITS, Atom, Const, Node, Var, flatten
from flora_jax.qarray import is_int8, outline, outlines
from flora_jax.sharding import explicit
from flora_jax.sharding.partition import constrain, without_axis
from flora_jax.update import pull
from flora_jax.update.layers import OWN, STATES, replace_each, take
from flora_jax.update.parameters import Parameters, Stack
from flora_jax.update.stack import CHAIN, Scan, Use, uses_of


class Program:
    """A function of params, as operations to walk through back and forth.

    Attributes:
      stacks: The parameters that a scan takes layer by layer, by their numbers.
    """

    def __init__(self, fun: Callable, params: Any, batch: Sequence[Any]):
        """Traces `fun(params, *batch)`, which returns a scalar, or a pair of it and auxiliary data."""
        self.leaves, self.structure = jax.tree.flatten(params, is_leaf=is_int8)
        self.batch = jax.tree.leaves(list(batch))
        closed, shapes = jax.make_jaxpr(fun, return_shape=True)(outlines(params), *batch)
        inputs = [Var(aval) for aval in closed.in_avals]
        self.inputs = inputs
        self.params = inputs[: len(self.leaves)]
        self.result = jax.tree.structure(shapes)
        nodes, self.outs = flatten(closed.jaxpr, closed.consts, inputs, JITS)
        self._find_uses(nodes)
        self.nodes = _without_chains(nodes, self.uses, self.outs)
        self._find_differentiated()
        self.stacks: dict[int, Stack] = {}
        for uses in self.uses.values():
            for use in uses.values():
                length = self.params[use.leaf].shape[use.axis]
                self.stacks.setdefault(use.leaf, Stack(use.axis, length))

    def _find_uses(self, nodes: Sequence[Node]) -> None:
        """Finds the scans that take parameters layer by layer."""
        origin: dict[Any, tuple[int, tuple[Node, ...]]] = {
            var: (leaf, ()) for leaf, var in enumerate(self.params)
        }
        self.uses: dict[Node, dict[int, Use]] = {}
        for node in nodes:
            if node.name in CHAIN and len(node.ins) == 1 and node.ins[0] in origin:
                leaf, chain = origin[node.ins[0]]
                origin[node.outs[0]] = leaf, (*chain, node)
            elif node.name == "scan":
                known = {
                    var: Use(leaf, _axis(chain), chain) for var, (leaf, chain) in origin.items()
                }
                if found := uses_of(node, known):
                    self.uses[node] = found

    def _find_differentiated(self) -> None:
        """Says which operations a gradient flows through, and at which of them the uses of a parameter begin."""
        self.active = set(self.params)
        for node in self.nodes:
            if node.name != "stop_gradient" and (
                node in self.uses or self.active.intersection(node.variables())
            ):
                self.active.update(out for out in node.outs if is_inexact(out.aval))
        useful = {out for out in self.outs[:1] if isinstance(out, Var)}
        self.differentiated: list[Node] = []
        for node in reversed(self.nodes):
            if useful.intersection(node.outs) and self.active.intersection(node.outs):
                self.differentiated.append(node)
                useful.update(var for var in node.variables() if var in self.active)
        self.first: dict[int, Node] = {}
        index = {var: leaf for leaf, var in enumerate(self.params)}
        for node in self.differentiated:
            own = self.uses.get(node, {})
            used = {use.leaf for use in own.values()} | {
                index[var]
                for place, var in enumerate(node.ins)
                if place not in own and isinstance(var, Var) and var in index
            }
            self.first.update(dict.fromkeys(used, node))


def value_and_update(
    program: Program,
    updates: Parameters,
    apply: Callable[..., Any],
    shardings: Sequence[Any],
    of_state: Sequence[Any],
) -> tuple[Any, Any, Any]:
    """Runs the program back and forth.

    Args:
      program: The function and its arguments.
      updates: The optimizer.
      apply: The function `(leaf, param, update, index)` that gives the new parameter.
      shardings: The `NamedSharding` of each parameter, or None where it is not known.
      of_state: That of each leaf of the optimizer's state.

    Returns:
      The new params, the new state, and what the function returned.
    """
    walk = _Walk(program, updates, apply, shardings, of_state)
    outs = walk.forward()
    walk.backward()
    params = jax.tree.unflatten(program.structure, [walk.new[i] for i in range(len(walk.params))])
    return params, updates.finish(walk.state), jax.tree.unflatten(program.result, outs)


class _Walk:
    def __init__(self, program, updates, apply, shardings, of_state):
        self.program, self.updates, self.apply = program, updates, apply
        self.params: list[Any] = program.leaves
        self.new: dict[int, Any] = {}
        self.state: dict[int, Any] = {}
        self.cotangents: dict[Var, Any] = {}
        self.pulls: dict[Node, Any] = {}
        firsts = (jax.tree.leaves(leaf)[0] for leaf in program.leaves)
        self.homes = [
            [one or explicit.sharding_of(x) for one, x in zip(known, arrays, strict=True)]
            for known, arrays in ((shardings, firsts), (of_state, updates.given))
        ]
        # on more devices a gradient is summed while the next one is computed
        self.alone = all(one is None or one.mesh.size == 1 for home in self.homes for one in home)
        self.shardings = [
            (one, without_axis(one, program.stacks[i].axis) if i in program.stacks else one)
            for i, one in enumerate(shardings)
        ]

    def forward(self) -> list[Any]:
        program = self.program
        known: dict[Var, Any] = dict(
            zip(program.inputs, [*map(as_array, self.params), *program.batch], strict=True)
        )

        def read(atom: Atom) -> Any:
            return atom.value if isinstance(atom, Const) else known[atom]

        # the floating-point values of weights in int8 are not kept for the backward pass
        quantized = {
            id(known[var]): leaf
            for leaf, (var, param) in enumerate(zip(program.params, self.params, strict=True))
            if is_int8(param)
        }
        differentiated = set(program.differentiated)
        for node in program.nodes:
            if node in program.uses and node in differentiated:
                own = program.uses[node]
                active = [
                    place in own or (isinstance(x, Var) and x in program.active)
                    for place, x in enumerate(node.ins)
                ]
                scan = self.pulls[node] = Scan(node, own, active)
                given = [None if i in own else read(x) for i, x in enumerate(node.ins)]
                outs = scan.forward(given, self.params)
            elif node in differentiated:
                active = [
                    isinstance(x, Var) and x in program.active and is_inexact(x.aval)
                    for x in node.ins
                ]
                with node.eqn.ctx.manager:
                    back = pull.Pull(node.run, [read(x) for x in node.ins], active)
                back.without(quantized)
                self.pulls[node] = active, back
                outs = back.outs
            else:
                with node.eqn.ctx.manager:
                    outs = node.run([read(x) for x in node.ins])
            known.update(zip(node.outs, outs, strict=True))
        return [read(out) for out in program.outs]

    def backward(self) -> None:
        program = self.program
        value = program.outs[0]
        if isinstance(value, Var):
            self.cotangents[value] = jnp.ones(value.shape, value.aval.dtype)
        for node in program.differentiated:
            cotangents = [self.cotangents.pop(out, None) for out in node.outs]
            if all(x is None for x in cotangents):
                continue
            if node in program.uses:
                back = self._through_layers(node, cotangents)
            else:
                active, through = self.pulls.pop(node)
                known = [x for x in cotangents if x is not None]

                def again(leaf, known=known):  # not before the walk is here
                    return as_array(jax.lax.optimization_barrier((self.params[leaf], known))[0])

                with node.eqn.ctx.manager:
                    found = iter(through.pull(cotangents, again))
                back = {i: next(found) for i, flag in enumerate(active) if flag}
            for place, cotangent in back.items():
                var = node.ins[place]
                if var in self.cotangents:
                    cotangent = self.cotangents[var] + cotangent
                self.cotangents[var] = cotangent
            self._update(node)
        for leaf in range(len(self.params)):
            if leaf not in self.new:
                self._whole(leaf)

    def _update(self, node: Node) -> None:
        """Updates the parameters that have no use before this one; the walk goes on when that is done."""
        fresh = [leaf for leaf, first in self.program.first.items() if first is node]
        if not fresh:
            return
        for leaf in fresh:
            if leaf not in self.new:
                self._whole(leaf)
        onward = [var for var in dict.fromkeys(node.variables()) if var in self.cotangents]
        places = [place for leaf in fresh for place in self.updates.owned[leaf]]
        held = (
            [self.cotangents[var] for var in onward],
            [self.new[leaf] for leaf in fresh],
            [self.state[place] for place in places],
        )
        cotangents, params, states = jax.lax.optimization_barrier(held)
        self.cotangents.update(zip(onward, cotangents, strict=True))
        self.new.update(zip(fresh, params, strict=True))
        self.state.update(zip(places, states, strict=True))

    def _through_layers(self, node: Node, cotangents: list[Any]) -> dict[int, Any]:
        program, updates = self.program, self.updates
        leaves = dict.fromkeys(use.leaf for use in program.uses[node].values())
        ready = [leaf for leaf in leaves if program.first[leaf] is node]
        more = {}
        for leaf in leaves:
            var = program.params[leaf]
            if var in self.cotangents:
                more[leaf] = self.cotangents.pop(var)
        params, states, grads, back = self.pulls.pop(node).backward(
            cotangents,
            {leaf: self.params[leaf] for leaf in leaves},
            {place: updates.given[place] for leaf in ready for place in updates.owned[leaf]},
            more,
            updates,
            self._one,
            ready,
            self.alone,
            self._shape,
        )
        self.new.update(params)
        self.state.update(states)
        self.cotangents.update((program.params[leaf], grad) for leaf, grad in grads.items())
        return back

    def _one(self, leaf: int, grad: Any, param: Any, state: Mapping[int, Any], index: Any):
        """Updates a parameter, or one layer of it."""
        sharding = self.shardings[leaf][0 if index is None else 1]
        grad = constrain(grad, sharding)
        update, state = self.updates.update(leaf, grad, as_array(param), state, index)
        param = self.apply(leaf, param, update, index)
        return param if is_int8(param) else constrain(param, sharding), state

    def _whole(self, leaf: int) -> None:
        """Updates a parameter whose gradient exists as a whole, or is zero."""
        param, updates = self.params[leaf], self.updates
        grad = self.cotangents.pop(self.program.params[leaf], None)
        state = {place: updates.given[place] for place in updates.owned[leaf]}
        if leaf not in updates.stacks:
            grad = jnp.zeros_like(outline(param)) if grad is None else grad
            self.new[leaf], new = self._one(leaf, grad, param, state, None)
            self.state.update(new)
            return
        stack = updates.stacks[leaf]

        axes = [{leaf: stack.axis}, {place: updates.axes[place] for place in state}]

        def compute(now, rest):
            if grad is None:
                own = jnp.zeros_like(outline(now.take(OWN, leaf)))
            else:
                own = take(grad, stack.axis, now.index)
            now.update(leaf, own, state, self._one, now.index)
            return rest

        (own, new), _ = replace_each(
            stack.length, lambda t: t, [{leaf: param}, state], axes, compute, (), self._shape
        )
        self.new |= own
        self.state.update(new)

    def _shape(self, group: int, name: int, array: Any) -> tuple[int, ...] | None:
        """Returns the shape of what one device has of an array that is replaced layer by layer; None if that is not known."""
        if self.alone:
            return array.shape
        home = self.homes[group][name] if group in (OWN, STATES) else None
        try:
            return home and home.shard_shape(array.shape)
        except ValueError:  # the scales of a weight in int8 may be sharded in another way
            return None


def _axis(chain: Sequence[Node]) -> int:
    """Returns the axis of a parameter that is the first one after these operations."""
    axis = 0
    for node in reversed(chain):
        if node.name == "transpose":
            axis = node.eqn.params["permutation"][axis]
    return axis


def _without_chains(
    nodes: Sequence[Node], uses: Mapping[Node, Mapping[int, Use]], outs: Sequence[Atom]
) -> list[Node]:
    """Leaves out the operations on whole stacks that only the scans over their layers need."""
    chains = {node for own in uses.values() for use in own.values() for node in use.chain}
    wanted = {out for out in outs if isinstance(out, Var)}
    kept = []
    for node in reversed(nodes):
        if node in chains and not wanted.intersection(node.outs):
            continue
        kept.append(node)
        own = uses.get(node, {})
        wanted.update(
            atom
            for place, atom in enumerate(node.ins)
            if place not in own and isinstance(atom, Var)
        )
    return kept[::-1]
