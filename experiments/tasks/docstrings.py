"""Summarisation gives a docstring's first line from its body, over packages that come with this one.

Each is a real text with a real summary; the split is by package. The paper's data, XSum, are in `hub`.
"""

import ast
import importlib.metadata
import inspect
import warnings
from collections.abc import Iterable, Iterator

from experiments.tasks.data import Card, Sides, apart, installed, kept, licences

PACKAGES = (
    "scipy", "jax", "jaxlib", "matplotlib", "numpy", "pandas", "huggingface-hub",
    "orbax-checkpoint", "Django", "fonttools", "narwhals", "datasets", "flax", "rich", "pillow",
    "fsspec", "optax", "grain", "tyro", "Jinja2", "pyarrow", "tqdm", "click",
)  # fmt: skip
VALIDATION = ("nltk", "joblib")
TEST = ("scikit-learn",)
WORDS = range(3, 21)
"""Allowed numbers of words in a first line."""
SHORTEST = 80
"""The smallest number of characters of a body."""


def load(
    packages: Iterable[str] = PACKAGES,
    validation: Iterable[str] = VALIDATION,
    test: Iterable[str] = TEST,
) -> Sides:
    """Loads pairs `(body, first line)` of the packages that are installed."""
    sides = {"train": packages, "validation": validation, "test": test}
    found = {side: installed(names) for side, names in sides.items()}
    names = [name for side in found.values() for name in side]
    version = importlib.metadata.version
    key = " ".join(f"{side}:{name}={version(name)}" for side in found for name in found[side])
    pairs = kept(
        "docstrings",
        key,
        lambda: [
            (side, pair) for side in found for name in found[side] for pair in _of_package(name)
        ],
    )
    card = Card(
        "First lines of docstrings",
        "Docstrings of modules, classes and functions; the source is all but the first line.",
        licences(names),
        f"by package: {', '.join(found['test'])} for test, {', '.join(found['validation'])} for "
        "validation; of texts on two sides, as of copied functions, one stays.",
    )
    return apart(card, ((side, (body, first)) for side, (body, first) in pairs))


def _of_package(name: str) -> Iterator[tuple[str, str]]:
    files = importlib.metadata.files(name) or []
    for file in sorted(files, key=str):
        if file.suffix == ".py" and not any("test" in part for part in file.parts):
            try:
                text = file.read_text()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(text)
            except (SyntaxError, ValueError, OSError):
                continue  # templates of code, and what was not installed
            yield from _of_tree(tree)


def _of_tree(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first, _, body = inspect.cleandoc(ast.get_docstring(node) or "").partition("\n\n")
        body = " ".join(body.split())
        if len(body) >= SHORTEST and "\n" not in first and len(first.split()) in WORDS:
            yield body, first.strip()
