"""Weight: what stands for a weight inside a function whose gradients are compressed in the backward pass.

A linear layer `y = x W` is the same as `y = x W + (x Aᵀ) U` with `U = 0`, which is LoRA at its start:
`A` is its down factor, and `U` its up factor. The derivative with respect to `U` is `(x Aᵀ)ᵀ δ`, where
`δ` is the cotangent of `y`, and that is the sketch of the gradient of `W`. So each weight has an up
factor of zeros here, and is itself not differentiated. The up factor takes no part in the forward
computation: each use of a weight has a backward rule of its own that gives the cotangent of the up
factor. JAX then sums these over all uses, over the steps of a `scan`, over micro-batches and over
devices.

An adapter (`flora_jax.adapters`) is the same array with down and up factors that are parameters, in
place of a sampled `A` and zero. It takes part in the forward computation, and all its derivatives are
JAX's.

In the descriptions of shapes `B` stands for the batch axes of a weight, `P` for its projected axes, and
`r` for the rank.

Source: arXiv 2402.03293, Section 2 and Algorithm 1.
"""

import dataclasses
import math
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from flora_jax import dtypes
from flora_jax.chain import distributions, products
from flora_jax.chain.blocks import Block, over_blocks
from flora_jax.chain.sketch import Spec
from flora_jax.fused.lazy import Lazy, materialized, product
from flora_jax.sharding import explicit, manual, partition

Kind = Literal["projected", "batch", "kept"]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight, or the result of operations on one that do not mix its projected axes with others.

    Attributes:
      value: The array; for an adapter it may be `Lazy`.
      up: The up factor: of the shape of `value`, with the rank in the place of the first projected axis
        and 1 in the place of the others. It is zero, except for an adapter.
      keys: The uint32 data of the keys of `A`, of shape `(*B, words)`; for an adapter the down factor
        itself, of shape `(*B, m · r)`.
      columns: The column of `A` that each index along the projected axes belongs to, an int32 array of
        shape `(*P,)`; None where none has been moved.
      factors: The factor that each of these columns is multiplied by, a float array of shape `(*P,)`;
        None for 1.
      spec: The `Spec` of the weight.
      kinds: For each axis of `value`, whether it is a projected axis, a batch axis, or neither (`kept`).
      looked_up: Whether the array is rows of the weight, found by index, rather than (a part of) the
        weight.
      sharding: The `NamedSharding` of the cotangent of the up factor, or None where it is not known.
      adapter: Whether the factors are those of an adapter, so that the weight is `value` plus their
        product.
      order: For an adapter, the function that computes `x (W + F G)` from matrices of shapes `(t, p)`,
        `(p, q)`, `(p, r)` and `(r, q)`; static. None stands for `x W + (x F) G`.
      differentiated: Whether `value` has a gradient of its own besides that of the weight, as the sum of
        the weight and another product has.
    """

    value: Any
    up: Any
    keys: Any
    columns: Any
    factors: Any
    spec: Spec
    kinds: tuple[Kind, ...]
    looked_up: bool = False
    sharding: NamedSharding | None = None
    adapter: bool = False
    order: Callable[..., jax.Array] | None = None
    differentiated: bool = False

    def tree_flatten(self):
        children = (self.value, self.up, self.keys, self.columns, self.factors)
        static = (self.spec, self.kinds, self.looked_up, self.sharding, self.adapter, self.order)
        static += (self.differentiated,)
        return children, static

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)

    @classmethod
    def start(cls, spec: Spec, cycle: Any, value: Any, up: Any, sharding: Any = None) -> "Weight":
        """Makes a `Weight` of a parameter, or of the part of it that this device has.

        Args:
          spec: The `Spec` of the weight.
          cycle: The number of the cycle.
          value: The parameter.
          up: Zeros of shape `spec.part_data_shape`.
          sharding: The `NamedSharding` of the sketch, or None where it is not known.
        """
        if sharding is not None:
            names = list(partition.entries(sharding.spec, up.ndim))
            for axis in spec.projected[1:]:
                names.insert(axis, ())
            sharding = NamedSharding(sharding.mesh, partition.spec_of(names))
        up = jnp.expand_dims(up, spec.projected[1:])
        keys = jax.random.key_data(products.matrix_keys(spec, cycle))
        columns = spec.positions(spec.projected) if spec.summed else None
        return cls(value, up, keys, columns, None, spec, kinds_of(spec), sharding=sharding)

    @classmethod
    def adapted(cls, spec: Spec, value: Any, down: Any, up: Any) -> "Weight":
        """Makes a `Weight` that is `value` plus the product of an adapter's factors.

        Args:
          spec: The `Spec` of the weight.
          value: The frozen weight.
          down: The down factor, of shape `(*B, *P, r)`.
          up: The up factor, of shape `spec.data_shape`.
        """
        up = jnp.expand_dims(up, spec.projected[1:])
        flat = down.reshape(*down.shape[: len(spec.batch)], -1)
        return cls(value, up, flat, None, None, spec, kinds_of(spec), adapter=True)

    def axes(self, kind: Kind) -> tuple[int, ...]:
        """Returns the axes of `value` that are of this kind."""
        return tuple(axis for axis, other in enumerate(self.kinds) if other == kind)

    @property
    def slot(self) -> int:
        """The axis of the up factor that has the rank."""
        return self.kinds.index("projected")

    def indices(self) -> jax.Array:
        """Returns `columns`, or the array that None stands for."""
        if self.columns is not None:
            return self.columns
        lengths = [self.value.shape[axis] for axis in self.axes("projected")]
        return jnp.arange(math.prod(lengths), dtype=jnp.int32).reshape(lengths)

    def replace(self, **changes) -> "Weight":
        """Returns a changed copy. A new up factor has no known sharding unless one is given with it."""
        if "up" in changes:
            changes.setdefault("sharding", None)
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Joined:
    """Weights (and arrays) that are concatenated along an axis, and kept apart until they are used.

    Attributes:
      parts: The weights and arrays.
      axis: The axis that they are concatenated along.
    """

    parts: tuple[Any, ...]
    axis: int

    def tree_flatten(self):
        return self.parts, self.axis

    @classmethod
    def tree_unflatten(cls, axis, parts):
        return cls(tuple(parts), axis)


def kinds_of(spec: Spec) -> tuple[Kind, ...]:
    """Returns the kind of each axis of the weight itself."""
    kinds: list[Kind] = ["kept"] * len(spec.shape)
    for axis in spec.projected:
        kinds[axis] = "projected"
    for axis in spec.batch:
        kinds[axis] = "batch"
    return tuple(kinds)


def up_shape(shape: Sequence[int], kinds: Sequence[Kind], rank: int) -> tuple[int, ...]:
    """Returns the shape of the up factor of a weight whose axes are of these kinds."""
    slot = tuple(kinds).index("projected")
    return tuple(
        rank if axis == slot else 1 if kinds[axis] == "projected" else length
        for axis, length in enumerate(shape)
    )


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
        return _to_up(weight, sketch, contracted_labels(weight, labels, labels), labels)

    return use(weight, (), lambda value: value, lambda source: None, back)


def merged(weight: Weight) -> jax.Array:
    """Returns the weight with its adapter added. The factors' product is summed in float32 at least."""
    labels = string.ascii_lowercase[: weight.value.ndim]
    down, up = both_factors(weight)
    equation = f"{down_labels(weight, labels)},{_up_labels(weight, labels)}->{labels}"
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
            saved = saved.astype(dtypes.operands(dtype, *_dtypes(weight.factors)))
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
            narrow = dtypes.operands(delta.dtype, *_dtypes(weight.factors))
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
    pair = [(down, down_labels(weight, of_weight)), (up, _up_labels(weight, of_weight))]
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
    dtype = dtypes.operands(x.dtype, weight.value.dtype, *_dtypes(down), *_dtypes(up))

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
      bind: The computation.
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
        return bind(*inputs, value)

    def forward(inputs, value, up, source):
        del up

        def of_floats(given, own):
            given = iter(given)
            mixed = (next(given) if flag else x for x, flag in zip(inputs, floats, strict=True))
            return bind(*mixed, *own, *([] if own else [value]))

        given = tuple(x for x, flag in zip(inputs, floats, strict=True) if flag)
        own = (value,) if weight.differentiated else ()
        if given or own:
            result, pull = jax.vjp(of_floats, given, own)
        else:
            result, pull = bind(*inputs, value), None
        return result, (pull, explicit.call(save, saved_sharding, source, *inputs), source)

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


def contract(
    weight: Weight,
    source: Any,
    array: jax.Array,
    labels: str,
    of_weight: str,
    precision: Any = None,
):
    """Contracts an array with `Aᵀ` over the projected axes, in blocks of `spec.block` entries of `A`.

    Args:
      weight: The `Weight`, of which only the static parts are used.
      source: The tuple `(keys, columns, factors)`.
      array: The array, which is multiplied and summed as `flora_jax.dtypes` says.
      labels: The einsum labels of `array`.
      of_weight: The einsum labels of the weight.
      precision: As in `jax.lax.dot_general`.

    Returns:
      The result, with the labels that `contracted_labels` gives.
    """
    keys, columns, factors = source
    spec = weight.spec
    projected = "".join(of_weight[axis] for axis in weight.axes("projected"))
    batch = "".join(of_weight[axis] for axis in weight.axes("batch"))
    result = contracted_labels(weight, labels, of_weight)
    dtype = dtypes.operands(array.dtype, *_dtypes(factors))
    array = array.astype(dtype)
    sums = dtypes.sums(dtype)
    if columns is None:
        columns = weight.indices()
    scale = distributions.scale(spec.distribution, spec.rank, spec.size)
    most = max(1, spec.block // (spec.rank * math.prod(keys.shape[:-1])))
    if most >= columns.size or not distributions.is_columnwise(spec.distribution):
        sampled = _sample(spec, keys, columns, factors).astype(dtype)
        equation = f"{labels},{batch}{projected}Z->{result}"
        return dtypes.einsum(equation, array, sampled, precision) * scale
    total = columns.size
    flat = [None if x is None else x.reshape(-1) for x in (columns, factors)]
    order = "".join(label for label in labels if label not in projected)
    array = jnp.einsum(f"{labels}->{order}{projected}", array).reshape(
        *(array.shape[labels.index(label)] for label in order), total
    )
    equation = f"{order}Y,{batch}YZ->{result}"

    def add(block, sketch):
        part = [None if x is None else block.take(x, 0) for x in flat]
        slab = jnp.where(block.fresh(), block.take(array, array.ndim - 1), 0)
        sampled = _sample(spec, keys, *part).astype(dtype)
        return sketch + dtypes.einsum(equation, slab, sampled, precision)

    shape = jax.eval_shape(lambda: add(Block(total, 1, 0, total, 0), jnp.zeros([], sums))).shape
    return over_blocks(total, most, add, jnp.zeros(shape, sums)) * scale


def sample(weight: Weight, source: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Samples all of the weight's `Aᵀ`, scaled, of shape `(*B, *P, r)` and in this dtype.

    For an adapter it returns the down factor as it is. `source` is the tuple `(keys, columns, factors)`.
    """
    keys, columns, factors = source
    if weight.adapter:
        return _adapter_down(weight, keys, columns, factors)
    columns = weight.indices() if columns is None else columns
    spec = weight.spec
    scale = distributions.scale(spec.distribution, spec.rank, spec.size)
    sampled = _sample(spec, keys, columns, factors)
    return (sampled.astype(jnp.promote_types(sampled.dtype, dtype)) * scale).astype(dtype)


def _adapter_down(weight: Weight, flat, columns, factors) -> jax.Array:
    batch, rank = flat.shape[:-1], weight.spec.rank
    if columns is None:
        lengths = [weight.value.shape[axis] for axis in weight.axes("projected")]
        down = flat.reshape(*batch, *lengths, rank)
    else:
        down = jnp.take(flat.reshape(*batch, -1, rank), columns, axis=len(batch))
    if factors is None:
        return down
    return down * factors[..., None].astype(dtypes.operands(down.dtype, *_dtypes(factors)))


def _sample(spec: Spec, keys, columns, factors) -> jax.Array:
    def one(words):
        key = jax.random.wrap_key_data(words, impl=spec.impl)
        return distributions.columns(spec.distribution, key, spec.rank, spec.size, columns)

    for _ in keys.shape[:-1]:
        one = jax.vmap(one)
    sampled = one(keys)
    return sampled if factors is None else sampled * factors[..., None]


def down_labels(weight: Weight, of_weight: str) -> str:
    """Returns the labels of the down factor: the batch axes, the projected axes, and `Z` for the rank."""
    axes = (*weight.axes("batch"), *weight.axes("projected"))
    return "".join(of_weight[axis] for axis in axes) + "Z"


def contracted_labels(weight: Weight, labels: str, of_weight: str) -> str:
    """Returns the labels of the result of `contract`.

    They are those of `labels` that are not projected, those of batch axes that it lacks, and `Z`, the rank.
    """
    projected = {of_weight[axis] for axis in weight.axes("projected")}
    left = "".join(label for label in labels if label not in projected)
    batch = (of_weight[axis] for axis in weight.axes("batch"))
    return left + "".join(label for label in batch if label not in left) + "Z"


def _dtypes(factors: Any) -> list[Any]:
    """The dtype of complex factors, which no product may lose; real ones are cast."""
    if factors is None or not jnp.issubdtype(factors.dtype, jnp.complexfloating):
        return []
    return [factors.dtype]


def _relabelled(array: jax.Array, labels: str, result: str) -> NamedSharding | None:
    """Returns the sharding of an array after a contraction, on a mesh with explicit axes."""
    found = explicit.sharding_of(array)
    if found is None:
        return None
    names = dict(zip(labels, partition.entries(found.spec, len(labels)), strict=True))
    return NamedSharding(found.mesh, partition.spec_of([names.get(label, ()) for label in result]))


def outer(
    weight: Weight,
    left: jax.Array,
    of_left: str,
    right: jax.Array,
    of_right: str,
    of_weight: str,
    precision: Any = None,
) -> jax.Array:
    """Multiplies two arrays, one of which has the rank, to a cotangent of the up factor."""
    goal = _up_labels(weight, of_weight)
    result = dtypes.einsum(f"{of_left},{of_right}->{goal}", left, right, precision)
    return _to_up(weight, result, goal, of_weight)


def _to_up(weight: Weight, array: jax.Array, labels: str, of_weight: str) -> jax.Array:
    array = jnp.einsum(f"{labels}->{_up_labels(weight, of_weight)}", array)
    return jnp.expand_dims(array, weight.axes("projected")[1:])


def _up_labels(weight: Weight, of_weight: str) -> str:
    return "".join(
        "Z" if axis == weight.slot else label
        for axis, label in enumerate(of_weight)
        if axis == weight.slot or weight.kinds[axis] != "projected"
    )
