"""MaxText's own pre-training, tiny: the lines of the page, against the same steps made by hand."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train
from maxtext.utils import train_utils

import flora_jax
from flora_jax.trainers import maxtext as flora_maxtext
from tests.helpers import assert_close
from tests.pages import ROOT, blocks

PAGE = ROOT / "docs" / "trainers" / "maxtext.md"
ONE, *_ = blocks(PAGE, "bash")
YAML, *_ = blocks(PAGE, "yaml")
BLOCKS = blocks(PAGE)
MESH = ("ici_fsdp_parallelism=4", "ici_tensor_parallelism=2", "per_device_batch_size=1")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Each test is in a folder of its own with the page's configuration."""
    (tmp_path / "tiny.yml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    flora_maxtext.register()


def arguments(*more):
    return ["train", "tiny.yml", *MESH, *more]


def losses():
    found = [json.loads(line) for line in Path("losses.jsonl").read_text().splitlines()]
    Path("losses.jsonl").unlink()
    return [step["learning/loss"] for step in found]


def run(*more):
    """Trains; returns the losses, the params and the optimizer's state."""
    config, recorder = train.initialize(arguments(*more))
    state = train.train_loop(config, recorder)
    params, _ = nnx.split_state(state["model"], nnx.Param, ...)
    return losses(), nnx.as_pure(params), nnx.as_pure(state["optimizer"]["opt_state"])


def assert_leaves_close(found, expected):
    """Each leaf as a whole: Adafactor divides by square roots, which single entries of tiny gradients feel."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, 5e-4)


def assert_equal(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_page(capsys):
    """Its command on one device and its lines on a 4 × 2 mesh have the same losses, which fall; its plan is printed."""
    one_device = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    one_device["PYTHONPATH"] = str(ROOT)
    command = ONE.strip().replace("python3", sys.executable)
    subprocess.run(command.split(), env=one_device, check=True)
    alone = losses()
    names = {}
    exec(BLOCKS[0], names)
    together = losses()
    assert len(alone) == 6 and alone[-1] < alone[0] - 0.5
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    capsys.readouterr()
    exec(BLOCKS[1], names)
    said = capsys.readouterr().out
    assert "decoder/layers/mlp/wi_0/kernel" in said and "Flora" in said


def numbers(params):
    """The axes of the two sides of each matrix, by hand."""
    attention, out = flora_jax.DimensionNumbers(0, (2, 3)), flora_jax.DimensionNumbers((0, 2), 3)

    def of(path, leaf):
        path = jax.tree_util.keystr(path)
        if leaf.ndim < 3:
            return None
        return (
            flora_jax.DimensionNumbers(0, 2)
            if leaf.ndim == 3
            else out
            if "out" in path
            else attention
        )

    return jax.tree_util.tree_map_with_path(of, params)


def by_hand(steps, *more):
    """The ordinary route: full gradients, full updates, no trainer, and no names of axes."""
    config, recorder = train.initialize(arguments(*more))
    _, _, _, model, mesh, schedule, _, loader, *_ = train_utils.setup_train_loop(config, recorder)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    projection = flora_jax.Projection(16, resample_every=2, weight_dimension_numbers=numbers)
    tx = flora_jax.flora(
        lambda step: schedule(2 * step + 1), projection=projection, accumulation_steps=2
    )

    def loss(pure, batch):
        held = jax.tree.map(lambda x: x, params)
        nnx.update(held, pure)
        held = nnx.merge(graph, held, rest, copy=True)
        return train.loss_fn(held, config, dict(batch), None, None)[0]

    @jax.jit
    def step(pure, state, batch):
        value, grads = jax.value_and_grad(loss)(pure, batch)
        updates, state = tx.update(grads, state, pure)
        return optax.apply_updates(pure, updates), state, value

    pure, values = nnx.as_pure(params), []
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        state = tx.init(pure)
        whole_uses = (
            flora_jax.value_and_grad(loss, projection)
            .plan(pure, loader.load_next_batch())
            .whole_uses
        )
        for _ in range(steps):
            pure, state, value = step(pure, state, loader.load_next_batch())
            values.append(float(value))
    return values, pure, whole_uses, flora_jax.plan(pure, projection, tx=tx)


def test_the_steps_are_those_made_by_hand():
    """Losses and params are the same, no full gradient is made, and the state has the bytes that both plans say."""
    more = ("flora_accumulation_steps=2", "gradient_clipping_threshold=0", "steps=6")
    found, params, state = run(*more)
    values, expected, whole_uses, plan = by_hand(6, *more)
    np.testing.assert_allclose(found, values, rtol=1e-4)
    assert found[0] == found[1] > found[2] == found[3] > found[4]
    assert_leaves_close(params, expected)
    assert not whole_uses
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert size == plan.state_bytes["Flora"]
    assert size == flora_maxtext.plan(arguments(*more)).state_bytes["Flora"]
    shardings = {x.sharding.spec for x in jax.tree.leaves(state)}
    assert jax.sharding.PartitionSpec("fsdp", None, "tensor") in shardings


@pytest.mark.parametrize(
    "more",
    [
        ("flora_accumulation_steps=2",),
        ("flora_preset=advised", "flora_accumulation_steps=2"),
        ("flora_momentum=0.9", "flora_resample_every=4", "flora_state_dtype=int8"),
    ],
    ids=["accumulation", "advised", "momentum"],
)
def test_a_checkpoint_within_a_cycle_resumes(more):
    """Five steps, a new start, and three more are eight in one go, to the last bit."""
    more = (*more, "learning_rate_schedule_steps=8")
    saved = (*more, "enable_checkpointing=true", "async_checkpointing=false")
    whole = run(*more, "steps=8")
    first, *_ = run(*saved, "steps=5")
    second, *resumed = run(*saved, "steps=8")
    assert [*first, *second] == whole[0]
    assert len(second) == 3
    assert_equal(resumed, list(whole[1:]))


def test_layers_without_scan():
    """The fused step is the ordinary one there as well, and the plan names each layer."""
    more = ("scan_layers=false", "gradient_clipping_threshold=0")
    fused, ordinary = run(*more), run(*more, "flora_fused=false")
    np.testing.assert_allclose(fused[0], ordinary[0], rtol=1e-4)
    assert_leaves_close(fused[1], ordinary[1])
    assert fused[0][-1] < fused[0][0] - 0.5
    specs = {x.path: x.spec for x in flora_maxtext.plan(arguments("scan_layers=false")).leaves}
    assert specs["decoder/layers_1/mlp/wi_0/kernel"].data_shape == (128, 16)


def test_layers_under_scan_have_a_sketch_each():
    leaves = {
        x.path: x for x in flora_maxtext.plan(arguments("flora_min_dim=2", "flora_rank=1")).leaves
    }
    layers = "decoder/layers"
    assert leaves[f"{layers}/mlp/wi_0/kernel"].spec.batch == (1,)
    assert leaves[f"{layers}/self_attention/out/kernel"].spec.batch == (1,)
    assert leaves[f"{layers}/pre_self_attention_layer_norm/scale"].spec is None
    assert leaves["token_embedder/embedding"].kind == "embedding"
    assert leaves["decoder/logits_dense/kernel"].kind == "head"


MIXTURE = (
    "decoder_block=mixtral",
    "num_experts=8",
    "num_experts_per_tok=2",
    "base_moe_mlp_dim=256",
    "sparse_matmul=false",
    "megablox=false",
    "load_balance_loss_weight=0.01",
)


@pytest.mark.parametrize(
    "model", [(), MIXTURE, ("shard_mode=explicit",)], ids=["dense", "experts", "explicit"]
)
def test_gradient_accumulation_steps(model):
    """Each of MaxText's steps is an optimizer step, and a sum of sketches is the sketch of MaxText's own sum."""
    more = (*model, "gradient_accumulation_steps=2", "gradient_clipping_threshold=0", "steps=4")
    fused, ordinary = run(*more), run(*more, "flora_fused=false")
    np.testing.assert_allclose(fused[0], ordinary[0], rtol=1e-4)
    assert_leaves_close(fused[1], ordinary[1])
    assert fused[0][0] > fused[0][1] > fused[0][2]


def test_other_optimizers_are_as_before():
    found, _, state = run("opt_type=adamw", "steps=4")
    assert found[-1] < found[0] - 1
    assert "mu" in str(jax.tree.structure(state))


@pytest.mark.parametrize(
    "more, said",
    [
        (["flora_rank=none"], "flora_rank must be given with opt_type=flora, found none"),
        (["flora_rank=0"], "rank must be an int of at least 1, a fraction .*, found 0"),
        (["flora_side=left"], "side must be one of input, output, larger, found 'left'"),
        (["flora_preset=best"], "flora_preset\n.*'paper' or 'advised'"),
        (["flora_rnak=3"], "'flora_rnak' not in"),
        (["flora_accumulation_steps=0"], "flora_accumulation_steps must be an int of at least 1"),
        (
            ["skip_step_on_spikes=true"],
            "skip_step_on_spikes must not be set .* flora_skip_nonfinite",
        ),
        (
            ["quantization=fp8"],
            "quantization must not be set .*, found fp8; take flora_fused=false",
        ),
        (["ici_pipeline_parallelism=2"], "using_pipeline_parallelism must not be set"),
        (["trainable_parameters_mask=x"], "trainable_parameters_mask must not be set"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_does_not_fit_is_refused(more, said):
    with pytest.raises(ValueError, match=said):
        flora_maxtext.plan(arguments(*more))


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.0")
    with pytest.raises(ImportError, match=r"needs maxtext 0\.2\.5, found 0\.3\.0"):
        flora_maxtext.check_version()


def test_another_source_is_refused(monkeypatch):
    monkeypatch.setattr(train, "loss_fn", lambda *args: None)
    with pytest.raises(
        RuntimeError, match=r"train\.loss_fn must have the source .*, found another"
    ):
        flora_maxtext.register()


def test_registering_again_changes_nothing():
    before = train.train_step, pyconfig.initialize
    flora_maxtext.register()
    assert (train.train_step, pyconfig.initialize) == before
