import json
from typing import get_args

import numpy as np
import pytest

from experiments import optimizers, quality
from tests.helpers import often


def test_table_takes_the_best_rate_of_each_row():
    def row(name, rate, loss, seed=0):
        return {"name": name, "rate": rate, "seed": seed, "loss": loss}

    lines = quality.table(
        [
            row(quality.GOAL, 0.1, 2.0),
            row(quality.GOAL, 0.2, 3.0),
            row(quality.GOAL, 0.1, 2.5, seed=1),
            row("orthogonalized d/4", 0.2, 1.8),
            row("orthogonalized d/4", 0.2, 2.0, seed=1),
            row("orthogonalized d/4", 0.4, 1.0, seed=1),  # the rate is that of the first seed
        ]
    ).splitlines()
    assert lines[2] == f"| {quality.GOAL} | 0.1 | 2 | 2.250 | 1.000 (1.000 to 1.000) |"
    assert lines[3] == "| orthogonalized d/4 | 0.2 | 2 | 1.900 | 0.850 (0.800 to 0.900) |"


@pytest.mark.parametrize("study", get_args(quality.Study))
def test_every_row_has_a_name_of_its_own(study):
    names = [str(setting) for setting in quality.settings(quality.Config(study=study))]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("method", often(get_args(optimizers.Method), "flora"))
def test_every_method_trains(method):
    """Against the same run at no learning rate, trained beside it."""
    config = quality.Config(width=128, layers=1, optimizer_steps=12, batch=2, length=16)
    run = quality.train(config, quality.Setting(method, part=8, side="larger"))
    trained, still = run([quality.Run(0, 0.02), quality.Run(0, 0.0, 0.0)])
    assert trained < still - 0.1


@pytest.mark.long
def test_runs_at_once_are_those_one_after_the_other():
    config = quality.Config(width=128, layers=1, optimizer_steps=12, batch=2, length=16)
    run = quality.train(config, quality.Setting(part=8))
    runs = [quality.Run(0, 0.02), quality.Run(1, 0.02), quality.Run(1, 0.04, 0.01)]
    alone = [run([one])[0] for one in runs]
    np.testing.assert_allclose(run(runs), alone, rtol=1e-4)
    assert len({round(loss, 3) for loss in alone}) == 3


def test_rates_of_every_width_are_in_one_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(
        quality,
        "train",
        lambda config, setting: lambda runs: [config.width * one.rate for one in runs],
    )
    config = quality.Config(
        out=tmp_path, study="rates", widths=(128, 256), parts=(4, 8), seeds=(0,)
    )
    quality.main(config)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 * 7
    picture = (tmp_path / "rates.svg").read_text()
    assert "width 128" in picture and "width 256" in picture


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    made = trained_by_distance(monkeypatch)
    config = quality.Config(out=tmp_path, parts=(4,), rows=2, seeds=(0, 1))
    quality.main(config)
    count = len((tmp_path / "results.jsonl").read_text().splitlines())
    assert made == [quality.GOAL, "orthogonalized d/4"]
    lines = (tmp_path / "quality.md").read_text().splitlines()
    rates = [float(line.split("|")[2]) for line in lines[2:]]
    assert all(abs(rate - 0.1) < 0.04 for rate in rates)  # beyond the edge of either grid
    quality.main(config)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == count
    assert len(made) == 2


def test_runs_at_once_have_the_whole_grid_on_every_seed(tmp_path, monkeypatch):
    trained_by_distance(monkeypatch)
    config = quality.Config(out=tmp_path, study="long", only=(0, 2), seeds=(0, 1), together=5)
    quality.main(config)
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    tried = [(one["name"], one["seed"], one["rate"]) for one in found]
    assert len(set(tried)) == len(tried)
    names = {name for name, _, _ in tried}
    assert len(names) == 1 + len(quality.OF_LONG)
    for name in names:
        rates = [
            sorted(rate for one, seed, rate in tried if (one, seed) == (name, s)) for s in (0, 1)
        ]
        assert rates[0] == rates[1] and rates[0][-1] > 0.1  # it grew beyond the edge


def trained_by_distance(monkeypatch):
    """In place of training the loss is the rate's distance from 0.1; gives the list of settings that were built."""
    made = []

    def train(config, setting):
        made.append(str(setting))
        return lambda runs: [abs(one.rate - 0.1) + 2 for one in runs]

    monkeypatch.setattr(quality, "train", train)
    return made
