"""The loop against plain optax, one micro-step at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax
from experiments.paper import loop, methods, problem
from experiments.paper.methods import Method
from experiments.tasks import batches
from flora_jax.models import decoder, vit
from tests.helpers import assert_tree_close, assert_tree_equal, normal

SIZES = problem.Sizes("ViT-test", (0, 0), 3, 2, 3)
MODEL = vit.Vit(vit.Shape(8, 4, 2, 128, 1, 2, 128, 5, remat=False))
RATE = 0.1
LAYERS = ("query", "key", "value", "out", "up", "down")


def vit_loss(model, params, batch):
    return vit.loss(model, params, batch["images"], batch["classes"])


def make(score=lambda *_: {"accuracy": 1.0}):
    arrays = {"images": normal(0, (20, 8, 8, 2)), "classes": np.arange(20, dtype=np.int32) % 5}
    return problem.Problem(MODEL, None, vit_loss, arrays, arrays, score, "", "")


def trained(given, method, sizes=SIZES, seed=1):
    """The params that are scored at the end, those that are trained, and the losses, of the loop."""
    ends, raw = [], []
    given = given._replace(score=lambda _, params: ends.append(params) or {})
    trial = loop.prepare(given, method, sizes)
    watched = trial._replace(merge=lambda params: raw.append(params) or trial.merge(params))
    figures = loop.run(given, watched, sizes, RATE, seed)
    return trial, ends[-1], raw[-1], figures


def by_hand(
    given,
    model,
    tx,
    params,
    state,
    trainable=lambda tree: (None, tree),
    seed=1,
    added=lambda tree: tree,
):
    order = batches.source(given.train, SIZES.batch, seed)
    losses = []

    @jax.jit
    def step(params, state, batch):
        held, own = trainable(params)
        value, grads = jax.value_and_grad(
            lambda own: vit_loss(model, added(own if held is None else merged(held, own)), batch)
        )(own)
        updates, state = tx.update(grads, state, own)
        own = optax.apply_updates(own, updates)
        return own if held is None else merged(held, own), state, value

    for i in range(SIZES.optimizer_steps * SIZES.accumulation):
        params, state, value = step(params, state, order[i])
        losses.append(float(value))
    return params, np.reshape(losses, (SIZES.optimizer_steps, -1)).mean(1)


def assert_close_but_for_noise(found, expected):
    """The gradient of a key's bias is zero, but for rounding, which Adafactor makes as large as any."""
    for tree in (found, expected):
        tree["layers"]["key"].pop("bias")
    assert_tree_close(found, expected, 1e-4)


def merged(held, own):
    return jax.tree.map(lambda a, b: b if a is None else a, held, own, is_leaf=lambda x: x is None)


def test_flora_is_the_chain_with_ordinary_gradients():
    given, method = make(), Method("flora", 16)
    _, found, _, figures = trained(given, method)
    tx = flora_jax.flora(
        optax.warmup_cosine_decay_schedule(0.0, RATE, 1, 3), rank=16, accumulation_steps=2
    )
    params = given.init(MODEL, 1)
    state = tx.init(params)
    assert int(flora_jax.cycle(state)) == 0
    first = jnp.int32(loop.CYCLES)
    state = jax.tree_util.tree_map_with_path(
        lambda path, x: first if "cycle" in jax.tree_util.keystr(path) else x, state
    )
    expected, losses = by_hand(given, MODEL, tx, params, state)
    assert_close_but_for_noise(found, expected)
    np.testing.assert_allclose(figures["losses"], losses, atol=2e-5)


@pytest.mark.long
def test_lora_trains_its_factors_and_what_it_does_not_patch():
    given, method = make(), Method("lora", 3)
    trial, found, raw, figures = trained(given, method)
    tx = optax.MultiSteps(
        optax.adafactor(optax.warmup_cosine_decay_schedule(0.0, RATE, 1, 3)), 2
    ).gradient_transformation()
    params = trial.start(1)[0]
    plain = {name: x for name, x in params.items() if name != "lora"}
    assert_tree_equal(plain, given.init(MODEL, 1))

    def added(tree):
        """The model's params with the factors' products in them."""
        layers = dict(tree["layers"])
        for name in LAYERS:
            pair = tree["lora"][f"layers/{name}/kernel"]
            kernel = layers[name]["kernel"] + pair["down"] @ pair["up"]
            layers[name] = {**layers[name], "kernel": kernel}
        return {**{name: x for name, x in tree.items() if name != "lora"}, "layers": layers}

    def trainable(tree):
        frozen = lambda path: path[-1].key == "kernel" and path[-2].key in LAYERS  # noqa: E731
        visit = jax.tree_util.tree_map_with_path
        return (
            visit(lambda path, x: x if frozen(path) else None, tree),
            visit(lambda path, x: None if frozen(path) else x, tree),
        )

    state = tx.init(trainable(params)[1])
    expected, losses = by_hand(given, MODEL, tx, params, state, trainable, added=added)
    np.testing.assert_allclose(figures["losses"], losses, atol=2e-5)
    held, own = trainable(raw)
    before, moved = trainable(params)
    assert_close_but_for_noise(jax.tree.map(np.asarray, found), added(expected))
    assert_close_but_for_noise(jax.tree.map(np.asarray, raw), expected)
    assert_tree_equal(held, before)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (own, moved)), strict=True))
    factors = sum(x.size for x in jax.tree.leaves(own["lora"]))
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert trial.nbytes.state == state_bytes + 4 * factors
    assert trial.nbytes.params == sum(4 * x.size for x in jax.tree.leaves(given.init(MODEL, 0)))


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_another_seed_draws_other_projections(momentum):
    method = Method("flora", 16, momentum=momentum, kappa=2)
    tx, projection = methods.build(method, 0.1, accumulation=2, optimizer_steps=3)
    params = {"w": jnp.asarray(normal(0, (128, 128)))}
    state = methods.from_cycle(tx.init(params), 7)
    assert int(flora_jax.cycle(state)) == 7
    sketches = [
        flora_jax.value_and_grad(lambda p: (p["w"] ** 2).sum(), projection)(params, cycle=c)[1]
        for c in (0, 7)
    ]
    assert not np.allclose(sketches[0]["w"].data, sketches[1]["w"].data)
    grown = jax.tree.map(lambda a, b: a.shape == b.shape, state, tx.init(params))
    assert jax.tree.all(grown)


@pytest.mark.long
def test_a_run_that_was_interrupted_goes_on_bit_equal(tmp_path):
    given, method = make(), Method("flora", 16)
    sizes = dataclasses.replace(SIZES, checkpoint_every=1)
    ends = []
    given = given._replace(score=lambda _, p: ends.append(jax.tree.map(np.asarray, p)) or {})
    trial = loop.prepare(given, method, sizes)
    undisturbed = loop.run(given, trial, sizes, RATE, 0)

    def stop(optimizer_step, figures):
        if optimizer_step == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "states"
    with pytest.raises(KeyboardInterrupt):
        loop.run(given, trial, sizes, RATE, 0, log=stop, folder=folder, settings={"a": 1})
    seen = []
    again = loop.run(
        given, trial, sizes, RATE, 0, log=lambda b, _: seen.append(b), folder=folder,
        settings={"a": 1},
    )  # fmt: skip
    assert seen[0] > 0
    assert again["losses"] == undisturbed["losses"]
    assert_tree_equal(ends[1], ends[0])


@pytest.mark.long
def test_galore_is_what_optax_has_over_accumulation():
    shape = decoder.Shape(20, 8, 12, 1, 2, 2, jnp.float32, remat=False, scan=False)
    model = decoder.Decoder(shape)
    tokens = np.random.default_rng(0).integers(0, 20, (12, 5)).astype(np.int32)
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

    def of_batch(model, params, batch):
        return model.apply({"params": params}, batch["tokens"], batch["targets"])

    given = make()._replace(model=model, loss=of_batch, train=arrays, validation=arrays)
    _, found, _, _ = trained(given, Method("galore", 2))
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, 1, 3)
    tx = optax.MultiSteps(optax.contrib.galore(rate, rank=2), 2).gradient_transformation()
    params = given.init(model, 1)
    state, order = tx.init(params), batches.source(arrays, SIZES.batch, 1)
    update = jax.jit(tx.update)
    gradient = jax.jit(jax.grad(lambda params, batch: of_batch(model, params, batch)))
    for i in range(SIZES.optimizer_steps * SIZES.accumulation):
        updates, state = update(gradient(params, order[i]), state, params)
        params = optax.apply_updates(params, updates)
    assert_tree_close(found, params, 1e-2)  # Adam divides what is near to zero by itself
