"""Schedule: the backward pass of a layer, operation by operation, so that each weight's gradient is used once it is complete."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from flora_jax.fused.program import JITS, REMATS, Atom, Const, Held, Node, Var, flatten, needed


class Schedule:
    """A function of weights and other arrays, which returns cotangents, those of the weights first.

    Attributes:
      nodes: Its operations, in the order in which they were traced.
      turns: For each weight the operation after which its cotangent is complete, and the weight is not used any more.
    """

    def __init__(
        self, fun: Callable[..., Sequence[Any]], args: Sequence[Any], weights: int, onward: int
    ):
        """Traces `fun(*args)`.

        Args:
          fun: The function.
          args: Arrays like those that it will be given: the weights first, cotangents last.
          weights: The number of weights.
          onward: The number of cotangents.
        """
        closed = jax.make_jaxpr(fun)(*args)
        self.inputs = [Var(aval) for aval in closed.in_avals]
        nodes, outs = flatten(closed.jaxpr, closed.consts, self.inputs, {**JITS, **REMATS})
        maker = {out: node for node in nodes for out in node.outs}
        wanted = set(map(id, needed(maker, outs, set(self.inputs))))
        self.nodes = [node for node in nodes if id(node) in wanted]
        self.grads, self.outs = outs[:weights], outs[weights:]
        self.turns = self._turns()
        self._find_onward(onward)

    def _turns(self) -> list[int]:
        turns = [len(self.nodes)] * len(self.grads)
        # what is made of one weight alone, which XLA may compute again wherever it is used
        own: dict[Atom, int] = {
            var: place for place, var in enumerate(self.inputs[: len(self.grads)])
        }
        makes: dict[Atom, list[int]] = {}
        for place, atom in enumerate(self.grads):
            makes.setdefault(atom, []).append(place)
        for turn, node in enumerate(self.nodes):
            used = node.variables()
            places = {own[var] for var in used if var in own}
            for ins, outs in _dependences(node):
                origins = {own.get(var, -1) for var in ins}
                if len(origins) == 1 and -1 not in origins:
                    own.update(dict.fromkeys(outs, *origins))
            for place in places.union(*(makes.get(out, ()) for out in node.outs)):
                turns[place] = turn
        return turns

    def _find_onward(self, count: int) -> None:
        """Finds what depends on the cotangents, and where it is used last."""
        self.late = set(self.inputs[len(self.inputs) - count :])
        self.last: dict[Atom, int] = {}
        for turn, node in enumerate(self.nodes):
            self.last.update(dict.fromkeys(node.variables(), turn))
            for ins, outs in _dependences(node):
                if self.late.intersection(ins):
                    self.late.update(outs)
        for atom, turn in zip(self.grads, self.turns, strict=True):
            self.last[atom] = max(self.last.get(atom, 0), turn)
        self.last.update(dict.fromkeys(self.outs, len(self.nodes)))

    def run(
        self,
        args: Sequence[Any],
        complete: Callable[[dict[int, Any], list[Any]], list[Any]],
    ) -> list[Any]:
        """Computes the cotangents.

        Args:
          args: What the function is given.
          complete: A function that is called with the cotangents of weights, by their places, as soon as these are
            complete, and with all else that depends on cotangents and is used later. It returns the latter.

        Returns:
          The cotangents that are not of weights.
        """
        known = dict(zip(self.inputs, args, strict=True))
        ready: dict[int, list[int]] = {}
        for place, turn in enumerate(self.turns):
            ready.setdefault(turn, []).append(place)
        for turn, node in enumerate([*self.nodes, None]):
            if node is not None:
                run(node, known)
            if turn in ready:
                grads = {place: value(self.grads[place], known) for place in ready[turn]}
                onward = [x for x in known if x in self.late and self.last.get(x, -1) > turn]
                fresh = complete(grads, [known[var] for var in onward])
                known.update(zip(onward, fresh, strict=True))
        return [value(atom, known) for atom in self.outs]


def _dependences(node: Node) -> Iterator[tuple[Sequence[Atom], Sequence[Var]]]:
    """Yields which outputs of an operation are made of which of its inputs, constants apart."""
    if isinstance(node, Held):
        yield from (([atom], [out]) for atom, out in zip(node.ins, node.outs, strict=True))
    else:
        yield node.variables(), node.outs


def run(node: Node, known: dict[Var, Any]) -> None:
    """Computes one operation, under the context that it was traced in."""
    with node.eqn.ctx.manager:  # it says which axes of a mesh are explicit there
        outs = node.run([value(atom, known) for atom in node.ins])
    known.update(zip(node.outs, outs, strict=True))


def value(atom: Atom, known: Mapping[Var, Any]) -> Any:
    """Returns the value of a variable or of a constant."""
    return atom.value if isinstance(atom, Const) else known[atom]
