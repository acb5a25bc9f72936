"""Reads checkpoints of Hugging Face and of llama.cpp; neither torch nor transformers is needed.

    model, params = load("t5-small")

`save` writes them.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flora_jax.models import folder, gguf_model
from flora_jax.models.checkpoint import Layout, Piece, layout_of, pieces
from flora_jax.models.config import FAMILIES, shape_of
from flora_jax.models.families import module, outline
from flora_jax.models.tensor_file import FLOATS, Tensor

_SHOWN = 5
"""Weights that an error names."""
_COLUMNS = 64
_ALIGNMENT = 128
"""Bytes of whose multiples a buffer begins, so that the CPU's arrays take it as it is."""


def load(
    source: str | Path, dtype: Any = None, shardings: Any = None, scan: bool = True
) -> tuple[Any, dict[str, Any]]:
    """Reads a model and its params from a checkpoint.

    What the configuration asks for is compared with the headers of the files before a weight is read. Then
    one tensor is read at a time, converted, and put where it belongs: beside the params the host holds one tensor
    and, with shardings, what its devices get of one array.

    Args:
      source: A folder with `config.json` and `*.safetensors`, or a `.gguf` file, whose weights are dequantized.
      dtype: The dtype of the params; by default what the configuration says, or float32.
      shardings: A `jax.sharding.Sharding` of all params, a tree of them, or a function to it from the params'
        outline (a tree of `jax.ShapeDtypeStruct`); the params are jax arrays then, of which each process reads
        what its devices need.
      scan: Whether layers are stacked; else, where the model can have it, each has params of its own.

    Returns:
      The Flax module and the tree of its params, as numpy arrays where no shardings are given.

    Raises:
      ValueError: A file is missing or damaged; weights are quantized, or only there as pickles; the model is of
        another type, or has an option that the one here has not; a weight is missing, of another shape, or
        not known.
    """
    source = Path(source)
    config, found = opened(source)
    shape = shape_of(config, dtype)
    _refuse_huge(source, shape, found)
    model = module(shape if scan else _unrolled(shape))
    params = outline(model)
    leaves: dict[str, Any] = flatten_dict(params, sep="/")  # pyright: ignore[reportAssignmentType]
    parts = _parts(source, model, leaves, found)
    places: dict[str, Any] = dict.fromkeys(leaves)
    if shardings is not None:
        tree = shardings(params) if callable(shardings) else shardings
        places = flatten_dict(jax.tree.broadcast(tree, params), sep="/")  # pyright: ignore[reportAssignmentType]
    read = {path: _array(leaf, parts[path], places[path]) for path, leaf in leaves.items()}
    return model, unflatten_dict(read, sep="/")


def opened(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the configuration and the tensors by name, each of which is read when it is asked for.

    Raises:
      ValueError: A file is missing or damaged.
    """
    source = Path(source)
    return (gguf_model if source.is_file() else folder).opened(source)


_Parts = list[tuple[Piece, Tensor]]


def _unrolled(shape: Any) -> Any:
    if not hasattr(shape, "scan"):
        raise ValueError(f"the layers of a {shape.model_type} model are always stacked")
    return dataclasses.replace(shape, scan=False)


def _refuse_huge(source: Path, shape: Any, found: dict[str, Tensor]) -> None:
    """Refuses sizes beyond all that the files have, before anything of such a size is made."""
    most = max([len(found), *(size for tensor in found.values() for size in tensor.shape)])
    for name in ("vocabulary", "width", "hidden", "inner", "layers", "heads", "head_size"):
        size = getattr(shape, name, None)
        if size is not None and size > most:
            raise ValueError(
                f"the configuration of {source} asks for {name} {size}, and its files have no axis "
                f"longer than {most}"
            )


def _parts(
    source: Path, model: Any, leaves: dict[str, Any], found: dict[str, Tensor]
) -> dict[str, _Parts]:
    """Returns the tensors of each of our arrays; refuses what does not fit, all of it at once."""
    layout = layout_of(model.shape)
    known = {full: found[name] for full, name in layout.full(list(found)).items()}
    _refuse_quantized(source, layout, known)
    parts: dict[str, _Parts] = {path: [] for path in leaves}
    wrong, used = [], set()
    for piece in pieces(model.shape, leaves):
        name = piece.name if piece.name in known else layout.copies.get(piece.name, piece.name)
        used |= {piece.name, name}
        leaf = leaves[piece.path]
        empty = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape[len(piece.at) :])
        expected = piece.rule.theirs(empty).shape
        if name not in known:
            wrong.append(f"weight {name!r} is missing in {source}")
        elif known[name].shape != expected:
            wrong.append(
                f"weight {name!r} in {source} must have shape {expected}, found {known[name].shape}"
            )
        elif known[name].kind not in FLOATS:  # of a name that others may leave out
            wrong.append(f"weight {name!r} in {source} must be floats, found {known[name].kind}")
        else:
            parts[piece.path].append((piece, known[name]))
        if len(wrong) > _SHOWN:
            break
    else:
        architecture = FAMILIES[model.shape.model_type].architecture
        wrong += [
            f"weight {name!r} in {source} is not one of {architecture}"
            for name in sorted(known.keys() - used)
            if not _matches(name, layout.needless)
        ]
    if wrong:
        more = "; and more" if len(wrong) > _SHOWN else ""
        raise ValueError("; ".join(wrong[:_SHOWN]) + more)
    return parts


def _refuse_quantized(source: Path, layout: Layout, known: dict[str, Tensor]) -> None:
    for name, tensor in known.items():
        if tensor.kind not in FLOATS and not _matches(name, layout.needless):
            raise folder.quantized(source, f"weight {name!r} is {tensor.kind}")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _array(leaf: jax.ShapeDtypeStruct, parts: _Parts, sharding: Any) -> Any:
    """Reads one of our arrays; with a sharding onto its devices."""
    if sharding is None:
        return next(iter(_buffers(leaf, parts, [(slice(None),) * len(leaf.shape)]).values()))
    wanted = sharding.addressable_devices_indices_map(leaf.shape).values()
    buffers = _buffers(leaf, parts, wanted)
    made = jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: buffers[_bounds(index, leaf.shape)], dtype=leaf.dtype
    )
    return made.block_until_ready()  # so that the next array's buffers do not come on top


def _buffers(
    leaf: jax.ShapeDtypeStruct, parts: _Parts, wanted: Iterable[Any]
) -> dict[Any, np.ndarray]:
    """Returns the wanted slices of an array by their bounds; a tensor is read once, if it is in any of them."""
    buffers = {}
    for bounds in {_bounds(index, leaf.shape) for index in wanted}:
        buffers[bounds] = _buffer(tuple(last - first for first, last in bounds), leaf.dtype)
    for piece, tensor in parts:
        depth, array = len(piece.at), None
        for bounds, buffer in buffers.items():
            outer = list(zip(piece.at, bounds, strict=False))
            if all(first <= i < last for i, (first, last) in outer):
                array = piece.rule.ours(tensor.read(leaf.dtype)) if array is None else array
                inner = tuple(slice(first, last) for first, last in bounds[depth:])
                place = (*(i - first for i, (first, _) in outer), ...)
                _copy(array[inner], buffer[place])
    return buffers


def _copy(array: np.ndarray, to: np.ndarray) -> None:
    """Copies, and converts; a transposed array some columns at a time, which the processor's caches like."""
    if to.ndim < 2 or array.flags.c_contiguous:
        to[...] = array
        return
    for i in range(0, to.shape[-1], _COLUMNS):
        to[..., i : i + _COLUMNS] = array[..., i : i + _COLUMNS]


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Returns the first and the last element, exclusive, of each axis."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _buffer(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an empty array that begins where the CPU's devices take it without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)
