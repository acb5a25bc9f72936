"""The notebooks run, what they show is so, and the `.ipynb` that are kept are those of the `.py` beside them, executed.

Nothing is asserted in a notebook. `FACTS` has what each of them shows, read from its output: from that which is kept,
and from that of a new run.
"""

import ast
import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jupytext
import nbformat
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from nbclient import NotebookClient
from packaging.requirements import Requirement

from experiments.bench import traffic

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


def numbers(text: str, pattern: str) -> np.ndarray:
    """The groups of all matches, as numbers; there must be one match at least."""
    found = re.findall(pattern, text, re.MULTILINE)
    assert found, f"nothing in the output is {pattern!r}"
    return np.array(found, float)


def number(text: str, pattern: str) -> float:
    found = numbers(text, pattern)
    assert found.size == 1, f"{pattern!r} is there {found.size} times"
    return found.item()


N = r"(\d[\d.]*(?:e[-+]?\d+)?)"
"""A number."""


def of_quickstart(text):
    params = number(text, rf"^The parameters take {N} MiB")
    row = rf"\s+{N}\s+{N}\s+{N}\s+{N}$"
    ((whole, _, loss, _),) = numbers(text, rf"^uncompressed{row}")
    ((peak, _, sketched, _),) = numbers(text, rf"^Flora, rank d/8{row}")
    assert whole > 3.9 * params  # the accumulated gradient, the gradient and the updates besides
    assert peak < 0.6 * whole and peak < 2.3 * params
    assert sketched < loss
    sentence = rf"takes {N} MiB where the uncompressed one takes {N} MiB, {N} of it; it ends at a held-out loss of {N} where the other ends at {N} nats"
    ((a, b, ratio, c, d),) = numbers(text, sentence)
    assert (a, b, c, d) == (peak, whole, sketched, loss)
    assert ratio == pytest.approx(peak / whole, abs=0.006)


def of_random_projection(text):
    errors = numbers(text, rf"against A G in float64: relative error {N}$")
    assert len(errors) == 4 and np.all(errors < 1e-5)
    still = numbers(text, rf"largest entry of the gradient of LoRA's a: {N},")
    assert len(still) == 2 and np.all(still == 0)
    rates, _, _, error, cosine, _ = numbers(text, r"^rate" + rf"\s+{N}" * 6 + "$").T
    assert list(rates) == [0.001, 0.01, 0.1, 0.3]
    assert np.all(np.diff(error) > 0)
    assert cosine[1] > 0.99 and cosine[2] > 0.9
    assert number(text, rf"largest ‖a − a₀‖/‖b‖ of all steps and rates: {N}$") < 1
    ((a, b),) = numbers(text, rf"‖a − a₀‖ ~ η\^{N}, ‖b‖ ~ η\^{N}$")
    assert abs(a - 2) < 0.1 and abs(b - 1) < 0.05
    row = rf"\s+rank of the change\s+{N}\s+held-out loss {N}$"
    ends = {
        name: numbers(text, rf"^{name}{row}")[0]
        for name in ("full", "LoRA", "one projection", "a new one each 10 steps")
    }
    assert ends["LoRA"][0] == ends["one projection"][0] == 8
    assert ends["full"][0] > 80 and ends["a new one each 10 steps"][0] > 80
    assert number(text, rf"^with new projections {N} singular values") <= 160
    # two draws of a projection: with seeds 0, 1 and 2 the second has 0.379, 0.307 and 0.349
    assert abs(ends["one projection"][1] / ends["LoRA"][1] - 1) < 0.2
    assert ends["a new one each 10 steps"][1] < 0.8 * ends["LoRA"][1]


def of_chain(text):
    ((one, mean),) = numbers(text, rf"relative error of one estimate {N}, of the mean of 128 {N}$")
    assert 0.7 < mean / one * math.sqrt(128) < 1.4
    ratios = numbers(
        text, rf"measured / formula at ranks \(8, 32, 128\): \[\s*{N}\s+{N}\s+{N}\s*\]"
    )
    assert ratios.shape == (5, 3) and np.all(np.abs(ratios - 1) < 0.1)
    steps = re.findall(r"^micro-step (\d): optimizer step (\w+), cycle (\d)$", text, re.MULTILINE)
    assert steps == [(str(i), str(i == 3), str(int(i == 3))) for i in range(4)]
    assert number(text, rf"largest difference to MultiSteps, relative: {N}$") < 1e-4
    ((first, mean),) = numbers(text, rf"cosine of update and gradient: first {N}, mean {N}$")
    assert 0 < first < 1 and 0.3 < mean < 1


def of_fused(text):
    whole, fused = text.split("\nflora_jax\n", 1)
    assert whole.count("a full gradient") == 2
    before, _, after = fused.partition("first   fused")
    assert "a full gradient" not in before and before.count("a sketch") == 2 and after
    errors = numbers(text, rf"^(?:first|second)\s+(?:fused|projected)?\s*relative error {N}$")
    assert len(errors) == 6 and np.all(errors < 1e-5)
    kernels = number(text, rf"^the model has {N} weights")
    row = rf"\s+{N} GFLOP in all products; {N} of them are full gradients, {N} are sketches$"
    ((flops, gradients, sketches),) = numbers(text, rf"^jax.value_and_grad{row}")
    assert (gradients, sketches) == (kernels, 0)
    ((fewer, gradients, sketches),) = numbers(text, rf"^flora_jax, rank 16{row}")
    assert (gradients, sketches) == (0, kernels) and fewer < 0.8 * flops
    assert "full gradients in the fused programs of ranks (4, 16, 64, 127): [0, 0, 0, 0]" in text
    table = numbers(text, r"^\s*(4|16|64|127)" + rf"\s+{N}" * 4 + "$")
    assert list(table[:, 0]) == [4, 16, 64, 127]
    assert np.all(np.diff(table[:, 1]) > 0) and np.all(table[:-1, 1] < 1)
    assert number(text, rf"difference of the formula to the FLOPs of the dots: {N}$") < 1e-3
    assert set(re.findall(r"^'(\w+)' gets its full gradient", text, re.MULTILINE)) == {"first"}
    (shapes,) = re.findall(r"^products of a weight's shape: (.*)$", text, re.MULTILINE)
    assert {tuple(sorted(shape)) for shape in ast.literal_eval(shapes)} == {(256, 640)}
    assert number(text, rf"that fall back to the full gradient: {N}$") == 0
    fits = rf"^{N} sketches, fused and projected: largest relative difference {N}$"
    ((count, error),) = numbers(text, fits)
    assert count == kernels + 1 and error < 1e-4  # the embedding's too


def of_pod(text):
    chips = r"^fewest of these chips that surely hold it: (.*)$"
    needed = ast.literal_eval(re.findall(chips, text, re.MULTILINE)[0])
    assert needed["Exact + Adafactor"] < needed["Flora, fused"] < needed["MultiSteps + Adafactor"]
    assert needed["Flora, fused"] < needed["Flora, ordinary gradients"]
    state = {name: number(text, rf"^{name}\s+{N} MiB a chip$") for name in ("Flora", "MultiSteps")}
    assert state["Flora"] < 0.2 * state["MultiSteps"]
    ((ours, theirs),) = numbers(text, rf"mean of 16 micro-steps: Flora {N} MB, MultiSteps {N} MB$")
    assert ours < theirs
    row = r", micro-step" + rf"\s+{N}" * 5 + "$"
    ours, theirs = (numbers(text, name + row)[0] for name in ("Flora", "MultiSteps"))
    assert 0.9 < ours[0] / theirs[0] < 1.1  # the weights are gathered with either
    assert ours[1] + ours[2] < 0.5 * (theirs[1] + theirs[2])
    row = rf"\s+arguments\s+{N} MiB, temporaries and results\s+{N} MiB a chip$"
    ours, theirs = (numbers(text, f"^{name}{row}")[0] for name in ("Flora", "MultiSteps"))
    assert ours.sum() < theirs.sum()


def of_variants(text):
    ((upright, before),) = numbers(text, rf"upright digits {N}, on turned ones {N}$")
    assert upright > 0.9
    row = rf"\s+([\d,]+)\s+{N}\s+{N}\s+{N}\s+{N}$"
    found = re.findall(rf"^(\w[\w, -]*?){row}", text, re.MULTILINE)
    assert len(found) == 10
    tested = {name: float(accuracy) for name, *_, accuracy in found}
    assert all(accuracy > before + 0.2 for accuracy in tested.values())
    assert max(tested, key=lambda name: tested[name]) == "full, Adam"
    assert max(tested["LoRTA"], tested["XGBLoRA"]) < tested["LoRA"] - 0.05
    states = {name: float(size) for name, _, size, *_ in found}
    assert states["Flora, momentum"] == min(states[name] for name in tested if tested[name] > 0.9)
    assert number(text, rf"LoRA and RunLoRA, first 10 losses: largest difference {N}$") < 1e-3
    assert number(text, rf"adapted and merged, logits: largest difference {N}$") < 1e-2
    assert number(text, rf"^SoRA: {N} of 48 gates are zero") > 0
    sizes = re.findall(r"^SoRA: ([\d,]+) numbers before pruning, ([\d,]+) after$", text, re.M)
    full, pruned = (int(size.replace(",", "")) for size in sizes[0])
    assert pruned < full
    assert number(text, rf"before and after pruning, logits: largest difference {N}$") < 1e-2


def of_real_model(text):
    total = number(text, rf"^memory of the compiled step: {N} GiB")
    assert 1.0 < total < 2.5  # the weights are one
    ((before, after),) = numbers(text, rf"^validation loss {N} before, {N} after$")
    assert after < before - 0.5
    assert text.count("\nbefore ") == text.count("\nafter  ") == 3
    assert "model.safetensors" in text and "tokenizer.json" in text


FACTS = dict(
    zip(
        NAMES,
        (
            of_quickstart,
            of_random_projection,
            of_chain,
            of_fused,
            of_pod,
            of_variants,
            of_real_model,
        ),
        strict=True,
    )
)
DOCTORED = [
    (0, r"^(Flora, rank d/8\s+)[\d.]+", r"\g<1>50.0"),
    (0, r"a held-out loss of [\d.]+", "a held-out loss of 1.0"),
    (1, r"^(layer_0: LoRA's .* error) .*$", r"\1 1.0e-01"),
    (1, r"^(rate 0.1 .* )0\.\d+(\s+[\d.]+)$", r"\g<1>0.85\2"),
    (1, r"^(LoRA\s+rank of the change\s+)8 ", r"\g<1>9 "),
    (1, r"^with new projections \d+", "with new projections 161"),
    (2, r"(\[\s*)[\d.]+", r"\g<1>1.2"),
    (2, r"(MultiSteps, relative:) .*$", r"\1 1.0e-03"),
    (3, r"a sketch$", "a full gradient"),
    (3, r"\[0, 0, 0, 0\]", "[0, 0, 0, 1]"),
    (3, r"^(first   relative error) .*$", r"\1 1.0e-01"),
    (3, r"(back to the full gradient:) 0", r"\1 1"),
    (4, r"^Flora( +[\d.]+ MiB a chip)$", r"Flora      2.00 MiB a chip"),
    (4, r"16 micro-steps: Flora [\d.]+", "16 micro-steps: Flora 99.00"),
    (5, r"^(LoRTA .* )[\d.]+$", r"\g<1>0.160"),
    (5, r"^(SoRA:) \d+ of", r"\1 0 of"),
    (6, r"[\d.]+ after$", "9.999 after"),
]
"""The number of a notebook, a part of its output, and what would be wrong in its place."""


@pytest.mark.long
@pytest.mark.newest
@each
def test_runs(source, monkeypatch, tmp_path):
    _as_a_reader(monkeypatch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # number 7 writes gigabytes
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = jupytext.read(source)
    try:
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    finally:
        shutil.rmtree(tmp_path)
    kept = read(source)
    assert pictures(notebook) == pictures(kept)
    for ran, before in zip(code(notebook), code(kept), strict=True):
        assert bool(ran.outputs) == bool(before.outputs), ran.source
    FACTS[source.stem](words(notebook))


@pytest.mark.long
@pytest.mark.newest
def test_the_quickstart_runs_from_the_wheel_alone(tmp_path, monkeypatch):
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*wheel, str(tmp_path), str(ROOT)], check=True)
    (built,) = tmp_path.glob("*.whl")
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    zipfile.ZipFile(built).extractall(installed)
    elsewhere.mkdir()
    _as_a_reader(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(installed))
    notebook = jupytext.read(SOURCES[0])
    modules = "{name: str(module.__file__) for name, module in sys.modules.items() if name.partition('.')[0] in ('flora_jax', 'experiments') and module.__file__}"
    notebook.cells.append(nbformat.v4.new_code_cell(f"import sys\nprint(repr({modules}))"))
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(elsewhere)}},
    )
    client.execute()
    imported = ast.literal_eval(notebook.cells.pop().outputs[0].text)
    assert "flora_jax" in imported
    assert all(file.startswith(str(installed)) for file in imported.values())
    assert not any(name.startswith("experiments") for name in imported)
    of_quickstart(words(notebook))


def _as_a_reader(monkeypatch):
    """Leaves out what the tests say to the compiler."""
    for name in list(os.environ):
        if name == "XLA_FLAGS" or (name.startswith("JAX_") and name != "JAX_PLATFORMS"):
            monkeypatch.delenv(name)


@each
def test_what_is_kept_shows_what_it_should(source):
    FACTS[source.stem](words(read(source)))


@pytest.mark.parametrize(("notebook", "old", "new"), DOCTORED)
def test_what_would_be_wrong_is_found(notebook, old, new):
    text = words(read(SOURCES[notebook]))
    doctored = re.sub(old, new, text, count=1, flags=re.MULTILINE)
    assert doctored != text
    with pytest.raises(AssertionError):
        FACTS[NAMES[notebook]](doctored)


@each
def test_a_reader_meets_no_assert_and_no_import_from_the_clone(source):
    tree = ast.parse(source.read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not imported(tree) & {"experiments", "tests"}


def imported(tree) -> set[str]:
    """The packages that are imported."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def declared(extras: set[str]) -> set[str]:
    """The distributions that pyproject.toml names for these extras, with those of the library itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, done = {"flora-jax"}, set()
    waiting = [*project["dependencies"], f"flora-jax[{','.join(extras)}]"]
    while waiting:
        requirement = Requirement(waiting.pop())
        found.add(requirement.name)
        if requirement.name == "flora-jax":
            for extra in requirement.extras - done:
                done.add(extra)
                waiting += project["optional-dependencies"][extra]
    return found


@each
def test_the_first_code_cell_installs_all_that_is_imported(source):
    first, *_ = code(read(source))
    assert "find_spec" in first.source and not first.outputs
    (extras,) = re.findall(r'"flora-jax\[([\w,]+)\]"', first.source)
    names = imported(ast.parse(source.read_text(encoding="utf-8"))) - sys.stdlib_module_names
    distributions = importlib.metadata.packages_distributions()
    there = declared(set(extras.split(",")))
    if "ipykernel" not in there:  # a notebook runs, so that it is there
        names.discard("IPython")
    installs = {"ipython" if name == "ipykernel" else name.lower() for name in there}
    assert len(names) > 2
    for name in names - {"flora_jax"}:
        assert installs & {known.lower() for known in distributions[name]}, name


@each
def test_it_begins_with_a_title_and_ends_with_a_conclusion(source):
    first, *_, last = read(source).cells
    assert first.cell_type == last.cell_type == "markdown"
    assert first.source.startswith("# ")
    head, _, text = last.source.partition("\n\n")
    assert head == "## Conclusion"
    assert 2 <= len(re.findall(r"[.?!](?=\s|$)", text)) <= 5


@pytest.mark.optimized
def test_the_pod_reads_collectives_as_the_benchmark_does():
    (cell,) = [cell for cell in code(read(SOURCES[4])) if "def collectives" in cell.source]
    own = types.SimpleNamespace(**_run(cell.source, re=re, math=math, devices=jax.devices()))
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    weights = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))

    def step(weights, x, flag):
        def loss(weights):
            return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0] ** 2)

        grads = jax.grad(loss)(weights)
        return jax.lax.cond(flag, lambda g: g / jnp.sqrt(jnp.sum(g * g)), lambda g: g, grads)

    arguments = (
        jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=weights),
        jax.ShapeDtypeStruct(
            (16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
        ),
        jax.ShapeDtypeStruct((), jnp.bool_, sharding=NamedSharding(mesh, PartitionSpec())),
    )
    text = jax.jit(step, out_shardings=weights).lower(*arguments).compile().as_text() or ""
    found = sorted(own.collectives(text))
    expected = [
        (c.kind, [a for a, _ in c.arrays], c.group, c.times, c.optimizer_step, c.sent)
        for c in traffic.collectives(text, 8)
    ]
    assert found == sorted(expected)
    assert {times for _, _, _, times, _, _ in found} >= {1, 5}
    assert {update for *_, update, _ in found} == {False, True}


def _run(source: str, **given) -> dict:
    exec(source, given)
    return given


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
