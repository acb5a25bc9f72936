"""Every optimizer of optax behind flora: apply_gradients gives what tx.update and optax.apply_updates give."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import flora_jax
from tests.helpers import assert_close, normal

PROJECTION = flora_jax.Projection(4, min_dim=8, resample_every=2)
SHAPES = {"stack": (2, 16, 24), "a": (16, 24), "b": (24, 16), "vector": (5,), "scalar": ()}
PARAMS = {name: jnp.asarray(normal(i, shape)) for i, (name, shape) in enumerate(SHAPES.items())}
MASK = {"stack": True, "a": False, "b": True, "vector": False, "scalar": True}
LABELS = {name: "one" if chosen else "two" for name, chosen in MASK.items()}
VALUE = {"value": jnp.float32(0.7)}
"""What some optimizers want besides gradients: the loss."""


def inner():
    return optax.sgd(0.1, momentum=0.9)


def odd(step, **others):
    return step % 2 == 1


def labelled(make):
    return make({"one": inner(), "two": optax.adam(0.1)}, LABELS)


ARGUMENTS = {
    "add_noise": lambda make: make(0.1, 0.5, 0),
    "apply_if_finite": lambda make: make(inner(), 3),
    "chain": lambda make: make(optax.clip(1.0), inner()),
    "conditionally_mask": lambda make: make(inner(), odd),
    "conditionally_transform": lambda make: make(inner(), odd),
    "inject_hyperparams": lambda make: make(optax.sgd)(learning_rate=0.1),
    "inject_stateful_hyperparams": lambda make: make(optax.sgd)(learning_rate=0.1),
    "masked": lambda make: make(inner(), MASK),
    "mechanize": lambda make: make(inner()),
    "monitor": lambda make: make({"norm": optax.tree.norm}),
    "multi_transform": labelled,
    "named_chain": lambda make: make(("clip", optax.clip(1.0)), ("sgd", inner())),
    "noisy_sgd": lambda make: make(0.1, key=0),
    "partition": labelled,
    "sam": lambda make: make(inner(), optax.chain(optax.contrib.normalize(), optax.sgd(0.1))),
    "scale_by_schedule": lambda make: make(lambda count: 0.1 / (1 + count)),
    "schedule_free": lambda make: make(inner(), 0.1),
    "selective_transform": lambda make: make(inner(), freeze_mask=MASK),
    "snapshot": lambda make: make("norm", optax.tree.norm),
    "split_real_and_imaginary": lambda make: make(inner()),
    "stateless": lambda make: make(lambda updates, params: optax.tree.scale(0.1, updates)),
    "stateless_with_tree_map": lambda make: make(lambda update, param: update + 0.1 * param),
    "with_extra_args_support": lambda make: make(inner()),
}
"""How to make what takes more than a learning rate."""

IMPOSSIBLE = {
    "differentially_private_aggregate": "it takes the gradient of each example",
    "dpsgd": "it takes the gradient of each example",
    "flatten": "it puts all gradients into one array",
    "hutchinson_estimator_diag_hessian": "it differentiates the loss in all params",
    "lbfgs": "its line search evaluates the loss",
    "lookahead": "its params are pairs of which one has gradients",
    "measure_with_ema": "it returns a measurement and no updates",
    "scale_by_backtracking_linesearch": "it evaluates the loss",
    "scale_by_lbfgs": "it loops over its memory of all leaves",
    "scale_by_muon": "it fails in optax itself without the masks that muon puts around it",
    "scale_by_zoom_linesearch": "it evaluates the loss",
    "sophia": "it differentiates the loss in all params",
}
"""What cannot be evaluated leaf by leaf, and why."""

NO_SCALAR = ("sm3", "scale_by_sm3")
"""What fails for a param without axes in optax itself."""

CHANGING = ("monitor",)
"""What has more in its state after the first update, which no accumulation can have, MultiSteps neither."""

OFTEN = ("apply_if_finite", "clip_by_global_norm", "momo", "novograd", "prodigy")


def made(make, name):
    """The transformation; the error where the arguments that all take do not do."""
    for arguments in ((), (0.1,)):
        try:
            tx = ARGUMENTS[name](make) if name in ARGUMENTS else make(*arguments)
        except Exception as error:  # whatever optax says
            found = error
        else:
            if isinstance(tx, optax.GradientTransformation):
                return tx
            found = TypeError(f"found {type(tx).__name__}")
    return found


def optimizers():
    """All functions of optax and optax.contrib that say, or turn out, to return a transformation."""
    for package, names in ((optax, optax.__all__), (optax.contrib, dir(optax.contrib))):
        for name in sorted(names):
            make = getattr(package, name)
            if not inspect.isfunction(make) or name.startswith("_"):
                continue
            says = "GradientTransformation" in str(inspect.signature(make).return_annotation)
            if says or name in ARGUMENTS or not isinstance(made(make, name), Exception):
                yield name, make


with warnings.catch_warnings(action="ignore"):
    OPTIMIZERS = dict(optimizers())


def test_every_optimizer_can_be_made_or_is_known_to_be_impossible():
    assert len(OPTIMIZERS) > 80
    unknown = {
        name: found
        for name, make in OPTIMIZERS.items()
        if name not in IMPOSSIBLE and isinstance(found := made(make, name), Exception)
    }
    assert not unknown, "state their arguments in ARGUMENTS, or why not in IMPOSSIBLE"


CASES = [
    pytest.param(name, steps, marks=() if (name in OFTEN and steps == 2) else pytest.mark.long)
    for name in sorted(OPTIMIZERS.keys() - IMPOSSIBLE.keys())
    for steps in ((1,) if name in CHANGING else (1, 2))
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "steps"), CASES)
def test_every_optimizer_leaf_by_leaf(name, steps):
    params = {k: x for k, x in PARAMS.items() if name not in NO_SCALAR or x.ndim}
    tx = flora_jax.flora(
        None,
        projection=PROJECTION,
        accumulation_steps=steps,
        optimizer=made(OPTIMIZERS[name], name),
    )
    more = {}
    try:
        jax.eval_shape(tx.update, params, tx.init(params), params)
    except Exception:  # whatever an optimizer says that wants the loss
        more = VALUE

    @jax.jit
    def chain(params, state, grads):
        updates, state = tx.update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def by_leaf(params, state, grads):
        return flora_jax.apply_gradients(tx, grads, state, params, slice_above=1, **more)

    expected = found = (params, tx.init(params))
    for i in range(2 * steps):
        grads = {k: jnp.asarray(normal(100 * i + x.size, x.shape)) for k, x in params.items()}
        expected, found = chain(*expected, grads), by_leaf(*found, grads)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        assert_close(left, right, 1e-4)


def test_a_number_of_numbers_is_shared():
    """Each leaf needs a number of each other one, which itself needs numbers of all."""

    def mix(updates, params):
        del params
        norm = optax.tree.norm(updates)
        largest = [jnp.max(jnp.abs(x / norm)) for x in jax.tree.leaves(updates)]
        return jax.tree.map(lambda x: x / sum(largest), updates)

    tx = flora_jax.flora(None, projection=PROJECTION, optimizer=optax.stateless(mix))
    state = tx.init(PARAMS)
    updates, _ = tx.update(PARAMS, state, PARAMS)
    expected = optax.apply_updates(PARAMS, updates)
    found, _ = flora_jax.apply_gradients(tx, PARAMS, state, PARAMS, slice_above=1)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(left, right, 1e-5)
