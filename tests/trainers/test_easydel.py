"""EasyDeL: what the page shows, step by step against steps made by hand on one device."""

import copy

import easydel as ed
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import flora_jax
from flora_jax.chain.plan import tree_bytes
from flora_jax.chain.sketch import without_cycle
from flora_jax.trainers import signatures
from flora_jax.trainers.easydel import Trainer
from tests.pages import ROOT, execute


@pytest.fixture(scope="module")
def page():
    """What the blocks of the page leave behind."""
    names = execute(ROOT / "docs" / "trainers" / "easydel.md")
    assert names.keys() >= {"trainer", "fused", "resumed"}
    return names


def batch_of(page, step):
    lines = np.array(page["lines"][16 * step : 16 * step + 16], np.int32)
    return {"input_ids": lines, "attention_mask": np.ones_like(lines)}


def arrays(tree):
    """The arrays of a tree of variables, each on the host, by path."""
    return {path: np.asarray(x.get_value()) for path, x in nnx.to_flat_state(tree)}


def one_device(page):
    """The model asks the mesh in context for the names of its axes."""
    names = page["trainer"].mesh.axis_names
    return Mesh(np.array(jax.devices()[:1]).reshape([1] * len(names)), names)


def alone(page):
    """The page's model, split, on one device."""
    config = copy.deepcopy(page["config"])
    config.set_model_mesh(one_device(page))
    types = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    return nnx.split(ed.LlamaForCausalLM(config=config, rngs=nnx.Rngs(0), **types), nnx.Param, ...)


def loss_of(graph, rest):
    def loss(params, batch):
        logits = nnx.merge(graph, params, rest)(**batch).logits.astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], batch["input_ids"][:, 1:]
        )
        return each.mean()

    return loss


@pytest.fixture(scope="module")
def hand(page):
    """Losses and params of twelve ordinary steps on one device, without EasyDeL's trainer."""
    graph, params, rest = alone(page)
    loss, tx = loss_of(graph, rest), page["tx"]
    state, losses, kept = tx.init(params), [], {}

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    with one_device(page):
        for i in range(12):
            params, state, value = step(params, state, batch_of(page, i))
            losses.append(float(value))
            kept[i + 1] = arrays(params)
    return losses, kept


def close(found, expected, tolerance):
    """All entries but one in two hundred: Adafactor takes the sign alone of those whose gradient is but rounding."""
    assert found.keys() == expected.keys()
    for path in found:
        assert np.mean(np.abs(found[path] - expected[path]) > tolerance) < 5e-3, path


def made(page, fused, folder, **changes):
    arguments = page["Arguments"](save_directory=str(folder), **page["given"] | changes)
    given = dict(arguments=arguments, model=page["new_model"](), dataset_train=page["dataset"])
    return Trainer(projection=page["projection"], **given) if fused else ed.Trainer(**given)


@pytest.mark.parametrize("name", ["output", "fused_output"])
def test_the_loss_falls(page, name):
    """Over the 40 micro-batches of the page, ten optimizer steps."""
    graph, params, rest = alone(page)
    loss = jax.jit(loss_of(graph, rest))
    state = page[name].state
    assert int(state.step) == 40
    trained = jax.tree.map(np.asarray, state.graphstate)
    with one_device(page):
        before, after = (float(loss(x, batch_of(page, 0))) for x in (params, trained))
    assert after < before - 0.3


@pytest.mark.parametrize("fused", [True, False])
def test_the_steps_on_a_mesh_are_those_made_by_hand_on_one_device(page, hand, tmp_path, fused):
    mine = made(page, fused, tmp_path, max_training_steps=6)
    assert dict(mine.model.mesh.shape) == {"dp": 1, "fsdp": 4, "ep": 1, "tp": 2, "sp": 1}
    state, losses = mine.model_state, []
    split = [x for x in jax.tree.leaves(state.opt_state) if not x.sharding.is_fully_replicated]
    assert len(split) > 15
    with mine.mesh:
        for i in range(6):
            state, metrics, error = mine._execute_train_step(state, batch_of(page, i))
            assert error is None
            losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses, hand[0][:6], rtol=5e-5)
    close(arrays(state.graphstate), hand[1][6], 2e-4)


def test_the_state_has_the_bytes_of_the_plan(page, tmp_path):
    for fused in (True, False):
        state = made(page, fused, tmp_path).model_state
        plan = flora_jax.plan(state.graphstate, page["projection"], accumulation_steps=4)
        assert tree_bytes(state.opt_state) == plan.state_bytes["Flora"]
        assert 3 * plan.state_bytes["Flora"] < 2 * plan.state_bytes["MultiSteps + Adafactor"]


def test_no_full_gradient_is_materialized(page):
    graph, params, rest = alone(page)
    of = flora_jax.value_and_grad(loss_of(graph, rest), page["projection"])
    with one_device(page):
        plan = of.plan(params, batch_of(page, 0))
    assert not plan.whole_uses
    assert sum(leaf.spec is not None for leaf in plan.leaves) == 16


def test_a_checkpoint_in_the_middle_of_an_accumulation_resumes(page, tmp_path):
    """Saved after 6 steps, of which four make an optimizer step; the end is that of a run that was never stopped."""
    assert page["resumed"]._resumed_from_checkpoint
    state = page["resumed_output"].state
    assert int(state.step) == 12
    whole = made(page, True, tmp_path, max_training_steps=12).train().state
    for a, b in zip(*map(jax.tree.leaves, (state.opt_state, whole.opt_state)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    close(arrays(state.graphstate), arrays(whole.graphstate), 1e-6)


def test_without_a_projection_the_state_is_read_back_too(page, tmp_path):
    def state(steps, kind=Trainer, folder=tmp_path):
        changes = {"max_training_steps": steps, "save_steps": 6, "save_optimizer_state": True}
        arguments = page["Arguments"](save_directory=str(folder), **page["given"] | changes)
        return kind(arguments=arguments, model=page["new_model"](), dataset_train=page["dataset"])

    saved = state(6).train().state
    counts = [int(x) for x in jax.tree.leaves(saved.opt_state) if x.ndim == 0]
    assert counts[:2] == [1, 2]
    resumed = state(12).model_state
    assert int(resumed.step) == 6
    for a, b in zip(*map(jax.tree.leaves, (resumed.opt_state, saved.opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    lost = state(12, ed.Trainer).model_state
    assert not any(int(x) for x in jax.tree.leaves(lost.opt_state) if x.ndim == 0)


def test_norms_are_those_of_the_sketches(page, tmp_path):
    mine = made(page, True, tmp_path, max_training_steps=1)
    graph, params, rest = alone(page)
    of = flora_jax.value_and_grad(loss_of(graph, rest), page["projection"])
    with one_device(page):
        _, grads = jax.jit(of)(params, batch_of(page, 0), cycle=jnp.int32(0))
    norms = [float(jnp.linalg.norm(x)) for x in jax.tree.leaves(without_cycle(grads))]
    with mine.mesh:
        _, metrics, _ = mine._execute_train_step(mine.model_state, batch_of(page, 0))
    np.testing.assert_allclose(metrics.max_grad_norm, max(norms), rtol=1e-4)
    np.testing.assert_allclose(metrics.mean_grad_norm, np.mean(norms), rtol=1e-4)


def test_a_loss_that_is_not_a_number_changes_nothing(page, tmp_path):
    mine = made(page, True, tmp_path, max_training_steps=1, loss_config=ed.LossConfig())
    state = mine.model_state
    broken = jax.tree.map(lambda x: x * jnp.nan, state.graphstate)
    before = jax.tree.map(np.asarray, state.opt_state)
    with mine.mesh:
        after, metrics, _ = mine._execute_train_step(
            state.replace(graphstate=broken), batch_of(page, 0)
        )
    assert np.isnan(metrics.loss)
    for a, b in zip(*map(jax.tree.leaves, (after.opt_state, before)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_accumulation_of_whole_gradients_is_refused(page, tmp_path):
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps must be 1, found 2: the chain"
    ):
        made(page, True, tmp_path, gradient_accumulation_steps=2)


def test_arguments(page):
    with pytest.raises(ValueError, match=r"projection must be a flora_jax\.Projection, found 8"):
        Trainer(projection=8)
    with pytest.raises(ValueError, match="rounding must be"):
        Trainer(projection=page["projection"], rounding="up")


def test_another_version_of_easydel_is_refused():
    for name, found in (
        ("configure_functions", r"the arguments \(self\)"),
        ("configure_steps", "no such function"),
    ):
        with pytest.raises(ImportError, match=rf"expects easydel's step with .*found {found} in"):
            signatures.check("easydel", {"step": (ed.Trainer, name, ("self", "state"))})
