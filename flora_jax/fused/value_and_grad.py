"""value_and_grad: gradients that are compressed inside the backward pass, and never materialized.

For a layer `y = x W`, where `δ` is the cotangent of `y`:

| paper | here |
|---|---|
| `x Aᵀ`, LoRA's down projection of the input | what is saved for the backward pass, in the place of `x` |
| `C = G Aᵀ`, the gradient of LoRA's up factor at zero | the sketch `(x Aᵀ)ᵀ δ` |

Source: arXiv 2402.03293, Section 2 and Algorithm 1.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax import dtypes
from flora_jax.chain.leaf_plan import LeafPlan, leaf_plans
from flora_jax.chain.plan import Plan
from flora_jax.chain.plan import plan as make_plan
from flora_jax.chain.project import cycle as cycle_of_state
from flora_jax.chain.projection import Projection, check_projection
from flora_jax.chain.sketch import Sketch, Spec
from flora_jax.fused.int8 import as_array, lazy
from flora_jax.fused.interpreter import Traced, Use, Walk, exposed
from flora_jax.fused.leaves import (
    combine,
    is_array,
    partition,
    refuse_changing_modules,
    trained,
    without,
)
from flora_jax.fused.rules import RULES
from flora_jax.fused.weight import Weight
from flora_jax.qarray import first_of_each, is_int8, outlines
from flora_jax.sharding import explicit, manual
from flora_jax.sharding.partition import constrain, of_sketch


def value_and_grad(
    fun: Callable,
    projection: Projection,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    shardings: Any = None,
) -> "ValueAndGrad":
    """Like `jax.value_and_grad`, but returns sketches, and never materializes the gradients they are of.

    Each gradient `G` that `projection` compresses is returned as a `Sketch`, whose data equal
    `G Aᵀ` (what `project` makes of the gradient of `jax.value_and_grad`) up to rounding. Where the
    input side is projected (`side="input"`), the layer's input is saved for the backward pass at width
    `r` only. If a weight is used in a way for which there is no rule, its full gradient is materialized
    there and projected at once; `ValueAndGrad.plan` names all such uses.

    Args:
      fun: The function to differentiate. It takes pytrees and returns a scalar, or a pair of a scalar
        and auxiliary data.
      projection: The `Projection` of the optimizer's chain.
      argnums: The positional argument or arguments to differentiate. Weights in int8 (`flora_jax.to_int8`) are made
        floating point where they are used, and have the gradients of what they stand for.
      has_aux: Whether `fun` returns a pair of the scalar and auxiliary data.
      shardings: A pytree of `NamedSharding` for the differentiated argument or arguments, with None for
        leaves whose sharding is unknown. Each sketch is then reduced over devices to the sharding that
        `state_shardings` gives it, and is not replicated first.

    Returns:
      A `ValueAndGrad`, a function `(*args, cycle, **kwargs)` that returns the value and the gradients.
      Pass the optimizer's state, or `flora_jax.cycle(opt_state)`, as `cycle`; the chain's `project`
      refuses sketches of another cycle than its own. Leaves that are not differentiated (see
      `jax.grad`; and floats that are attributes of an object) have the gradient None.

    Raises:
      ValueError: On a call, `argnums` is out of range, a parameter is complex, or `cycle` is no
        optimizer's state.
      TypeError: On a call, `fun` does not return a scalar (or a pair, with `has_aux`), or an argument is
        an NNX module with state that a call changes, such as BatchNorm's statistics.

    Examples:
      >>> import flora_jax, jax, jax.numpy as jnp
      >>> projection = flora_jax.Projection(4, min_dim=8)
      >>> tx = flora_jax.flora(1e-2, projection=projection)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> opt_state = tx.init(params)
      >>> loss = lambda params, x: jnp.sum((x @ params["kernel"]) ** 2)
      >>> grad_fn = flora_jax.value_and_grad(loss, projection)
      >>> value, grads = grad_fn(params, jnp.ones((2, 16)), cycle=opt_state)
      >>> grads["kernel"].data.shape
      (4, 8)
    """
    check_projection(projection)
    return ValueAndGrad(fun, projection, argnums, has_aux, shardings)


@dataclasses.dataclass(frozen=True)
class ValueAndGrad:
    """The function that `value_and_grad` returns. Its attributes are the arguments given there."""

    fun: Callable
    projection: Projection
    argnums: int | Sequence[int]
    has_aux: bool
    shardings: Any = None

    def __call__(self, *args: Any, cycle: Any, **kwargs: Any) -> Any:
        cycle = _cycle_of(cycle)
        function = _Function(self, args, kwargs)
        ups = list(map(_zero_up, function.plans, function.differentiated))
        uncompressed = [
            None if plan.spec else as_array(leaf)
            for plan, leaf in zip(function.plans, function.differentiated, strict=True)
        ]

        shardings = self._shardings(function)

        def run(ups, uncompressed):
            ups, uncompressed = (
                list(map(constrain, leaves, shardings)) for leaves in (ups, uncompressed)
            )
            return function.result(function.walk(Walk(RULES), cycle, ups, uncompressed, shardings))

        with dtypes.promoting():
            value, grads = jax.value_and_grad(run, (0, 1), has_aux=True)(ups, uncompressed)
        leaves = [
            grad
            if plan.spec is None
            else Sketch.unchecked(_total(plan.spec, leaf, data), cycle, plan.spec)
            for plan, leaf, data, grad in zip(
                function.plans, function.differentiated, *grads, strict=True
            )
        ]
        grads = function.gradients(leaves)
        return (value if self.has_aux else value[0]), grads

    def _shardings(self, function: "_Function") -> list[Any]:
        """Returns the sharding of each gradient, or None where it is not known."""
        if self.shardings is None:
            return [None] * len(function.plans)
        leaves = jax.tree.leaves(self.shardings, is_leaf=lambda x: x is None)
        count = len(jax.tree.leaves(function.differentiated))
        if len(leaves) != count:
            raise ValueError(
                f"shardings must have a leaf for each differentiated array, found {len(leaves)} for "
                f"{count}"
            )
        leaves = first_of_each(function.differentiated, leaves)
        return [
            of_sketch(plan.spec, sharding) if plan.spec else sharding
            for plan, sharding in zip(function.plans, leaves, strict=True)
        ]

    def uses(self, *args: Any, **kwargs: Any) -> tuple[Use, ...]:
        """Returns all uses of compressed weights. The arguments may be `jax.ShapeDtypeStruct`s."""
        walk = Walk(RULES)

        def traced(args, kwargs):
            function = _Function(self, args, kwargs)
            ups = list(map(_zero_up, function.plans, function.differentiated))
            shardings = [None] * len(ups)
            uncompressed = list(map(as_array, function.differentiated))
            return function.walk(walk, 0, ups, uncompressed, shardings)

        arrays, rest = partition((args, kwargs))
        jax.eval_shape(lambda arrays: traced(*combine(arrays, rest)), arrays)
        return tuple(walk.uses)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Returns `flora_jax.plan` of the (first) differentiated argument, and the uses without a rule.

        Args:
          *args: The arguments of the function; they may be `jax.ShapeDtypeStruct`s.
          **kwargs: The keyword arguments of the function, without `cycle`.

        Returns:
          A `Plan` whose `whole_uses` are the uses at which a full gradient is materialized.
        """
        first = self.argnums if isinstance(self.argnums, int) else self.argnums[0]
        params = trained(args[first])
        uses = tuple(use for use in self.uses(*args, **kwargs) if use.whole)
        return dataclasses.replace(make_plan(params, self.projection), whole_uses=uses)


class _Function:
    """The function with these arguments, as a jaxpr over flat leaves."""

    def __init__(self, owner: ValueAndGrad, args: tuple, kwargs: dict):
        refuse_changing_modules((args, kwargs))
        argnums = owner.argnums
        self.single = isinstance(argnums, int)
        places = [argnums] if isinstance(argnums, int) else list(argnums)
        for place in places:
            if not -len(args) <= place < len(args):
                raise ValueError(
                    f"argnums must be below the number of positional arguments, found {place} "
                    f"for {len(args)} of them"
                )
        places = [place % len(args) for place in places]
        self.plans: list[LeafPlan] = []
        self.differentiated: list[Any] = []
        self.structures: list[Any] = []
        self.aux_rest: Any = None
        self.aux_structure: Any = None
        for place in places:
            arg = trained(args[place])
            leaves, structure = jax.tree.flatten(arg, is_leaf=is_int8)
            self.plans += leaf_plans(_shaped(outlines(arg)), owner.projection)
            self.differentiated += leaves
            self.structures.append(structure)
        held = [
            without(arg, trained(arg)) if place in places else arg for place, arg in enumerate(args)
        ]
        arrays, rest = partition((held, kwargs))
        self.others, structure = jax.tree.flatten(arrays)
        count = len(self.differentiated)

        def flat(*leaves):
            trees = self._unflatten(leaves[:count])
            held, kwargs = combine(jax.tree.unflatten(structure, leaves[count:]), rest)
            for place, tree in zip(places, trees, strict=True):
                held[place] = combine(tree, held[place])
            result = owner.fun(*held, **kwargs)
            if owner.has_aux and not (isinstance(result, tuple | list) and len(result) == 2):
                raise TypeError(
                    "fun must return a pair (value, aux) with has_aux=True, found "
                    f"{type(result).__name__}"
                )
            value, aux = result if owner.has_aux else (result, None)
            if not is_array(value) and not isinstance(value, float):
                hint = ", or use has_aux=True" if isinstance(value, tuple | list) else ""
                raise TypeError(f"fun must return a scalar{hint}, found {type(value).__name__}")
            arrays, self.aux_rest = partition(aux)
            leaves, self.aux_structure = jax.tree.flatten(arrays)
            return [value, *leaves]

        self.jaxpr = jax.make_jaxpr(flat)(*outlines(self.differentiated), *self.others)

    def walk(
        self,
        walk: Walk,
        cycle: Any,
        ups: list[Any],
        uncompressed: list[Any],
        shardings: list[Any],
    ) -> list[Any]:
        """Evaluates it with a `Weight` in the place of each leaf that is compressed."""
        ins = []
        for plan, leaf, up, plain, sharding in zip(
            self.plans, self.differentiated, ups, uncompressed, shardings, strict=True
        ):
            value = Weight.start(plan.spec, cycle, lazy(leaf), up, sharding) if plan.spec else plain
            ins.append(Traced(value, True))
        ins += [Traced(leaf, False) for leaf in self.others]
        wanted = [i == 0 for i in range(len(self.jaxpr.jaxpr.outvars))]  # and no auxiliary data
        outs = exposed(walk.run(self.jaxpr.jaxpr, self.jaxpr.consts, ins, wanted))
        return [traced.value for traced in outs]

    def result(self, outs: list[Any]) -> tuple[Any, Any]:
        """Returns `(value, (value, aux))`, with which the value is part of the auxiliary data too."""
        aux = combine(jax.tree.unflatten(self.aux_structure, outs[1:]), self.aux_rest)
        return outs[0], aux

    def gradients(self, leaves: list[Any]) -> Any:
        trees = self._unflatten(leaves)
        return trees[0] if self.single else tuple(trees)

    def _unflatten(self, leaves: Sequence[Any]) -> list[Any]:
        trees, start = [], 0
        for structure in self.structures:
            stop = start + structure.num_leaves
            trees.append(jax.tree.unflatten(structure, leaves[start:stop]))
            start = stop
        return trees


def _zero_up(plan: LeafPlan, leaf: Any) -> jax.Array | None:
    """Returns the up factor of a compressed leaf, which is zero."""
    if plan.spec is None:
        return None
    spec = plan.spec
    (leaf, *_) = jax.tree.leaves(leaf)
    zeros = jnp.zeros(spec.part_data_shape, dtypes.sums(spec.dtype))
    zeros = manual.vary(zeros, manual.varying(leaf) - set(spec.summed))
    return explicit.put(zeros, of_sketch(plan.spec, explicit.sharding_of(leaf)))


def _total(spec: Spec, leaf: Any, data: jax.Array) -> jax.Array:
    """Sums over the devices that projected axes are sharded over, where types do not make JAX do so."""
    (leaf, *_) = jax.tree.leaves(leaf)
    return manual.total(data, sorted(set(spec.summed) - manual.varying(leaf)))


def _cycle_of(cycle: Any) -> Any:
    """Returns the cycle, given it or the optimizer's state."""
    if isinstance(cycle, int) or (is_array(cycle) and jnp.ndim(cycle) == 0):
        return cycle
    return cycle_of_state(cycle)


def _shaped(tree: Any) -> Any:
    """Returns the tree with arrays in the places of Python floats."""
    return jax.tree.map(lambda x: x if is_array(x) else jnp.asarray(x), tree)
