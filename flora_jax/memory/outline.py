"""Outline: what a plan needs to know of a model, the shapes of its params and its stacks of layers."""

import dataclasses
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flora_jax.memory import chips
from flora_jax.models import config, families, t5, vit


@dataclass(frozen=True)
class Stack:
    """Describes equal layers, one after the other.

    Attributes:
      path: The path of the subtree of the params with its weights, each with the layers as first axis.
      layers: The number of layers.
      width: The width of the states between layers.
      hidden: The width of the feed-forward part.
      heads: The heads of attention.
      chunked: Whether attention goes over some hundred queries at a time, not all at once.
    """

    path: str
    layers: int
    width: int
    hidden: int
    heads: int
    chunked: bool = True

    def within(self, path: str) -> bool:
        """Returns whether a path of the params is in this stack."""
        return path.startswith(self.path + "/")


@dataclass(frozen=True)
class Outline:
    """Describes a model without its weights.

    Attributes:
      name: The model's name, for the reader.
      model: The Flax module.
      params: Its params, a nested dict of `jax.ShapeDtypeStruct`.
      stacks: Its stacks of layers.
      outputs: The number of logits for each token (or image).
      length: The tokens that the model makes of one input whatever it is told (a ViT's patches); None for
        as many as it is given.
    """

    name: str
    model: Any
    params: dict[str, Any]
    stacks: tuple[Stack, ...]
    outputs: int
    length: int | None = None

    def layers(self, stack: Stack) -> Any:
        """Returns the params of a stack."""
        return reduce(getitem, stack.path.split("/"), self.params)


def outline(shape: Any, name: str = "") -> Outline:
    """Returns the outline of a model of this shape; its name is by default the model type."""
    model = families.module(shape)
    of_images = isinstance(shape, vit.Shape)
    counts = {"layers": shape.layers}
    if isinstance(shape, t5.Shape):
        counts = {
            f"{part}/layers": shape.count(part == "decoder") for part in ("encoder", "decoder")
        }
    chunked = not (of_images or isinstance(shape, t5.Shape))
    return Outline(
        name or shape.model_type,
        model,
        families.outline(model),
        tuple(
            Stack(path, layers, shape.width, shape.hidden, shape.heads, chunked)
            for path, layers in counts.items()
        ),
        shape.classes if of_images else shape.vocabulary,
        shape.length if of_images else None,
    )


def named(name: str, dtype: Any = jnp.bfloat16, remat: bool = True) -> Outline:
    """Returns the outline of the model of this name in `flora_jax.models.config.NAMED`, in any case.

    Args:
      name: The name.
      dtype: The dtype of parameters and activations.
      remat: Whether the backward pass computes each layer again.

    Raises:
      ValueError: There is none.
    """
    name = chips.find("model", name, config.NAMED)
    return outline(dataclasses.replace(config.named(name, dtype), remat=remat), name)


QUANTIZED = ("quantization_config", "quantization", "compression_config")
"""Entries of a `config.json` that say that the weights are not what their dtype says."""


def read(file: str | Path, dtype: Any = jnp.bfloat16, remat: bool = True) -> Outline:
    """Returns the outline of the model of a `config.json`, or of a folder with one.

    Args:
      file: The file or its folder.
      dtype: The dtype of parameters and activations.
      remat: Whether the backward pass computes each layer again.

    Raises:
      ValueError: There is no such file, its weights are quantized, or it asks for what the models here have not.
    """
    found = config.read(file)
    for name in QUANTIZED:
        if entry := found.get(name):
            kind = entry.get("quant_method") if isinstance(entry, dict) else None
            bits = entry.get("bits") if isinstance(entry, dict) else None
            kind = kind or (f"{bits} bits" if bits else name)
            raise ValueError(
                f"config {str(file)!r} must be of unquantized weights, which are those that can be trained, found {kind}"
            )
    shape = dataclasses.replace(config.shape_of(found, dtype), remat=remat)
    return outline(shape, found.get("_name_or_path") or str(file))
