"""GGUF files, those of llama.cpp: their metadata and tensors, each tensor dequantized when it is read.

A file is a header (version and counts), the metadata (keys, types, values), what is said of each tensor (name,
sizes, type, offset) and the tensors' bytes. All lengths are checked against the file's size before they are
followed. Package `gguf` knows the quantized types.

Source: ggml's `docs/gguf.md`.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flora_jax.models.tensor_file import Tensor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = "BbHhIif?sAQqd"
"""The types of metadata by number, as codes of `struct`; `s` is a string and `A` an array."""
_KINDS = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}
_MOST_AXES = 4
_AT_ONCE = 2**22
"""Weights that are dequantized at a time, since package gguf holds several copies of them."""


class Gguf(NamedTuple):
    """Holds what a file says before its weights.

    Attributes:
      metadata: The values by key; those of an array of numbers as a numpy array.
      tensors: The tensors by name, with axes in numpy's order. One that is quantized is read as float32 by default and has `F32` as
        its `kind`.
      types: The type of each tensor in the file, such as `Q4_K`.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    types: dict[str, str]


def open_gguf(file: Path) -> Gguf:
    """Returns the metadata and the tensors of a file; no weight is read.

    Raises:
      ValueError: The file is no GGUF file, of an unknown version, damaged, or was cut off.
    """
    try:
        return _open(file)
    except (struct.error, UnicodeDecodeError, OverflowError, IndexError) as error:
        raise _damaged(file, "metadata that cannot be read") from error


def _open(file: Path) -> Gguf:
    reader = _Reader(file)
    if reader.take(4) != _MAGIC:
        raise ValueError(f"{file} is no GGUF file; of *.safetensors give the folder they are in")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"{file} must be GGUF of version 2 or 3, found {version}")
    count, entries = reader.length(20), reader.length(13)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = reader.text()
        metadata[key] = reader.value(reader.number("I"))
    said = [_said(reader) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _damaged(file, f"general.alignment {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    tensors, types = {}, {}
    for name, sizes, number, offset in said:
        if name in tensors:
            raise _damaged(file, f"two tensors {name!r}")
        types[name], tensors[name] = _tensor(reader, name, sizes, number, start + offset)
    return Gguf(metadata, tensors, types)


class _Reader:
    """Takes values from the start of a file, one after the other, and never from beyond its end."""

    def __init__(self, file: Path):
        self.file, self.at = file, 0
        self.size = file.stat().st_size
        self.data = np.memmap(file, np.uint8, "r") if self.size else np.empty(0, np.uint8)

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise _damaged(self.file, f"{count} bytes from {self.at} on in a file of {self.size}")
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def length(self, width: int) -> int:
        """Takes a count of things that have at least so many bytes each."""
        count = self.number("Q")
        if count * width > self.size - self.at:
            raise _damaged(self.file, f"a count of {count} in a file of {self.size} bytes")
        return count

    def text(self) -> str:
        return self.take(self.length(1)).decode()

    def value(self, number: int) -> Any:
        code = self.code(number)
        if code == "s":
            return self.text()
        if code != "A":
            return self.number(code)
        code = self.code(self.number("I"))
        if code == "A":
            raise _damaged(self.file, "arrays in arrays")
        if code == "s":
            return [self.text() for _ in range(self.length(8))]
        width = struct.calcsize(code)
        return np.frombuffer(self.take(self.length(width) * width), np.dtype(f"<{code}"))

    def code(self, number: int) -> str:
        if number >= len(_SCALARS):
            raise _damaged(self.file, f"a value of type {number}")
        return _SCALARS[number]


def _said(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, axes = reader.text(), reader.number("I")
    if axes > _MOST_AXES:
        raise _damaged(reader.file, f"{name!r} with {axes} axes")
    sizes = tuple(reader.number("Q") for _ in range(axes))
    return name, sizes[::-1], reader.number("I"), reader.number("Q")


def _tensor(
    reader: _Reader, name: str, shape: tuple[int, ...], number: int, start: int
) -> tuple[str, Tensor]:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ImportError(
            "GGUF files need package gguf: pip install flora-jax[finetune]"
        ) from error

    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise _damaged(reader.file, f"{name!r} of unknown type {number}") from error
    block, width = GGML_QUANT_SIZES[kind]
    row = shape[-1] if shape else 1
    size = math.prod(shape) // block * width
    if row % block:
        raise _damaged(reader.file, f"{name!r} with rows of {row}, no multiple of {block}")
    if start + size > reader.size:
        raise _damaged(
            reader.file, f"{name!r} up to byte {start + size} in a file of {reader.size}"
        )
    plain = _KINDS.get(kind.name)

    def read(dtype: Any = np.float32) -> np.ndarray:
        if not size:
            return np.empty(shape, dtype)
        if plain is not None:
            return np.memmap(reader.file, np.dtype(plain), "r", start, shape)
        rows = math.prod(shape[:-1])
        stored = np.memmap(reader.file, np.uint8, "r", start, (rows, row // block * width))
        array, some = np.empty((rows, row), dtype), max(1, _AT_ONCE // row)
        try:
            for i in range(0, rows, some):
                array[i : i + some] = dequantize(stored[i : i + some], kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{name!r} in {reader.file} is {kind.name}, which package gguf does not dequantize"
            ) from error
        return array.reshape(shape)

    return kind.name, Tensor(name, "F32" if plain is None else kind.name, shape, read)


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"{file} is damaged or incomplete: it has {what}")
