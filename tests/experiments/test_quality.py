from typing import get_args

import pytest

from experiments import optimizers, quality


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


@pytest.mark.parametrize("method", get_args(optimizers.Method))
def test_every_method_trains(method):
    """Against the same run at no learning rate."""
    config = quality.Config(width=128, layers=1, optimizer_steps=12, batch=2, length=16)
    run = quality.train(config, quality.Setting(method, part=8, side="larger"), 0)
    assert run(0.02) < run(0.0) - 0.1


def test_rates_of_every_width_are_in_one_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(
        quality, "train", lambda config, setting, seed: lambda rate: config.width * rate
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
    made = []

    def train(config, setting, seed):
        made.append((str(setting), seed))
        return lambda rate: abs(rate - 0.1) + 2

    monkeypatch.setattr(quality, "train", train)
    config = quality.Config(out=tmp_path, parts=(4,), rows=2, seeds=(0, 1))
    quality.main(config)
    count = len((tmp_path / "results.jsonl").read_text().splitlines())
    assert [name for name, _ in made] == [quality.GOAL] * 2 + ["orthogonalized d/4"] * 2
    lines = (tmp_path / "quality.md").read_text().splitlines()
    rates = [float(line.split("|")[2]) for line in lines[2:]]
    assert all(abs(rate - 0.1) < 0.04 for rate in rates)  # beyond the edge of either grid
    quality.main(config)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == count
    assert len(made) == 4
