"""A hook of mkdocs: the build fails where a public name of the package has no entry with a docstring.

A name is public if `flora_jax` or `flora_jax.adapters` exports it, if a module of `PUBLIC` defines it without an underscore,
or if the README, a page or a notebook uses it. Names of constants need no entry.
"""

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flora_jax", "flora_jax.adapters")
PUBLIC = {  # modules of functions for users, and what else is in them: shared with other modules
    "flora_jax.finetune.run": ("tokenizer_of",),
    "flora_jax.models.config": ("Family",),
    "flora_jax.models.families": (),
    "flora_jax.models.generate": (),
    "flora_jax.models.gguf_file": (),
    "flora_jax.models.gguf_tokenizer": (),
    "flora_jax.models.load": (),
    "flora_jax.models.rotary": (),
    "flora_jax.models.save": (),
    "flora_jax.trainers.axis_names": ("of_state", "owner_of"),
    "flora_jax.trainers.easydel": (),
    "flora_jax.trainers.kauldron": (),
    "flora_jax.trainers.linen": (),
    "flora_jax.trainers.maxtext": ("Transformation", "check_version"),
    "flora_jax.trainers.nnx": (),
    "flora_jax.trainers.schedule": (),
    "flora_jax.trainers.tunix": (),
    "flora_jax.adapters.peft": ("module_name",),
    "flora_jax.adapters.quantized": (),
}
CODE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
MENTION = re.compile(r"\bflora_jax(?:\.[A-Za-z_]\w*)+")
DIRECTIVE = re.compile(r"^::: .*$", re.M)
ENTRY = re.compile(r'id="(flora_jax\.[\w.]+)"')

_entries: set[str] = set()


def on_pre_build(**_) -> None:
    """Forgets the last build, where mkdocs serves."""
    _entries.clear()
    definitions.cache_clear()
    imports.cache_clear()


def on_page_content(text: str, **_) -> None:
    """Remembers the entries of a page."""
    _entries.update(ENTRY.findall(text))


def on_post_build(**_) -> None:
    """Fails if there is a public name without an entry, or without a docstring."""
    if lacking := missing(_entries):
        raise PluginError("No entry in the reference, or no docstring: " + ", ".join(lacking))


def missing(entries: set[str]) -> list[str]:
    """Returns the public names that have no entry, or whose entry would be empty."""
    names = {found for name in (*exported(), *used()) if (found := home(name))}
    documented = {home(name) for name in entries}
    return sorted(n for n in names if n not in documented or not ast.get_docstring(defined(n)))


def exported() -> Iterator[str]:
    """Yields what users may call, whether a page uses it or not."""
    for package in PACKAGES:
        yield from (f"{package}.{name}" for name in imports(package))
    for module, shared in PUBLIC.items():
        for node in definitions(module).values():
            if not node.name.startswith("_") and node.name not in shared:
                yield f"{module}.{node.name}"


def used() -> Iterator[str]:
    """Yields what the README, the pages and the notebooks import or name."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = DIRECTIVE.sub("", page.read_text(encoding="utf-8"))
        yield from MENTION.findall(text)
        for code in CODE.findall(text):
            yield from names_of(code)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code":
                yield from names_of(re.sub(r"^[%!].*$", "", text, flags=re.M))
            else:
                yield from MENTION.findall(text)


def names_of(code: str) -> Iterator[str]:
    """Yields the full names of what a piece of code takes from the package."""
    known: dict[str, str] = {"flora_jax": "flora_jax"}
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flora_jax"):
            for name in node.names:
                known[name.asname or name.name] = f"{node.module}.{name.name}"
                yield f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        parts = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else [""]
        if parts[0] in known:
            yield ".".join((known[parts[0]], *parts[1:]))


def home(name: str) -> str | None:
    """Returns the module and name under which a function or class is defined; None for anything else."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        package, local = ".".join(parts[:i]), parts[i]
        if not source(package):
            continue
        if local in definitions(package):
            return f"{package}.{local}"
        origin = imports(package).get(local)
        if origin and origin.startswith("flora_jax.") and origin != name:
            return home(origin)
        return None
    return None


def defined(name: str) -> ast.FunctionDef | ast.ClassDef:
    module, _, local = name.rpartition(".")
    return definitions(module)[local]


@functools.cache
def definitions(module: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    body = parsed(module).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@functools.cache
def imports(module: str) -> dict[str, str]:
    found = (node for node in parsed(module).body if isinstance(node, ast.ImportFrom))
    return {n.asname or n.name: f"{node.module}.{n.name}" for node in found for n in node.names}


def parsed(module: str) -> ast.Module:
    file = source(module)
    return ast.parse(file.read_text(encoding="utf-8") if file else "")


def source(module: str) -> Path | None:
    folder = ROOT.joinpath(*module.split("."))
    files = (folder / "__init__.py", folder.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)
