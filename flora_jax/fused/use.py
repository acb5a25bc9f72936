"""Use: what a weight does where it is used, with a backward rule whose result is the sketch."""

import math
import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from flora_jax import dtypes
from flora_jax.fused.contraction import (
    complex_dtypes,
    contract,
    contracted_labels,
    down_labels,
    outer,
    sample,
    to_up,
    up_labels,
)
from flora_jax.fused.lazy import Lazy, materialized, product
from flora_jax.fused.weight import Weight
from flora_jax.sharding import explicit, manual, partition


def expose(weight: Weight) -> jax.Array:
    """Returns the value as a plain array, which can be used in any way.

    Its full gradient is materialized, and projected at once.
    """
    if weight.adapter:
        return merged(weight)
    labels = string.ascii_lowercase[: weight.value.ndim]

    def back(saved, source, delta):
        del saved
        sketch = contract(weight, source, delta, labels, labels)
        return to_up(weight, sketch, contracted_labels(weight, labels, labels), labels)

    return use(weight, (), lambda value: value, lambda source: None, back)


def merged(weight: Weight) -> jax.Array:
    """Returns the weight with its adapter added. The factors' product is summed in float32 at least."""
    labels = string.ascii_lowercase[: weight.value.ndim]
    down, up = both_factors(weight)
    equation = f"{down_labels(weight, labels)},{up_labels(weight, labels)}->{labels}"
    change = dtypes.einsum(equation, down, up)
    value = materialized(weight.value)
    total = dtypes.sums(value.dtype, change.dtype)
    return (value.astype(total) + change.astype(total)).astype(value.dtype)


def both_factors(weight: Weight) -> tuple[jax.Array, jax.Array]:
    """Returns the down factor, of shape `(*B, *P, r)`, and the up factor without axes of length 1."""
    down = sample(weight, (weight.keys, weight.columns, weight.factors))
    return down, jnp.squeeze(weight.up, weight.axes("projected")[1:])


def multiply(
    weight: Weight,
    x: jax.Array,
    bind: Callable,
    labels: tuple[str, str, str],
    precision: Any = None,
):
    """Contracts `x` with a weight, summing over all projected axes or over none of them.

    Where the projected axes are summed over, `x Aᵀ` is saved for the backward pass, and not `x`.

    Args:
      weight: The `Weight`.
      x: The other factor.
      bind: The contraction itself, a function `(x, value) -> y` that is linear in each.
      labels: The einsum labels of `x`, of the weight and of `y`.
      precision: As in `jax.lax.dot_general`, for the products of the sketch.

    Returns:
      The result `y`, or None where some of the projected axes are summed over and others are not.
    """
    of_x, of_weight, of_y = labels
    projected = {of_weight[axis] for axis in weight.axes("projected")}
    if weight.adapter:
        return _multiply_adapted(weight, x, bind, labels, precision)
    dtype = dtypes.operands(x.dtype, weight.value.dtype)
    if projected <= set(of_x) - set(of_y):
        of_saved = contracted_labels(weight, of_x, of_weight)

        def save(source, x):
            x = x.astype(dtype)
            saved = contract(weight, source, x, of_x, of_weight, precision)
            saved = saved.astype(dtypes.operands(dtype, *complex_dtypes(weight.factors)))
            return partition.constrain(
                saved, partition.last_axis_replicated(weight.sharding, saved.ndim)
            )

        def back(saved, source, delta):
            del source
            return outer(weight, saved, of_saved, delta, of_y, of_weight, precision)

        def saved_sharding(source, x):
            del source
            return _relabelled(x, of_x, of_saved)

        return use(weight, (x,), bind, save, back, saved_sharding)
    if projected <= set(of_y) - set(of_x):
        of_delta = contracted_labels(weight, of_y, of_weight)

        def back_output(saved, source, delta):
            delta = delta.astype(dtypes.operands(delta.dtype, dtype))
            narrow = dtypes.operands(delta.dtype, *complex_dtypes(weight.factors))
            delta = contract(weight, source, delta, of_y, of_weight, precision).astype(narrow)
            return outer(weight, saved, of_x, delta, of_delta, of_weight, precision)

        return use(
            weight,
            (x,),
            bind,
            lambda source, x: x,
            back_output,
            lambda _, x: explicit.sharding_of(x),
        )
    return None


def _multiply_adapted(
    weight: Weight,
    x: jax.Array,
    bind: Callable,
    labels: tuple[str, str, str],
    precision: Any,
):
    """Computes `x W + (x F) G` with an adapter's factors, without forming `W + F G`."""
    of_x, of_weight, of_y = labels
    projected = {of_weight[axis] for axis in weight.axes("projected")}
    down, up = both_factors(weight)
    pair = [(down, down_labels(weight, of_weight)), (up, up_labels(weight, of_weight))]
    if projected <= set(of_x) - set(of_y):
        of_middle = contracted_labels(weight, of_x, of_weight)
    elif projected <= set(of_y) - set(of_x):
        of_middle = contracted_labels(weight, of_y, of_weight)
        pair.reverse()
    else:
        return None
    if weight.order is not None and not weight.axes("batch") and not isinstance(weight.value, Lazy):
        return _multiply_matrices(weight, x, bind, labels, pair)
    if isinstance(weight.value, Lazy):
        y = product(weight.value, x, bind, labels)
    else:
        y = bind(x, weight.value)
    (first, of_first), (second, of_second) = pair
    dtype = dtypes.operands(x.dtype, weight.value.dtype, *complex_dtypes(down), *complex_dtypes(up))

    def low_rank(x, first, second):
        x, first, second = (array.astype(dtype) for array in (x, first, second))
        middle = dtypes.einsum(f"{of_x},{of_first}->{of_middle}", x, first, precision)
        return dtypes.einsum(
            f"{of_middle},{of_second}->{of_y}", middle.astype(dtype), second, precision
        )

    change = explicit.call(low_rank, explicit.sharding_of(y), x, first, second)
    total = dtypes.sums(y.dtype, change.dtype)
    return (y.astype(total) + change.astype(total)).astype(y.dtype)


def _multiply_matrices(weight: Weight, x: jax.Array, bind: Callable, labels, pair) -> jax.Array:
    """Computes the product by `weight.order`; the first factor of `pair` shares axes with `x`."""
    assert weight.order is not None
    of_x, of_weight, of_y = labels
    (first, of_first), (second, of_second) = pair
    summed = "".join(label for label in of_x if label not in of_y)
    free = "".join(label for label in of_x if label in of_y)
    results = "".join(label for label in of_y if label not in free)
    outcome = jax.eval_shape(bind, x, weight.value)

    def matrix(array, of_array, rows, columns):
        array = jnp.einsum(f"{of_array}->{rows}{columns}", array)
        return array.reshape(math.prod(array.shape[: len(rows)]), -1)

    dtype = dtypes.operands(x.dtype, weight.value.dtype)
    y = weight.order(
        matrix(x, of_x, free, summed).astype(dtype),
        matrix(weight.value, of_weight, summed, results).astype(dtype),
        matrix(first, of_first, summed, "Z").astype(dtype),
        matrix(second, of_second, "Z", results).astype(dtype),
    )
    lengths = [outcome.shape[of_y.index(label)] for label in free + results]
    y = jnp.einsum(f"{free}{results}->{of_y}", y.reshape(lengths))
    return y.astype(outcome.dtype)


def use(
    weight: Weight,
    inputs: tuple[Any, ...],
    bind: Callable,
    save: Callable,
    back: Callable,
    saved_sharding: Callable | None = None,
):
    """Computes `bind(*inputs, value)`, with its own backward rule for the up factor.

    Args:
      weight: The `Weight`.
      inputs: Arrays, of which those of a floating type are differentiated in the ordinary way.
      bind: The computation; linear in its only input, if it has one, where the value is `Lazy`.
      save: A function `(source, *inputs) -> saved` that returns what the backward rule needs besides the
        cotangent, where `source` is `(keys, columns, factors)`.
      back: The backward rule, a function `(saved, source, cotangent) -> cotangent of the up factor`.
      saved_sharding: A function `(source, *inputs) -> NamedSharding` that returns the sharding of what
        is saved, for meshes with explicit axes.
    """
    source = (weight.keys, weight.columns, weight.factors)
    up_dtype = weight.up.dtype
    floats = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in inputs]

    @jax.custom_vjp
    def run(inputs, value, up, source):
        del up, source
        return bind(*inputs, materialized(value))

    def forward(inputs, value, up, source):
        del up

        def of_floats(given, own):
            given = iter(given)
            mixed = (next(given) if flag else x for x, flag in zip(inputs, floats, strict=True))
            return bind(*mixed, *own, *([] if own else [value]))

        given = tuple(x for x, flag in zip(inputs, floats, strict=True) if flag)
        own = (value,) if weight.differentiated else ()
        if isinstance(value, Lazy):
            result = bind(*inputs, value.materialize())
            pull = jax.tree_util.Partial(pull_lazy, value) if given else None
        elif given or own:
            result, pull = jax.vjp(of_floats, given, own)
        else:
            result, pull = bind(*inputs, value), None
        return result, (pull, explicit.call(save, saved_sharding, source, *inputs), source)

    def pull_lazy(value, delta):
        # computed again, and not before the backward pass is here
        value, delta = jax.lax.optimization_barrier((value, delta))
        array = value.materialize()
        return jax.linear_transpose(lambda *given: bind(*given, array), *inputs)(delta), ()

    def backward(residuals, delta):
        pull, saved, source = residuals

        def cotangent(saved, source, delta):
            return partition.constrain(back(saved, source, delta).astype(up_dtype), weight.sharding)

        of_up = explicit.call(cotangent, explicit.sharding_of(weight.up), saved, source, delta)
        of_given, of_own = pull(delta) if pull else ((), ())
        of_given = iter(of_given)
        of_inputs = tuple(next(of_given) if flag else None for flag in floats)
        return of_inputs, (of_own[0] if of_own else None), of_up, None

    run.defvjp(forward, backward)
    return run(*manual.alike((inputs, weight.value, weight.up, source)))


def _relabelled(array: jax.Array, labels: str, result: str) -> NamedSharding | None:
    """Returns the sharding of an array after a contraction, on a mesh with explicit axes."""
    found = explicit.sharding_of(array)
    if found is None:
        return None
    names = dict(zip(labels, partition.entries(found.spec, len(labels)), strict=True))
    return NamedSharding(found.mesh, partition.spec_of([names.get(label, ()) for label in result]))
