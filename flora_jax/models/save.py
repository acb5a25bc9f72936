"""Writes Hugging Face checkpoints, which `load` and torch's `transformers` read.

save("mine", model, params, like="gemma-3-270m")
"""

import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from flora_jax.models import gguf_model
from flora_jax.models.checkpoint import INDEX, ONE, Piece, layout_of, pieces
from flora_jax.models.config import FILE, config_of, read, shape_of
from flora_jax.models.families import outline
from flora_jax.models.folder import copy_companions, files_of
from flora_jax.models.tensor_file import (
    Tensor,
    bytes_of,
    in_order,
    kind_of,
    sync,
    tensors_of,
    write,
)

_Files = dict[str, list[Tensor]]


def save(
    folder: str | Path,
    model: Any,
    params: Any,
    like: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a checkpoint; the folder appears when all of it is on the disk.

    Beside the params the host holds one tensor at a time. Where several processes hold the params, all of them call
    this, and the first one writes.

    Args:
      folder: The folder to make.
      model: A module of this package.
      params: Its params; arrays of numpy or of jax, on any devices.
      like: The checkpoint that was loaded. Of a folder all is kept but the weights: the configuration (but for the
        dtype), which file has which tensor, the tokenizer, and all other files that are not weights in another format.
        A `.gguf` file gives its tokenizer and chat template.
      shard_bytes: The most bytes of a file, where `like` does not say which has what; weights that are more go to several.

    Raises:
      ValueError: The folder is there already or lies in `like`; the params do not fit the model, or the model not
        `like`; the model has an option for which Hugging Face's configuration has no entry.
      OSError: The disk is full, or the folder cannot be written; then nothing is left of it.
    """
    folder, like = Path(folder), None if like is None else Path(like)
    if not _all_well(not folder.exists()):
        raise ValueError(f"{folder} is there already; give another folder")
    if like is not None and like.resolve() in folder.resolve().parents:
        raise ValueError(f"{folder} lies in {like}, which it is made from; give another folder")
    config = _config(model, like)
    weights = _theirs(model, params)
    index: dict[str, Any] = {}
    if like is None or like.is_file():
        files = _shards(weights, shard_bytes)
    else:
        files, index = _as_in(like, model, weights)
    files = {name: in_order(tensors) for name, tensors in files.items()}
    arrays = (tensor.read() for tensors in files.values() for tensor in tensors)
    failure = None
    if jax.process_index() == 0:
        try:
            _write(folder, like, config, files, index, arrays)
        except OSError as error:
            failure = error
    for _ in arrays if jax.process_count() > 1 else ():  # what others gather, all do
        pass
    if not _all_well(failure is None) and failure is None:
        raise OSError(f"{folder} could not be written by the first process")
    if failure is not None:
        raise _said(failure, folder, files) from failure


def _all_well(well: bool) -> bool:
    """Returns what the first process says."""
    if jax.process_count() == 1:
        return well
    return bool(multihost_utils.broadcast_one_to_all(np.int32(well)))


def _said(error: OSError, folder: Path, files: _Files) -> OSError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return OSError(f"{folder} cannot be written: {error.strerror}; nothing of it is left")
    size = sum(bytes_of(tensor) for tensors in files.values() for tensor in tensors)
    return OSError(
        f"the disk is full: {folder} needs {size / 1e9:.2f} GB for its weights; nothing of it is left"
    )


def _write(
    folder: Path,
    like: Path | None,
    config: dict[str, Any],
    files: _Files,
    index: dict[str, Any],
    arrays: Iterator[np.ndarray],
) -> None:
    """Writes all beside the folder's final place, and renames it."""
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        if like is not None:
            (_from_gguf if like.is_file() else copy_companions)(like, beside)
        _write_json(beside / FILE, config)
        if index or len(files) > 1:
            tensors = [(name, x) for name, found in files.items() for x in found]
            about = index.get("metadata", {}) | {"total_size": sum(bytes_of(x) for _, x in tensors)}
            where = index.get("weight_map", {}) | {x.name: name for name, x in tensors}
            _write_json(beside / INDEX, {**index, "metadata": about, "weight_map": where})
        for name, tensors in files.items():
            write(beside / name, tensors, arrays)
        _keep(beside)
        beside.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _from_gguf(file: Path, folder: Path) -> None:
    from flora_jax.models.gguf_tokenizer import read_tokenizer, write_tokenizer

    write_tokenizer(read_tokenizer(file), folder)


def _write_json(file: Path, entries: dict[str, Any]) -> None:
    file.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _keep(folder: Path) -> None:
    """Waits until all files and folders are on the disk."""
    for file in (*folder.rglob("*"), folder):
        sync(file)


def _config(model: Any, like: Path | None) -> dict[str, Any]:
    """Returns the entries of `config.json`."""
    if like is None:
        return config_of(model.shape)
    if like.is_file():
        config, _ = gguf_model.opened(like)
        _require_like(model, config, like)
        kept = {x: config[x] for x in config if x in gguf_model.KEPT}
        return config_of(model.shape) | kept
    config = read(like)
    _require_like(model, config, like)
    dtype = np.dtype(model.shape.dtype).name
    names = [name for name in ("dtype", "torch_dtype") if name in config]
    if not names and dtype != "float32":
        names = ["dtype"]
    return config | dict.fromkeys(names, dtype)


def _require_like(model: Any, config: dict[str, Any], like: Path) -> None:
    shape = shape_of(config, model.shape.dtype)
    for field in dataclasses.fields(shape):
        found, kept = getattr(model.shape, field.name, None), getattr(shape, field.name)
        if field.name not in ("remat", "scan", "sharded") and found != kept:
            raise ValueError(
                f"the model must be that of {like}, whose {field.name} is {kept!r}, found {found!r}"
            )


def _theirs(model: Any, params: Any) -> list[Tensor]:
    """Returns the checkpoint's tensors; each is gathered when it is read."""
    found: dict[str, Any] = flatten_dict(params, sep="/")  # pyright: ignore[reportAssignmentType]
    expected: dict[str, Any] = flatten_dict(outline(model), sep="/")  # pyright: ignore[reportAssignmentType]
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())[0]
        state = "missing" if odd in expected else "not one of the model's"
        raise ValueError(f"params: {odd!r} is {state}")
    for path, leaf in expected.items():
        if found[path].shape != leaf.shape:
            raise ValueError(
                f"params: {path!r} must have shape {leaf.shape}, found {found[path].shape}"
            )
    return [_tensor(piece, found[piece.path]) for piece in pieces(model.shape, expected)]


def _tensor(piece: Piece, leaf: Any) -> Tensor:
    part = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape[len(piece.at) :])
    shape = piece.rule.theirs(part).shape
    return Tensor(piece.name, kind_of(leaf.dtype), shape, partial(_read, piece, leaf))


def _read(piece: Piece, leaf: Any) -> np.ndarray:
    return piece.rule.theirs(_gathered(leaf, piece.at))


def _gathered(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    """Returns a part of an array, from wherever it is; the array keeps no copy of it on the host."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf[index])
    if index:
        leaf = leaf[index]
    if not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    shards = [shard.data for shard in leaf.addressable_shards]
    again = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    return np.asarray(again)


def _shards(tensors: list[Tensor], most: int) -> _Files:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + bytes_of(tensor) > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += bytes_of(tensor)
    if len(shards) == 1:
        return {ONE: shards[0]}
    count = len(shards)
    return {
        f"model-{i + 1:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards)
    }


def _as_in(like: Path, model: Any, weights: list[Tensor]) -> tuple[_Files, dict[str, Any]]:
    """Returns the files with the tensors that they have in `like`, and its index, if it has one.

    A tensor that the model has not is written as the one that it is a copy of, else as it was.
    """
    layout = layout_of(model.shape)
    new = {tensor.name: tensor for tensor in weights}
    old = {name: tensors_of(like / name) for name in files_of(like)}
    full = layout.full([name for tensors in old.values() for name in tensors])
    names = {name: whole for whole, name in full.items()}
    files: _Files = {}
    for file, tensors in old.items():
        files[file] = []
        for name, tensor in tensors.items():
            whole = names[name] if names[name] in new else layout.tied.get(names[name], "")
            files[file].append(new[whole]._replace(name=name) if whole in new else tensor)
    rest = new.keys() - full.keys()
    files[list(files)[-1]] += [tensor for name, tensor in new.items() if name in rest]
    index = json.loads((like / INDEX).read_text()) if (like / INDEX).exists() else {}
    return files, index
