import dataclasses
import io

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from experiments import text, train
from experiments.models.decoder import Shape

SMALL = train.Config(
    rank=16,
    boundaries=6,
    accumulation=2,
    batch=2,
    length=16,
    model=Shape(width=128, layers=1, heads=2),
    evaluate_every=2,
)


@pytest.fixture(autouse=True)
def small_text(monkeypatch):
    """A megabyte of the real text, so that reading it takes no time."""
    whole = text.load()
    part = text.Corpus(whole.train[:900_000], whole.validation[:100_000], whole.files)
    monkeypatch.setattr(text, "load", lambda: part)


def run(config):
    console = Console(file=io.StringIO(), width=100)
    figures = train.train(config, console)
    return figures, console.file.getvalue()


def final_params(folder, step):
    with ocp.CheckpointManager((folder / "states").absolute()) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(step, args=args)["state"]["params"]


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_bit_equal(tmp_path, monkeypatch):
    whole = dataclasses.replace(SMALL, out=tmp_path / "whole")
    cut = dataclasses.replace(SMALL, out=tmp_path / "cut")
    figures, _ = run(whole)
    batch, calls = text.batch, []

    def cut_off(side, seed, step, size, length):
        calls.append(step)
        if seed == cut.seed and step == 9:
            raise KeyboardInterrupt
        return batch(side, seed, step, size, length)

    with monkeypatch.context() as patch:
        patch.setattr(text, "batch", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(cut)
    resumed, output = run(cut)
    assert "Going on from micro-step 8." in output
    left, right = final_params(whole.out, 12), final_params(cut.out, 12)
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert resumed["final"] == figures["final"]
    assert figures["final"] < figures["initial"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["multisteps", "galore"])
def test_the_other_optimizers_train_and_report(tmp_path, method):
    config = dataclasses.replace(SMALL, optimizer=method, out=tmp_path, learning_rate=0.01)
    figures, _ = run(config)
    assert figures["final"] < figures["initial"]
    console = Console(file=io.StringIO(), width=120)
    train.show(config, figures, console)
    assert method in console.file.getvalue()
    for name in ("curves.png", "curves.svg", "report.txt", "sample.txt"):
        assert (tmp_path / name).stat().st_size > 0


def test_another_setting_in_the_same_folder_is_refused(tmp_path):
    first = dataclasses.replace(SMALL, out=tmp_path)
    train.Checkpoints(tmp_path, {"rank": first.rank}).close()
    with pytest.raises(
        ValueError, match=r"rank: the run in .* was started with 16, this one has 8"
    ):
        train.Checkpoints(tmp_path, {"rank": 8})


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="batch must be at least 1, found 0"):
        dataclasses.replace(SMALL, batch=0)
