"""The benchmark of an accelerator, at toy size on the CPU; its arithmetic against that by hand."""

import json
import math
from dataclasses import replace

import pytest

from experiments.bench import accelerator, chips
from tests.helpers import often

TOY = accelerator.Config(
    shapes=("LLaMA-test",), batch=1, length=16, micro_batches=2, rounds=1, part=8
)


@pytest.mark.parametrize("method", often(accelerator.TITLES, "flora"))
def test_each_method_is_timed(method):
    found = accelerator.one(TOY, method, "LLaMA-test")
    assert math.isfinite(found["tokens_per_second"]) and found["tokens_per_second"] > 0
    assert found["compiled_bytes"] > 0
    assert found["share_of_peak"] is None  # of a CPU no peak is known


def test_the_command_writes_a_table_and_a_picture(tmp_path, monkeypatch):
    """One method in a process of its own, compiled ahead, and one that fails there, which is said and does not end the command."""
    monkeypatch.setitem(accelerator.TITLES, "none", "no such method")
    config = replace(TOY, methods=("none", "lora"), micro_batches=1, ahead=2, out=tmp_path)
    accelerator.main(config)
    rows = json.loads((tmp_path / "accelerator.json").read_text())["rows"]
    failed, good = rows
    assert failed["method"] == "none" and failed["error"]
    assert good["method"] == "lora" and good["tokens_per_second"] > 0
    assert good["compile_seconds"] > 0 and good["compile_seconds"] != good["seconds_until_timed"]
    assert (tmp_path / "accelerator.png").stat().st_size > 1000


def test_what_comes_after_the_time_is_not_begun(tmp_path):
    config = accelerator.Config(methods=("exact", "lora"), minutes=0, out=tmp_path)
    assert [row["error"] for row in accelerator.rows(config)] == 2 * [
        "not begun: the time was over"
    ]


def test_flops_are_those_of_the_shapes():
    """LLaMA-60M: 8 layers of width 512, hidden 1376, vocabulary 32000, of which the embedding multiplies nothing."""
    weights = 8 * (4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512) + 512 + 32000 * 512
    found = accelerator.flops(accelerator.SHAPES["LLaMA-60M"], tokens=100, length=64)
    assert found == 100 * (6 * weights + 12 * 8 * 512 * 64)


@pytest.mark.parametrize(
    ("kind", "tera"),
    (
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ),
)
def test_peaks(kind, tera):
    assert chips.peak(kind) == tera * 1e12


def test_of_an_unknown_chip_there_is_no_peak():
    assert chips.peak("cpu") is None


@pytest.mark.long
def test_in_turn(tmp_path):
    """Ratios are those of the seconds, the first of MultiSteps one."""
    config = replace(
        TOY, methods=("multisteps", "lora"), micro_batches=1, in_turn=True, out=tmp_path
    )
    base, other = accelerator.main(config)
    assert base["ratio"] == 1 and other["ratio"] == other["seconds"] / base["seconds"]
