"""Pages: the blocks of code of a page of the docs, which are run as they stand."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def blocks(file: Path, language: str = "python") -> list[str]:
    text = file.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def execute(file: Path) -> dict:
    """Runs a file's blocks one after the other, in one namespace; errors name the file."""
    names: dict = {}
    for i, block in enumerate(blocks(file)):
        exec(compile(block, f"{file.name}, block {i}", "exec"), names)
    return names
