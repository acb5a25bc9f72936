"""Parameters: an optimizer's update of one parameter at a time, where a layer of a stack is a parameter of its own."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax import dtypes
from flora_jax.chain import keys
from flora_jax.fused.int8 import as_array
from flora_jax.fused.program import Atom, Values, Var, flatten, needed
from flora_jax.paths import path_name
from flora_jax.qarray import is_int8, outline
from flora_jax.update.layers import take
from flora_jax.update.owners import CHOICE, as_choice


@dataclasses.dataclass(frozen=True)
class Stack:
    """Says that a parameter is a stack of layers.

    Attributes:
      axis: The axis of the layers.
      length: The number of layers.
    """

    axis: int
    length: int

    def dropped(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of one layer."""
        return (*shape[: self.axis], *shape[self.axis + 1 :])


class Parameters:
    """The program of an optimizer's update, evaluated for one parameter at a time.

    The optimizer is traced for a tree in which each stack has the shape of one layer. What its state has for a
    stack is that of one layer, stacked along an axis of its own.

    Attributes:
      names: The names of the parameters, in the order of the leaves.
      stacks: What is said of each parameter that is a stack, by its number.
      owned: For each parameter, the numbers of the leaves of the state that are its own.
      axes: For each leaf of the state of a stack, the axis of the layers.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        state: Any,
        stacks: Mapping[int, Stack],
    ):
        """Traces the update.

        Raises:
          ValueError: The update of a parameter needs the gradient of another, or the state does not have a leaf
            for each layer where it must.
        """
        tx = optax.with_extra_args_support(tx)
        paths = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_int8)[0]
        self.names = [path_name(path) for path, _ in paths]
        self.stacks = stacks
        layer = _of_layers(params, stacks)
        outline = jax.eval_shape(tx.init, layer)
        self.structure = jax.tree.structure(state)
        if jax.tree.structure(outline) != self.structure:
            raise ValueError(
                "opt_state must have the structure of tx.init(params), found another: make it by step.init(params)"
            )
        self.given = jax.tree.leaves(state)
        one = [
            jax.ShapeDtypeStruct(own.shape, jnp.result_type(leaf))
            for own, leaf in zip(jax.tree.leaves(outline), self.given, strict=True)
        ]

        def update(grads, state, params, index):
            with keys.of_layers(dict.fromkeys((self.names[i] for i in stacks), index)):
                return tx.update(grads, state, params)

        args = (layer, jax.tree.unflatten(self.structure, one), layer, jnp.int32(0))
        closed, shapes = jax.make_jaxpr(update, return_shape=True)(*args)
        if jax.tree.structure(shapes[1]) != self.structure:
            raise ValueError(
                "tx must keep the structure of its state in each update, found another"
            )
        inputs = [Var(aval) for aval in closed.in_avals]
        count, states = len(self.names), len(self.given)
        self.grads, rest = inputs[:count], inputs[count:]
        self.state, rest = rest[:states], rest[states:]
        self.params, (self.index,) = rest[:count], rest[count:]
        nodes, outs = flatten(closed.jaxpr, closed.consts, inputs)
        self.updates, self.new_state = outs[:count], outs[count:]
        self._find_owners(nodes)
        self._find_axes([x.shape for x in one])

    def _find_owners(self, nodes: Iterable[Any]) -> None:
        """Says which parameter each leaf of the state belongs to."""
        count = len(self.names)
        owner: dict[int, frozenset[int]] = {}
        while True:  # what a leaf of the state belongs to, all that is computed from it does
            of = {
                var: frozenset([i])
                for vars in (self.grads, self.params)
                for i, var in enumerate(vars)
            }
            of |= {self.state[place]: found for place, found in owner.items()}
            self.maker: dict[Var, Any] = {}
            pending = list(nodes)[::-1]
            while pending:
                node = pending.pop()
                found = frozenset().union(*(of.get(var, frozenset()) for var in node.variables()))
                if len(found) > 1 and node.name == "cond":
                    pending += as_choice(node)[::-1]
                    continue
                for out in node.outs:
                    of[out], self.maker[out] = found, node
            of_updates, of_state = (
                [of.get(out, frozenset()) if isinstance(out, Var) else frozenset() for out in goals]
                for goals in (self.updates, self.new_state)
            )
            for leaf, found in enumerate(of_updates):
                if others := sorted(found - {leaf}):
                    self._refuse(f"the update of {self.names[leaf]!r}", others[0])
            for found in of_state:
                if len(found) > 1:
                    own, other, *_ = sorted(found)
                    self._refuse(f"its state of {self.names[own]!r}", other)
            new = {place: found for place, found in enumerate(of_state) if found}
            if new == owner:
                break
            owner = new
        self.owned: list[list[int]] = [[] for _ in range(count)]
        for place, (leaf,) in owner.items():
            self.owned[leaf].append(place)
        self.shared = [place for place in range(len(self.state)) if place not in owner]
        self.known = {self.state[place]: self.given[place] for place in self.shared}

    def _refuse(self, what: str, other: int) -> None:
        raise ValueError(
            f"tx must be leaf-wise with update='backward', found that {what} needs {self.names[other]!r} as well, whose gradient "
            "does not exist at that time; in the place of clipping by the global norm take optax.clip_by_block_rms "
            "or optax.adaptive_grad_clip, which clip each parameter by itself"
        )

    def _find_axes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Finds the axis of the layers in each leaf of the state of a stack."""
        self.axes: dict[int, int] = {}
        for leaf, places in enumerate(self.owned):
            stack = self.stacks.get(leaf)
            for place in places:
                found, one = jnp.shape(self.given[place]), shapes[place]
                if stack is None:
                    if found != one:
                        self._refuse_state(leaf, found, one)
                    continue
                fitting = [
                    axis
                    for axis in range(len(found))
                    if found[axis] == stack.length and (*found[:axis], *found[axis + 1 :]) == one
                ]
                if not fitting:
                    self._refuse_state(leaf, found, (stack.length, *one))
                self.axes[place] = stack.axis if stack.axis in fitting else fitting[0]
        for place in self.shared:
            if (found := jnp.shape(self.given[place])) != shapes[place]:
                raise ValueError(
                    f"opt_state must have a leaf of shape {shapes[place]} that belongs to no parameter, found {found}; "
                    "make it by step.init(params)"
                )

    def _refuse_state(self, leaf: int, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        raise ValueError(
            f"opt_state must have shape {expected} where it is of {self.names[leaf]!r}, since with update='backward' "
            f"each layer is a parameter of its own, found {found}; make it by step.init(params)"
        )

    def update(
        self, leaf: int, grad: Any, param: Any, state: Mapping[int, Any], index: Any = None
    ) -> tuple[Any, dict[int, Any]]:
        """Returns the update of a parameter and its new state, by the places of its leaves.

        Args:
          leaf: The number of the parameter.
          grad: Its gradient, or that of one layer.
          param: The parameter, or one layer of it.
          state: The leaves of its state by their places, or one layer of each.
          index: The number of the layer; None where it is no stack.
        """
        known = {
            **self.known,
            self.grads[leaf]: grad,
            self.params[leaf]: param,
            **{self.state[place]: value for place, value in state.items()},
            self.index: jnp.int32(0) if index is None else index,
        }
        goals = [self.updates[leaf], *(self.new_state[place] for place in self.owned[leaf])]
        found = self._evaluate(goals, known)
        return found[0], dict(zip(self.owned[leaf], found[1:], strict=True))

    def finish(self, states: Mapping[int, Any]) -> Any:
        """Returns the new state, given the leaves of it that belong to parameters, by their places."""
        rest = self._evaluate([self.new_state[place] for place in self.shared], self.known)
        new = {**states, **dict(zip(self.shared, rest, strict=True))}
        return jax.tree.unflatten(self.structure, [new[i] for i in range(len(self.given))])

    def _evaluate(self, goals: list[Atom], known: dict[Var, Any], maker: Any = None) -> list[Any]:
        """Computes goals; of a choice between branches, such as that of an optimizer step, the branch that is taken."""
        maker = self.maker if maker is None else maker
        nodes = needed(maker, goals, known)
        choices = [node for node in nodes if node.eqn is CHOICE]
        if choices:
            which = choices[0].ins[0]
            (number,) = self._evaluate([which], known, maker)
            same = [node for node in choices if node.ins[0] is which]

            def taken(case):
                chosen: dict[Any, Any] = {node.outs[0]: node.ins[1 + case] for node in same}
                own = {}
                for node in nodes:
                    if any(isinstance(x, Var) and x in chosen for x in node.ins):
                        node = dataclasses.replace(node, ins=[chosen.get(x, x) for x in node.ins])
                    own |= {out: node for out in node.outs if out not in chosen}
                ends = [chosen.get(goal, goal) if isinstance(goal, Var) else goal for goal in goals]
                return [jnp.asarray(x) for x in self._evaluate(ends, known, own)]

            cases = [partial(taken, case) for case in range(len(choices[0].ins) - 1)]
            return list(jax.lax.switch(jnp.asarray(number, jnp.int32), cases))
        values = Values([], known)
        with dtypes.promoting():
            for node in nodes:
                ins = [values(atom) for atom in node.ins]
                values.known.update(zip(node.outs, node.run(ins), strict=True))
            return [values(goal) for goal in goals]


def init(tx: optax.GradientTransformation, params: Any, stacks: Mapping[int, Stack]) -> Any:
    """Returns the state of an optimizer for which each layer of a stack is a parameter of its own."""
    tx = optax.with_extra_args_support(tx)
    leaves, tree = jax.tree.flatten(params, is_leaf=is_int8)
    firsts = [
        as_array(take(leaf, stacks[i].axis, 0) if i in stacks else leaf)
        for i, leaf in enumerate(leaves)
    ]
    first = jax.tree.unflatten(tree, firsts)
    state, structure = jax.tree.flatten(tx.init(first))
    owned = Parameters(tx, first, jax.tree.unflatten(structure, state), {}).owned
    for i, stack in stacks.items():
        if not owned[i]:
            continue

        def one(layer, i=i):
            given = jax.tree.unflatten(tree, [*firsts[:i], as_array(layer), *firsts[i + 1 :]])
            found = jax.tree.leaves(tx.init(given))
            return [found[place] for place in owned[i]]

        stacked = jax.vmap(one, in_axes=stack.axis, axis_size=stack.length)(leaves[i])
        for place, found in zip(owned[i], stacked, strict=True):
            state[place] = found
    return jax.tree.unflatten(structure, state)


def _of_layers(params: Any, stacks: Mapping[int, Stack]) -> Any:
    """Returns the shapes of the params, each stack with the shape of one layer."""
    leaves, structure = jax.tree.flatten(params, is_leaf=is_int8)
    shapes = []
    for i, leaf in enumerate(leaves):
        whole = outline(leaf)
        shape = stacks[i].dropped(whole.shape) if i in stacks else whole.shape
        shapes.append(jax.ShapeDtypeStruct(shape, whole.dtype))
    return jax.tree.unflatten(structure, shapes)
