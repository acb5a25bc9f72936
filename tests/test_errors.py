"""Wrong arguments: each message names the argument, what was found and what was expected."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax

PARAMS = {"a": {"kernel": jnp.ones((32, 48))}, "b": jnp.ones(48)}


def projection(rank=4, **others):
    return flora_jax.Projection(rank, min_dim=8, **others)


def sketches(rank=4, params=PARAMS, **others):
    tx = flora_jax.project(projection(rank, **others))
    return tx.update(params, tx.init(params))[0]


def update(tx, grads, params=PARAMS):
    return tx.update(grads, tx.init(params), params)


STACK = {"w": jnp.ones((4, 64, 48))}


def of_another_stack(tx, resample_every=1):
    other = {"w": jnp.ones((3, 64, 48))}
    return update(tx, sketches(params=other, resample_every=resample_every), STACK)


def accumulate(every=2, **others):
    return flora_jax.accumulate(flora_jax.decompress(), every, **others)


WRONG = {
    "rank zero": (lambda: projection(0), "rank must be an int of at least 1, .* found 0"),
    "rank large fraction": (lambda: projection(1.5), "rank must be .* found 1.5"),
    "rank bool": (lambda: projection(True), "rank must be .* found True"),
    "rank array": (
        lambda: projection(jnp.asarray(4)),
        "rank must be .* found a jax.Array; under optax.inject_hyperparams name it in static_args",
    ),
    "rank function": (
        lambda: flora_jax.plan(PARAMS, projection(lambda path, shape: 0.5)),
        "rank of 'a/kernel' must be an int of at least 1, found 0.5",
    ),
    "distribution": (
        lambda: projection(distribution="normal"),
        "distribution must be one of gaussian, rademacher, orthonormal, srht, srtt, found 'normal'",
    ),
    "side": (lambda: projection(side="left"), "side must be one of input, output, larger, found"),
    "head": (lambda: projection(head="output"), "head must be one of input, whole"),
    "embedding": (lambda: projection(embedding="rows"), "embedding must be one of output, whole"),
    "resample_every": (
        lambda: projection(resample_every=0),
        "resample_every must be an int of at least 1 or a schedule, found 0",
    ),
    "min_dim": (
        lambda: flora_jax.Projection(4, min_dim=0),
        "min_dim must be an int of at least 1, found 0",
    ),
    "block": (lambda: projection(block=0), "block must be an int of at least 1, found 0"),
    "seed": (lambda: projection(seed=0.5), "seed must be an int, found 0.5"),
    "every": (lambda: accumulate(0), "every must be an int of at least 1 or a schedule, found 0"),
    "accumulator_dtype": (
        lambda: accumulate(accumulator_dtype="int2"),
        "accumulator_dtype must be one of float32, float64, bfloat16, int8, int4, found 'int2'",
    ),
    "decay": (lambda: flora_jax.momentum(1.0), "decay must be at least 0 and below 1, found 1.0"),
    "cycle inside an accumulation": (
        lambda: accumulate(4, projection=projection(resample_every=6)),
        "resample_every must be a multiple of every=4, found 6",
    ),
    "cycle of another schedule": (
        lambda: accumulate(lambda step: 4, projection=projection(resample_every=8)),
        "resample_every must be a multiple of every=.* found 8",
    ),
    "cycle inside an accumulation of flora": (
        lambda: flora_jax.flora(
            1e-2, projection=projection(resample_every=6), accumulation_steps=4
        ),
        "resample_every must be a multiple of accumulation_steps=4, found 6",
    ),
    "no learning rate": (
        lambda: flora_jax.flora(None, rank=4),
        "learning_rate must be a number or a schedule without optimizer, found None",
    ),
    "project": (
        lambda: flora_jax.project(8),
        "projection must be a flora_jax.Projection, found 8",
    ),
    "accumulate": (
        lambda: accumulate(projection=8),
        "projection must be a flora_jax.Projection, found 8",
    ),
    "momentum": (
        lambda: flora_jax.momentum(0.9, projection=8),
        "projection must be a flora_jax.Projection, found 8",
    ),
    "shrink": (lambda: flora_jax.shrink(8), "projection must be a flora_jax.Projection, found 8"),
    "scale_by_shape": (
        lambda: flora_jax.scale_by_shape(8),
        "projection must be a flora_jax.Projection, found 8",
    ),
    "orthogonalize": (
        lambda: flora_jax.orthogonalize(0),
        "iterations must be an int of at least 1, found 0",
    ),
    "Nesterov without momentum": (
        lambda: flora_jax.flora(1e-2, rank=4, nesterov=True),
        "momentum must be given beside nesterov=True, found None",
    ),
    "a rate of Adafactor's beside the only one": (
        lambda: flora_jax.flora(1e-2, rank=4, adafactor_learning_rate=0.1),
        "adafactor_learning_rate must be None without preset='advised' or beside optimizer, found 0.1",
    ),
    "a momentum of what is not compressed": (
        lambda: flora_jax.accumulate(optax.sgd(1.0), 2, decay=0.9),
        "projection must be given beside decay=0.9, which is that of sketches, found None",
    ),
    "a decay of the accumulator": (
        lambda: flora_jax.accumulate(optax.sgd(1.0), 2, decay=1.0),
        "decay must be at least 0 and below 1, found 1.0",
    ),
    "a new projection": (
        lambda: flora_jax.momentum(0.9, at_new_projection="keep"),
        "at_new_projection must be one of transfer, shorten, reset, found 'keep'",
    ),
    "flora": (
        lambda: flora_jax.flora(1e-2, projection=8),
        "projection must be a flora_jax.Projection, found 8",
    ),
    "value_and_grad": (
        lambda: flora_jax.value_and_grad(jnp.sum, 0),
        "projection must be a flora_jax.Projection, found 0",
    ),
    "make_train_step": (
        lambda: flora_jax.make_train_step(jnp.sum, optax.sgd(0.1), 8),
        "projection must be a flora_jax.Projection, found 8",
    ),
    "plan": (
        lambda: flora_jax.plan(PARAMS, PARAMS),
        "projection must be a flora_jax.Projection, found <class 'dict'>",
    ),
    "neither rank nor projection": (
        lambda: flora_jax.flora(1e-2),
        "flora takes one of rank and projection, found neither",
    ),
    "both rank and projection": (
        lambda: flora_jax.flora(1e-2, rank=4, projection=projection()),
        "flora takes one of rank and projection, found both",
    ),
    "preset": (
        lambda: flora_jax.flora(1e-2, rank=4, preset="best"),
        "preset must be one of paper, advised, official, found 'best'",
    ),
    "official without momentum": (
        lambda: flora_jax.flora(1e-2, rank=4, preset="official"),
        "preset='official' takes rank and momentum, and neither projection nor nesterov",
    ),
    "state_dtype": (
        lambda: flora_jax.flora(1e-2, rank=4, state_dtype="float16"),
        "state_dtype must be one of .* found 'float16'",
    ),
    "accumulation_steps": (
        lambda: flora_jax.flora(1e-2, rank=4, accumulation_steps=2.5),
        "accumulation_steps must be an int of at least 1 or a schedule, found 2.5",
    ),
    "mask of another tree": (
        lambda: flora_jax.plan(PARAMS, projection(mask={"other": True})),
        "mask must be a prefix of the params' tree .*, found .*'other'",
    ),
    "axis out of range": (
        lambda: flora_jax.plan(
            PARAMS, projection(weight_dimension_numbers=flora_jax.DimensionNumbers(0, 2))
        ),
        "weight_dimension_numbers of 'a/kernel': axis 2 is not among the 2 axes of shape (32, 48)",
    ),
    "axes overlap": (
        lambda: flora_jax.plan(
            PARAMS, projection(weight_dimension_numbers=flora_jax.DimensionNumbers(0, 0))
        ),
        "weight_dimension_numbers of 'a/kernel': reduction and output axes must be disjoint",
    ),
    "sketch of another rank": (
        lambda: update(flora_jax.project(projection(8)), sketches(4)),
        "'a/kernel': found a sketch of rank 4, expected 8",
    ),
    "sketch of another seed": (
        lambda: update(flora_jax.project(projection(seed=1)), sketches()),
        "'a/kernel': found a sketch of seed 0, expected 1",
    ),
    "sketch where none is made": (
        lambda: update(flora_jax.project(projection(mask=False)), sketches()),
        "'a/kernel': found a sketch, expected an uncompressed gradient, .* (masked)",
    ),
    "uncompressed gradient to accumulate": (
        lambda: update(accumulate(projection=projection(resample_every=2)), PARAMS),
        "'a/kernel': accumulate found an uncompressed gradient, expected a sketch",
    ),
    "sketch to accumulate without projection": (
        lambda: update(accumulate(), sketches()),
        "'a/kernel': accumulate found a sketch, expected an uncompressed gradient; give accumulate the",
    ),
    "uncompressed gradient to momentum": (
        lambda: update(flora_jax.momentum(0.9, projection=projection()), PARAMS),
        "'a/kernel': momentum found an uncompressed gradient, expected a sketch",
    ),
    "sketches of another stack to accumulate": (
        lambda: of_another_stack(accumulate(projection=projection(resample_every=2)), 2),
        "'w': accumulate found a sketch of shape (3, 4, 48), expected that of its state, (4, 4, 48)",
    ),
    "sketches of another stack to momentum": (
        lambda: of_another_stack(flora_jax.momentum(0.9, projection=projection())),
        "'w': momentum found a sketch of shape (3, 4, 48), expected that of its state, (4, 4, 48)",
    ),
    "sketches of another stack to project": (
        lambda: of_another_stack(flora_jax.project(projection())),
        "'w': project found a sketch of a gradient of shape (3, 64, 48), expected that of the param, (4, 64, 48)",
    ),
    "gradients of another stack to project": (
        lambda: update(flora_jax.project(projection()), {"w": jnp.ones((3, 64, 48))}, STACK),
        "'w': project found a gradient of shape (3, 64, 48), expected that of the param, (4, 64, 48)",
    ),
    "a layer of a sketch to project": (
        lambda: update(
            flora_jax.project(projection()),
            jax.tree.map(lambda x: x[0], sketches(params=STACK)),
            STACK,
        ),
        "'w': found a sketch whose data have shape (4, 48), expected (4, 4, 48)",
    ),
    "sketch without a cycle": (
        lambda: flora_jax.decompress().update(
            flora_jax.Sketch(jnp.ones((32, 4)), None, sketches()["a"]["kernel"].spec), ()
        ),
        "'a/kernel': decompress found a sketch without a cycle",
    ),
    "sum of two ranks": (
        lambda: sketches(4)["a"]["kernel"] + sketches(8)["a"]["kernel"],
        "'a/kernel': sketches that are added must agree in rank, found 4 and 8",
    ),
    "cycle of a plain state": (
        lambda: flora_jax.cycle(optax.adam(1.0).init(PARAMS)),
        "opt_state must hold the state of one flora_jax.project, found 0",
    ),
}


def matches(error, pattern):
    """Parentheses in the table are literal, `.*` is not."""
    pattern = ".*".join(re.escape(part) for part in pattern.split(".*"))
    assert re.search(pattern, str(error.value)), str(error.value)


@pytest.mark.parametrize("case", WRONG)
def test_message(case):
    wrong, pattern = WRONG[case]
    with pytest.raises(ValueError) as error:
        wrong()
    matches(error, pattern)
    assert "\n" not in str(error.value)


def test_sum_with_an_array():
    with pytest.raises(TypeError, match="a Sketch can be added to a Sketch only, found ndarray"):
        sketches()["a"]["kernel"] + np.ones(3)


def test_sum_of_two_cycles():
    spec = sketches()["a"]["kernel"].spec
    one, two = (flora_jax.Sketch(jnp.ones((32, 4)), jnp.int32(i), spec) for i in (3, 5))
    with pytest.raises(ValueError, match="must be of one cycle, found 3 and 5"):
        one + two


def test_rank_under_inject_hyperparams():
    injected = optax.inject_hyperparams(flora_jax.flora)(learning_rate=1e-2, rank=4)
    with pytest.raises(ValueError, match=r"must be .* found a jax.Array; .* static_args"):
        injected.init(PARAMS)


def test_two_chains_have_no_one_cycle():
    tx = flora_jax.flora(1e-2, projection=projection())
    with pytest.raises(ValueError, match="found 2"):
        flora_jax.cycle((tx.init(PARAMS), tx.init(PARAMS)))


def test_the_table_is_of_arguments_that_are_right_otherwise():
    """The same calls with right arguments raise nothing."""
    tx = flora_jax.flora(1e-2, projection=projection(resample_every=2), accumulation_steps=2)
    updates, _ = update(tx, PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_learning_rate_that_is_not_used(momentum):
    with pytest.warns(UserWarning, match="does not use learning_rate .*; give learning_rate=None"):
        flora_jax.flora(1e-2, rank=4, momentum=momentum, optimizer=optax.sgd(0.1))


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (flora_jax.Projection(64, min_dim=8), "rank 64 is not below the output side's 48"),
        (flora_jax.Projection(4), "32 x 48 is below min_dim 128"),
    ],
)
def test_nothing_is_compressed(rule, reason):
    with pytest.warns(UserWarning) as caught:
        flora_jax.flora(1e-2, projection=rule, accumulation_steps=1).init(PARAMS)
    (one,) = caught
    assert f"nothing is compressed, neither 'a/kernel' ({reason})" in str(one.message)


def test_nothing_is_compressed_by_choice():
    with warnings.catch_warnings(action="error"):
        flora_jax.flora(1e-2, projection=projection(mask=False)).init(PARAMS)
        flora_jax.flora(1e-2, projection=projection()).init({"b": jnp.ones(48)})


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_integers_of_numpy_are_ints(kind):
    tx = flora_jax.flora(1e-2, rank=kind(4), accumulation_steps=kind(2), seed=kind(3))
    same = flora_jax.flora(1e-2, rank=4, accumulation_steps=2, seed=3)
    params = {"w": jnp.ones((128, 256))}
    assert str(jax.make_jaxpr(tx.init)(params)) == str(jax.make_jaxpr(same.init)(params))
    rule = flora_jax.Projection(kind(4), resample_every=kind(6), seed=kind(3), min_dim=kind(8))
    assert (rule.rank, rule.resample_every, rule.seed, rule.min_dim) == (4, 6, 3, 8)
    assert type(rule.seed) is type(rule.rank) is type(rule.resample_every) is int
    numbers = flora_jax.DimensionNumbers(kind(0), kind(1))
    rule = flora_jax.Projection(lambda path, shape: kind(4), weight_dimension_numbers=numbers)
    assert flora_jax.plan(params, rule).leaves[0].spec.rank == 4
