import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from experiments.paper import (
    accumulation,
    against_galore,
    base,
    files,
    images,
    kappa,
    loop,
    momentum,
    problem,
    rows,
    table,
)
from experiments.paper.methods import FULL_RATES, RATES, Method, unit
from experiments.paper.sizes import SIZES
from experiments.paper.table import Options, Table

TABLES = [module.TABLE for module in (accumulation, momentum, kappa, base, images, against_galore)]
PLAIN, FLORA, LORA = Method("uncompressed"), Method("flora", 32), Method("lora", 2)


def line(method, rate, seed, validation, accuracy, state=100):
    return {
        "method": dataclasses.asdict(method),
        "rate": rate,
        "seed": seed,
        "figures": {"validation": validation, "accuracy": accuracy},
        "bytes": {"params": 1, "state": state, "peak": 5},
    }


RESULTS = [
    line(PLAIN, 0.05, 0, 3.0, 70.0, 400),
    line(PLAIN, 0.1, 0, 1.0, 80.0, 400),
    line(PLAIN, 0.2, 0, 2.0, 90.0, 400),
    line(PLAIN, 0.1, 1, 1.0, 84.0, 400),
    line(FLORA, 0.1, 0, 1.2, 81.0),
    line(FLORA, 0.2, 0, 1.1, 79.0),
    line(FLORA, 0.2, 1, 1.1, 85.0),
    line(LORA, 0.1, 0, 1.5, 60.0, 110),
    line(LORA, 0.2, 0, math.nan, 10.0, 110),
    line(LORA, 0.1, 1, 1.5, 62.0, 110),
]
GRID = {PLAIN: (0.05, 0.1, 0.2), FLORA: (0.05, 0.1, 0.2), LORA: (0.05, 0.1, 0.2)}


def test_the_rate_is_chosen_by_validation_and_the_scores_are_over_seeds():
    plain, flora, lora = rows.summarise(RESULTS, GRID, (0, 1), "accuracy")
    assert (plain.rate, plain.edge, plain.figures["accuracy"]) == (0.1, False, [80.0, 84.0])
    assert (flora.rate, flora.edge, flora.figures["accuracy"]) == (0.2, True, [79.0, 85.0])
    assert lora.rate == 0.1  # not the one that gave NaN
    assert flora.equal == 81.0
    assert flora.error("accuracy") == pytest.approx(math.sqrt(18))


def asked(losses, row=PLAIN, results=(), grow=2):
    """Gives the runs of a row until its order ends; `losses` gives the loss of a rate."""
    results, seen = list(results), []
    for seed, rate in table._order(row, (0.003, 0.01, 0.03, 0.1), grow, (0, 1), results):
        seen.append((seed, rate))
        results.append(line(row, rate, seed, losses(rate), 0.0))
    return seen


GRID_RUN = [(0, rate) for rate in (0.003, 0.01, 0.03, 0.1)]


@pytest.mark.parametrize(
    ("losses", "more", "best"),
    [
        (lambda rate: abs(math.log(rate / 0.02)), [], 0.03),
        (lambda rate: abs(math.log(rate / 0.2)), [0.3, 1.0], 0.3),
        (lambda rate: abs(math.log(rate / 0.004)) + (rate < 0.002), [0.001], 0.003),
        (lambda rate: -rate, [0.3, 1.0], 1.0),
        (lambda rate: rate, [0.001, 0.0003], 0.0003),
        (lambda rate: math.nan if rate > 0.002 else -rate, [0.001, 0.0003], 0.001),
        (lambda rate: math.nan, [0.001, 0.0003], 0.0003),
    ],
)
def test_the_grid_grows_while_its_edge_is_the_best(losses, more, best):
    assert asked(losses) == [*GRID_RUN, *((0, rate) for rate in more), (1, best)]


def test_a_grid_that_was_interrupted_while_it_grew_goes_on_as_it_would_have():
    runs = asked(lambda rate: -rate)
    for count in range(len(runs)):
        before = [line(PLAIN, rate, seed, -rate, 0.0) for seed, rate in runs[:count]]
        after = asked(lambda rate: -rate, results=before)
        assert [x for x in runs[:count] if x[0] == 0] + after == runs


def test_rates_that_a_user_names_are_all_that_is_tried():
    assert asked(lambda rate: -rate, grow=0) == [*GRID_RUN, (1, 0.1)]


def test_every_row_runs_at_the_rate_of_the_uncompressed_one_too():
    given = [line(PLAIN, rate, 0, -rate, 0.0) for rate in (0.1, 0.3)]
    seen = asked(lambda rate: abs(math.log(rate / 0.02)), FLORA, given)
    assert seen == [*GRID_RUN, (0, 0.3), (1, 0.03)]


def test_table_in_markdown_says_who_wins():
    text = rows.markdown(rows.summarise(RESULTS, GRID, (0, 1), "accuracy"), "accuracy")
    row = next(x for x in text.splitlines() if x.startswith("| Flora"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:4] == ["Flora r=32", "0.2 (edge)", "82.00 ± 4.24", "1.100 ± 0.000"]
    assert cells[4:6] == ["1.000", "1.012"]
    assert "0.0 % better than uncompressed in accuracy, within 2 %" in text
    assert "better than LoRA r=2, which has 1.10 times its state" in text


def test_table_in_markdown_says_who_loses():
    worse = [
        line(FLORA, 0.2, 0, 0.5, 50.0), line(FLORA, 0.2, 1, 0.5, 50.5), line(LORA, 0.1, 2, 1, 61.0)
    ]  # fmt: skip
    results = [x for x in RESULTS if x["method"] != dataclasses.asdict(FLORA)] + worse
    (sentence,) = rows.verdicts(rows.summarise(results, GRID, (0, 1), "accuracy"), "accuracy")
    assert "38.7 % worse than uncompressed in accuracy, not within 2 %" in sentence
    assert "worse than LoRA r=2, which" in sentence


def test_table_in_markdown_says_what_diverged():
    lost = [line(FLORA, rate, 0, math.nan, 0.0) for rate in (0.1, 0.2)]
    results = [x for x in RESULTS if x["method"] != dataclasses.asdict(FLORA)] + lost
    (sentence,) = rows.verdicts(rows.summarise(results, GRID, (0, 1), "accuracy"), "accuracy")
    assert sentence == "- Flora r=32: diverged, at every learning rate of the grid."


def test_of_perplexity_less_is_better():
    assert rows.worse_by("perplexity", 11.0, 10.0) == pytest.approx(0.1)
    assert rows.worse_by("bleu", 11.0, 10.0) == pytest.approx(-0.1)


def test_a_line_that_was_interrupted_is_passed_over_and_spoils_no_other(tmp_path):
    file = tmp_path / "results.jsonl"
    files.append(file, {"a": 1})
    with file.open("a") as stream:
        stream.write('{"a": 2, "b"')
    files.append(file, {"a": 3})
    assert files.read(file) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("one", TABLES, ids=lambda one: one.name)
@pytest.mark.parametrize("size", ["cpu", "full"])
def test_every_table_is_complete(one, size):
    chosen = one.rows[size]
    assert len({str(row) for row in chosen}) == len(chosen) == len(set(chosen))
    sizes = table.sizes_of(one, Options(size=size))
    _, shape = problem.MODELS[sizes.model]
    dataclasses.replace(shape, **one.changes)
    for row in chosen:
        assert rows.plain(row) in chosen
        assert RATES[unit(row)] and FULL_RATES[unit(row)]
        assert row.rank < shape.width or row.state_dtype == "int4"  # fewer bits pay for rank


def test_a_model_that_is_not_known():
    with pytest.raises(ValueError, match=r"model must be one of T5-test, .*, found 'BERT'"):
        table.sizes_of(TABLES[0], Options(model="BERT"))


SMALL = Table("small", "Small", "images", {"cpu": (PLAIN,), "full": ()}, optimizer_steps=2)


def make(tmp_path, **options):
    console = Console(file=io.StringIO(), width=200)
    given = Options(seeds=(0, 1), rates=(0.1,), out=tmp_path, **options)
    return table.make(SMALL, given, console), console.file.getvalue()


@pytest.mark.long
def test_a_table_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    undisturbed, text = make(tmp_path / "undisturbed")
    assert len(undisturbed) == 2 and "Digits of scikit-learn" in text
    for name in ("table.md", "table.csv", "plot.png", "plot.svg", "results.jsonl"):
        assert (tmp_path / "undisturbed" / name).stat().st_size > 0
    assert list((tmp_path / "undisturbed" / "tensorboard").rglob("events*"))
    run, seen = loop.run, []

    def dying(*args, **options):
        seen.append(args)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return run(*args, **options)

    monkeypatch.setattr(loop, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "interrupted", tracker="none")
    assert len(files.read(tmp_path / "interrupted" / "results.jsonl")) == 1
    again, _ = make(tmp_path / "interrupted", tracker="none")
    assert len(seen) == 3  # the one that was interrupted, and no other
    figures = [[(x["figures"], x["losses"]) for x in results] for results in (undisturbed, again)]
    assert figures[0] == figures[1]
    assert json.dumps(again[-1]) in (tmp_path / "interrupted" / "results.jsonl").read_text()


@pytest.mark.long
def test_a_dry_run_plans_and_writes_nothing(tmp_path):
    results, text = make(tmp_path / "dry", dry_run=True)
    assert not results and not (tmp_path / "dry").exists()
    assert "uncompressed" in text and "MiB" in text
    assert "2 runs of 2 optimizer steps: some" in text


def test_sizes_of_the_paper():
    assert SIZES["full"]["summarisation"].model == "T5-3B"
    assert SIZES["full"]["summarisation"].accumulation == 16
