"""Flax NNX: gradients, an optimizer and a training step for modules, which are changed in place.

    optimizer = Optimizer(model, tx)
    step = make_train_step(loss, projection)
    value, metrics = step(model, optimizer, batch)

All other state of a module (statistics of BatchNorm, counts of Dropout, caches) is that of a call of the loss, as
`nnx.value_and_grad` has it. This needs `flax` (`pip install flora-jax[models]`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flora_jax.chain.project import cycle as cycle_of
from flora_jax.chain.projection import Projection, check_projection
from flora_jax.chain.sketch import without_cycle
from flora_jax.fused.value_and_grad import value_and_grad as of_params
from flora_jax.rounding import Rounding, check
from flora_jax.trainers.axis_names import METADATA, of_state, owner_of
from flora_jax.update.apply_gradients import apply_gradients


def value_and_grad(
    fun: Callable[..., Any],
    projection: Projection,
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """Returns `nnx.value_and_grad`, with sketches in the places of the gradients that the projection compresses.

    Args:
      fun: The function `(model, *args, **kwargs) -> scalar`, or to a pair of the scalar and auxiliary data.
      projection: The `Projection` of the optimizer.
      wrt: The filter of the variables that are trained, as in `nnx.Optimizer`.
      has_aux: Whether `fun` returns a pair.

    Returns:
      A function `(model, *args, cycle, **kwargs) -> (value, grads)`, or `((value, aux), grads)`. Its `cycle` is the
      optimizer (or its state, or a number). It changes the model's other state as a call of `fun` does;
      `optimizer.update(model, grads)` takes the gradients.

    Raises:
      TypeError: On a call, the first argument is no module.
    """
    check_projection(projection)

    def of_model(model: Any, *args: Any, cycle: Any, **kwargs: Any) -> tuple[Any, Any]:
        graph, params, rest = _split(model, wrt)
        run = partial(_run, fun, graph, has_aux, wrt)
        gradient = of_params(run, projection, has_aux=True)
        if isinstance(cycle, nnx.Optimizer):
            cycle = cycle_of(nnx.as_pure(cycle.opt_state))
        (value, (aux, rest)), grads = gradient(params, rest, args, kwargs, cycle=cycle)
        nnx.update(model, rest)
        return ((value, aux) if has_aux else value), grads

    return of_model


class Optimizer(nnx.Optimizer):
    """Is `nnx.Optimizer`, with names of axes and shardings that are those of each array of its state.

    Flax gives each array of the state the metadata of its weight, whatever its own shape: a sketch has the rank in the place
    of an axis of its weight, a factored moment lacks one. Trainers that lay out the state by this metadata (MaxText, Tunix) fail, or
    replicate what should be sharded. Here each axis has the name of the weight's axis that it came from, and
    the names of an axis that was replaced go to what replaced it, where the mesh in context divides it.

    Args:
      model: The module.
      tx: Any optax transformation.
      wrt: The filter of the variables that are trained.
    """

    def __init__(self, model: Any, tx: Any, *, wrt: Any = nnx.Param, **others: Any):
        owners = _owners(model, wrt)
        named = lambda params: _named(tx.init(params), owners)  # noqa: E731
        super().__init__(model, optax.GradientTransformation(named, tx.update), wrt=wrt, **others)
        self.tx = tx


def update(model: Any, optimizer: Any, grads: Any, *, rounding: Rounding = "nearest") -> None:
    """Updates a module and its optimizer as `optimizer.update(model, grads)` does, but without a tree of updates.

    Args:
      model: The module.
      optimizer: Its `nnx.Optimizer`.
      grads: The gradients, each either a sketch or uncompressed.
      rounding: How new bfloat16 params are rounded, as in `flora_jax.make_train_step`.

    Raises:
      ValueError: As `flora_jax.apply_gradients` does.
    """
    params = nnx.as_pure(nnx.state(model, optimizer.wrt))
    state = nnx.as_pure(optimizer.opt_state)
    params, state = apply_gradients(
        optimizer.tx, nnx.as_pure(grads), state, params, rounding=rounding
    )
    nnx.update(model, params)
    nnx.update(optimizer.opt_state, nnx.state(state))
    optimizer.step[...] += 1


def make_train_step(
    loss: Callable[..., Any],
    projection: Projection | None = None,
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    rounding: Rounding = "nearest",
    donate: bool = True,
) -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
    """Returns a compiled step that changes a module and its optimizer in place; neither gradients nor updates exist in full.

    It is `value_and_grad` and `flora_jax.apply_gradients` together, so any optimizer that is leaf-wise does; without a
    projection gradients are ordinary ones.

    Args:
      loss: The function `(model, *batch) -> scalar`, or to a pair of the scalar and auxiliary data.
      projection: The `Projection` of the optimizer, or None.
      wrt: The filter of the variables that are trained.
      has_aux: Whether `loss` returns a pair.
      rounding: How new bfloat16 params are rounded, as in `flora_jax.make_train_step`.
      donate: Whether the buffers of the model and of the optimizer may be overwritten.

    Returns:
      A function `step(model, optimizer, *batch) -> (value, metrics)`. The metrics have `gradient_norm`, and `aux`
      with `has_aux`. The norm is that of sketches and uncompressed gradients together: its square is an unbiased estimate of the square of
      the gradient's norm (of every micro-batch, before any clipping).

    Raises:
      ValueError: An argument is not valid.
      TypeError: On a call, the first argument is no module.

    Examples:
      >>> import flora_jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from flora_jax.trainers import nnx as flora_nnx
      >>> projection = flora_jax.Projection(4, min_dim=8, resample_every=2)
      >>> tx = flora_jax.flora(1e-2, projection=projection, accumulation_steps=2)
      >>> model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
      >>> optimizer = flora_nnx.Optimizer(model, tx)
      >>> step = flora_nnx.make_train_step(lambda model, x: jnp.mean(model(x) ** 2), projection)
      >>> value, metrics = step(model, optimizer, jnp.ones((2, 16)))
      >>> sorted(metrics)
      ['gradient_norm']
    """
    if projection is not None:
        check_projection(projection)
    check(rounding)

    @partial(nnx.jit, donate_argnums=(0, 1) if donate else ())
    def step(model: Any, optimizer: Any, *batch: Any) -> tuple[jax.Array, dict[str, Any]]:
        graph, params, rest = _split(model, wrt)
        state = nnx.as_pure(optimizer.opt_state)
        run = partial(_run, loss, graph, has_aux, wrt)
        if projection is None:
            gradient = jax.value_and_grad(run, has_aux=True)
        else:
            gradient = partial(of_params(run, projection, has_aux=True), cycle=cycle_of(state))
        (value, (aux, rest)), grads = gradient(params, rest, batch, {})
        grads = without_cycle(nnx.as_pure(grads))
        metrics = {"gradient_norm": _norm(grads)}
        update(model, optimizer, grads, rounding=rounding)
        nnx.update(model, rest)
        return value, {**metrics, "aux": aux} if has_aux else metrics

    return step


def _split(model: Any, wrt: Any) -> tuple[Any, Any, Any]:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an NNX module, found {type(model).__name__}; for params take "
            "flora_jax.value_and_grad"
        )
    graph, params, rest = nnx.split(model, wrt, ...)
    return graph, params, rest


def _run(
    fun: Callable[..., Any],
    graph: Any,
    has_aux: bool,
    wrt: Any,
    params: Any,
    rest: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, tuple[Any, Any]]:
    """Calls a function of a module as one of its params; the module's other state is among what it returns."""
    params, rest = jax.tree.map(lambda x: x, (params, rest))  # variables of this trace
    model = nnx.merge(graph, params, rest)
    found = fun(model, *args, **kwargs)
    value, aux = found if has_aux else (found, None)
    return value, (aux, nnx.state(model, nnx.Not(wrt)))


def _norm(tree: Any) -> jax.Array:
    """Returns the root of the sum of all squares, in float32."""
    squares = (jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32))) for x in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def _owners(model: Any, wrt: Any) -> dict[Any, tuple[tuple[int, ...], Any]]:
    """Returns shape and names of the axes of each variable that has names, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, wrt), is_leaf=_is_variable)
    return {path: (one.get_value().shape, names) for path, one in leaves if (names := _names(one))}


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _names(one: Any) -> Any:
    metadata = one.get_metadata()
    return next((metadata[key] for key in METADATA if metadata.get(key)), None)


def _named(state: Any, owners: dict[Any, tuple[tuple[int, ...], Any]]) -> Any:
    """Gives the variables of the state the axis names of their own shapes."""

    def of(path: Any, one: Any) -> Any:
        owner = owner_of(path, owners)
        shape = getattr(one.get_value(), "shape", None) if _is_variable(one) else None
        if owner is None or shape is None or shape == owner[0]:  # a count, or masked
            return one
        metadata = one.get_metadata()
        names = of_state(path, shape, *owner)
        own = {key: names for key in METADATA if metadata.get(key)}
        return type(one)(one.get_value(), **{**metadata, **own})

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=_is_variable)
