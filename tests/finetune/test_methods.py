"""Methods: each learns a sentence by heart, in the state that it says; schedules are those of the formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flora_jax.chain import storage
from flora_jax.finetune import methods, muon
from flora_jax.finetune.settings import ADAPTERS, EXACT, METHODS, UNRANKED, Settings
from flora_jax.models import decoder, families
from tests.helpers import often

SHAPE = decoder.Shape(64, 64, 96, 2, 4, 4, jnp.float32)
MODEL = families.module(SHAPE)
STEPS = 10
WORDS = np.random.default_rng(0).integers(0, 64, (2, 33)).astype(np.int32)
BATCH = {
    "tokens": WORDS[:, :-1],
    "targets": WORDS[:, 1:],
    "weights": np.ones((2, 32), np.float32),
    "share": np.float32(1),
}
BATCH = jax.tree.map(jnp.asarray, BATCH)


def loss(params, batch):
    found = MODEL.apply({"params": params}, batch["tokens"], batch["targets"], batch["weights"])
    return found * batch["share"]


def settings(method, **changes):
    alone = method in (*EXACT, "xgb-lora")
    given = {"micro_batches": None if alone else 2, "rank": None if method in UNRANKED else 8}
    rate = 0.003 if method == "adam" else 0.02
    return Settings("model", ("data",), method=method, rate=rate, **{**given, **changes})


def start(given, dtype=jnp.float32):
    params = MODEL.init(jax.random.key(0), BATCH["tokens"])["params"]
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    outline = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    method = methods.build(given, loss, MODEL, outline, STEPS)
    frozen, state = jax.jit(method.init)(params, BATCH)
    return method, params, frozen, state


@pytest.mark.parametrize("name", often(METHODS, "flora", "exact", "lora"))
def test_each_method_learns(name):
    given = settings(name)
    method, params, frozen, state = start(given)
    shapes = jax.eval_shape(method.init, params, BATCH)
    assert jax.tree.map(jnp.shape, shapes[1]) == jax.tree.map(jnp.shape, state)
    first = float(loss(params, BATCH))
    for _ in range(STEPS * given.accumulated):
        state, value = method.step(frozen, state, BATCH)
    if frozen is not None:  # they are as they were
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), frozen, params))
    now = float(jax.jit(method.loss)(frozen, state, BATCH))
    after = float(loss(method.params(frozen, state), BATCH))
    assert float(value) < first - 0.3
    assert after < first - 0.3
    assert after == pytest.approx(now, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype"), often([("flora", "int4"), ("flora-adafactor", "int8")], ("flora", "int4"))
)
def test_narrow_sketches_learn(name, dtype, monkeypatch):
    monkeypatch.setattr(storage, "MIN_SIZE", 1)
    given = settings(name, state_dtype=dtype)
    method, params, frozen, state = start(given)
    assert dtype in {x.dtype.name for x in jax.tree.leaves(state["opt_state"])}
    for _ in range(STEPS * given.accumulated):
        state, _ = method.step(frozen, state, BATCH)
    assert float(loss(state["params"], BATCH)) < float(loss(params, BATCH)) - 0.3


def test_micro_batches_are_as_one_batch():
    """Two halves of which one counts four times as much as the other: the mean is that of tokens."""
    given = settings("adafactor")
    method, _, _, state = start(given)
    weights = np.ones((2, 32), np.float32)
    weights[1, 8:] = 0
    for row, share in ((0, 32 / 20), (1, 8 / 20)):
        one = {k: v[row : row + 1] for k, v in BATCH.items() if k != "share"}
        one |= {"weights": jnp.asarray(weights[row : row + 1]), "share": jnp.float32(share)}
        state, _ = method.step(None, state, one)
    alone = settings("adafactor", micro_batches=1)
    method, _, _, whole = start(alone)
    whole, _ = method.step(None, whole, {**BATCH, "weights": jnp.asarray(weights)})
    for a, b in zip(
        jax.tree.leaves(state["params"]), jax.tree.leaves(whole["params"]), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(
    "name",
    often([name for name in METHODS if name not in ADAPTERS], "flora", "exact"),
)
def test_weight_decay_is_that_of_matrices_times_the_rate(name):
    """Beside the same step without it; the first step has a third of the peak rate of 0.02, or of 0.003 for Adam."""
    after = {}
    for share in (0.0, 0.5):
        given = settings(name, weight_decay=share, warmup=0.3)
        method, params, _, state = start(given)
        before = jax.tree.map(np.asarray, params)
        for _ in range(given.accumulated):
            state, _ = method.step(None, state, BATCH)
        after[share] = state["params"]
    rate = (0.003 if name == "adam" else 0.02) / 3
    paths = jax.tree_util.tree_leaves_with_path(before)
    for (path, old), plain, less in zip(
        paths, jax.tree.leaves(after[0.0]), jax.tree.leaves(after[0.5]), strict=True
    ):
        key = jax.tree_util.keystr(path)
        matrix = "layers" in key and old.ndim == 3
        expected = -0.5 * rate * old if matrix else 0 * old
        np.testing.assert_allclose(less - plain, expected, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ["flora", "flora-adafactor", "muon", "lora"])
def test_scales_of_many_layers_are_no_matrix(name):
    """As many layers as the shortest side of a matrix, as in LLaMA-7B and Mistral."""
    model = families.module(dataclasses.replace(SHAPE, layers=methods.MIN_DIM))
    outline = jax.eval_shape(lambda: model.init(jax.random.key(0), BATCH["tokens"])["params"])
    method = methods.build(settings(name), loss, model, outline, STEPS)
    if name == "lora":
        own = jax.eval_shape(method.init, outline, BATCH)[1]["own"]
        assert not [path for path in own if "norm" in path] and len(own) == 7
        return
    state = jax.eval_shape(method.tx.init, outline)
    kept = jax.tree_util.tree_leaves_with_path(state)
    norms = [leaf.shape for path, leaf in kept if "norm" in jax.tree_util.keystr(path)]
    assert (methods.MIN_DIM, SHAPE.width) in norms
    assert not {(methods.MIN_DIM, 8), (8, SHAPE.width)} & set(norms)  # a sketch's
    if name == "muon":
        tree = muon.matrices(outline, methods.MIN_DIM)
        assert not any(jax.tree.leaves(tree["layers"]["attention_norm"]))
        assert tree["layers"]["query"]["kernel"]


def test_adapters_are_kept_in_float32_and_weights_stay_bfloat16():
    given = settings("lora")
    method, _, frozen, state = start(given, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(state["own"])} == {jnp.dtype("float32")}
    before = state["own"]["layers/query/kernel"]["down"]
    for _ in range(4):
        state, _ = method.step(frozen, state, BATCH)
    assert not np.array_equal(before, state["own"]["layers/query/kernel"]["down"])
    merged = method.params(frozen, state)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_small_updates_arrive_in_bfloat16():
    """At a rate far below a weight's last bit, the mean of the weights moves with stochastic rounding alone."""
    moved = {}
    for rounding in ("stochastic", "nearest"):
        given = settings("exact", rounding=rounding)
        given = given.__class__(
            **{**given.__dict__, "rate": 2e-5, "schedule": "constant", "warmup": 0.0}
        )
        method, params, _, state = start(given, jnp.bfloat16)
        before = jax.tree.map(jnp.copy, params)
        for _ in range(STEPS):
            state, _ = method.step(None, state, BATCH)
        different = jax.tree.map(lambda a, b: float((a != b).mean()), before, state["params"])
        moved[rounding] = different["layers"]["gate"]["kernel"]
    assert moved["stochastic"] > 0.01 > moved["nearest"]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedules(kind):
    given = Settings("model", ("data",), schedule=kind, warmup=0.2)
    rate = methods.schedule(given, 0.5, 20)
    rise = [float(rate(i)) for i in range(5)]
    np.testing.assert_allclose(rise, [0.125, 0.25, 0.375, 0.5, 0.5], rtol=1e-6)
    i = 12
    expected = {
        "cosine": 0.25 * (1 + np.cos(np.pi * (i - 4) / 16)),
        "linear": 0.5 * (1 - (i - 4) / 16),
        "constant": 0.5,
    }
    assert float(rate(i)) == pytest.approx(expected[kind], rel=1e-5)


def test_the_advised_chain_is_that_of_the_library():
    """One optimizer step of `flora` moves a matrix by the rate times an orthogonal matrix, times what its shape asks for."""
    given = settings("flora", micro_batches=1, warmup=0.0, schedule="constant")
    method, params, _, state = start(given)
    before = np.asarray(params["layers"]["up"]["kernel"])
    state, _ = method.step(None, state, BATCH)
    update = np.asarray(state["params"]["layers"]["up"]["kernel"]) - before
    values = np.linalg.svd(update[0], compute_uv=False)
    assert (values[8:] < 1e-4 * values[0]).all()  # of rank 8
    expected = 0.02 * (96 / 64) ** 0.5 * (64 / 8) ** 0.25
    assert values[:8] == pytest.approx(np.full(8, expected), rel=0.2)


def test_without_accumulation_there_is_no_multisteps():
    tx, _ = methods._transformation(settings("adafactor", micro_batches=1), {}, STEPS)
    assert not isinstance(jax.eval_shape(tx.init, {"a": jnp.ones(3)}), optax.MultiStepsState)
