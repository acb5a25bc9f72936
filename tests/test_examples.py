"""The examples of docstrings, README and docs run as they stand; what docs say of the planner is so."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from xml.etree import ElementTree

import jax.numpy as jnp
import pytest

import flora_jax
from flora_jax import planner, shapes
from tests.test_planner import COMPILED

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(info.name for info in pkgutil.walk_packages(flora_jax.__path__, "flora_jax."))
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```python" in path.read_text())

GIVEN = """
import flora_jax, jax, jax.numpy as jnp, optax
everywhere = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec())
params = {"kernel": jnp.ones((512, 512)), "bias": jnp.zeros(512)}
params = jax.device_put(params, everywhere)
batch = jnp.ones((2, 512))
def loss(params, x):
    return jnp.mean((x @ params["kernel"] + params["bias"]) ** 2)
"""
"""What the README's blocks take for granted."""


def blocks(file: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), re.M | re.S)


def execute(file: Path, given: str = "") -> dict:
    """Runs a file's blocks one after the other, in one namespace; errors name the file."""
    names: dict = {}
    exec(given, names)
    for i, block in enumerate(blocks(file)):
        exec(compile(block, f"{file.name}, block {i}", "exec"), names)
    return names


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_docstrings_with_examples():
    finder = doctest.DocTestFinder()
    found = [finder.find(importlib.import_module(name)) for name in MODULES]
    assert sum(bool(test.examples) for tests in found for test in tests) >= 5


def test_readme():
    names = execute(ROOT / "README.md", GIVEN)
    assert len(blocks(ROOT / "README.md")) >= 3
    assert jnp.isfinite(names["value"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page):
    assert execute(page)


def test_every_public_name_is_in_the_reference():
    told = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    names = {name for name in vars(flora_jax) if not name.startswith("_")}
    named = set(re.findall(r"^::: flora_jax\.(\w+)$", told, re.M))
    modules = {name.removeprefix("flora_jax.").split(".")[0] for name in MODULES}
    public = {name for name in names if name not in modules or callable(getattr(flora_jax, name))}
    assert public == named


@pytest.mark.newest  # MultiSteps of older optax accumulates in the params' dtype
def test_the_planner_s_table():
    lines = []
    for model, method, rank, length, batch, chips, gib in COMPILED:
        e = planner.estimate(
            planner.Setting(shapes.named(model), rank, length, batch, chips), method
        )
        name = method + (f", rank {rank}" if e.rank else "")
        tokens = f"{batch} x {length} tokens"
        lines.append(
            f"| {model}, {tokens} | {chips} | {name} | {gib:.2f} | {e.total / planner.GIB:.2f} |\n"
        )
    assert (ROOT / "docs" / "planner.txt").read_text() == "".join(lines)


@pytest.mark.newest  # MultiSteps of older optax accumulates in the params' dtype
def test_the_planner_s_picture():
    setting = planner.Setting(shapes.named("LLaMA-7B"))
    text = planner.to_svg(setting, planner.estimates(setting)) + "\n"
    ElementTree.fromstring(text)
    assert (ROOT / "docs" / "plan.svg").read_text() == text
