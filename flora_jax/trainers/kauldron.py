# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Kauldron: a training step whose gradients are compressed in the backward pass, and whose updates never exist in full.

    trainer = kd.train.Trainer(
        ..., optimizer=flora_jax.flora(1e-2, projection=projection), trainstep=TrainStep(projection=projection)
    )

This needs `kauldron`, at the version that the documentation's page names.
"""

import dataclasses
import functools
from typing import Any

import jax
from kauldron import kd, kontext
from kauldron.train import context as contexts
from kauldron.train import train_step as steps

from flora_jax.chain import recorder
from flora_jax.chain.project import cycle as cycle_of
from flora_jax.chain.projection import Projection, check_projection
from flora_jax.chain.sketch import is_sketch, without_cycle
from flora_jax.fused.value_and_grad import value_and_grad
from flora_jax.rounding import Rounding, check
from flora_jax.sharding.partition import constrain
from flora_jax.sharding.state import state_shardings
from flora_jax.trainers import signatures
from flora_jax.update.apply_gradients import apply_gradients

CALLED = {
    "TrainStep._step": (steps.TrainStep, "_step", ("self", "state", "batch")),
    "TrainStep._init_optimizer": (steps.TrainStep, "_init_optimizer", ("self", "state")),
    "forward_with_loss": (
        steps,
        "forward_with_loss",
        ("context", "model", "losses", "rngs", "is_training"),
    ),
    "Context.from_state_and_batch": (
        contexts.Context,
        "from_state_and_batch",
        ("state", "batch"),
    ),
}
"""What is overridden or called here, with the arguments that it has in the version that this was written for."""


signatures.check("kauldron", CALLED)


@dataclasses.dataclass(kw_only=True, eq=False, frozen=True)
class TrainStep(steps.TrainStep):
    """Is `kd.train.TrainStep`, with gradients that are compressed in the backward pass, and no tree of updates.

    Metrics and summaries of the loss, the batch, the predictions, the intermediates, the params and the optimizer's state are those of
    `kd.train.TrainStep`. `grads` has the entries of the sketches in the places of the gradients that are compressed: the
    square of their norm is an unbiased estimate of the square of the gradient's norm, and no other statistic of them is one
    of the gradient. `updates` do not exist, and what needs them is refused.

    The optimizer's state is laid out by the shapes of its own arrays and the layout of the params (`flora_jax.state_shardings`), unless
    `sharding.opt_state` of the trainer says how.

    Args:
      projection: The `Projection` of the optimizer. None leaves the step as Kauldron has it, all metrics included, and lays out the
        state alone.
      rounding: How new bfloat16 params are rounded, as in `flora_jax.make_train_step`.

    Raises:
      ValueError: An argument is not valid. On the first step: a metric or summary needs `updates`.
    """

    projection: Projection | None = None
    rounding: Rounding = "nearest"

    def __post_init__(self):
        if self.projection is not None:
            check_projection(self.projection)
        check(self.rounding)
        if self.projection is None and self.rounding != "nearest":
            raise ValueError(
                f"rounding must be 'nearest' without a projection, found {self.rounding!r}"
            )

    @functools.partial(jax.jit, static_argnames="self", donate_argnames="state")
    def _init_optimizer(self, state: steps.TrainState) -> steps.TrainState:
        return self._laid_out(super()._init_optimizer(state))

    def _step(self, state: steps.TrainState, batch: Any) -> tuple[Any, contexts.Context]:
        if self.projection is None:
            new, context = super()._step(state, batch)
            return self._laid_out(new), context
        self._refuse_updates()
        context = contexts.Context.from_state_and_batch(state=state, batch=batch)
        given = {
            "step": state.step,
            "batch": batch,
            "params": state.params,
            "opt_state": state.opt_state,
        }

        def loss(params: Any) -> tuple[Any, contexts.Context]:
            value, found = steps.forward_with_loss(
                context.replace(params=params),
                model=self.model,
                losses=self.aux.losses,
                rngs=self.rng_streams.train_rngs(state.step),
                is_training=True,
            )
            return value, found.replace(**dict.fromkeys(given))

        projection = recorder.restricted(
            self.projection, self.optimizer, state.opt_state, state.params
        )
        shardings = jax.tree.map(lambda x: x.sharding, self._outlines(state.params))
        gradient = value_and_grad(loss, projection, has_aux=True, shardings=shardings)
        (_, context), grads = gradient(state.params, cycle=cycle_of(state.opt_state))
        params, opt_state = apply_gradients(
            self.optimizer,
            without_cycle(grads),
            state.opt_state,
            state.params,
            shardings=shardings,
            rounding=self.rounding,
        )
        new = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            collections=context.collections,
        )
        context = self.aux.update_context(context.replace(grads=_entries(grads), **given))
        return self._laid_out(new), context

    def _outlines(self, params: Any) -> Any:
        """Returns shapes of the params, with the shardings that the trainer gives them; None where it gives none."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        return kd.sharding.with_sharding_constraint(shapes, self.sharding.params)

    def _laid_out(self, state: steps.TrainState) -> steps.TrainState:
        """Lays out the optimizer's state by its own shapes, where the trainer does not say how, and says it of all params."""
        params = self._outlines(state.params)
        if self.sharding.opt_state is not None or not all(
            x.sharding for x in jax.tree.leaves(params)
        ):
            return state
        shardings = state_shardings(self.optimizer, params)
        return state.replace(opt_state=jax.tree.map(constrain, state.opt_state, shardings))

    def _refuse_updates(self) -> None:
        for kind in ("metrics", "summaries"):
            for name, metric in getattr(self.aux, kind).items():
                if isinstance(metric, kd.metrics.SkipIfMissing):
                    continue
                paths = jax.tree.leaves(kontext.get_keypaths(metric))
                if any(str(path).split(".")[0].split("[")[0] == "updates" for path in paths):
                    raise ValueError(
                        f"{kind} {name!r} needs `updates`, which never exist in full with a projection; leave it out, or "
                        "wrap it in kd.metrics.SkipIfMissing"
                    )


def _entries(grads: Any) -> Any:
    """Returns the tree with the entries of sketches in the places of the sketches."""
    return jax.tree.map(lambda x: x.data if is_sketch(x) else x, grads, is_leaf=is_sketch)
