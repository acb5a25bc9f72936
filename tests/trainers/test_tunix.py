"""Tunix' own trainer on its own Gemma 3, tiny: the lines of the page, against the same steps made by hand."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import qwix
from flax import nnx
from tunix.models.gemma3 import model as gemma
from tunix.sft import peft_trainer, utils

import flora_jax
from flora_jax.trainers.tunix import PeftTrainer
from tests.pages import ROOT, blocks

BLOCKS = blocks(ROOT / "docs" / "trainers" / "tunix.md")
EVERY = 4


def make_model(dtype=jnp.float32):
    config = gemma.ModelConfig(
        num_layers=2,
        num_embed=256,
        embed_dim=128,
        hidden_dim=256,
        num_heads=2,
        head_dim=128,
        num_kv_heads=1,
        sliding_window_size=8,
        param_dtype=dtype,
    )
    return gemma.Gemma3(config, rngs=nnx.Rngs(0))


def model_input(batch):
    mask = batch.input_mask
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def make_batches(count=16):
    """Sequences of squares modulo 256, each beginning elsewhere."""
    starts = np.arange(count * 8).reshape(count, 8, 1)
    tokens = ((starts + np.arange(16)) ** 2 % 251).astype(np.int32)
    return [
        peft_trainer.TrainingInput(input_tokens=each, input_mask=np.ones_like(each, bool))
        for each in tokens
    ]


def make_config(**others):
    given = {"gradient_accumulation_steps": EVERY, "eval_every_n_steps": 100, **others}
    return peft_trainer.TrainingConfig(**given)


def make_tx(**others):
    given = {"rank": 16, "accumulation_steps": EVERY, **others}
    return flora_jax.flora(0.1, **given)


def make_trainer(model, tx, **others):
    return PeftTrainer(model, tx, make_config(**others)).with_gen_model_input_fn(model_input)


def params_of(model):
    return nnx.as_pure(nnx.state(model, nnx.Param))


def by_hand(tx, batches, model=None):
    """The ordinary route: full gradients, full updates, no trainer."""
    model = make_model() if model is None else model
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(pure, batch):
        held = jax.tree.map(lambda x: x, params)
        nnx.update(held, pure)
        return peft_trainer._default_loss_fn(nnx.merge(graph, held, rest), **model_input(batch))

    @jax.jit
    def step(pure, state, batch):
        value, grads = jax.value_and_grad(loss)(pure, batch)
        updates, state = tx.update(grads, state, pure)
        return optax.apply_updates(pure, updates), state, value

    pure = nnx.as_pure(params)
    state, values = tx.init(pure), []
    for batch in batches:
        pure, state, value = step(pure, state, batch)
        values.append(float(value))
    return pure, values


def assert_close(found, expected, rtol=2e-4):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(np.asarray(other, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), atol=rtol * scale
        )


def losses(trainer):
    return [float(x) for x in trainer.metrics_logger.get_metric_history("", "loss", "train")]


def test_the_page(tmp_path):
    """Its first lines train: the steps are those made by hand, the log counts optimizer steps, and the state is what is planned."""
    names = {
        "folder": str(tmp_path),
        "model": make_model(),
        "model_input": model_input,
        "batches": make_batches(80),
    }
    exec(BLOCKS[0], names)
    trainer, tx = names["trainer"], names["tx"]
    expected, values = by_hand(tx, make_batches(80))
    assert_close(params_of(names["model"]), expected, 2e-3)
    assert trainer.train_steps == 20 and trainer.iter_steps == 80
    logged = losses(trainer)
    np.testing.assert_allclose(logged, np.mean(np.reshape(values, (20, EVERY)), 1), rtol=1e-3)
    assert logged[-1] < logged[0] - 0.3
    projection = flora_jax.Projection(16, resample_every=EVERY)
    plan = flora_jax.plan(params_of(names["model"]), projection, accumulation_steps=EVERY)
    state = jax.tree.leaves(nnx.as_pure(trainer.optimizer.opt_state))
    count = 4  # of the schedule
    assert sum(x.nbytes for x in state) == plan.state_bytes["Flora"] + count


def test_the_rate_in_the_log():
    """The rate of Adafactor inside is logged once for each optimizer step; Tunix writes it during the next one."""
    schedule = optax.linear_schedule(0.02, 0.0, 4)
    names = {"schedule": schedule}
    exec("import flora_jax, optax\n" + BLOCKS[1], names)
    trainer = make_trainer(make_model(), names["tx"], max_steps=3)
    trainer.train(make_batches(12))
    logged = trainer.metrics_logger.get_metric_history("", "learning_rate", "train")
    np.testing.assert_allclose(
        logged, [0.015, 0.01, 0.01], rtol=1e-6
    )  # a step late, the last is not


def test_a_checkpoint_between_two_optimizer_steps_resumes(tmp_path):
    """Ten micro-batches, a new process' worth of objects, and six more are sixteen in one go."""
    options = ocp.CheckpointManagerOptions(save_interval_steps=1000)
    others = {"checkpoint_root_directory": str(tmp_path), "checkpointing_options": options}
    batches = make_batches()
    whole = make_model()
    make_trainer(whole, make_tx()).train(batches)
    make_trainer(make_model(), make_tx(), **others).train(batches[:10])
    resumed = make_model()
    trainer = make_trainer(resumed, make_tx(), **others)
    assert (trainer.train_steps, trainer.iter_steps) == (2, 10)
    trainer.train(batches)
    assert (trainer.train_steps, trainer.iter_steps) == (4, 16)
    for one, other in zip(
        jax.tree.leaves(params_of(resumed)), jax.tree.leaves(params_of(whole)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_mesh(tmp_path):
    """Four devices for fsdp times two for tensor parallelism: one device's losses, a sharded state, and its checkpoint resumes."""
    _, values = by_hand(make_tx(), make_batches())
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    folder = {"checkpoint_root_directory": str(tmp_path)}
    with mesh:
        model = _sharded_model()
        trainer = make_trainer(model, make_tx(), **folder)
        trainer.train(make_batches(8))
        trainer = make_trainer(_sharded_model(), make_tx(), **folder)
        assert trainer.train_steps == 2
        trainer.train(make_batches())
    np.testing.assert_allclose(
        losses(trainer), np.mean(np.reshape(values, (4, EVERY)), 1)[2:], rtol=2e-3
    )
    state = nnx.as_pure(trainer.optimizer.opt_state)
    large = [x for x in jax.tree.leaves(state) if x.size >= 16 * 128]
    assert large and all(x.addressable_shards[0].data.size < x.size for x in large)


@nnx.jit
def _sharded_model():
    model = make_model()
    state = nnx.state(model)
    nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
    return model


def test_lora():
    """The LoRA params alone change, as in the same steps made by hand."""

    def make():
        provider = qwix.LoraProvider(module_path=".*(q_einsum|gate_proj|up_proj)", rank=4, alpha=8)
        return qwix.apply_lora_to_model(
            make_model(), provider, rngs=nnx.Rngs(1), **_example(make_batches(1)[0])
        )

    model = make()
    trainer = make_trainer(model, make_tx())
    trainer.train(make_batches(8))
    before, after = make(), model
    same = jax.tree.map(
        np.array_equal, params_of(before), params_of(after)
    )  # with the LoRA params, which are params
    changed = {path for path, equal in jax.tree_util.tree_leaves_with_path(same) if not equal}
    lora = {
        path
        for path, _ in jax.tree_util.tree_leaves_with_path(
            nnx.as_pure(nnx.state(model, nnx.LoRAParam))
        )
    }
    assert changed and changed <= lora


def _example(batch):
    given = model_input(batch)
    return {
        "last_tokens": given["input_tokens"],
        "positions": given["positions"],
        "cache": None,
        "attention_mask": given["attention_mask"],
    }


def test_auxiliary_data_and_bfloat16():
    """A loss with auxiliary data, bfloat16 params rounded stochastically: the loss falls."""
    seen = []

    class Trainer(PeftTrainer):
        def _post_process_train_step(self, aux):
            seen.append(float(aux["tokens"]))

    def loss(model, **given):
        return peft_trainer._default_loss_fn(model, **given), {"tokens": given["input_mask"].sum()}

    model = make_model(jnp.bfloat16)
    tx = flora_jax.flora(0.5, rank=16, accumulation_steps=EVERY)
    trainer = Trainer(model, tx, make_config(), rounding="stochastic")
    trainer.with_gen_model_input_fn(model_input).with_loss_fn(loss, has_aux=True)
    trainer.train(make_batches(32))
    assert seen == [128.0] * 32
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1


def test_no_full_gradient_exists():
    """Of no compressed weight of this model is the gradient ever whole."""
    graph, params, rest = nnx.split(make_model(), nnx.Param, ...)

    def loss(pure, batch):
        held = jax.tree.map(lambda x: x, params)
        nnx.update(held, pure)
        return peft_trainer._default_loss_fn(nnx.merge(graph, held, rest), **model_input(batch))

    grad_fn = flora_jax.value_and_grad(loss, flora_jax.Projection(16))
    assert not grad_fn.plan(nnx.as_pure(params), make_batches(1)[0]).whole_uses


def test_the_distillation_trainer_inherits_it():
    names = {"PeftTrainer": PeftTrainer}
    exec(BLOCKS[2], names)
    assert names["Distillation"]._train_step is PeftTrainer._train_step


@pytest.mark.parametrize("count", (1, 2))
def test_two_numbers_of_micro_batches_are_refused(count):
    with pytest.raises(ValueError, match=rf"gradient_accumulation_steps=4 .* found .*={count}"):
        make_trainer(make_model(), make_tx(accumulation_steps=count))


def test_a_schedule_of_micro_batches_is_refused():
    static = set(inspect.signature(flora_jax.flora).parameters) - {"learning_rate"}
    make = optax.inject_hyperparams(flora_jax.flora, static_args=static)
    tx = make(learning_rate=optax.constant_schedule(0.01), rank=16, accumulation_steps=EVERY)
    with pytest.raises(ValueError, match="must have inject_hyperparams inside"):
        make_trainer(make_model(), tx)
