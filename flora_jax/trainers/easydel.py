# pyright: reportMissingImports=false
"""EasyDeL: its trainer with gradients that are compressed in the backward pass, and updates that never exist in full.

    trainer = Trainer(projection=projection, arguments=arguments, model=model, dataset_train=dataset)

The chain comes from `arguments.get_optimizer_and_scheduler`, as the documentation's page shows. This needs `easydel`, at the version that
the page names.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from easydel.trainers import Trainer as Base
from easydel.trainers import training_utils as utils
from eformer.serialization import Checkpointer
from eformer.serialization.checkpointer import find_latest_checkpoint
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flora_jax.chain import recorder
from flora_jax.chain.project import cycle as cycle_of
from flora_jax.chain.projection import Projection, check_projection
from flora_jax.chain.sketch import is_sketch, without_cycle
from flora_jax.fused.value_and_grad import value_and_grad
from flora_jax.rounding import Rounding, check
from flora_jax.trainers import signatures
from flora_jax.update.apply_gradients import apply_gradients

CALLED = {
    "Trainer.configure_functions": (Base, "configure_functions", ("self",)),
    "Trainer._configure_state": (Base, "_configure_state", ("self",)),
    "make_assertions_and_get_sizes": (
        utils,
        "make_assertions_and_get_sizes",
        ("batch", "gradient_accumulation_steps", "batch_partition_spec"),
    ),
    "update_metrics": (
        utils,
        "update_metrics",
        ("metrics", "learning_rate_fn", "step", "gradients"),
    ),
}
"""What is overridden or called here, with the arguments that it has in the version that this was written for."""


signatures.check("easydel", CALLED)


class Trainer(Base):
    """Is `ed.Trainer`, with a fused training step, and with an optimizer's state that is there after a resumption.

    EasyDeL reads the state back by the rules for weights, which fail where a moment has fewer axes than its weight, as in Adafactor; it then goes
    on with an empty state, silently. Here such a state is read whole and laid out afterwards.

    Losses, learning rates and all that EasyDeL logs are kept. The norms of gradients are those of the sketches, whose squares are unbiased
    estimates of the squares of the gradients' own.

    Args:
      projection: The `Projection` of the chain that `arguments.get_optimizer_and_scheduler` returns; None leaves the step as
        EasyDeL has it.
      rounding: How new bfloat16 params are rounded, as in `flora_jax.make_train_step`.
      **others: The arguments of `ed.Trainer`.

    Raises:
      FileNotFoundError: A run was resumed without its optimizer's state, and the checkpoint is gone.
      ValueError: An argument is not valid; `arguments.gradient_accumulation_steps` is not 1, since the chain accumulates; or the arguments ask for
        quantization with straight-through gradients.
    """

    def __init__(
        self, *, projection: Projection | None = None, rounding: Rounding = "nearest", **others: Any
    ):
        if projection is not None:
            check_projection(projection)
        check(rounding)
        if projection is None and rounding != "nearest":
            raise ValueError(f"rounding must be 'nearest' without a projection, found {rounding!r}")
        self.projection = projection
        self.rounding: Rounding = rounding
        super().__init__(**others)

    def _configure_state(self) -> None:
        if self._resumed_from_checkpoint and self.model_state.opt_state is None:
            self.model_state = self.model_state.replace(opt_state=self._saved_state())
        super()._configure_state()

    def _saved_state(self) -> Any:
        """Returns the optimizer's state of the latest checkpoint, whole on every device."""
        folder = str(self.arguments._get_save_directory(create=False))
        path = find_latest_checkpoint(folder)
        if path is None:
            raise FileNotFoundError(
                f"{folder!r} must have the checkpoint that the run was resumed from, found none"
            )
        checkpointer = Checkpointer(base_path=path, save_interval=None, step_policies=[])
        opt_state, _ = checkpointer.load_pytree(
            mesh=self.model.mesh,
            path=path,
            partition_rules=((".*", PartitionSpec()),),
            prefix="tx",
            load_treedef=True,
            template=jax.eval_shape(self.tx.init, self.model_state.graphstate),
        )
        return opt_state

    def configure_functions(self) -> Any:
        """Returns EasyDeL's functions, with the fused step in the place of its own where there is a projection."""
        if self.projection is None:
            return super().configure_functions()
        count = self.arguments.gradient_accumulation_steps
        if count != 1:
            raise ValueError(
                f"gradient_accumulation_steps must be 1, found {count}: the chain's accumulation_steps accumulates sketches"
            )
        functions = super().configure_functions()
        *_, straight_through = self._train_shared_fn_static_args
        if straight_through is not None:
            raise ValueError(
                "quantization with straight-through gradients must be off in the fused step, found "
                f"quantization_mode={self.arguments.quantization_mode!r}"
            )
        everywhere = NamedSharding(self.model.mesh, PartitionSpec())
        functions.sharded_training_step_function = jax.jit(
            functools.partial(_step, self.projection, self.rounding),
            static_argnums=(2, 3, 4, 5, 6),
            in_shardings=(self.state_shardings, everywhere),
            out_shardings=(self.state_shardings, everywhere),
            donate_argnums=0,
        )
        return functions


def _step(
    projection: Projection,
    rounding: Rounding,
    state: Any,
    batch: Any,
    loss_config: Any,
    schedule: Any,
    partition_spec: Any,
    count: int,
    straight_through: Any,
) -> tuple[Any, Any]:
    del straight_through
    *_, spec = utils.make_assertions_and_get_sizes(
        batch=batch, gradient_accumulation_steps=count, batch_partition_spec=partition_spec
    )
    batch = jax.lax.with_sharding_constraint(batch, NamedSharding(state.model.mesh, spec))

    def loss(params: Any) -> tuple[Any, Any]:
        module = state.merge(params)
        given = module.prepare_inputs_for_call(**batch)
        labels = given.pop("labels", None)
        outputs, metrics = module.compute_loss(labels=labels, loss_config=loss_config, **given)
        return outputs.loss, metrics

    pure, opt_state = _pure(state.graphstate), _pure(state.opt_state)
    taken = recorder.restricted(projection, state.tx, opt_state, pure)
    of = value_and_grad(loss, taken, has_aux=True)
    (value, metrics), grads = of(state.graphstate, cycle=cycle_of(opt_state))
    grads = _pure(grads)

    def update() -> Any:
        return apply_gradients(state.tx, without_cycle(grads), opt_state, pure, rounding=rounding)

    if loss_config is not None and loss_config.break_on_nan:
        new = jax.lax.cond(jnp.isnan(value), lambda: (pure, opt_state), update)
    else:
        new = update()
    entries = jax.tree.map(lambda x: x.data if is_sketch(x) else x, grads, is_leaf=is_sketch)
    metrics = utils.update_metrics(
        metrics=metrics,
        learning_rate_fn=schedule,
        step=state.step,
        gradients=_like(state.graphstate, entries),
    )
    state = state.replace(
        step=state.step + 1,
        graphstate=_like(state.graphstate, new[0]),
        opt_state=_like(state.opt_state, new[1]),
    )
    return state, metrics


def _pure(tree: Any) -> Any:
    """Returns a tree with the contents of variables in their places."""

    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    return jax.tree.map(lambda x: x.get_value() if is_variable(x) else x, tree, is_leaf=is_variable)


def _like(tree: Any, pure: Any) -> Any:
    """Returns a tree of variables with these arrays in them."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(pure))
