"""Tensor files: `*.safetensors`, read and written one tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: of each tensor the dtype, the shape
and where its bytes lie) and the bytes of the tensors. What a header says is checked against the file's size
before anything is read.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

FLOATS: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
}
"""The dtypes of weights that can be read, by their names in a file."""
_NAMES = {dtype: kind for kind, dtype in FLOATS.items()}
_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LONGEST_HEADER = 100_000_000


class Tensor(NamedTuple):
    """Says what a tensor is before it is read.

    Attributes:
      name: Its name in its file.
      kind: Its dtype, as its file names it.
      shape: Its shape.
      read: The function that reads it; one that dequantizes gives the dtype that it is called with, or float32.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Callable[..., np.ndarray]


def tensors_of(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name; only its header is read.

    A tensor that is read is a view of the file, so that what is not used of it takes no memory.

    Raises:
      ValueError: The file is damaged or was cut off.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise _damaged(file, f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise _damaged(file, "a header that is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(file, "a header that is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _tensor(file, 8 + length, size, name, entry) for name, entry in header.items()}


def _tensor(file: Path, start: int, size: int, name: str, entry: Any) -> Tensor:
    try:
        kind, shape = str(entry["dtype"]), tuple(entry["shape"])
        first, last = entry["data_offsets"]
        counts = (*shape, first, last)
        sound = all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in counts)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"an entry for {name!r} that cannot be read") from error
    width = FLOATS[kind].itemsize if kind in FLOATS else _BYTES.get(kind)
    if not sound or first > last or (width and last - first != math.prod(shape) * width):
        raise _damaged(file, f"an entry for {name!r} whose shape and bytes do not agree")
    if start + last > size:
        raise _damaged(file, f"{name!r} up to byte {start + last} in a file of {size}")

    def read(_: Any = None) -> np.ndarray:
        dtype = FLOATS[kind] if kind in FLOATS else np.dtype(np.uint8)
        full = shape if kind in FLOATS else (last - first,)
        if first == last:
            return np.empty(full, dtype)
        return np.memmap(file, dtype, "r", start + first, full)

    return Tensor(name, kind, shape, read)


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"{file} is damaged or incomplete: it has {what}")


def kind_of(dtype: Any) -> str:
    """Returns the name in a file of a dtype.

    Raises:
      ValueError: It is none of those that a checkpoint may have.
    """
    if jnp.dtype(dtype) not in _NAMES:
        wanted = ", ".join(str(known) for known in _NAMES)
        raise ValueError(f"the dtype of weights in a file must be one of {wanted}, found {dtype}")
    return _NAMES[jnp.dtype(dtype)]


def bytes_of(tensor: Tensor) -> int:
    """Returns the bytes that a tensor takes in a file."""
    width = FLOATS[tensor.kind].itemsize if tensor.kind in FLOATS else _BYTES[tensor.kind]
    return math.prod(tensor.shape) * width


def in_order(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns tensors in the order of a file: the widest first, so that each lies at a multiple of its dtype's width."""
    return sorted(tensors, key=lambda x: -bytes_of(x._replace(shape=())))


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write(file: Path, tensors: list[Tensor], arrays: Iterator[np.ndarray]) -> None:
    """Writes a file, and waits until it is on the disk.

    Args:
      file: The file to make.
      tensors: What it is to hold, `in_order`.
      arrays: The array of each, one at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        first, end = end, end + bytes_of(tensor)
        entry = {"dtype": tensor.kind, "shape": tensor.shape, "data_offsets": (first, end)}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.ascontiguousarray(next(arrays))
            assert array.nbytes == bytes_of(tensor), tensor.name
            stream.write(array.reshape(-1).view(np.uint8).data)
            del array
        stream.flush()
        os.fsync(stream.fileno())
