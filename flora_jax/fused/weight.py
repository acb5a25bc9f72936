"""Weight: what stands for a weight inside a function whose gradients are born compressed.

A linear layer `y = x W` may be written `y = x W + (x Aᵀ) B` with `B = 0`, LoRA at its start; the
derivative by `B` is `(x Aᵀ)ᵀ δ`, the sketch of the gradient of `W`. `B` is the weight's *tap* here.
It has no part in the forward computation: what uses a weight says in its own backward rule what
its cotangent at the tap is. JAX's differentiation then sums the taps of all uses, over the steps
of a `scan`, over micro-batches and over devices, and never sees the weight itself.

The same array with an `A` and a `B` that are *kept*, in place of a drawn one and zero, is an adapter
(`flora_jax.adapters`). It takes part in the forward computation, and all its derivatives are JAX's.

In the shape descriptions `B` are the batch axes of a weight, `P` its projected ones.

Source: arXiv 2402.03293, Section 2 and Algorithm 1.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from flora_jax.chain import distributions, products
from flora_jax.chain.blocks import Block, over_blocks
from flora_jax.chain.sketch import Spec
from flora_jax.fused.made import Made, product, value_of
from flora_jax.sharding import explicit, manual, partition

Kind = Literal["projected", "batch", "kept"]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight, or what came of it by operations that keep its projected axes to themselves.

    Attributes:
      value: the array; where the factors are kept also a `Made` one.
      tap: zeros, of the shape of `value` with the rank in place of the first projected axis and 1 in
        place of the others.
      keys: uint32 key data `(*B, words)`; where the factors are kept, `A` itself, `(*B, m · r)`.
      columns: int32 `(*P,)`, which column of `A` each index is; None where none was moved.
      factors: float `(*P,)`, by what each column is multiplied; None for 1.
      spec: of the weight.
      kinds: what each axis of `value` is.
      looked_up: whether it is rows of the weight, found by index, rather than (a part of) the weight.
      place: the `NamedSharding` of the tap's cotangent; None where it is not known.
      kept: whether `A` and the tap are an adapter's, and the weight is `value + A tap`.
      order: where the factors are kept, what computes `x (W + F G)` of matrices `(t, p)`, `(p, q)`,
        `(p, r)` and `(r, q)`; static. None for `x W + (x F) G`.
    """

    value: Any
    tap: Any
    keys: Any
    columns: Any
    factors: Any
    spec: Spec
    kinds: tuple[Kind, ...]
    looked_up: bool = False
    place: NamedSharding | None = None
    kept: bool = False
    order: Callable[..., jax.Array] | None = None

    def tree_flatten(self):
        children = (self.value, self.tap, self.keys, self.columns, self.factors)
        static = (self.spec, self.kinds, self.looked_up, self.place, self.kept, self.order)
        return children, static

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)

    @classmethod
    def start(cls, spec: Spec, cycle: Any, value: Any, tap: Any, place: Any = None) -> "Weight":
        """The weight itself, or the part that is here; `place` is of the tap's shape."""
        if place is not None:
            cut = list(partition.entries(place.spec, tap.ndim))
            for axis in spec.projected[1:]:
                cut.insert(axis, ())
            place = NamedSharding(place.mesh, partition.spec_of(cut))
        tap = jnp.expand_dims(tap, spec.projected[1:])
        keys = jax.random.key_data(products.matrix_keys(spec, cycle))
        columns = spec.positions(spec.projected) if spec.summed else None
        return cls(value, tap, keys, columns, None, spec, kinds_of(spec), place=place)

    @classmethod
    def adapted(cls, spec: Spec, value: Any, down: Any, up: Any) -> "Weight":
        """`value` plus the product of `down`, `(*B, *P, r)`, and `up`, of shape `spec.data_shape`."""
        tap = jnp.expand_dims(up, spec.projected[1:])
        flat = down.reshape(*down.shape[: len(spec.batch)], -1)
        return cls(value, tap, flat, None, None, spec, kinds_of(spec), kept=True)

    def axes(self, kind: Kind) -> tuple[int, ...]:
        return tuple(axis for axis, other in enumerate(self.kinds) if other == kind)

    @property
    def slot(self) -> int:
        """The axis of the tap that has the rank."""
        return self.kinds.index("projected")

    def indices(self) -> jax.Array:
        """`columns`, or what None stands for."""
        if self.columns is not None:
            return self.columns
        lengths = [self.value.shape[axis] for axis in self.axes("projected")]
        return jnp.arange(math.prod(lengths), dtype=jnp.int32).reshape(lengths)

    def replace(self, **changes) -> "Weight":
        """The same with changes; a new tap has no known place unless one comes with it."""
        if "tap" in changes:
            changes.setdefault("place", None)
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Weights (and arrays) laid one after another along an axis."""

    parts: tuple[Any, ...]
    axis: int


def kinds_of(spec: Spec) -> tuple[Kind, ...]:
    """What each axis of the weight itself is."""
    kinds: list[Kind] = ["kept"] * len(spec.shape)
    for axis in spec.projected:
        kinds[axis] = "projected"
    for axis in spec.batch:
        kinds[axis] = "batch"
    return tuple(kinds)


def tap_shape(shape: Sequence[int], kinds: Sequence[Kind], rank: int) -> tuple[int, ...]:
    """The shape of the tap of a weight of these kinds."""
    slot = tuple(kinds).index("projected")
    return tuple(
        rank if axis == slot else 1 if kinds[axis] == "projected" else length
        for axis, length in enumerate(shape)
    )


def expose(weight: Weight) -> jax.Array:
    """The value, for a use of any kind; its whole cotangent is projected as soon as it is there."""
    if weight.kept:
        return merged(weight)
    labels = string.ascii_lowercase[: weight.value.ndim]

    def back(kept, source, delta):
        del kept
        sketch = contract(weight, source, delta, labels, labels)
        return _to_tap(weight, sketch, contracted_labels(weight, labels, labels), labels)

    return use(weight, (), lambda value: value, lambda source: None, back)


def merged(weight: Weight) -> jax.Array:
    """The value with its adapter in it; the product is summed in float32 at least."""
    labels = string.ascii_lowercase[: weight.value.ndim]
    down, tap = both_factors(weight)
    sums = jnp.promote_types(jnp.promote_types(down.dtype, tap.dtype), jnp.float32)
    equation = f"{down_labels(weight, labels)},{_tap_labels(weight, labels)}->{labels}"
    change = jnp.einsum(equation, down, tap, preferred_element_type=sums)
    value = value_of(weight.value)
    return (value + change).astype(value.dtype)


def both_factors(weight: Weight) -> tuple[jax.Array, jax.Array]:
    """`A`, `(*B, *P, r)`, and the tap without its axes of length 1 for projected ones."""
    down = draw(weight, (weight.keys, weight.columns, weight.factors))
    return down, jnp.squeeze(weight.tap, weight.axes("projected")[1:])


def multiply(weight: Weight, x: jax.Array, bind: Callable, labels: tuple[str, str, str]):
    """A contraction of `x` with a weight that sums over all projected axes or over none.

    Where it sums over them the input is projected: `x Aᵀ` is kept for the backward pass, not `x`.

    Args:
      weight: the weight.
      x: the other factor.
      bind: the contraction itself, `(x, value) -> y`, linear in each.
      labels: einsum's, of `x`, of the weight and of `y`.

    Returns:
      `y`; None where some of the projected axes are summed over and others are not.
    """
    of_x, of_weight, of_y = labels
    projected = {of_weight[axis] for axis in weight.axes("projected")}
    if weight.kept:
        return _multiply_adapted(weight, x, bind, labels)
    if projected <= set(of_x) - set(of_y):
        of_kept = contracted_labels(weight, of_x, of_weight)

        def save(source, x):
            kept = contract(weight, source, x, of_x, of_weight).astype(x.dtype)
            return partition.constrain(kept, partition.last_axis_whole(weight.place, kept.ndim))

        def back(kept, source, delta):
            del source
            return outer(weight, kept, of_kept, delta, of_y, of_weight)

        def kept_at(source, x):
            del source
            return _relabelled(x, of_x, of_kept)

        return use(weight, (x,), bind, save, back, kept_at)
    if projected <= set(of_y) - set(of_x):
        of_delta = contracted_labels(weight, of_y, of_weight)

        def back_output(kept, source, delta):
            delta = contract(weight, source, delta, of_y, of_weight).astype(delta.dtype)
            return outer(weight, kept, of_x, delta, of_delta, of_weight)

        return use(
            weight, (x,), bind, lambda source, x: x, back_output, lambda _, x: explicit.place(x)
        )
    return None


def _multiply_adapted(weight: Weight, x: jax.Array, bind: Callable, labels: tuple[str, str, str]):
    """`x W + (x A) B`, or with the factors' roles changed; `W + A B` is not made."""
    of_x, of_weight, of_y = labels
    projected = {of_weight[axis] for axis in weight.axes("projected")}
    down, tap = both_factors(weight)
    pair = [(down, down_labels(weight, of_weight)), (tap, _tap_labels(weight, of_weight))]
    if projected <= set(of_x) - set(of_y):
        of_middle = contracted_labels(weight, of_x, of_weight)
    elif projected <= set(of_y) - set(of_x):
        of_middle = contracted_labels(weight, of_y, of_weight)
        pair.reverse()
    else:
        return None
    if weight.order is not None and not weight.axes("batch") and not isinstance(weight.value, Made):
        return _multiply_matrices(weight, x, bind, labels, pair)
    if isinstance(weight.value, Made):
        y = product(weight.value, x, bind, labels)
    else:
        y = bind(x, weight.value)
    (first, of_first), (second, of_second) = pair
    sums = jnp.promote_types(x.dtype, jnp.float32)

    def low_rank(x, first, second):
        first, second = first.astype(x.dtype), second.astype(x.dtype)
        einsum = functools.partial(jnp.einsum, preferred_element_type=sums)
        middle = einsum(f"{of_x},{of_first}->{of_middle}", x, first).astype(x.dtype)
        return einsum(f"{of_middle},{of_second}->{of_y}", middle, second)

    change = explicit.call(low_rank, explicit.place(y), x, first, second)
    return y + change.astype(y.dtype)


def _multiply_matrices(weight: Weight, x: jax.Array, bind: Callable, labels, pair) -> jax.Array:
    """The product by `weight.order`; `pair` has the factor first that shares axes with `x`."""
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

    y = weight.order(
        matrix(x, of_x, free, summed),
        matrix(weight.value, of_weight, summed, results),
        matrix(first, of_first, summed, "Z").astype(x.dtype),
        matrix(second, of_second, "Z", results).astype(x.dtype),
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
    kept_at: Callable | None = None,
):
    """Computes `bind(*inputs, value)`, with a backward rule of its own for the tap.

    Args:
      weight: the weight.
      inputs: at most one array, differentiated in the ordinary way.
      bind: the computation.
      save: `(source, *inputs) -> kept`, what the rule needs beside the cotangent; `source` is
        `(keys, columns, factors)`.
      back: `(kept, source, cotangent) -> cotangent of the tap`.
      kept_at: `(source, *inputs) -> NamedSharding` of what is kept, on a mesh of explicit axes.
    """
    source = (weight.keys, weight.columns, weight.factors)
    tap_type = weight.tap.dtype

    @jax.custom_vjp
    def run(inputs, value, tap, source):
        del tap, source
        return bind(*inputs, value)

    def forward(inputs, value, tap, source):
        del tap
        pull = None
        if inputs:
            result, pull = jax.vjp(lambda *inputs: bind(*inputs, value), *inputs)
        else:
            result = bind(value)
        return result, (pull, explicit.call(save, kept_at, source, *inputs), source)

    def backward(residuals, delta):
        pull, kept, source = residuals

        def tap(kept, source, delta):
            return partition.constrain(back(kept, source, delta).astype(tap_type), weight.place)

        of_tap = explicit.call(tap, explicit.place(weight.tap), kept, source, delta)
        return (pull(delta) if pull else ()), None, of_tap, None

    run.defvjp(forward, backward)
    return run(*manual.alike((inputs, weight.value, weight.tap, source)))


def contract(weight: Weight, source: Any, array: jax.Array, labels: str, of_weight: str):
    """Sums an array with `Aᵀ` over the projected axes, no more than `spec.block` of `A` at a time.

    Args:
      weight: for its static parts.
      source: `(keys, columns, factors)`.
      array: to be contracted; its dtype is that of the products, sums are in float32 at least.
      labels: einsum's, of `array`.
      of_weight: einsum's, of the weight.

    Returns:
      The array, with the labels that `contracted_labels` gives.
    """
    keys, columns, factors = source
    spec = weight.spec
    projected = "".join(of_weight[axis] for axis in weight.axes("projected"))
    batch = "".join(of_weight[axis] for axis in weight.axes("batch"))
    result = contracted_labels(weight, labels, of_weight)
    sums = jnp.promote_types(array.dtype, jnp.float32)
    if columns is None:
        columns = weight.indices()
    scale = distributions.scale(spec.distribution, spec.rank, spec.size)
    most = max(1, spec.block // (spec.rank * math.prod(keys.shape[:-1])))
    if most >= columns.size or not distributions.is_columnwise(spec.distribution):
        drawn = _draw(spec, keys, columns, factors).astype(array.dtype)
        equation = f"{labels},{batch}{projected}Z->{result}"
        return jnp.einsum(equation, array, drawn, preferred_element_type=sums) * scale
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
        drawn = _draw(spec, keys, *part).astype(array.dtype)
        return sketch + jnp.einsum(equation, slab, drawn, preferred_element_type=sums)

    shape = jax.eval_shape(lambda: add(Block(total, 1, 0, total, 0), jnp.zeros([], sums))).shape
    return over_blocks(total, most, add, jnp.zeros(shape, sums)) * scale


def draw(weight: Weight, source: Any) -> jax.Array:
    """`A` of the weight, `(*B, *P, r)`, scaled; whole. `source` is `(keys, columns, factors)`."""
    keys, columns, factors = source
    if weight.kept:
        return _kept(weight, keys, columns, factors)
    columns = weight.indices() if columns is None else columns
    spec = weight.spec
    scale = distributions.scale(spec.distribution, spec.rank, spec.size)
    return _draw(spec, keys, columns, factors) * scale


def _kept(weight: Weight, flat, columns, factors) -> jax.Array:
    batch, rank = flat.shape[:-1], weight.spec.rank
    if columns is None:
        lengths = [weight.value.shape[axis] for axis in weight.axes("projected")]
        down = flat.reshape(*batch, *lengths, rank)
    else:
        down = jnp.take(flat.reshape(*batch, -1, rank), columns, axis=len(batch))
    return down if factors is None else down * factors[..., None].astype(down.dtype)


def _draw(spec: Spec, keys, columns, factors) -> jax.Array:
    def one(words):
        key = jax.random.wrap_key_data(words, impl=spec.impl)
        return distributions.columns(spec.distribution, key, spec.rank, spec.size, columns)

    for _ in keys.shape[:-1]:
        one = jax.vmap(one)
    drawn = one(keys)
    return drawn if factors is None else drawn * factors[..., None]


def down_labels(weight: Weight, of_weight: str) -> str:
    """Those of `A`: of the batch axes, of the projected ones, and `Z`, the rank."""
    axes = (*weight.axes("batch"), *weight.axes("projected"))
    return "".join(of_weight[axis] for axis in axes) + "Z"


def contracted_labels(weight: Weight, labels: str, of_weight: str) -> str:
    """`labels` less the projected ones, then those of batch axes that it lacked, then `Z`, the rank."""
    projected = {of_weight[axis] for axis in weight.axes("projected")}
    left = "".join(label for label in labels if label not in projected)
    batch = (of_weight[axis] for axis in weight.axes("batch"))
    return left + "".join(label for label in batch if label not in left) + "Z"


def _relabelled(array: jax.Array, labels: str, result: str) -> NamedSharding | None:
    """Where an array lies after a contraction, on a mesh of explicit axes: its own labels stay."""
    found = explicit.place(array)
    if found is None:
        return None
    cut = dict(zip(labels, partition.entries(found.spec, len(labels)), strict=True))
    return NamedSharding(found.mesh, partition.spec_of([cut.get(label, ()) for label in result]))


def outer(weight: Weight, left, of_left: str, right, of_right: str, of_weight: str) -> jax.Array:
    """The product of two factors of which one has the rank, as a tap."""
    goal = _tap_labels(weight, of_weight)
    sums = jnp.promote_types(jnp.promote_types(left.dtype, right.dtype), jnp.float32)
    result = jnp.einsum(f"{of_left},{of_right}->{goal}", left, right, preferred_element_type=sums)
    return _to_tap(weight, result, goal, of_weight)


def _to_tap(weight: Weight, array: jax.Array, labels: str, of_weight: str) -> jax.Array:
    array = jnp.einsum(f"{labels}->{_tap_labels(weight, of_weight)}", array)
    return jnp.expand_dims(array, weight.axes("projected")[1:])


def _tap_labels(weight: Weight, of_weight: str) -> str:
    return "".join(
        "Z" if axis == weight.slot else label
        for axis, label in enumerate(of_weight)
        if axis == weight.slot or weight.kinds[axis] != "projected"
    )
