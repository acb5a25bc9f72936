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
from flora_jax.update.apply_gradients import apply_gradients as of_pure


def value_and_grad(
    fun: Callable[..., Any],
    projection: Projection | None,
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """Returns `nnx.value_and_grad`, with sketches in the places of the gradients that the projection compresses.

    Args:
      fun: The function `(model, *args, **kwargs) -> scalar`, or to a pair of the scalar and auxiliary data.
      projection: The `Projection` of the optimizer, or None for ordinary gradients.
      wrt: The filter of the variables that are trained, as in `nnx.Optimizer`.
      has_aux: Whether `fun` returns a pair.

    Returns:
      A function `(model, *args, cycle, **kwargs) -> (value, grads)`, or `((value, aux), grads)`. Its `cycle` is the
      optimizer (or its state, or a number). It changes the model's other state as a call of `fun` does;
      `optimizer.update(model, grads)` takes the gradients.

    Raises:
      TypeError: On a call, the first argument is no module.
    """
    if projection is not None:
        check_projection(projection)

    def of_model(model: Any, *args: Any, cycle: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        graph, params, rest = _split(model, wrt)
        run = partial(_run, fun, graph, has_aux, wrt)
        if projection is None:
            gradient = jax.value_and_grad(run, has_aux=True)
        else:
            if isinstance(cycle, nnx.Optimizer):
                cycle = cycle_of(nnx.as_pure(cycle.opt_state))
            gradient = partial(of_params(run, projection, has_aux=True), cycle=cycle)
        (value, (aux, rest)), grads = gradient(params, rest, args, kwargs)
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
        super().__init__(model, own_axis_names(tx, model, wrt), wrt=wrt, **others)
        self.tx = tx


def own_axis_names(
    tx: optax.GradientTransformation, model: Any, wrt: Any = nnx.Param, mesh: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation with an `init` that gives variables the axis names of their own shapes.

    It is for trainers that make an `nnx.Optimizer` themselves; elsewhere take `Optimizer`.

    Args:
      tx: Any optax transformation.
      model: The module.
      wrt: The filter of the variables that are trained.
      mesh: The mesh, where it is not the one in context.
    """
    tx, owners = optax.with_extra_args_support(tx), _owners(model, wrt)
    return optax.GradientTransformationExtraArgs(
        lambda params: _named(tx.init(params), owners, mesh), tx.update
    )


def apply_gradients(
    model: Any, optimizer: nnx.Optimizer, grads: Any, *, rounding: Rounding = "nearest"
) -> None:
    """Updates a module and its optimizer in place, without a tree of updates; `optimizer.update` would make one.

    Call it under `nnx.jit`, with the model and the optimizer donated.

    Args:
      model: The module.
      optimizer: Its optimizer, whose transformation is leaf-wise.
      grads: Gradients, or sketches of them, as `value_and_grad` returns them.
      rounding: How new bfloat16 params are rounded, as in `flora_jax.make_train_step`.
    """
    pure, state = of_pure(
        optimizer.tx,
        nnx.as_pure(grads),
        nnx.as_pure(optimizer.opt_state),
        nnx.as_pure(nnx.state(model, optimizer.wrt)),
        rounding=rounding,
    )
    nnx.update(model, pure)
    nnx.update(optimizer.opt_state, nnx.state(state))
    optimizer.step[...] += 1


def gradient_norm(grads: Any) -> jax.Array:
    """Returns the norm of gradients, or of their sketches: its square is then an unbiased estimate of the gradient's."""
    tree = without_cycle(nnx.as_pure(grads))
    squares = (jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32))) for x in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, jnp.float32(0)))


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
    gradient = value_and_grad(loss, projection, wrt=wrt, has_aux=has_aux)
    check(rounding)

    @partial(nnx.jit, donate_argnums=(0, 1) if donate else ())
    def step(model: Any, optimizer: Any, *batch: Any) -> tuple[jax.Array, dict[str, Any]]:
        found, grads = gradient(model, *batch, cycle=optimizer)
        value, aux = found if has_aux else (found, None)
        metrics = {"gradient_norm": gradient_norm(grads)}
        apply_gradients(model, optimizer, grads, rounding=rounding)
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


def _owners(model: Any, wrt: Any) -> dict[Any, tuple[tuple[int, ...], Any]]:
    """Returns shape and names of the axes of each variable that has names, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, wrt), is_leaf=_is_variable)
    return {path: (one.get_value().shape, names) for path, one in leaves if (names := _names(one))}


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _names(one: Any) -> Any:
    metadata = one.get_metadata()
    return next((metadata[key] for key in METADATA if metadata.get(key)), None)


def _named(state: Any, owners: dict[Any, tuple[tuple[int, ...], Any]], mesh: Any) -> Any:
    """Gives the variables of the state the axis names of their own shapes."""

    def of(path: Any, one: Any) -> Any:
        owner = owner_of(path, owners)
        if not _is_variable(one) or owner is None or one.get_value().shape == owner[0]:
            return one
        metadata = one.get_metadata()
        shape, names = owner
        names = of_state(path, one.get_value().shape, shape, names, mesh)
        own = {key: names for key in METADATA if metadata.get(key)}
        return type(one)(one.get_value(), **{**metadata, **own})

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=_is_variable)
