"""make_train_step: gradients and the update leaf by leaf, put together in a compiled training step."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import optax

from flora_jax import bits
from flora_jax.chain import project, recorder
from flora_jax.chain.projection import Projection, check_projection
from flora_jax.chain.sketch import without_cycle
from flora_jax.fused.int8 import from_int8
from flora_jax.fused.leaves import combine, partition, refuse_changing_modules, trained, without
from flora_jax.fused.value_and_grad import value_and_grad
from flora_jax.qarray import first_of_each, has_int8, outlines
from flora_jax.rounding import Rounding, check, key_of, of_leaf
from flora_jax.sharding.partition import constrain, known
from flora_jax.update.apply_gradients import apply_gradients
from flora_jax.update.backward import Program, value_and_update
from flora_jax.update.parameters import Parameters
from flora_jax.update.parameters import init as make_state
from flora_jax.update.rounded import added


def make_train_step(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    projection: Projection | None = None,
    *,
    update: Literal["after", "backward"] = "after",
    rounding: Rounding = "nearest",
    has_aux: bool = False,
    micro_batches: int | None = None,
    donate: bool = True,
) -> "TrainStep":
    """Returns a compiled training step in which neither full gradients nor a tree of updates exist.

    With `update="after"` and a projection it is `flora_jax.value_and_grad` and `flora_jax.apply_gradients`
    together: gradients are compressed inside the backward pass. Without a projection it is `jax.value_and_grad` and
    `flora_jax.apply_gradients`: gradients exist, and updates do not.

    With `update="backward"` gradients are exact, every call is one `tx.update`, and each parameter is updated
    inside the backward pass, as soon as all of its uses are behind; then its gradient is gone. A `scan` over layers is
    walked through from the last layer to the first, and the weights and the state of one layer after the other are
    replaced in place. Each layer of such a stack is a parameter of its own: norms, root mean squares, factored
    moments and masks by shape are those of a layer, where optax has those of the stack. A scan is one of layers if
    it takes at least one matrix for each step.

    The new params and the new state have the shardings of the ones that the step is given (see `state_shardings`).

    Args:
      loss: The loss function `(params, *batch) -> scalar`, or to a pair of the scalar and auxiliary
        data. `params` may be any pytree: a dict, Linen's params, an NNX state (to be merged inside the
        function), or an Equinox module.
      tx: The transformation: `flora_jax.flora`, or another chain with `flora_jax.project(projection)`; without a projection
        any optimizer. Leaves that `project` is not given, as `optax.multi_transform` or `optax.masked` say, have
        ordinary gradients. The update of each leaf must depend on no full gradient but its own, and with
        `update="backward"` on no other gradient at all.
      projection: The `Projection` of `tx`, or None for gradients that are not compressed.
      update: When parameters are updated: after the backward pass, or in it.
      rounding: How new bfloat16 params (and those in int8, see `flora_jax.to_int8`) are rounded: to nearest, or
        `stochastic`, by which updates much smaller than a param still arrive in the mean. The random numbers
        come from the counts in the state, so that they are the same on every layout of devices and after a restart.
      has_aux: Whether `loss` returns a pair.
      micro_batches: The number of micro-batches that every array of `batch` has along its first axis.
        Their gradients, or sketches, are averaged inside the step, by `jax.lax.scan`. None if there is no such axis.
      donate: Whether the step may overwrite the params and the state that it is given.

    Returns:
      A function `step(params, opt_state, *batch)` that returns `(params, opt_state, loss)`, followed by
      the auxiliary data with `has_aux` (stacked if there are micro-batches). Its `step.lower` is that of
      the compiled function, and `step.init(params, *batch)` makes the state: `tx.init(params)`, but with
      `update="backward"` that of each layer, and for params in int8 that of what they stand for.

    Raises:
      ValueError: `micro_batches` is below 1, or given with `update="backward"`, as is `projection`. On the first call:
        the update of a leaf needs the gradient of another, the state is not that of `step.init`, there
        is no count in it for `rounding="stochastic"`, or the first axis of an array of `batch` has another length.

    Examples:
      >>> import flora_jax, jax.numpy as jnp, optax
      >>> projection = flora_jax.Projection(4, side="input", min_dim=8, resample_every=2)
      >>> tx = flora_jax.flora(1e-2, projection=projection, accumulation_steps=2)
      >>> loss = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> step = flora_jax.make_train_step(loss, tx, projection)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> opt_state = tx.init(params)
      >>> params, opt_state, value = step(params, opt_state, jnp.ones((2, 16)))

      Exact gradients, each of which updates its parameter in the backward pass:

      >>> step = flora_jax.make_train_step(loss, optax.adafactor(1e-2), update="backward")
      >>> opt_state = step.init(params, jnp.ones((2, 16)))
      >>> params, opt_state, value = step(params, opt_state, jnp.ones((2, 16)))
    """
    if projection is not None:
        check_projection(projection)
    if micro_batches is not None and micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1, found {micro_batches}")
    if update not in ("after", "backward"):
        raise ValueError(f"update must be 'after' or 'backward', found {update!r}")
    check(rounding)
    if update == "backward" and projection is not None:
        raise ValueError(
            "projection must be None with update='backward', in which gradients are exact; tx alone says what is "
            "kept as sketches"
        )
    if update == "backward" and micro_batches is not None:
        raise ValueError(
            "micro_batches must be None with update='backward', in which each micro-batch is an optimizer step, "
            f"found {micro_batches}"
        )

    @partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 4) if donate else ())
    def compiled(rest, shardings, params, held, opt_state, *batch):
        of = _of_trained(loss, held, rest)
        of_params, of_state = shardings
        if update == "backward":
            params, opt_state, value = _backward(
                of, tx, params, opt_state, batch, shardings, rounding
            )
            return _put(params, of_params), _put(opt_state, of_state), value
        _check_state(tx, params, opt_state)
        if projection is None:
            grad_fn = partial(_gradient, of, has_aux, of_params)
        else:
            taken = recorder.restricted(projection, tx, opt_state, outlines(params))
            grad_fn = partial(
                value_and_grad(of, taken, has_aux=has_aux, shardings=of_params),
                cycle=project.cycle(opt_state),
            )
        if micro_batches is None:
            value, grads = grad_fn(params, *batch)
        else:
            value, grads = _mean(grad_fn, params, batch, micro_batches, has_aux)
        grads = without_cycle(grads)  # which is the state's own
        params, opt_state = apply_gradients(
            tx, grads, opt_state, params, shardings=of_params, rounding=rounding
        )
        return _put(params, of_params), _put(opt_state, of_state), value

    def prepared(params, opt_state, *batch):
        refuse_changing_modules(params)
        if micro_batches is not None:
            _check_batch(batch, micro_batches)
        own, held, rest = _parts(params)
        shardings = tuple(tuple(map(known, jax.tree.leaves(tree))) for tree in (own, opt_state))
        return (rest, shardings, own, held, opt_state, *batch)

    def step(params, opt_state, *batch):
        args = prepared(params, opt_state, *batch)
        own, opt_state, value = compiled(*(_apart(args) if donate else args))
        params = combine(own, combine(args[3], args[0].tree()))
        return (params, opt_state, *value) if has_aux else (params, opt_state, value)

    def init(params, *batch):
        own, held, rest = _parts(params)
        if update == "after":
            return _init(tx, own)
        return make_state(tx, own, Program(_of_trained(loss, held, rest), own, batch).stacks)

    return TrainStep(step, init, lambda *args: compiled.lower(*prepared(*args)))


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The function that `make_train_step` returns.

    Attributes:
      step: The function `(params, opt_state, *batch) -> (params, opt_state, loss)` itself.
      init: The function `(params, *batch) -> opt_state`.
      lower: The function `(params, opt_state, *batch)` that lowers the compiled function for its arguments, which may be
        `jax.ShapeDtypeStruct`s.
    """

    step: Callable[..., tuple[Any, ...]]
    init: Callable[..., Any]
    lower: Callable[..., Any]

    def __call__(self, params: Any, opt_state: Any, *batch: Any) -> tuple[Any, ...]:
        return self.step(params, opt_state, *batch)


def _of_trained(loss: Callable, held: Any, rest: "_Static") -> Callable:
    """Returns the loss as a function of what is trained of the params, and of the batch."""
    return lambda params, *batch: loss(combine(params, combine(held, rest.tree())), *batch)


def _init(tx: optax.GradientTransformation, params: Any) -> Any:
    """Makes the state for what the params stand for, which is not computed where only its shapes matter."""
    if not has_int8(params):
        return tx.init(params)
    return jax.jit(lambda params: tx.init(from_int8(params)))(params)


def _check_state(tx: optax.GradientTransformation, params: Any, opt_state: Any) -> None:
    """Raises a ValueError where params are in int8, and the state was made for their integers and scales."""
    if not has_int8(params):
        return
    expected = jax.eval_shape(tx.init, outlines(params))
    if jax.tree.structure(opt_state) != jax.tree.structure(expected):
        raise ValueError(
            "opt_state must be that of params as floating-point arrays, where some are in int8, found another: make it by "
            "step.init(params)"
        )


def _gradient(of, has_aux, shardings, params, *batch) -> tuple[Any, Any]:
    """Returns the value and ordinary gradients, sharded as the params."""
    value, grads = jax.value_and_grad(of, has_aux=has_aux)(from_int8(params), *batch)
    return value, _put(grads, tuple(first_of_each(params, shardings)))


def _backward(of, tx, params, opt_state, batch, shardings, rounding) -> tuple[Any, Any, Any]:
    """Updates the params in the backward pass."""
    program = Program(of, params, batch)
    updates = Parameters(tx, params, opt_state, program.stacks)
    key = key_of(opt_state) if rounding == "stochastic" else None

    def apply(leaf, param, update, index):
        random = None
        if key is not None:
            own = of_leaf(key, updates.names[leaf])
            random = bits.random(own if index is None else bits.fold(own, index), update.shape)
        return added(param, update, random)

    of_params, of_state = shardings
    firsts = first_of_each(params, of_params)
    return value_and_update(program, updates, apply, firsts, of_state)


def _mean(grad_fn: Callable, params: Any, batch: Any, count: int, has_aux: bool) -> Any:
    """Averages the value and the gradients over the first axis of the batch, and stacks auxiliary data."""
    first = jax.tree.map(lambda x: x[0], batch)
    _, shapes = jax.eval_shape(grad_fn, params, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(sums, one):
        value, grads = grad_fn(params, *one)
        return jax.tree.map(lambda a, b: a + b / count, sums, grads), value

    grads, values = jax.lax.scan(add, zeros, batch, length=count)
    if has_aux:
        return (values[0].mean(), values[1]), grads
    return values.mean(), grads


def _apart(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies what would be donated twice: arrays of the state that are the params', or are there twice."""
    rest, shardings, params, held, opt_state, *batch = args
    seen: set[Any] = set()

    def apart(leaf):
        place = _place(leaf)
        if place in seen:
            return jnp.copy(leaf)
        seen.add(place)
        return leaf

    params, opt_state = jax.tree.map(apart, (params, opt_state))
    return (rest, shardings, params, held, opt_state, *batch)


def _place(leaf: Any) -> Any:
    """Returns what tells the buffer of an array, on the first of its devices here, from all others."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return id(leaf)
    try:
        first = leaf.addressable_data(0)
        return first.device, first.unsafe_buffer_pointer()
    except Exception:  # typed keys, deleted arrays, and backends without pointers
        return id(leaf)


def _check_batch(batch: Any, count: int) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        if not jnp.shape(leaf) or jnp.shape(leaf)[0] != count:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"batch{name} must have micro_batches={count} as its first axis, found shape "
                f"{jnp.shape(leaf)}"
            )


def _put(tree: Any, shardings: tuple[Any, ...]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(constrain, leaves, shardings))


class _Static:
    """The leaves of the params that are not arrays, hashable for `jax.jit`."""

    def __init__(self, tree: Any):
        self.leaves, self.structure = jax.tree.flatten(tree)

    def tree(self) -> Any:
        return jax.tree.unflatten(self.structure, self.leaves)

    def __hash__(self) -> int:
        return hash((self.structure, *self.leaves))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Static)
            and self.structure == other.structure
            and self.leaves == other.leaves
        )


def _parts(params: Any) -> tuple[Any, Any, _Static]:
    """Splits the params into what is trained, other arrays, and all else, each with None for the others' leaves."""
    own = trained(params)
    held, rest = partition(without(params, own))
    return own, held, _Static(rest)
