"""Stack: a scan over layers, whose backward pass updates the weights of one layer after the other in place."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from flora_jax.fused.int8 import as_array
from flora_jax.fused.interpreter import is_inexact
from flora_jax.fused.program import Node, Var
from flora_jax.fused.rules.control_flow import scan_counts
from flora_jax.qarray import outline
from flora_jax.update import pull
from flora_jax.update.layers import OWN, Round, replace_each, take
from flora_jax.update.parameters import Parameters


@dataclasses.dataclass(frozen=True)
class Use:
    """A parameter whose layers a scan takes one after the other.

    Attributes:
      leaf: The number of the parameter.
      axis: The axis of its layers.
      chain: The operations on the whole parameter before the scan, such as a cast.
    """

    leaf: int
    axis: int
    chain: tuple[Node, ...]

    def of_layer(self, layer: jax.Array) -> jax.Array:
        """Returns what the scan's body takes, given one layer of the parameter."""
        axis = self.axis
        for node in self.chain:
            if node.name == "convert_element_type":
                layer = layer.astype(node.eqn.params["new_dtype"])
            elif node.name == "transpose":
                order = node.eqn.params["permutation"]
                place = order.index(axis)
                rest = [i - (i > axis) for i in order if i != axis]
                layer, axis = jnp.transpose(layer, rest), place
        return layer


LATE, XS = 2, 3
"""What a backward pass replaces beside parameters and state: gradients that are not complete, and cotangents."""
CHAIN = {"convert_element_type", "transpose", "copy", "sharding_constraint"}
"""Operations on a stack that can be done to each layer."""


class Scan:
    """A scan over layers, evaluated by two loops of ours.

    The first keeps for each layer what the backward pass needs; weights are not among it. The second goes back from
    the last layer to the first, and replaces each layer of the weights as soon as its gradient is there.
    """

    def __init__(self, node: Node, uses: Mapping[int, Use], active: Sequence[bool]):
        """Prepares the scan.

        Args:
          node: The operation.
          uses: The parameters among its inputs, by the places of these.
          active: Which inputs are differentiated.
        """
        self.node, self.uses = node, dict(uses)
        params = node.eqn.params
        self.consts, count = scan_counts(params)
        self.carries = self.consts + count
        self.length, self.reverse = params["length"], params["reverse"]
        body = core.jaxpr_as_fun(params["jaxpr"])
        self.body: Callable = lambda given: list(body(*given))
        self.raw = [use for _, use in sorted({use.leaf: use for use in uses.values()}.items())]
        self.here = [i for i in range(len(node.ins)) if i not in uses]
        self.active = list(active)
        self.wanted = self._activity(params["jaxpr"].jaxpr, count)

    def _activity(self, jaxpr: Any, count: int) -> list[bool]:
        """Marks the carries that become active, and says which outputs are."""
        while True:
            moving = {var for var, flag in zip(jaxpr.invars, self.active, strict=True) if flag}
            for eqn in jaxpr.eqns:
                ins = (atom for atom in eqn.invars if not isinstance(atom, core.Literal))
                if eqn.primitive.name != "stop_gradient" and moving.intersection(ins):
                    moving.update(out for out in eqn.outvars if is_inexact(out.aval))
            outs = [not isinstance(x, core.Literal) and x in moving for x in jaxpr.outvars]
            carries = self.active[self.consts : self.carries]
            if all(old or not new for old, new in zip(carries, outs, strict=False)):
                # a carry that starts active and is overwritten still has a cotangent
                return [*carries, *outs[count:]]
            for i in range(count):
                self.active[self.consts + i] |= outs[i]

    def forward(self, given: Sequence[Any], params: Sequence[Any]) -> list[Any]:
        """Returns the outputs, given the inputs (None where they are parameters) and all parameters."""
        self.given = given
        consts, first = list(given[: self.consts]), list(given[self.consts : self.carries])
        rest = (None if x is None else take(x, 0, 0) for x in given[self.carries :])
        shapes = [*consts, *first, *rest]
        here = self.here

        def body(inputs):
            layers = dict(zip((use.leaf for use in self.raw), inputs, strict=False))
            rest = inputs[len(self.raw) :]
            full: list[Any] = [None] * len(given)
            for i, x in zip(here, rest, strict=True):
                full[i] = x
            for i, use in self.uses.items():
                full[i] = use.of_layer(layers[use.leaf])
            return self.body(full)

        layers = [as_array(take(params[use.leaf], use.axis, 0)) for use in self.raw]
        self.layer = pull.Layer(
            body,
            [*layers, *(shapes[i] for i in here)],
            [*[True] * len(layers), *(self.active[i] for i in here)],
            self.wanted,
            [*[True] * len(layers), *(not self.consts <= i < self.carries for i in here)],
        )
        others = [i for i in here if i >= self.carries]

        def step(carry, xs):
            i, rest = xs
            layers = [as_array(take(params[use.leaf], use.axis, i)) for use in self.raw]
            outs, kept = self.layer.forward([*layers, *consts, *carry, *rest])
            carry = [x.astype(old.dtype) for x, old in zip(outs, carry, strict=False)]
            return carry, (outs[len(carry) :], kept)

        with self.node.eqn.ctx.manager:
            carry, (ys, self.kept) = jax.lax.scan(
                step,
                [jnp.asarray(x) for x in first],
                (jnp.arange(self.length), [given[i] for i in others]),
                length=self.length,
                reverse=self.reverse,
                unroll=self.node.eqn.params["unroll"],
            )
        return [*carry, *ys]

    def backward(
        self,
        cotangents: Sequence[Any],
        params: Mapping[int, Any],
        states: Mapping[int, Any],
        more: Mapping[int, Any],
        updates: Parameters,
        update: Callable[..., tuple[Any, dict[int, Any]]],
        ready: Sequence[int],
        in_order: bool,
        shape_of: Callable[[int, Any, Any], Any],
    ) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any], dict[int, Any]]:
        """Goes back through the layers.

        Args:
          cotangents: The cotangents of the outputs, None where there is none.
          params: The parameters that this scan uses, by their numbers.
          states: The leaves of the optimizer's state that belong to those in `ready`, by their places.
          more: Cotangents of these parameters from uses after this one.
          updates: What says where the layers lie in the state.
          update: The function `(leaf, gradient, layer, state, index)` that gives the new layer and state.
          ready: The parameters that have no use before this one, so that they are updated here.
          in_order: Whether a layer's backward pass waits, on a TPU, until each weight is written whose gradient is complete.
          shape_of: As in `replace_each`.

        Returns:
          The new parameters in `ready`, the new leaves of the state, the gradients of the other parameters, and the
          cotangents of the inputs by their places.
        """
        count = self.carries - self.consts
        flags = self.wanted[:count]
        given = self.given
        moving = [i for i in self.here if self.active[i]]
        of_consts = [i for i in moving if i < self.consts]
        carried = [i for i in moving if self.consts <= i < self.carries]
        of_xs = [i for i in moving if i >= self.carries]
        ends = [
            jnp.zeros_like(x) if cotangent is None else cotangent
            for x, cotangent, flag in zip(
                given[self.consts : self.carries], cotangents, flags, strict=False
            )
            if flag
        ]
        of_ys = [
            (place, cotangent)
            for place, cotangent in enumerate(cotangents[count:], count)
            if self.wanted[place]
        ]
        leaves = [use.leaf for use in self.raw]
        late = [leaf for leaf in leaves if leaf not in ready]
        of_leaf = {use.leaf: use.axis for use in self.raw}
        arrays: Any = [
            {leaf: params[leaf] for leaf in ready},
            dict(states),
            {leaf: jnp.zeros_like(outline(params[leaf])) for leaf in late},
            {place: jnp.zeros_like(given[place]) for place in of_xs},
        ]
        axes: list[dict[int, int]] = [
            {leaf: of_leaf[leaf] for leaf in ready},
            {place: updates.axes[place] for place in states},
            {leaf: of_leaf[leaf] for leaf in late},
            dict.fromkeys(of_xs, 0),
        ]
        shapes: dict[int, Any] = {place: self.layer.outs[place] for place, _ in of_ys}

        def order(t):
            return t if self.reverse else self.length - 1 - t

        def replace(now: Round, place: int, grad: Any) -> list[tuple[int, int]]:
            use, i = self.raw[place], now.index
            leaf = use.leaf
            if leaf in more:
                grad = grad + take(more[leaf], use.axis, i)
            if leaf in late:
                now.put(LATE, leaf, grad)
                return [(LATE, leaf)]
            if now.early and in_order:
                # the layer is read anew, not kept since the backward pass used it
                grad, now.index = jax.lax.optimization_barrier((grad, i))
            return now.update(leaf, grad, updates.owned[leaf], update, i)

        def compute(now: Round, loop):
            of_carry, sums = loop
            i = now.index
            inputs: list[Any] = [
                as_array(
                    now.take(OWN, leaf) if leaf in ready else take(params[leaf], of_leaf[leaf], i)
                )
                for leaf in leaves
            ]
            for place in self.here:
                if place < self.consts:
                    inputs.append(given[place])
                elif place < self.carries:
                    inputs.append(None)
                else:
                    inputs.append(take(given[place], 0, i))
            ys = [
                jnp.zeros(shapes[place].aval.shape, shapes[place].aval.dtype)
                if cotangent is None
                else take(cotangent, 0, i)
                for place, cotangent in of_ys
            ]

            def complete(grads: Mapping[int, Any], onward: list[Any]) -> list[Any]:
                """Replaces the layers of these weights; on a TPU the walk goes on when that is done."""
                touched = [
                    name for place, grad in grads.items() for name in replace(now, place, grad)
                ]
                if not (now.early and in_order):
                    return onward
                written = [now.arrays[group][name] for group, name in touched]
                onward, written = jax.lax.optimization_barrier((onward, written))
                for (group, name), array in zip(touched, written, strict=True):
                    now.arrays[group][name] = array
                return onward

            kept = [take(x, 0, i) for x in self.kept]
            found = self.layer.pull(inputs, kept, [*of_carry, *ys], len(leaves), complete)
            rest = dict(zip(moving, found, strict=True))
            for place in of_xs:
                now.put(XS, place, rest[place])
            of_carry = [rest[place] for place in carried]
            return of_carry, [a + rest[place] for a, place in zip(sums, of_consts, strict=True)]

        with self.node.eqn.ctx.manager:
            arrays, (ends, sums) = replace_each(
                self.length,
                order,
                arrays,
                axes,
                compute,
                (ends, [jnp.zeros_like(given[place]) for place in of_consts]),
                shape_of,
            )
        own, new_states, grads, inputs = arrays
        back = dict(zip([*of_consts, *carried], [*sums, *ends], strict=True)) | inputs
        return own, new_states, grads, back


def uses_of(node: Node, origin: Mapping[Var, Use]) -> dict[int, Use]:
    """Returns the parameters that a scan takes layer by layer; nothing where it is no stack of layers.

    A stack of layers has at least one matrix in each of them.
    """
    if node.name != "scan":
        return {}
    consts, carries = scan_counts(node.eqn.params)
    found = {
        place: origin[atom]
        for place, atom in enumerate(node.ins)
        if place >= consts + carries and isinstance(atom, Var) and atom in origin
    }
    if not any(len(node.ins[place].shape) > 2 for place in found):  # type: ignore[union-attr]
        return {}
    return found
