"""Low rank: an adapter, which leaves weights frozen and trains a low-rank array beside each.

| paper (weight: out × in) | here (weight: in × out) |
|---|---|
| `W + B A` | `W + down up` |
| `A`, `r × m` | `down`, transposed |
| `B`, `n × r` | `up`, transposed |

The array that stands for a weight inside a function is the `Weight` of the fused route: there the down
factor is sampled and the up factor is zero, and here both are parameters. So any JAX function of the
params can be run with adapters, without a change to it; `x (W + down up)` is computed as
`x W + (x down) up`.

In the descriptions of shapes `B` stands for the batch axes of a weight, `P` for its projected axes (the
input side, unless the projection says otherwise), and `r` for the rank.

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
from flora_jax.fused.use import merged
from flora_jax.fused.weight import Weight


class Factors(NamedTuple):
    """The two factors whose product over the rank is added to one weight.

    Attributes:
      down: The down factor, of shape `(*B, *P, r)`.
      up: The up factor times the scale, of the weight's shape with the rank in the place of the
        projected axes.
    """

    down: Any
    up: Any


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A method of low-rank adaptation: how its parameters start, and what they add to each weight.

    Attributes:
      init: The function `(key, params) -> adapter_params`, which returns the initial parameters.
      factors: The function `(params, adapter_params) -> {path: Factors}`, which returns what is added to
        each weight.
      projection: The `Projection` that says which leaves have an adapter, and of which rank.
      scale: A function from a leaf's `Spec` to the number that its up factor is multiplied by, for
        methods whose parameters are `{path: {"down", "up"}}`.
      prepare: A function `(params, adapter_params, weights) -> weights`, which may change the weights (a
        dict of `Weight`s by path) before a function is run with them, or None.
    """

    init: Callable[[jax.Array, Any], Any]
    factors: Callable[[Any, Any], dict[str, Factors]]
    projection: Projection
    scale: Callable[[Spec], float] = lambda spec: 1.0
    prepare: Callable[[Any, Any, dict[str, Weight]], dict[str, Weight]] | None = None

    def apply(self, fun: Callable) -> Callable:
        """Returns a function that runs `fun` with the adapters.

        The result can be differentiated with respect to `adapter_params` (`jax.grad(…, argnums=1)`),
        compiled, mapped, and run under `scan`, `remat` and shardings as `fun` can. If a weight is used in
        a way for which there is no rule, the sum of the weight and its adapter is computed there; `uses`
        names all such uses.

        Args:
          fun: A function `(params, *args, **kwargs)`.

        Returns:
          A function `(params, adapter_params, *args, **kwargs)`.

        Raises:
          ValueError: On a call, `adapter_params` do not fit `params`.
        """

        def adapted(params: Any, adapter_params: Any, *args: Any, **kwargs: Any) -> Any:
            return _run(self, Walk(RULES), fun, params, adapter_params, args, kwargs)

        return adapted

    def uses(
        self, fun: Callable, params: Any, adapter_params: Any, *args: Any, **kwargs: Any
    ) -> tuple[Use, ...]:
        """Returns all uses of weights with an adapter. The arguments may be `jax.ShapeDtypeStruct`s.

        Args:
          fun: A function `(params, *args, **kwargs)`.
          params: The params of the model.
          adapter_params: The params of the adapter.
          *args: Further arguments of `fun`.
          **kwargs: Keyword arguments of `fun`.

        Returns:
          A tuple of `Use`. Its `whole` is True where the sum of a weight and its adapter is computed.
        """
        walk = Walk(RULES)
        arrays, rest = partition((params, adapter_params, args, kwargs))

        def traced(arrays):
            params, adapter_params, args, kwargs = combine(arrays, rest)
            run = _run(self, walk, fun, params, adapter_params, args, kwargs)
            return partition(run)[0]

        jax.eval_shape(traced, arrays)
        return tuple(walk.uses)

    def merge(self, params: Any, adapter_params: Any) -> Any:
        """Returns the params with the adapters added to them, rounded to the params' dtype.

        A quantized weight that has an adapter becomes one in floating point.

        Args:
          params: The params of the model.
          adapter_params: The params of the adapter.
        """
        return _merged(self, params, adapter_params, 1)

    def unmerge(self, params: Any, adapter_params: Any) -> Any:
        """Returns the params before they were merged with these adapters, up to rounding.

        Args:
          params: The merged params.
          adapter_params: The params of the adapter.
        """
        return _merged(self, params, adapter_params, -1)


def as_projection(rank: Any) -> Projection:
    """Returns a `Projection` as it is; an int is the rank of all matrices but embeddings, on the input side."""
    if isinstance(rank, Projection):
        return rank
    return Projection(rank, side="input", embedding="whole")


def specs(projection: Projection, params: Any) -> dict[str, Spec]:
    """Returns the specs of the leaves that have an adapter, by path.

    Raises:
      ValueError: No leaf has one.
    """
    plans = plans_of(projection, params)
    found = {plan.path: plan.spec for plan in plans if plan.spec}
    if not found:
        reasons = ", ".join(f"{plan.path!r}: {plan.reason}" for plan in plans[:4])
        raise ValueError(f"an adapter needs a weight to adapt, found none ({reasons or 'no leaf'})")
    return found


def down_shape(spec: Spec) -> tuple[int, ...]:
    """Returns the shape of a down factor, `(*B, *P, r)`."""
    return (*(spec.shape[axis] for axis in (*spec.batch, *spec.projected)), spec.rank)


def layer_name(path: str) -> str:
    """Returns the name of a leaf's layer.

    It is the path up to the first name that ends in a number, or else the first name.
    """
    names = path.split("/")
    for i, name in enumerate(names):
        if re.search(r"\d$", name):
            return "/".join(names[: i + 1])
    return names[0]


def layer_names(spec: Spec, name_of: Callable[[str], str]) -> list[str]:
    """Returns the names of a leaf's layers: one, or one for each index of its first batch axis."""
    name = name_of(spec.path)
    if not spec.batch:
        return [name]
    return [f"{name}[{i}]" for i in range(spec.shape[spec.batch[0]])]


def to_matrices(spec: Spec, down: Any, up: Any) -> tuple[jax.Array, jax.Array]:
    """Reshapes the factors (or their gradients) to `(*B, m, r)` and `(*B, r, n)`."""
    batch = tuple(spec.shape[axis] for axis in spec.batch)
    up = jnp.moveaxis(up, *_up_order(spec))
    return down.reshape(*batch, -1, spec.rank), up.reshape(*batch, spec.rank, -1)


def from_matrices(spec: Spec, down: Any, up: Any) -> tuple[jax.Array, jax.Array]:
    """Reshapes matrices to factors; the inverse of `to_matrices`."""
    source, goal = _up_order(spec)
    up = up.reshape([spec.data_shape[axis] for axis in (*source, *_others(spec, source))])
    return down.reshape(down_shape(spec)), jnp.moveaxis(up, goal, source)


def _up_order(spec: Spec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the move that brings the batch axes, then the rank, to the front of an up factor."""
    slot = spec.projected[0]
    source = (*data_batch(spec), slot)
    return source, tuple(range(len(source)))


def _others(spec: Spec, source: tuple[int, ...]) -> list[int]:
    return [axis for axis in range(len(spec.data_shape)) if axis not in source]


def start_pair(key: jax.Array, spec: Spec, init: str = "kaiming") -> dict[str, jax.Array]:
    """Returns the initial `{"down", "up"}` of one leaf: the down factor is random, and the up factor zero.

    Args:
      key: A typed key. Each leaf derives a key of its own from it, which does not depend on the other
        leaves.
      spec: The `Spec` of the leaf.
      init: The distribution of the down factor: `kaiming` is uniform on ±1/√m, as in the authors' code
        and in PEFT; `gaussian` is normal with standard deviation 1/r.

    Raises:
      ValueError: `init` is neither of the two.
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
    """Returns the factors; raises a ValueError if one of them fits no leaf."""
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
    """Returns the weights that have an adapter, by path."""
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
    """Splits the params into arrays (`Lazy` ones too) and all else, each with None for the other's leaves."""

    def pick(wanted: bool) -> Any:
        def visit(x):
            return x if (is_lazy(x) or is_array(x)) == wanted else None

        return jax.tree.map(visit, params, is_leaf=is_lazy)

    return pick(True), pick(False)


def plans_of(projection: Projection, params: Any) -> list[LeafPlan]:
    """Returns the plan of every array, in the order of the tree."""
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
