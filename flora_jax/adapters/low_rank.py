"""An adapter: weights that are kept as they are, each with a low-rank array that is trained.

A leaf `W` is run as `W + A B`. The array that carries it through a function is the `Weight` of the
fused route, with both factors kept: there `A` is drawn and `B = 0`, here they are parameters. Any JAX
function of the params is run so without a change to it; `x (W + A B)` is computed as `x W + (x A) B`.

In the shape descriptions `B` are the batch axes of a weight, `P` its projected ones (the input side,
unless the projection says otherwise), `r` is the rank.

Source: Hu et al., "LoRA", arXiv 2106.09685, Section 4.1; arXiv 2402.03293, Section 2.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.chain.keys import fold_path
from flora_jax.chain.leaf_plan import LeafPlan, leaf_plans
from flora_jax.chain.plan import Use
from flora_jax.chain.products import data_batch
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import Spec
from flora_jax.fused.interpreter import Traced, Walk, exposed
from flora_jax.fused.lazy import is_lazy, materialized
from flora_jax.fused.leaves import combine, is_array, partition
from flora_jax.fused.rules import RULES
from flora_jax.fused.weight import Weight, merged


class Factors(NamedTuple):
    """What is added to one weight: `down · up`, summed over the rank.

    Attributes:
      down: `A`, `(*B, *P, r)`.
      up: `B` times the scale: the weight's shape, with the rank in place of the projected axes.
    """

    down: Any
    up: Any


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A method: how its parameters start, and what they add to each weight.

    Attributes:
      init: `(key, params) -> adapter_params`.
      factors: `(params, adapter_params) -> {path: Factors}`.
      projection: which leaves have an adapter, and of which rank.
      scale: what `up` is multiplied by, per leaf, where the params are `{path: {"down", "up"}}`.
      prepare: `(params, adapter_params, weights) -> weights`, a last word on the weights by path
        before the walk; None where there is none.
    """

    init: Callable[[jax.Array, Any], Any]
    factors: Callable[[Any, Any], dict[str, Factors]]
    projection: Projection
    scale: Callable[[Spec], float] = lambda spec: 1.0
    prepare: Callable[[Any, Any, dict[str, Weight]], dict[str, Weight]] | None = None

    def apply(self, fun: Callable) -> Callable:
        """`fun(params, *args)` as `(params, adapter_params, *args)`, run with the adapters.

        What it gives can be differentiated in `adapter_params` (`jax.grad(…, argnums=1)`), compiled,
        mapped, and run under `scan`, `remat` and shardings as `fun` can. A use of an adapted weight
        that has no rule gets `W + A B` whole; `uses` names it.

        Raises:
          ValueError: `adapter_params` do not fit `params`.
        """

        def adapted(params: Any, adapter_params: Any, *args: Any, **kwargs: Any) -> Any:
            return _run(self, Walk(RULES), fun, params, adapter_params, args, kwargs)

        return adapted

    def uses(
        self, fun: Callable, params: Any, adapter_params: Any, *args: Any, **kwargs: Any
    ) -> tuple[Use, ...]:
        """Where adapted weights are used, and how; the arguments may be shapes."""
        walk = Walk(RULES)
        arrays, rest = partition((params, adapter_params, args, kwargs))

        def traced(arrays):
            params, adapter_params, args, kwargs = combine(arrays, rest)
            run = _run(self, walk, fun, params, adapter_params, args, kwargs)
            return partition(run)[0]

        jax.eval_shape(traced, arrays)
        return tuple(walk.uses)

    def merge(self, params: Any, adapter_params: Any) -> Any:
        """The params with the adapters added to them, rounded to the params' dtype.

        A quantised weight that has an adapter becomes one in floating point.
        """
        return _merged(self, params, adapter_params, 1)

    def unmerge(self, params: Any, adapter_params: Any) -> Any:
        """What was merged with these adapters, to rounding."""
        return _merged(self, params, adapter_params, -1)


def as_projection(rank: Any) -> Projection:
    """An int `r` stands for rank `r` on the input side of every matrix but embeddings."""
    if isinstance(rank, Projection):
        return rank
    return Projection(rank, side="input", embedding="whole")


def specs(projection: Projection, params: Any) -> dict[str, Spec]:
    """The leaves that have an adapter, by path.

    Raises:
      ValueError: no leaf has one.
    """
    plans = plans_of(projection, params)
    found = {plan.path: plan.spec for plan in plans if plan.spec}
    if not found:
        reasons = ", ".join(f"{plan.path!r}: {plan.reason}" for plan in plans[:4])
        raise ValueError(f"an adapter needs a weight to adapt, found none ({reasons or 'no leaf'})")
    return found


def down_shape(spec: Spec) -> tuple[int, ...]:
    """`(*B, *P, r)`."""
    return (*(spec.shape[axis] for axis in (*spec.batch, *spec.projected)), spec.rank)


def layer_name(path: str) -> str:
    """The name of a leaf's layer: its path up to the first name that ends in a number, else the first name."""
    names = path.split("/")
    for i, name in enumerate(names):
        if re.search(r"\d$", name):
            return "/".join(names[: i + 1])
    return names[0]


def layer_names(spec: Spec, name_of: Callable[[str], str]) -> list[str]:
    """The layers of a leaf: one, or one for each index of its first batch axis."""
    name = name_of(spec.path)
    if not spec.batch:
        return [name]
    return [f"{name}[{i}]" for i in range(spec.shape[spec.batch[0]])]


def to_matrices(spec: Spec, down: Any, up: Any) -> tuple[jax.Array, jax.Array]:
    """The factors (or their gradients) as `(*B, m, r)` and `(*B, r, n)`."""
    batch = tuple(spec.shape[axis] for axis in spec.batch)
    up = jnp.moveaxis(up, *_up_order(spec))
    return down.reshape(*batch, -1, spec.rank), up.reshape(*batch, spec.rank, -1)


def from_matrices(spec: Spec, down: Any, up: Any) -> tuple[jax.Array, jax.Array]:
    """Undoes `to_matrices`."""
    source, goal = _up_order(spec)
    up = up.reshape([spec.data_shape[axis] for axis in (*source, *_others(spec, source))])
    return down.reshape(down_shape(spec)), jnp.moveaxis(up, goal, source)


def _up_order(spec: Spec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Moves the batch axes, then the rank, to the front of `up`."""
    slot = spec.projected[0]
    source = (*data_batch(spec), slot)
    return source, tuple(range(len(source)))


def _others(spec: Spec, source: tuple[int, ...]) -> list[int]:
    return [axis for axis in range(len(spec.data_shape)) if axis not in source]


def start_pair(key: jax.Array, spec: Spec, init: str = "kaiming") -> dict[str, jax.Array]:
    """`{"down", "up"}` of one leaf: random on the projected side, zero on the other.

    `kaiming` is uniform on ±1/√m, as the authors' code and PEFT have it; `gaussian` is normal with
    standard deviation 1/r. Each leaf has a key of its own, whatever other leaves there are.
    """
    key, shape, dtype = fold_path(key, spec.path), down_shape(spec), jnp.dtype(spec.dtype)
    if init == "gaussian":
        down = jax.random.normal(key, shape, dtype) / spec.rank
    elif init == "kaiming":
        bound = spec.size**-0.5
        down = jax.random.uniform(key, shape, dtype, -bound, bound)
    else:
        raise ValueError(f"init must be one of kaiming, gaussian, found {init!r}")
    return {"down": down, "up": jnp.zeros(spec.data_shape, dtype)}


def _checked(adapter: Adapter, params: Any, adapter_params: Any) -> dict[str, Factors]:
    """The factors, of which each fits a leaf."""
    plans = {plan.path: plan for plan in plans_of(adapter.projection, params)}
    factors = adapter.factors(params, adapter_params)
    for path, pair in factors.items():
        plan = plans.get(path)
        if plan is None or plan.spec is None:
            reason = "no parameter has this path" if plan is None else plan.reason
            raise ValueError(f"{path!r} has an adapter and should have none: {reason}")
        expected = (down_shape(plan.spec), plan.spec.data_shape)
        found = (tuple(jnp.shape(pair.down)), tuple(jnp.shape(pair.up)))
        if found != expected:
            raise ValueError(
                f"{path!r}: the adapter's factors must be of shapes {expected[0]} and {expected[1]}, "
                f"found {found[0]} and {found[1]}"
            )
    return factors


def _weight(plan: LeafPlan, leaf: Any, pair: Factors) -> Weight:
    assert plan.spec is not None
    return Weight.adapted(plan.spec, leaf, *pair)


def _weights(adapter: Adapter, params: Any, adapter_params: Any) -> dict[str, Weight]:
    """The adapted leaves, by path."""
    factors = _checked(adapter, params, adapter_params)
    plans = plans_of(adapter.projection, params)
    leaves = zip(plans, jax.tree.leaves(params, is_leaf=is_lazy), strict=True)
    return {
        plan.path: _weight(plan, leaf, factors[plan.path])
        for plan, leaf in leaves
        if plan.path in factors
    }


def _run(adapter: Adapter, walk: Walk, fun, params, adapter_params, args, kwargs) -> Any:
    arrays, rest = arrays_apart(params)
    leaves, structure = jax.tree.flatten(arrays, is_leaf=is_lazy)
    adapted = _weights(adapter, arrays, adapter_params)
    if adapter.prepare is not None:
        adapted = adapter.prepare(arrays, adapter_params, adapted)
    given, others = partition((args, kwargs))
    given, given_structure = jax.tree.flatten(given)
    outline: list[Any] = []

    def flat(*values):
        own = combine(jax.tree.unflatten(structure, values[: len(leaves)]), rest)
        inputs = jax.tree.unflatten(given_structure, values[len(leaves) :])
        args, kwargs = combine(inputs, others)
        results, plain = partition(fun(own, *args, **kwargs))
        results, result_structure = jax.tree.flatten(results)
        outline[:] = [result_structure, plain]
        return results

    jaxpr = jax.make_jaxpr(flat)(*map(_outline, leaves), *given)
    paths = [plan.path for plan in plans_of(adapter.projection, arrays)]
    ins = [
        Traced(adapted[path] if path in adapted else materialized(leaf), False)
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    ins += [Traced(value, False) for value in given]
    outs = exposed(walk.run(jaxpr.jaxpr, jaxpr.consts, ins))
    result_structure, plain = outline
    results = jax.tree.unflatten(result_structure, [traced.value for traced in outs])
    return combine(results, plain)


def arrays_apart(params: Any) -> tuple[Any, Any]:
    """Arrays (`Lazy` ones too), and all else, each with None in place of the other."""

    def pick(wanted: bool) -> Any:
        def visit(x):
            return x if (is_lazy(x) or is_array(x)) == wanted else None

        return jax.tree.map(visit, params, is_leaf=is_lazy)

    return pick(True), pick(False)


def plans_of(projection: Projection, params: Any) -> list[LeafPlan]:
    """The plan of every array, in the order of the tree."""
    arrays, _ = arrays_apart(params)
    return leaf_plans(jax.tree.map(_outline, arrays, is_leaf=is_lazy), projection)


def _outline(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_lazy(leaf) else leaf


def _merged(adapter: Adapter, params: Any, adapter_params: Any, sign: int) -> Any:
    arrays, rest = arrays_apart(params)
    leaves, structure = jax.tree.flatten(arrays, is_leaf=is_lazy)
    adapted = _weights(adapter, arrays, adapter_params)
    paths = [plan.path for plan in plans_of(adapter.projection, arrays)]
    results = []
    for path, leaf in zip(paths, leaves, strict=True):
        weight = adapted.get(path)
        if weight is not None:
            leaf = merged(weight.replace(up=sign * weight.up))
        results.append(leaf)
    return combine(jax.tree.unflatten(structure, results), rest)
