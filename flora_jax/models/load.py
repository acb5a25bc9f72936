"""Reads Hugging Face checkpoints; neither torch nor transformers is needed.

    model, params = load(Path("t5-small"))

`save` writes them.
"""

import fnmatch
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from flora_jax.models.checkpoint import INDEX, ONE, layers_of, layout_of
from flora_jax.models.config import FAMILIES, FILE, read, shape_of
from flora_jax.models.families import module, outline


def load(folder: Path, dtype: Any = None) -> tuple[Any, dict[str, Any]]:
    """Reads a model and its params from a checkpoint.

    Args:
      folder: A folder with `config.json` and the weights.
      dtype: The dtype of the params; by default what the configuration says, or float32.

    Returns:
      The Flax module and the tree of its params, as numpy arrays.

    Raises:
      ValueError: A file is missing; the model is of another type, or has an option that the one here
        has not; a weight is missing, of another shape, or not known.
    """
    config = read(_file(folder, FILE))
    model = module(shape_of(config, dtype))
    with _Weights(folder, layout_of(model.shape).prefix) as weights:
        params = _read(model, FAMILIES[model.shape.model_type].architecture, weights)
    return model, params


class _Weights:
    """Holds the arrays of a checkpoint by name, each read when asked for."""

    def __init__(self, folder: Path, prefix: str):
        index, where = folder / INDEX, {}
        if index.exists():
            where = json.loads(index.read_text())["weight_map"]
            files = {name: _file(folder, name) for name in sorted(set(where.values()))}
        else:
            files = {ONE: _file(folder, ONE)}
        self.folder = folder
        self.open = {name: safe_open(file, framework="numpy") for name, file in files.items()}
        self.found: dict[str, tuple[Any, str]] = {}
        for handle in self.open.values():
            found = list(handle.keys())
            bare = prefix and not any(key.startswith(prefix) for key in found)
            self.found |= {
                f"{prefix}{key}" if bare and key != "lm_head.weight" else key: (handle, key)
                for key in found
            }
        for name in where:
            if name not in self.found and prefix + name not in self.found:
                raise ValueError(f"{name!r} is named by {index} and in none of its files")

    def __enter__(self) -> "_Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self.open.clear()
        self.found.clear()

    def get(self, name: str) -> np.ndarray:
        if name not in self.found:
            raise ValueError(f"weight {name!r} is missing in {self.folder}")
        handle, key = self.found[name]
        return handle.get_tensor(key)


def _read(model: Any, architecture: str, weights: _Weights) -> dict[str, Any]:
    layout = layout_of(model.shape)
    rules = layout.rules(model.shape)
    params, used = {}, set()
    leaves: dict[str, Any] = flatten_dict(outline(model), sep="/")  # pyright: ignore[reportAssignmentType]
    for path, leaf in leaves.items():
        rule = rules[path]
        stacked = "{i}" in rule.name
        layers = range(layers_of(model.shape, path))
        names = [rule.name.format(i=i) for i in layers] if stacked else [rule.name]
        array = np.empty(leaf.shape, leaf.dtype)
        for i, name in enumerate(names):
            used.add(name)
            if name not in weights.found:
                name = layout.copies.get(name, name)
            found = weights.get(name)
            expected = rule.theirs(array[i] if stacked else array).shape
            if found.shape != expected:
                raise ValueError(
                    f"weight {name!r} in {weights.folder} must have shape {expected}, found "
                    f"{found.shape}"
                )
            array[i if stacked else ...] = rule.ours(found)
        params[path] = array
    for name in weights.found.keys() - used:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in layout.needless):
            raise ValueError(f"weight {name!r} in {weights.folder} is not one of {architecture}")
    return unflatten_dict(params, sep="/")


def _file(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{file} is missing; a checkpoint is a folder with {FILE} and {ONE}")
    return file
