"""Kauldron with Gemma: what the page shows, step by step against steps made by hand on one device."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kauldron import kd
from kauldron.train import train_step as steps

import flora_jax
from flora_jax.chain.plan import tree_bytes
from flora_jax.trainers import signatures
from flora_jax.trainers.kauldron import TrainStep
from tests.pages import ROOT, execute

NAMES = {"trainer", "fused", "scheduled", "sharded", "resumed"}


@pytest.fixture(scope="module")
def page():
    """What the blocks of the page leave behind."""
    names = execute(ROOT / "docs" / "trainers" / "kauldron.md")
    assert names.keys() >= NAMES
    return names


@pytest.fixture(scope="module")
def batches(page):
    found = iter(page["trainer"].train_ds)
    return [next(found) for _ in range(6)]


def trainer(page, **changes):
    """The page's trainer in float32, with no projection in the step."""
    model = page["given"]["model"].clone(dtype=jnp.float32)
    return kd.train.Trainer(**page["given"] | {"model": model} | changes)


def run(trainer, batches, state=None):
    """States and losses, and what the metrics of each step give."""
    state = trainer.init_state() if state is None else state
    losses, metrics = [], []
    for batch in batches:
        batch = kd.sharding.device_put(batch, trainer.sharding.batch)
        state, aux = trainer.trainstep.step(state, batch, return_losses=True, return_metrics=True)
        computed = aux.compute()
        losses.append(float(computed.loss_values["losses/total"]))
        metrics.append(computed.metric_values)
    return state, losses, metrics


def loss_of(model):
    def loss(params, batch):
        logits = model.apply({"params": params}, batch["tokens"]).logits.astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"][..., 0])
        return each.mean()

    return loss


def by_hand(page, params, batches, tx=None):
    """Losses and params of ordinary steps on one device, without Kauldron."""
    tx = tx or page["tx"]
    loss = loss_of(page["given"]["model"].clone(dtype=jnp.float32))
    params = jax.device_put(jax.tree.map(np.asarray, params), jax.devices()[0])
    state, losses = tx.init(params), []

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for batch in batches:
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    return params, losses


def close(found, expected, tolerance=2e-5):
    names = flax.traverse_util.flatten_dict(found, sep="/")
    others = flax.traverse_util.flatten_dict(expected, sep="/")
    assert names.keys() == others.keys()
    for name in names:
        np.testing.assert_allclose(names[name], others[name], atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def hand(page, batches):
    """The weights of a trainer's start; the params and the losses of six steps made by hand."""
    start = jax.tree.map(np.asarray, trainer(page).init_state().params)
    return start, *by_hand(page, start, batches)


@pytest.mark.parametrize("name, of", [("trainer", "state"), ("fused", "fused_state")])
def test_the_loss_falls_in_bfloat16(page, batches, name, of):
    """Over the 40 micro-batches of the page, ten optimizer steps."""
    state = page[of]
    assert int(state.step) == 40
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"bfloat16"}
    loss = jax.jit(loss_of(page["given"]["model"]))
    before = float(loss(page[name].init_state().params, batches[0]))
    assert float(loss(state.params, batches[0])) < before - 0.3


@pytest.mark.parametrize("fused", [True, False])
def test_the_steps_are_those_made_by_hand(page, batches, hand, fused):
    _, params, expected = hand
    step = TrainStep(projection=page["projection"] if fused else None)
    state, losses, _ = run(trainer(page, trainstep=step), batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close(state.params, params)
    assert int(state.step) == 6


def test_the_state_has_the_bytes_of_the_plan(page):
    for name in ("trainer", "fused", "sharded"):
        state = page[name].init_state()
        plan = flora_jax.plan(state.params, page["projection"], accumulation_steps=4)
        assert tree_bytes(state.opt_state) == plan.state_bytes["Flora"]
        assert 3 * plan.state_bytes["Flora"] < 2 * plan.state_bytes["MultiSteps + Adafactor"]


def test_no_full_gradient_is_materialized(page, batches):
    """All uses of Gemma's weights have a rule: tied embeddings, attention's and the gating einsums."""
    mine = trainer(page)
    fun = loss_of(mine.model)
    of = flora_jax.value_and_grad(fun, page["projection"])
    plan = of.plan(mine.state_specs.params, batches[0])
    assert not plan.whole_uses
    assert sum(leaf.spec is not None for leaf in plan.leaves) == 11


def test_the_norm_is_that_of_the_sketches(page, batches, hand):
    metrics = dict(page["fused"].train_metrics)
    mine = trainer(page, trainstep=TrainStep(projection=page["projection"]), train_metrics=metrics)
    _, _, found = run(mine, batches[:1])
    of = flora_jax.value_and_grad(loss_of(mine.model), page["projection"])
    _, sketches = jax.jit(of)(hand[0], batches[0], cycle=jnp.int32(0))
    arrays = [
        getattr(x, "data", x)
        for x in jax.tree.leaves(sketches, is_leaf=lambda x: hasattr(x, "spec"))
    ]
    expected = np.sqrt(sum(float(jnp.sum(x**2)) for x in arrays))
    np.testing.assert_allclose(found[0]["metrics/gradient_norm"], expected, rtol=1e-4)


def test_metrics_of_updates(page, batches):
    """They are refused where there are none, skipped where that is asked for, and kept without a projection."""
    updates = kd.metrics.TreeReduce(
        metric=kd.metrics.Norm(tensor="updates", axis=None, aggregation_type="concat")
    )
    loss = kd.metrics.SkipIfMissing(metric=kd.metrics.Norm(tensor="updates.embedder"))
    fused = TrainStep(projection=page["projection"])
    with pytest.raises(ValueError, match=r"metrics 'size' needs `updates`, which never exist"):
        run(trainer(page, trainstep=fused, train_metrics={"size": updates}), batches[:1])
    _, _, found = run(trainer(page, trainstep=fused, train_metrics={"size": loss}), batches[:1])
    assert not found[0]
    kept = trainer(page, trainstep=TrainStep(), train_metrics={"size": updates})
    _, _, found = run(kept, batches[:4])
    assert [float(x["metrics/size"]) > 0 for x in found] == [False, False, False, True]


@pytest.mark.parametrize(
    "layout, fused", [("sharding", True), ("two_axes", True), ("two_axes", False)]
)
def test_on_a_mesh_the_steps_are_those_of_one_device(page, batches, hand, layout, fused):
    """On the eight devices of Kauldron's own mesh, and on one of 4 × 2; the state has a layout of its own from the start."""
    assert page["mesh"].devices.shape == (4, 2)
    step = TrainStep(projection=page["projection"] if fused else None)
    mine = trainer(page, trainstep=step, sharding=page[layout])
    state = mine.init_state()
    expected = flora_jax.state_shardings(page["tx"], state.params)
    specs = [
        [
            x.sharding.is_equivalent_to(s, x.ndim)
            for x, s in zip(*map(jax.tree.leaves, (tree, expected)), strict=True)
        ]
        for tree in (state.opt_state, run(mine, batches[:1])[0].opt_state)
    ]
    assert all(map(all, specs))
    split = [x for x in jax.tree.leaves(state.opt_state) if not x.sharding.is_fully_replicated]
    assert len(split) > 20
    state, losses, _ = run(mine, batches)
    np.testing.assert_allclose(losses, hand[2], rtol=1e-5)
    close(state.params, hand[1], 1e-4)


def test_the_layout_that_the_trainer_gives_holds(page):
    sharding = dataclasses.replace(page["sharding"], opt_state=kd.sharding.REPLICATED)
    step = TrainStep(projection=page["projection"])
    state = trainer(page, trainstep=step, sharding=sharding).init_state()
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.opt_state))


def test_a_checkpoint_in_the_middle_of_an_accumulation_resumes(page):
    """Step 6 of 4-step accumulations; the end is bit for bit that of a run that was never stopped."""
    assert 6 in page["resumed"].checkpointer.all_steps
    end = page["resumed_state"]
    assert int(end.step) == 12
    whole = kd.train.Trainer(
        **page["given"] | {"num_train_steps": 11, "trainstep": page["kept"]["trainstep"]}
    )
    expected, _ = whole.train()
    for a, b in zip(*map(jax.tree.leaves, (end, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_schedule_that_is_logged(page, batches, hand):
    """The first update, after four micro-batches, has the rate that the log shows at the last of them."""
    rate = page["scheduled"].schedules["learning_rate"]
    mine = trainer(
        page,
        optimizer=page["scheduled"].optimizer,
        trainstep=TrainStep(projection=page["projection"]),
    )
    state, _, _ = run(mine, batches[:4])
    constant = flora_jax.flora(float(rate(3)), projection=page["projection"], accumulation_steps=4)
    params, _ = by_hand(page, hand[0], batches[:4], constant)
    close(state.params, params)


def test_frozen_weights(page, batches, hand):
    """`partial_updates`: what is frozen has no sketch in the state, and stays; the rest is as by hand."""

    tx = page["partial"].optimizer
    mine = trainer(page, optimizer=tx, trainstep=TrainStep(projection=page["projection"]))
    state, losses, _ = run(mine, batches[:5])
    params, expected = by_hand(page, hand[0], batches[:5], tx)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close(state.params, params)
    close({"x": state.params["embedder"]}, {"x": hand[0]["embedder"]}, 0)


def test_arguments():
    with pytest.raises(ValueError, match="projection must be"):
        TrainStep(projection=8)
    with pytest.raises(ValueError, match="rounding must be 'nearest' without a projection"):
        TrainStep(rounding="stochastic")


def test_another_version_of_kauldron_is_refused():
    for name, arguments, found in (
        ("_step", ("self", "state"), r"the arguments \(self, state, batch\)"),
        ("_update", ("self",), "no such function"),
    ):
        with pytest.raises(ImportError, match=rf"expects kauldron's step with .*found {found} in"):
            signatures.check("kauldron", {"step": (steps.TrainStep, name, arguments)})
