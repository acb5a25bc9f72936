"""The text is the Python standard library's own source, as bytes, split by file.

Its licence is PSF-2.0. It has some 12 MB in some 600 files, without the test suite, and is the same on every
machine that has the same Python. A file is for validation when the hash of its name says so (one
in ten), so that no line of a file is on both sides.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
from numpy.typing import NDArray

VOCABULARY = 256
SEPARATOR = 0
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """The bytes of all files of each side, separated by a zero byte.

    Attributes:
      train: Bytes to train on, a uint8 array.
      validation: Bytes to validate on, a uint8 array.
      files: Number of files on each side.
    """

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    files: tuple[int, int]

    def digest(self) -> str:
        """Gives a digest that tells this text from that of another version of Python."""
        parts = (
            hashlib.blake2b(side.tobytes(), digest_size=8) for side in (self.train, self.validation)
        )
        return "-".join(part.hexdigest() for part in parts)


def load(folder: Path | None = None) -> Corpus:
    """Reads the standard library, or all `.py` files below `folder`.

    Raises:
      ValueError: A side has no file.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if SKIPPED.isdisjoint(name.parts):
            digest = hashlib.sha256(name.as_posix().encode()).digest()
            sides[digest[0] % 10 == 0].append(path.read_bytes() + bytes([SEPARATOR]))
    if not all(sides):
        raise ValueError(f"text must have at least some ten .py files, found too few in {folder}")
    train, validation = (np.frombuffer(b"".join(side), np.uint8) for side in sides)
    return Corpus(train, validation, (len(sides[0]), len(sides[1])))


def batch(text: NDArray[np.uint8], seed: int, step: int, size: int, length: int):
    """Gives windows at random places, int32 `(size, length + 1)`, as a function of seed and step."""
    random = np.random.default_rng((seed, step))
    starts = random.integers(0, len(text) - length, size)
    return np.stack([text[start : start + length + 1] for start in starts]).astype(np.int32)


def held_out(corpus: Corpus, length: int, size: int = 64) -> list[NDArray[np.int32]]:
    """Gives eight batches of validation windows, which are the same for every run."""
    return [batch(corpus.validation, 1, i, size, length) for i in range(8)]


class Windows:
    """Windows of `length + 1` bytes side by side, each sharing its last byte with the next; int32."""

    def __init__(self, text: NDArray[np.uint8], length: int):
        self.text, self.length = text, length

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        start = index * self.length
        return self.text[start : start + self.length + 1].astype(np.int32)


def stream(text: NDArray[np.uint8], seed: int, size: int, length: int) -> grain.DatasetIterator:
    """Gives endless batches `(size, length + 1)`, every window once in an epoch, shuffled anew in each.

    Its `get_state` is a position that a checkpoint keeps and `set_state` goes back to, on any number
    of hosts, since each host reads all of the batch.
    """
    windows = grain.MapDataset.source(Windows(text, length)).seed(seed).shuffle().repeat()
    return iter(windows.batch(size).to_iter_dataset(grain.ReadOptions(num_threads=1)))


def unigram_loss(corpus: Corpus) -> float:
    """Gives the validation loss, nats per byte, of byte frequencies counted on the train side (plus one)."""
    counts = np.bincount(corpus.train, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[corpus.validation].mean())
