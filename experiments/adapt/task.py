"""A task that a model is adapted to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Task(NamedTuple):
    """A task that a model is adapted to.

    Attributes:
      params: Params before the adaptation.
      loss: `(params, batch) -> scalar`.
      batch: `step -> batch` of the training side.
      validation: `params -> loss` on examples that no step has seen.
      score: `params -> figures` on the test side.
      width: Width of the model.
      heads: Number of heads of its attention.
      layers: Number of layers for XGBLoRA.
      layer_of: LoRTA's name of a layer, from a leaf's path.
      about: A sentence on the data.
    """

    params: Any
    loss: Callable[[Any, Any], jax.Array]
    batch: Callable[[int], Any]
    validation: Callable[[Any], float]
    score: Callable[[Any], dict[str, float]]
    width: int
    heads: int
    layers: int
    layer_of: Callable[[str], str] | None
    about: str
