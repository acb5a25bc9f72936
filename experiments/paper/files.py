"""Files of a table: lines of results, and files that are written as a whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the results; runs whose results have another one are done again."""


def read(file: Path) -> list[dict[str, Any]]:
    """Reads the lines that were written completely."""
    if not file.exists():
        return []
    lines = []
    for text in file.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # interrupted while it was written; that run is done again
            continue
    return lines


def append(file: Path, line: dict[str, Any]) -> None:
    """Adds a line, which is on the disk before this returns."""
    with file.open("ab+") as stream:
        stream.seek(0, os.SEEK_END)
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(line).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Gives a path beside `file`; what is written there takes the place of `file` in the end."""
    partial = file.with_name(file.name + ".partial")
    yield partial
    partial.replace(file)


def replace_text(file: Path, text: str) -> None:
    """Writes the text; a write that is interrupted leaves the file as it was."""
    with atomic_file(file) as partial:
        partial.write_text(text)
