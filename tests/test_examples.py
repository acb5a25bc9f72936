"""The examples of docstrings, README and docs run as they stand; what docs say of the planner is so."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import optax
import pytest

import flora_jax
from flora_jax import adapters
from flora_jax.adapters import peft, quantized
from flora_jax.chain.plan import tree_bytes
from flora_jax.memory import estimate, outline, report
from tests.__main__ import TRAINERS
from tests.memory.test_estimate import COMPILED
from tests.pages import ROOT, execute

ELSEWHERE = [f"flora_jax.trainers.{name}" for name in TRAINERS]
"""Modules and pages of trainers that are not installed here; `tests/trainers` runs them."""
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(flora_jax.__path__, "flora_jax.")
    if info.name not in ELSEWHERE
)
APART = ((peft, "save"), (peft, "load"), (quantized, "quantize"))
"""Public functions of the adapters' modules that need packages of their own."""
PAGES = sorted(
    path
    for path in (ROOT / "docs").rglob("*.md")
    if "```python" in path.read_text()
    and not (path.parent.name == "trainers" and path.stem in TRAINERS)
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_docstrings_with_examples():
    finder = doctest.DocTestFinder()
    found = [finder.find(importlib.import_module(name)) for name in MODULES]
    assert sum(bool(test.examples) for tests in found for test in tests) >= 5


def test_readme():
    """Its example runs as it stands, its files are there, and it is read in two minutes."""
    file = ROOT / "README.md"
    assert jnp.isfinite(execute(file)["value"])
    text = file.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)", text)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert len(links) > 10 and not missing
    prose = re.sub(r"^(\|.*|```[\s\S]*?^```)$", "", text, flags=re.M)
    assert len(prose.split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page):
    assert execute(page)


CHANGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```diff" in path.read_text())
OF_TORCH = ("Flora(model.parameters()", "FloraAccelerator(")
"""What the tests have no package for."""


def changed(page: Path, sign: str) -> list[str]:
    """Lines of the page's diffs that go (`-`) or come (`+`)."""
    found = re.findall(r"^```diff\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [line[2:] for block in found for line in block.splitlines() if line[0] == sign]


@pytest.mark.parametrize("page", CHANGES, ids=lambda page: page.stem)
def test_changes_of_a_line(page):
    """Both lines make an optax transformation, and the second holds less than the first."""
    params = {"kernel": jnp.ones((512, 512))}

    def state_bytes(line):
        names = {"optax": optax, "flora_jax": flora_jax}
        exec(compile(line, page.name, "exec"), names)
        state = jax.eval_shape(names["tx"].init, params)
        return tree_bytes(state)

    gone, come = changed(page, "-"), changed(page, "+")
    assert len(gone) == len(come) > 0
    for before, after in zip(gone, come, strict=True):
        assert 0 < state_bytes(after) < tree_bytes(params)
        if any(word in before for word in OF_TORCH):
            compile(before, page.name, "exec")
        else:
            assert state_bytes(after) < state_bytes(before)


def test_changes_are_of_these_pages():
    assert [page.stem for page in CHANGES] == ["flora-opt", "galore", "multisteps"]


def test_files_and_commands_that_pages_name_are_there():
    pages = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    files = set(re.findall(r"\b(?:experiments|flora_jax|tests)/[a-z_/]+\.py\b", text))
    modules = set(re.findall(r"python3? -m ((?:experiments|flora_jax|tests)[a-z_.]*\w)", text))
    assert len(files) > 10 and len(modules) > 10
    assert [name for name in files if not (ROOT / name).exists()] == []
    paths = {name: ROOT.joinpath(*name.split(".")) for name in modules}
    missing = [
        name
        for name, path in paths.items()
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists()
    ]
    assert missing == []


def test_the_layout_of_maxtext():
    """Layers along axis 1 are a batch axis, each kernel has a sketch, no full gradient is materialized, and it learns."""
    names = execute(ROOT / "docs" / "trainers" / "stacks.md")
    specs = {leaf.path: leaf.spec for leaf in names["plan"].leaves}
    assert {path: spec.data_shape for path, spec in specs.items()} == {
        "wi/kernel": (256, 4, 16),
        "wo/kernel": (16, 4, 256),
    }
    assert all(spec.batch == (1,) for spec in specs.values())
    params, x = names["params"], names["x"]
    grad_fn = flora_jax.value_and_grad(names["loss"], names["projection"])
    assert not grad_fn.plan(params, x).whole_uses
    assert names["loss"](params, x) < names["value"]


def test_every_public_name_is_in_the_reference():
    told = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    names = {name for name in vars(flora_jax) if not name.startswith("_")}
    named = set(re.findall(r"^::: flora_jax\.(\w+)$", told, re.M))
    modules = {name.removeprefix("flora_jax.").split(".")[0] for name in MODULES}
    public = {name for name in names if name not in modules or callable(getattr(flora_jax, name))}
    assert public == named


def test_every_public_name_of_the_adapters_is_in_the_reference():
    told = (ROOT / "docs" / "reference" / "adapters.md").read_text()
    told = re.sub(
        r"^::: .*\n    options: \{members: false.*\n", "", told, flags=re.M
    )  # of modules, the text
    named = re.findall(r"^::: flora_jax\.adapters\.([\w.]+)$", told, re.M)
    named = [
        re.sub(r"^(\w+)\.\1$", r"\1", name) for name in named
    ]  # a function in the module of its name
    assert len(named) == len(set(named))
    public = {
        name
        for name, value in vars(adapters).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    modules = {
        f"{module.__name__.rpartition('.')[2]}.{name}": (module, name) for module, name in APART
    }
    assert set(named) == public | set(modules)
    assert all(callable(getattr(module, name)) for module, name in modules.values())


@pytest.mark.newest  # MultiSteps of older optax accumulates in the params' dtype
def test_the_planner_s_table():
    lines = []
    for model, method, rank, length, batch, chips, gib in COMPILED:
        setting = estimate.Setting(
            rank, length, batch, chips, model=outline.named(model), moments="params"
        )
        e = estimate.estimate(setting, method)
        name = method + (f", rank {rank}" if e.rank else "")
        tokens = f"{batch} x {length} tokens"
        lines.append(
            f"| {model}, {tokens} | {chips} | {name} | {gib:.2f} | {e.total / estimate.GIB:.2f} |\n"
        )
    assert (ROOT / "docs" / "planner.txt").read_text() == "".join(lines)


@pytest.mark.newest  # MultiSteps of older optax accumulates in the params' dtype
def test_the_planner_s_picture():
    setting = estimate.Setting(model=outline.named("LLaMA-7B"))
    text = report.to_svg(setting, estimate.estimates(setting)) + "\n"
    ElementTree.fromstring(text)
    assert (ROOT / "docs" / "plan.svg").read_text() == text
