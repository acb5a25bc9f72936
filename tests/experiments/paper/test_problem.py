import io

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.paper import loop, problem, start
from experiments.paper.methods import Method
from experiments.tasks import data
from flora_jax.models import decoder, gpt2, t5, vit
from flora_jax.models.families import outline
from flora_jax.models.load import load
from flora_jax.models.save import save
from tests.helpers import often

MODELS = {
    "summarisation": (t5.T5, t5.Shape(280, 8, 12, 1, 2, 4)),
    "translation": (gpt2.Gpt2, gpt2.Shape(280, 16, 8, 1, 2)),
    "language": (decoder.Decoder, decoder.Shape(280, 8, 12, 1, 2, 2, np.float32)),
    "images": (vit.Vit, vit.Shape(8, 4, 1, 8, 1, 2, 12, 10)),
}
CARD = data.Card("Words", "Made.", "none", "by place.")
PAIRS = [(f"eins zwei drei vier {i}", f"one two three four {i}") for i in range(30)]
SIDES = {
    "summarisation": data.Sides(CARD, PAIRS[:20], PAIRS[20:25], PAIRS[25:]),
    "translation": data.Sides(CARD, PAIRS[:20], PAIRS[20:25], PAIRS[25:]),
    "language": data.Sides(CARD, *([a for a, _ in PAIRS[i : i + 10]] for i in (0, 10, 20))),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    load = problem.load
    monkeypatch.setattr(problem, "load", lambda task, _: SIDES.get(task) or load(task, "offline"))
    monkeypatch.setattr(problem, "MODELS", MODELS)


def sizes(task):
    return problem.Sizes(task, (7, 5), 3, 2, 2, held_out=4)


@pytest.mark.parametrize("task", often(MODELS, "images"))
def test_arrays_have_the_shapes_that_were_planned(task):
    given, planned = (make(task, sizes(task)) for make in (problem.make, problem.outline))
    assert {k: (x.shape[1:], x.dtype) for k, x in given.train.items()} == {
        k: (x.shape[1:], x.dtype) for k, x in planned.train.items()
    }
    params = given.init(given.model, 0)
    assert jax.eval_shape(lambda: planned.init(planned.model, 0)) == jax.eval_shape(lambda: params)
    batch = {name: x[:3] for name, x in given.train.items()}
    value = float(given.loss(given.model, params, batch))
    assert value == pytest.approx(float(planned.loss(planned.model, params, batch)))
    assert value == pytest.approx(np.log(280 if task != "images" else 10), rel=0.5)
    assert problem.make(task, sizes(task)).digest == given.digest


@pytest.mark.parametrize("task", MODELS)
def test_scores_are_of_the_test_side(task):
    given = problem.make(task, sizes(task))
    params = given.init(given.model, 0)
    figures = given.score(given.model, params)
    assert problem.METRIC[task] in figures
    assert all(np.isfinite(value) and value >= 0 for value in figures.values())
    if task == "language":
        rows = [row for text in SIDES[task].test for row in (*given.words.encode([text])[0], 1)]
        windows = [rows[5 * i : 5 * i + 6] for i in range((len(rows) - 1) // 5)]
        windows = np.array(windows[:: -(-len(windows) // 4)])
        logits = np.asarray(given.model.apply({"params": params}, windows[:, :-1]), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        mean = np.take_along_axis(logits, windows[:, 1:, None], -1).mean()
        assert figures["perplexity"] == pytest.approx(np.exp(-mean), rel=1e-4)
    if task == "translation":
        assert "|tok:13a|" in given.about


def test_a_source_is_cut_into_halves_on_its_own_side():
    found = problem.continuations(SIDES["translation"])
    assert found.train[1] == ("eins zwei", "drei vier 1")
    assert [len(side) for side in found[1:]] == [20, 5, 5]


@pytest.mark.long
def test_a_start_is_trained_once_and_all_begin_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "STARTS", tmp_path)
    small = problem.Sizes("translation", (7, 5), 3, 2, 2, held_out=4, warm=3)
    console = Console(file=io.StringIO())
    folder = start.warm_start("translation", small, "offline", {}, console)
    assert "validation loss is" in console.file.getvalue()
    again = Console(file=io.StringIO())
    assert start.warm_start("translation", small, "offline", {}, again) == folder
    assert not again.file.getvalue()
    _, params = load(folder)
    given = problem.make("translation", small, checkpoint=folder)
    assert jax.tree.all(jax.tree.map(np.array_equal, given.params, params))
    (row,) = given.words.encode(["eins"])
    assert given.train["tokens"][0, : len(row)].tolist() == row
    assert given.words.separator == 2
    for method in (Method("uncompressed"), Method("lora", 2)):
        begun, _ = loop.program(given, method, small).start(5)
        np.testing.assert_array_equal(begun["wte"]["embedding"], params["wte"]["embedding"])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model = MODELS["translation"][0](MODELS["translation"][1])
    shapes = outline(model)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    save(tmp_path / "gpt2", model, params)
    with pytest.raises(ValueError, match="must be a T5 for summarisation, found Gpt2"):
        problem.make("summarisation", sizes("summarisation"), checkpoint=tmp_path / "gpt2")
