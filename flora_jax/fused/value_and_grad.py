"""value_and_grad: gradients that are born compressed.

| paper | here |
|---|---|
| `x Aᵀ`, LoRA's down projection of the input | what is kept for the backward pass |
| `C = G Aᵀ = (x Aᵀ)ᵀ δ`, the gradient of LoRA's up factor at zero | the sketch |

Source: arXiv 2402.03293, Section 2 and Algorithm 1.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.chain.leaf_plan import LeafPlan, leaf_plans
from flora_jax.chain.plan import Plan
from flora_jax.chain.plan import plan as make_plan
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import Sketch, Spec
from flora_jax.fused.interpreter import Traced, Use, Walk, exposed
from flora_jax.fused.leaves import combine, is_differentiable, partition
from flora_jax.fused.rules import RULES
from flora_jax.fused.weight import Weight
from flora_jax.sharding import explicit, manual
from flora_jax.sharding.partition import constrain, of_sketch


def value_and_grad(
    fun: Callable,
    projection: Projection,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    shardings: Any = None,
) -> "ValueAndGrad":
    """As `jax.value_and_grad`, with `Sketch`es in place of the gradients that `projection` compresses.

    Their data are what `project` makes of `jax.value_and_grad`'s, to rounding, but the whole
    gradient never exists, and where the input side is projected (`side="input"`) the activations
    that a weight meets are kept at width `r`. A use of a weight that has no rule falls back to the
    whole gradient, which is projected at once; `ValueAndGrad.plan` names it.

    Args:
      fun: function of pytrees to a scalar (and auxiliary data).
      projection: that of the optimizer's chain.
      argnums: which positional arguments to differentiate.
      has_aux: whether `fun` gives a pair of the scalar and auxiliary data.
      shardings: tree of `NamedSharding` of the differentiated argument(s), None in it where a leaf's is
        unknown. Each sketch is then summed over devices to where `state_shardings` says that it
        lies, and no further.

    Returns:
      A function `(*args, cycle, **kwargs)` that gives the value and the gradients. `cycle` is
      `flora_jax.cycle(opt_state)`. Leaves that are no floating-point arrays have the gradient None.

    Raises:
      ValueError: `argnums` out of range, a complex parameter.

    Example:
      >>> import flora_jax, jax, jax.numpy as jnp
      >>> projection = flora_jax.Projection(4, min_dim=8)
      >>> tx = flora_jax.flora(1e-2, projection=projection)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> opt_state = tx.init(params)
      >>> loss = lambda params, x: jnp.sum((x @ params["kernel"]) ** 2)
      >>> grad_fn = flora_jax.value_and_grad(loss, projection)
      >>> value, grads = grad_fn(params, jnp.ones((2, 16)), cycle=flora_jax.cycle(opt_state))
      >>> grads["kernel"].data.shape
      (4, 8)
    """
    return ValueAndGrad(fun, projection, argnums, has_aux, shardings)


@dataclasses.dataclass(frozen=True)
class ValueAndGrad:
    """What `value_and_grad` gives; see there."""

    fun: Callable
    projection: Projection
    argnums: int | Sequence[int]
    has_aux: bool
    shardings: Any = None

    def __call__(self, *args: Any, cycle: Any, **kwargs: Any) -> Any:
        function = _Function(self, args, kwargs)
        taps = list(map(_tap, function.plans, function.differentiated))
        wholes = [
            None if plan.spec else leaf
            for plan, leaf in zip(function.plans, function.differentiated, strict=True)
        ]

        places = self._places(function)

        def run(taps, wholes):
            taps, wholes = (list(map(constrain, leaves, places)) for leaves in (taps, wholes))
            return function.result(function.walk(Walk(RULES), cycle, taps, wholes, places))

        value, grads = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(taps, wholes)
        leaves = [
            grad if plan.spec is None else Sketch(_total(plan.spec, leaf, data), None, plan.spec)
            for plan, leaf, data, grad in zip(
                function.plans, function.differentiated, *grads, strict=True
            )
        ]
        grads = function.gradients(leaves)
        return (value if self.has_aux else value[0]), grads

    def _places(self, function: "_Function") -> list[Any]:
        """Where each gradient shall lie."""
        if self.shardings is None:
            return [None] * len(function.plans)
        leaves = jax.tree.leaves(self.shardings, is_leaf=lambda x: x is None)
        if len(leaves) != len(function.plans):
            raise ValueError(
                f"shardings must have a leaf for each differentiated array, found {len(leaves)} for "
                f"{len(function.plans)}"
            )
        return [
            of_sketch(plan.spec, sharding) if plan.spec else sharding
            for plan, sharding in zip(function.plans, leaves, strict=True)
        ]

    def uses(self, *args: Any, **kwargs: Any) -> tuple[Use, ...]:
        """Where the compressed weights are used, and how; the arguments may be shapes."""
        walk = Walk(RULES)

        def traced(args, kwargs):
            function = _Function(self, args, kwargs)
            taps = list(map(_tap, function.plans, function.differentiated))
            places = [None] * len(taps)
            return function.walk(walk, 0, taps, function.differentiated, places)

        arrays, rest = partition((args, kwargs))
        jax.eval_shape(lambda arrays: traced(*combine(arrays, rest)), arrays)
        return tuple(walk.uses)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """`flora_jax.plan` of the (first) differentiated argument, with the uses that have no rule."""
        first = self.argnums if isinstance(self.argnums, int) else self.argnums[0]
        params = jax.tree.map(lambda x: x if is_differentiable(x) else None, args[first])
        whole = tuple(use for use in self.uses(*args, **kwargs) if use.whole)
        return dataclasses.replace(make_plan(params, self.projection), whole_uses=whole)


class _Function:
    """`fun` of some arguments as a jaxpr over flat leaves."""

    def __init__(self, owner: ValueAndGrad, args: tuple, kwargs: dict):
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
            arg = jax.tree.map(lambda x: x if is_differentiable(x) else None, args[place])
            leaves, structure = jax.tree.flatten(arg)
            self.plans += leaf_plans(arg, owner.projection)
            self.differentiated += leaves
            self.structures.append(structure)
        held = [
            jax.tree.map(lambda x: None if is_differentiable(x) else x, arg)
            if place in places
            else arg
            for place, arg in enumerate(args)
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
            if owner.has_aux and not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(
                    "fun must give a pair (value, aux) with has_aux=True, found "
                    f"{type(result).__name__}"
                )
            value, aux = result if owner.has_aux else (result, None)
            arrays, self.aux_rest = partition(aux)
            leaves, self.aux_structure = jax.tree.flatten(arrays)
            return [value, *leaves]

        self.jaxpr = jax.make_jaxpr(flat)(*self.differentiated, *self.others)

    def walk(
        self, walk: Walk, cycle: Any, taps: list[Any], wholes: list[Any], places: list[Any]
    ) -> list[Any]:
        """Evaluates it with weights in place of the leaves that have a tap."""
        ins = []
        for plan, leaf, tap, whole, place in zip(
            self.plans, self.differentiated, taps, wholes, places, strict=True
        ):
            value = Weight.start(plan.spec, cycle, leaf, tap, place) if plan.spec else whole
            ins.append(Traced(value, True))
        ins += [Traced(leaf, False) for leaf in self.others]
        outs = exposed(walk.run(self.jaxpr.jaxpr, self.jaxpr.consts, ins))
        return [traced.value for traced in outs]

    def result(self, outs: list[Any]) -> tuple[Any, Any]:
        """`(value, (value, aux))`."""
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


def _tap(plan: LeafPlan, leaf: Any) -> jax.Array | None:
    if plan.spec is None:
        return None
    spec = plan.spec
    zeros = jnp.zeros(spec.part_data_shape, jnp.promote_types(spec.dtype, jnp.float32))
    zeros = manual.vary(zeros, manual.varying(leaf) - set(spec.summed))
    return explicit.put(zeros, of_sketch(plan.spec, explicit.place(leaf)))


def _total(spec: Spec, leaf: Any, data: jax.Array) -> jax.Array:
    """The sum over devices that cut projected axes, where types do not tell JAX to make it."""
    return manual.total(data, sorted(set(spec.summed) - manual.varying(leaf)))
