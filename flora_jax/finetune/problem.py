"""Problem: the model, the method, and the shapes of all that a run holds.

In the shape descriptions `B` is a micro-batch, `T` a sequence, `K` the tokens of a sequence whose loss counts.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flora_jax.finetune import layout, methods, sizes
from flora_jax.finetune.settings import Settings
from flora_jax.models import decoder, families, gpt2
from flora_jax.models.config import shape_of
from flora_jax.sharding.state import state_shardings

ARRAYS = ("tokens", "segments", "positions")
"""The arrays of a micro-batch that are `(B, T)`."""
SCORED = ("targets", "weights", "places")
"""Those that are `(B, K)`: the tokens that count, their weights and their places in the sequence."""
ROUND = 64
"""`K` is a multiple of this."""


class Problem(NamedTuple):
    """A model and a method on a mesh.

    Attributes:
      settings: The settings.
      mesh: The mesh.
      model: The Flax module.
      outline: The shapes of its params, with shardings.
      method: The method.
      steps: The number of optimizer steps.
      scored: `K`, the most tokens of a sequence whose loss counts; logits of others are not computed.
    """

    settings: Settings
    mesh: Mesh
    model: Any
    outline: Any
    method: methods.Method
    steps: int
    scored: int

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a micro-batch."""
        size, length = self.settings.rows, self.settings.length
        place = layout.of_batch(self.mesh, size)
        lengths = {**dict.fromkeys(ARRAYS, length), **dict.fromkeys(SCORED, self.scored)}
        shapes = {
            name: jax.ShapeDtypeStruct(
                (size, n), jnp.float32 if name == "weights" else jnp.int32, sharding=place
            )
            for name, n in lengths.items()
        }
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return {**shapes, "share": jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)}

    def started(self) -> tuple[Any, Any]:
        """Returns the shapes of the frozen params and of the state, with shardings."""
        frozen, state = jax.eval_shape(self.method.init, self.outline, self.batch())
        if frozen is not None:
            frozen = self.outline
        return frozen, self._placed(state)

    def _placed(self, state: Any) -> Any:
        """Gives each leaf of the state the sharding that follows from those of the params."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        put = lambda x, s=everywhere: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        if "params" not in state or self.mesh.size == 1:
            return jax.tree.map(put, state)
        placed = {name: jax.tree.map(put, part) for name, part in state.items()}
        placed["params"] = self.outline
        found = jax.tree.leaves(state_shardings(self.method.tx, self.outline))
        leaves, structure = jax.tree.flatten(state.get("opt_state"))
        if len(found) == len(leaves):
            placed["opt_state"] = jax.tree.unflatten(structure, map(put, leaves, found))
        return placed

    def measured(self) -> sizes.Sizes | None:
        """Compiles the step and returns what it takes; None where the compiler runs out of the device's memory."""
        frozen, state = self.started()
        batch = self.batch()
        with jax.set_mesh(self.mesh):
            lowered = self.method.lower(frozen, state, batch)
            try:
                return sizes.measure(lowered, frozen, state, batch)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return None


def shape_for(settings: Settings, config: dict[str, Any], mesh: Mesh) -> Any:
    """Returns the shape of the model of a `config.json`, as this run trains it.

    Raises:
      ValueError: The model is none that writes text, or asks for what the models here have not.
    """
    kind: Any = settings.dtype
    if kind == "auto":
        kind = "float32" if jax.default_backend() == "cpu" else None
    shape = shape_of(config, kind)
    if not isinstance(shape, decoder.Shape | gpt2.Shape):
        raise ValueError(
            f"model must be a decoder to be fine-tuned, found model_type {shape.model_type!r}"
        )
    limit = shape.positions if isinstance(shape, gpt2.Shape) else None
    if limit is not None and settings.length > limit:
        raise ValueError(
            f"length must be at most {limit}, the positions of this model, found {settings.length}"
        )
    over: tuple[Any, ...] = ()
    if mesh.size > 1:
        over = (layout.BATCH, "model") if isinstance(shape, decoder.Shape) else (layout.BATCH,)
        if isinstance(shape, decoder.Shape) and shape.key_heads % mesh.shape["model"]:
            raise ValueError(
                f"mesh: model must divide the {shape.key_heads} key heads of this model, found "
                f"{mesh.shape['model']}"
            )
    return dataclasses.replace(shape, remat=settings.remat, sharded=over)


def problem(
    settings: Settings, config: dict[str, Any], mesh: Mesh, steps: int, most: int
) -> Problem:
    """Returns the model and the method that the settings ask for; nothing is compiled or read.

    Args:
      settings: The settings.
      config: The model's configuration.
      mesh: The mesh.
      steps: The number of optimizer steps.
      most: The most tokens of a sequence whose loss counts.
    """
    if settings.rows % layout.parts(mesh):
        raise ValueError(
            f"batch must be a multiple of the mesh's data x fsdp, {layout.parts(mesh)}, found {settings.rows}"
        )
    model = families.module(shape_for(settings, config, mesh))
    outline = families.outline(model)
    outline = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        outline,
        layout.of_params(mesh, outline),
    )
    method = methods.build(settings, partial(loss, model), model, outline, steps)
    scored = min(settings.length, -(-most // ROUND) * ROUND)
    return Problem(settings, mesh, model, outline, method, steps, scored)


def loss(model: Any, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns a micro-batch's part of the mean loss of an optimizer step, nats a token that counts.

    The mean over the micro-batches of a step is the mean over all of its tokens: `share` is the part of
    the step's tokens that are in this micro-batch, times the number of micro-batches.
    """
    found: Any = model.apply(
        {"params": params},
        batch["tokens"],
        batch["targets"],
        batch["weights"],
        positions=batch["positions"],
        segments=batch["segments"],
        places=batch["places"],
    )
    return found * batch["share"]


def put(given: Problem, batch: dict[str, np.ndarray], share: float) -> dict[str, jax.Array]:
    """Returns a micro-batch on the devices.

    Args:
      given: The problem.
      batch: The arrays `(B, T)` of the data.
      share: The part of the optimizer step's tokens that count that are in this micro-batch, times the micro-batches.
    """
    shapes = given.batch()
    arrays = {name: batch[name] for name in ARRAYS} | _scored(batch, given.scored)
    arrays["share"] = np.asarray(share)
    return {
        name: layout.put(shapes[name].sharding, np.asarray(array, shapes[name].dtype))
        for name, array in arrays.items()
    }


def _scored(batch: dict[str, np.ndarray], most: int) -> dict[str, np.ndarray]:
    """Returns places, targets and weights `(B, most)` of the tokens that count, those that do first."""
    places = np.argsort(batch["weights"] == 0, axis=1, kind="stable")[:, :most]
    picked = {name: np.take_along_axis(batch[name], places, 1) for name in ("targets", "weights")}
    return {**picked, "places": places}
