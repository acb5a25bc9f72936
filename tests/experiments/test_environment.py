"""The environment of the checkout's own commands."""

import sys
from pathlib import Path

import pytest

from experiments.environment import run

PYTHON = Path(sys.executable)


def test_bytecode_is_kept_whatever_the_image_says(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert run(PYTHON, "-c", "import sys; sys.exit(sys.dont_write_bytecode)") == 0


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_status_is_that_of_the_command(code):
    assert run(PYTHON, "-c", f"raise SystemExit({code})") == code
