import contextlib
import dataclasses
import io
import signal

import jax
import pytest
from rich.console import Console

from experiments import text, train
from experiments.decoder import Shape
from experiments.soak import final_state
from flora_jax.finetune import checkpoints as checkpoint
from flora_jax.finetune import layout
from tests.helpers import assert_tree_close, assert_tree_equal

SMALL = train.Config(
    rank=16,
    optimizer_steps=6,
    accumulation=2,
    batch=2,
    length=16,
    model=Shape(width=128, layers=1, heads=2),
    evaluate_every=2,
    checkpoint_every=3,
)


@pytest.fixture(autouse=True)
def small_text(monkeypatch):
    """A megabyte of the real text, so that reading it takes no time."""
    full = text.load()
    part = text.Corpus(full.train[:900_000], full.validation[:100_000], full.files)
    monkeypatch.setattr(text, "load", lambda: part)


def run(config):
    console = Console(file=io.StringIO(), width=100)
    figures = train.train(config, console)
    return figures, console.file.getvalue()


class Watched:
    """A stream of batches before whose batch number `at` something happens."""

    def __init__(self, batches, at, happens):
        self.batches, self.left, self.happens = batches, at, happens
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        if self.left == 0:
            self.happens()
        self.left -= 1
        return next(self.batches)


@contextlib.contextmanager
def before_batch(at, happens, monkeypatch):
    stream = text.stream
    with monkeypatch.context() as patch:
        patch.setattr(text, "stream", lambda *args: Watched(stream(*args), at, happens))
        yield


def die():
    raise KeyboardInterrupt


def interrupt(config, after, monkeypatch):
    """A run that dies after so many micro-steps of its own."""
    with before_batch(after, die, monkeypatch), pytest.raises(KeyboardInterrupt):
        run(config)


@pytest.mark.long
def test_a_run_that_was_interrupted_ends_bit_equal(tmp_path, monkeypatch):
    undisturbed = dataclasses.replace(SMALL, out=tmp_path / "undisturbed")
    interrupted = dataclasses.replace(SMALL, out=tmp_path / "interrupted")
    figures, _ = run(undisturbed)
    interrupt(interrupted, 11, monkeypatch)
    resumed, output = run(interrupted)
    assert "Going on from micro-step 9." in output  # in the middle of a cycle
    left, right = final_state(undisturbed.out, 12), final_state(interrupted.out, 12)
    assert_tree_equal(left, right)
    assert resumed["final"] == figures["final"]
    pairs = [tuple(pair) for pair in resumed["history"]["train"]]
    assert pairs == figures["history"]["train"]
    assert figures["final"] < figures["initial"]


@pytest.mark.long
def test_a_run_goes_on_in_other_layouts(tmp_path, monkeypatch):
    """It goes on from one device to two, four and eight; from data parallel to FSDP, and tensor parallel as well."""
    base = dataclasses.replace(SMALL, batch=8)
    alone = dataclasses.replace(base, out=tmp_path / "alone")
    figures, _ = run(alone)
    moved, make_mesh = dataclasses.replace(base, out=tmp_path / "moved"), layout.make_mesh
    layouts = [("", 1), ("data=2", 2), ("fsdp=4", 4), ("data=2,fsdp=2,model=2", 8)]
    for i, (mesh, count) in enumerate(layouts):
        config = dataclasses.replace(moved, mesh=mesh)
        with monkeypatch.context() as patch:
            devices = jax.devices()[:count]
            patch.setattr(layout, "make_mesh", lambda text, d=devices: make_mesh(text, d))
            if count < 8:
                interrupt(config, 4, monkeypatch)
            else:
                resumed, output = run(config)
                assert f"Going on from micro-step {3 * i}." in output
    left, right = (final_state(c.out, 12)["params"] for c in (alone, moved))
    assert_tree_close(left, right, 2e-3)
    assert resumed["final"] == pytest.approx(figures["final"], rel=1e-3)


@pytest.mark.long
def test_a_notice_to_stop_saves_at_once(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, out=tmp_path, checkpoint_every=100)

    def notice():
        signal.raise_signal(signal.SIGTERM)

    with (
        before_batch(4, notice, monkeypatch),
        pytest.raises(train.Stopped, match="Stopped at micro-step 5, saved"),
    ):
        run(config)
    _, output = run(config)
    assert "Going on from micro-step 5." in output


@pytest.mark.long
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


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="batch must be at least 1, found 0"):
        dataclasses.replace(SMALL, batch=0)


def test_another_text_is_another_run(tmp_path):
    corpus = text.load()
    checkpoint.Checkpoints(tmp_path, train.settings(SMALL, corpus)).close()
    other = dataclasses.replace(corpus, train=corpus.train[1:])
    with pytest.raises(ValueError, match=r"text: the run in .* was started with"):
        checkpoint.Checkpoints(tmp_path, train.settings(SMALL, other))


def test_a_batch_that_does_not_go_over_the_devices_is_refused(tmp_path):
    config = dataclasses.replace(SMALL, batch=6, mesh="data=4,model=2", out=tmp_path)
    with pytest.raises(ValueError, match="batch must be a multiple of data x fsdp, 4, found 6"):
        run(config)
