"""The folders: imports point one way, no circle of modules, no file that nobody can read in one sitting."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "paths",
    "dtypes",
    "tracing",
    "bits",
    "qarray",
    "rounding",
    "sharding",
    "chain",
    "fused",
    "update",
    "trainers",
    "models",
    "adapters",
    "memory",
    "finetune",
    "cli",
)
"""Of `flora_jax`, each of which imports only from those before it."""
LONGEST = 500
"""Lines of a file."""


def modules(package):
    """The files of a package by dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imports(files):
    """For each module those of the same package that it imports, anywhere in it."""
    graph = {}
    for name, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found.add(full if full in files else node.module)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
        graph[name] = sorted((found & files.keys()) - {name})
    return graph


def circle(graph):
    """Modules that import each other around, the first again as the last; None where there are none."""
    done, way = set(), []

    def visit(name):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        way.append(name)
        for other in graph[name]:
            if found := visit(other):
                return found
        way.pop()
        done.add(name)
        return None

    return next((found for name in graph if (found := visit(name))), None)


def test_a_circle_is_found():
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) is None


@pytest.mark.parametrize("package", ["flora_jax", "experiments", "tests"])
def test_no_circle(package):
    graph = imports(modules(package))
    assert sum(map(len, graph.values())) > len(graph) / 2
    assert circle(graph) is None


def test_folders_point_one_way():
    graph = imports(modules("flora_jax"))
    folders = {name: name.split(".")[1] for name in graph if "." in name}
    assert set(folders.values()) == set(FOLDERS)
    wrong = [
        (name, other)
        for name, folder in folders.items()
        for other in graph[name]
        if other in folders and FOLDERS.index(folders[other]) > FOLDERS.index(folder)
    ]
    assert not wrong


def test_the_library_needs_no_experiment():
    for name, path in modules("flora_jax").items():
        assert "experiments" not in {
            (node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }, name


def test_files_are_short_or_say_why():
    files = {**modules("flora_jax"), **modules("experiments"), **modules("tests")}
    for name, path in files.items():
        text = path.read_text()
        if len(text.splitlines()) > LONGEST:
            assert "One file since" in (ast.get_docstring(ast.parse(text)) or ""), name
