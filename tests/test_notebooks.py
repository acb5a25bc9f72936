"""The notebooks run, and the `.ipynb` that are kept are those of the `.py` beside them, executed."""

import os
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
NAMES = [
    "1_quickstart",
    "2_lora_is_a_random_projection",
    "3_the_chain",
    "4_fused_gradients",
    "5_a_pod_on_a_laptop",
    "6_variants_of_lora",
    "7_fine_tune_a_real_model",
]
PICTURES = ("image/png", "image/svg+xml")
MACHINE = re.compile(
    r"(?:/(?:home|root|tmp|Users|usr|work|var|opt|private|mnt)/|[A-Z]:\\)[\w.\\/\-]+"
)
"""Paths of a machine."""

each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def read(source: Path):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook) -> list:
    return [output for cell in code(notebook) for output in cell.outputs]


def pictures(notebook) -> list[str]:
    """Kinds of the pictures, by cell."""
    return [kind for out in outputs(notebook) for kind in out.get("data", ()) if kind in PICTURES]


def words(notebook) -> str:
    """All that the cells printed or showed as text."""
    texts = [out.get("text", "") for out in outputs(notebook)]
    shown = [out.get("data", {}) for out in outputs(notebook)]
    return "\n".join(texts + [data[k] for data in shown for k in data if not k.startswith("image")])


@pytest.mark.long
@pytest.mark.newest
@each
def test_runs(source, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    kept = read(source)
    assert pictures(notebook) == pictures(kept)
    for ran, before in zip(code(notebook), code(kept), strict=True):
        assert bool(ran.outputs) == bool(before.outputs), ran.source


@each
def test_what_is_kept_is_the_source_executed(source):
    kept = read(source)
    assert cells(kept) == cells(jupytext.read(source))
    assert [cell.execution_count for cell in code(kept)] == list(range(1, len(code(kept)) + 1))
    assert not any(output.output_type == "error" for output in outputs(kept))
    assert not any(output.get("name") == "stderr" for output in outputs(kept))
    assert pictures(kept)
    assert words(kept).strip()


@each
def test_what_is_kept_is_paired(source):
    kept = read(source)
    assert kept.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    assert kept.metadata["kernelspec"]["name"] == "python3"
    assert jupytext.read(source).metadata["jupytext"]["formats"] == "ipynb,py:percent"


@each
def test_no_path_of_a_machine(source):
    kept = read(source)
    texts = [cell.source for cell in kept.cells] + [words(kept)]
    texts += [
        data for out in outputs(kept) for k, data in out.get("data", {}).items() if "svg" in k
    ]
    assert not [found for text in texts for found in MACHINE.findall(text)]


def test_what_is_a_path_of_a_machine():
    assert MACHINE.search('File "/home/someone/flora/x.py"') and MACHINE.search(r"C:\Users\x")
    assert not MACHINE.search(
        "image/png, arXiv 2402.03293, 4/6 of its FLOPs, https://arxiv.org/abs/1"
    )


def test_they_are_all_and_the_readme_and_docs_name_each():
    assert [source.stem for source in SOURCES] == NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    site = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"(notebooks/{name}.ipynb)" in readme
        assert f"notebooks/{name}.ipynb" in site
