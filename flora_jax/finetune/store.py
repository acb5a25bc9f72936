"""Keeps encoded examples on disk as plain numpy files, opened memory-mapped.

A folder is written under a temporary name and renamed when it is whole; a checksum tells a damaged one.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flora_jax.finetune.examples import Counts, Example
from flora_jax.finetune.packing import Store
from flora_jax.models.tensor_file import sync

SIDES = ("train", "validation")
INDEX = "index.json"
_DTYPES = {"tokens": "<i4", "counts": "|b1", "offsets": "<i8", "prompts": "<i4"}
_CHUNK = 2**24


class Writer:
    """Appends examples to a folder that appears, whole, at `close`.

    Use it as a context: on an exception what was written is removed.
    """

    def __init__(self, folder: Path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        self._files = {
            (side, name): _Array(self._temporary / f"{side}.{name}.npy", dtype)
            for side in SIDES
            for name, dtype in _DTYPES.items()
        }
        for side in SIDES:
            self._files[side, "offsets"].append(np.zeros(1))
        self._ends = {str(side): 0 for side in SIDES}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._files.values():
            file.file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def append(self, side: str, examples: Sequence[Example]) -> None:
        """Adds examples to one side."""
        if not examples:
            return
        ends = self._ends[side] + np.cumsum([len(example.tokens) for example in examples])
        self._ends[side] = int(ends[-1])
        self._files[side, "tokens"].append(np.concatenate([e.tokens for e in examples]))
        self._files[side, "counts"].append(np.concatenate([e.counts for e in examples]))
        self._files[side, "offsets"].append(ends)
        self._files[side, "prompts"].append(np.array([e.prompt for e in examples]))

    def close(self, counts: dict[str, Counts]) -> None:
        """Puts the folder in its place, in that of an older one if need be."""
        files = {f"{side}.{name}.npy": f.close() for (side, name), f in self._files.items()}
        index = {
            "files": files,
            "sides": {side: dataclasses.asdict(counts[side]) for side in SIDES},
        }
        with open(self._temporary / INDEX, "w") as file:
            json.dump(index, file)
            _sync(file)
        sync(self._temporary)
        if read(self.folder) is not None:  # another process was faster
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self._temporary.rename(self.folder)
        except OSError:
            if read(self.folder) is None:
                raise
        sync(self.folder.parent)


def read(folder: Path) -> tuple[dict[str, Store], dict[str, Counts]] | None:
    """Opens a folder that `Writer` made.

    Returns:
      The examples and the counts of each side; or None where the folder is missing or damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        if any(_checksum(folder / name) != wanted for name, wanted in index["files"].items()):
            return None
        stores = {side: Store(*(_open(folder, side, name) for name in _DTYPES)) for side in SIDES}
        return stores, {side: Counts(**index["sides"][side]) for side in SIDES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class _Array:
    """Is a .npy file of one axis that grows; its header has room for the final length."""

    def __init__(self, path: Path, dtype: str):
        self.file = open(path, "w+b")  # noqa: SIM115
        self._dtype, self._length = np.dtype(dtype), 0
        self._header()

    def _header(self) -> None:
        entries = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self.file, entries)

    def append(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, self._dtype).data)
        self._length += len(values)

    def close(self) -> list[int]:
        """Writes the length into the header; returns the checksum."""
        self.file.seek(0)
        self._header()
        _sync(self.file)
        self.file.close()
        return _checksum(Path(self.file.name))


def _open(folder: Path, side: str, name: str) -> np.ndarray:
    path = folder / f"{side}.{name}.npy"
    found = np.load(path, mmap_mode="r" if _filled(path) else None, allow_pickle=False)
    if found.ndim != 1 or found.dtype != np.dtype(_DTYPES[name]):
        raise ValueError(f"{path} has {found.ndim} axes of {found.dtype}")
    return found


def _filled(path: Path) -> bool:
    """Says whether an array has any element; an empty one cannot be mapped."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        return np.lib.format.read_array_header_1_0(file)[0] != (0,)


def _checksum(path: Path) -> list[int]:
    """Returns the bytes of a file, and their CRC-32."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
