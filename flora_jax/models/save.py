"""Writes Hugging Face checkpoints, which `load` and torch's `transformers` read.

save(Path("mine"), model, params)
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from flora_jax.models.checkpoint import INDEX, ONE, layout_of
from flora_jax.models.config import FILE, config_of
from flora_jax.models.families import outline


def save(folder: Path, model: Any, params: Any, shard_bytes: int = 5 * 10**9) -> None:
    """Writes a checkpoint; the folder appears when all of it is written.

    Args:
      folder: The folder to make.
      model: A module of this package, with its layers stacked.
      params: Its params.
      shard_bytes: The most bytes of a file; weights that are more go to several.

    Raises:
      ValueError: The folder is there already; the params do not fit the model; the model has an option for
        which Hugging Face's configuration has no entry.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; give another folder")
    config = config_of(model.shape)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / FILE).write_text(json.dumps(config, indent=2))
    shards = list(_shards(_theirs(model, params), shard_bytes))
    if len(shards) == 1:
        save_file(shards[0], partial / ONE, {"format": "pt"})
    else:
        where, total = {}, 0
        for i, shard in enumerate(shards):
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, partial / name, {"format": "pt"})
            where |= dict.fromkeys(shard, name)
            total += sum(x.nbytes for x in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (partial / INDEX).write_text(json.dumps(index, indent=2))
    for file in partial.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    partial.rename(folder)


def _theirs(model: Any, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Gives the checkpoint's names and arrays, one at a time."""
    rules = layout_of(model.shape).rules(model.shape)
    found: dict[str, Any] = flatten_dict(params, sep="/")  # pyright: ignore[reportAssignmentType]
    expected: dict[str, Any] = flatten_dict(outline(model), sep="/")  # pyright: ignore[reportAssignmentType]
    if found.keys() != rules.keys():
        odd = sorted(found.keys() ^ rules.keys())[0]
        state = "missing" if odd in rules else "not one of the model's"
        raise ValueError(f"params: {odd!r} is {state}")
    for path, rule in rules.items():
        array = np.asarray(found[path])
        if array.shape != expected[path].shape:
            raise ValueError(
                f"params: {path!r} must have shape {expected[path].shape}, found {array.shape}"
            )
        if "{i}" not in rule.name:
            yield rule.name, np.ascontiguousarray(rule.theirs(array))
            continue
        for i, layer in enumerate(array):
            yield rule.name.format(i=i), np.ascontiguousarray(rule.theirs(layer))


def _shards(arrays: Iterator[tuple[str, np.ndarray]], most: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, array in arrays:
        if shard and sum(x.nbytes for x in shard.values()) + array.nbytes > most:
            yield shard
            shard = {}
        shard[name] = array
    yield shard
