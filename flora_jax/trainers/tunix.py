"""Tunix: its trainers, with gradients that are compressed in the backward pass and accumulated once.

    config = TrainingConfig(gradient_accumulation_steps=4, eval_every_n_steps=100, max_steps=1000)
    tx = flora_jax.flora(1e-2, rank=256, accumulation_steps=4)
    PeftTrainer(model, tx, config).train(data)

This needs `google-tunix`; the versions that were tested are those of 0.1.
"""

# pyright: reportMissingImports=false

import dataclasses
import functools
from typing import Any

import jax
import optax
from flax import nnx
from jax.interpreters import pxla
from tunix.sft import peft_trainer, profiler

from flora_jax.chain import recorder
from flora_jax.rounding import Rounding, check
from flora_jax.trainers import nnx as of_nnx
from flora_jax.trainers import signatures

ITERATIONS = "flora_iter_steps"
"""The number of micro-batches so far, in what a checkpoint has of its own."""
CALLED = {
    f"PeftTrainer.{name}": (peft_trainer.PeftTrainer, name, arguments)
    for name, arguments in {
        "_train_step": ("self", "model", "optimizer", "inputs"),
        "_save_last_checkpoint": ("self",),
        "_try_get_learning_rate": ("self",),
        "custom_checkpoint_metadata": ("self",),
        "jit_train_and_eval_step": ("self", "skip_jit", "cache_nnx_graph"),
    }.items()
}
"""What is overridden here, with the arguments that it has in the version that this was written for."""

signatures.check("google-tunix", CALLED)


class PeftTrainer(peft_trainer.PeftTrainer):
    """Is Tunix' trainer, which never has a full gradient of a compressed weight here, nor full updates.

    Tunix' other trainers become so by a class `class Distillation(PeftTrainer, DistillationTrainer)`.

    `gradient_accumulation_steps` means what it does in Tunix: its steps, its schedule, its log and its
    checkpoints count optimizer steps. But the micro-batches are summed by the optimizer, as sketches; no `optax.MultiSteps` is put around it. A
    checkpoint made between two optimizer steps resumes there. The gradient's norm in the log is that of the sketches, whose square is an unbiased estimate.

    Args:
      model: The module. With LoRA, as Tunix has it, its LoRA params alone are trained.
      optimizer: A chain with a `project`, such as `flora_jax.flora`, that accumulates as many micro-batches as `training_config` says.
      training_config: The configuration of Tunix.
      *others: Further arguments of the trainer.
      rounding: How new bfloat16 params are rounded, as in `flora_jax.make_train_step`.
      donate_model: Whether the buffers of the model may be overwritten, where Tunix keeps the old params beside the new ones. Say no
        where something else holds the same arrays, such as a rollout.

    Raises:
      ValueError: The optimizer accumulates another number of micro-batches than the configuration says, or its schedule would count micro-batches.
    """

    def __init__(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        training_config: Any,
        *others: Any,
        rounding: Rounding = "nearest",
        donate_model: bool = True,
        **named: Any,
    ):
        check(rounding)
        steps = training_config.gradient_accumulation_steps or 1
        wrt = nnx.LoRAParam if peft_trainer.utils.is_lora_enabled(model) else nnx.Param
        params = nnx.as_pure(nnx.state(model, wrt))
        self._projection, count = recorder.settings(optimizer, params)
        _check_steps(optimizer, params, count, steps)
        self._rounding: Rounding = rounding
        self._donate_model, self._wrt = donate_model, wrt
        mesh = pxla.thread_resources.env.physical_mesh
        own = of_nnx.own_axis_names(optimizer, model, wrt, mesh)
        alone = dataclasses.replace(training_config, gradient_accumulation_steps=None)
        super().__init__(model, own, alone, *others, **named)
        self.config = training_config
        self.optimizer.tx = optimizer
        before = self._train_steps * steps
        self._iter_steps = self._restored_custom_metadata.get(ITERATIONS, before)
        most = self.config.max_steps
        self._prof = profiler.Profiler(
            initial_step=self._iter_steps,
            max_step=None if most is None else most * steps,
            profiler_options=self.config.profiler_options,
        )

    def _train_step(self, model: Any, optimizer: Any, inputs: Any) -> tuple[Any, Any, Any]:
        gradient = of_nnx.value_and_grad(
            self.loss_fn, self._projection, wrt=self._wrt, has_aux=self._has_aux
        )
        found, grads = gradient(model, cycle=optimizer, **self.gen_model_input_fn(inputs))
        value, aux = found if self._has_aux else (found, None)
        norm = of_nnx.gradient_norm(grads)
        of_nnx.apply_gradients(model, optimizer, grads, rounding=self._rounding)
        return value, aux, norm

    def jit_train_and_eval_step(self, skip_jit: bool = False, cache_nnx_graph: bool = False) -> Any:
        made = self._jitted_train_step_fn is None
        steps = super().jit_train_and_eval_step(skip_jit, cache_nnx_graph)
        if made and not skip_jit and self._donate_model:
            names = ("model", "optimizer")
            step = nnx.jit(self.create_train_step_fn(), donate_argnames=names)
            bind = nnx.cached_partial if cache_nnx_graph else functools.partial
            self._jitted_train_step_fn = functools.partial(bind(step, self.model, self.optimizer))
            steps = self._jitted_train_step_fn, self._jitted_eval_step_fn
        return steps

    def custom_checkpoint_metadata(self) -> dict[str, Any]:
        """Returns what Tunix' trainer saves, and the number of micro-batches so far."""
        return {**super().custom_checkpoint_metadata(), ITERATIONS: self._iter_steps}

    def _save_last_checkpoint(self) -> None:
        """Saves also what Tunix leaves out of the last checkpoint: the number of micro-batches."""
        latest = self.checkpoint_manager.latest_step()
        if latest is None or latest < self._train_steps:
            self.checkpoint_manager.save(
                self._train_steps,
                self.model,
                self.optimizer,
                save_only_lora_params=self._lora_enabled,
                force=True,
                custom_metadata=self.custom_checkpoint_metadata(),
            )

    def _try_get_learning_rate(self) -> Any:
        """Returns the rate that `optax.inject_hyperparams` keeps, wherever in the chain it is."""
        for node in _nodes(nnx.as_pure(self.optimizer.opt_state)):
            if "learning_rate" in node.hyperparams:
                return node.hyperparams["learning_rate"]
        return None


def _nodes(state: Any) -> list[Any]:
    """Returns the states of `optax.inject_hyperparams`."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "hyperparams"))
    return [node for node in leaves if hasattr(node, "hyperparams")]


def _check_steps(tx: optax.GradientTransformation, params: Any, count: Any, steps: int) -> None:
    if count != steps:
        raise ValueError(
            f"optimizer must accumulate the gradient_accumulation_steps={steps} of training_config, found "
            f"accumulation_steps={count if isinstance(count, int) else 'a schedule'}"
        )
    outer = jax.eval_shape(tx.init, params)
    if steps > 1 and any(getattr(outer, "hyperparams_states", ())):
        raise ValueError(
            "optimizer must have inject_hyperparams inside, where it counts optimizer steps, as in "
            "flora(None, optimizer=inject_hyperparams(adafactor)(learning_rate=schedule), …), found it around the chain"
        )
