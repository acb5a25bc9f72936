import dataclasses

import jax
import numpy as np
import pytest

from experiments.paper import memory, problem
from flora_jax.chain.plan import tree_bytes
from flora_jax.models import t5

SIZES = problem.Sizes("small", (8, 4), 1, 4, 10)
SHAPE = t5.Shape(600, 256, 512, 1, 2, 128)


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.setattr(problem, "MODELS", {"small": (t5.T5, SHAPE)})
    return {row[:3]: row[3:] for row in memory.programs(SIZES, 16)}


def test_the_rows_are_those_of_the_methods_the_steps_and_checkpointing(programs):
    assert len(programs) == 8
    states = {key: tree_bytes(shapes[1]) for key, (_, shapes) in programs.items()}
    for remat in (False, True):
        flora, light = (states["Flora r=16", step, remat] for step in ("ordinary", "light"))
        assert flora == light < states["LoRA r=16", "ordinary", remat]
        assert flora < states["uncompressed", "ordinary", remat] / 4


def test_bytes_are_those_of_the_compiled_program():
    step = jax.jit(lambda x: x + 1)
    assert memory.measure(step, (jax.ShapeDtypeStruct((1000,), np.float32),), "cpu") == 8000


def test_markdown_has_ratios_to_the_first_row():
    rows = [
        memory.Row("a", "ordinary", False, 2**21, 2**30),
        memory.Row("b", "light", True, 0, 2**29),
    ]
    text = memory.markdown([*rows, dataclasses.replace(rows[1], peak=None)]).splitlines()
    assert text[2] == "| a | ordinary | no | 2 | 1,024 | 1.000 |"
    assert text[3] == "| b | light | yes | 0 | 512 | 0.500 |"
    assert text[4] == "| b | light | yes | 0 | over 95 GiB | - |"
