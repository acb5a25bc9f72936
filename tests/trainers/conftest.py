"""Trainers that are not installed here are not tested here: `python3 -m tests --trainers` tests them, and fails where one is missing."""

import importlib.util

from tests.__main__ import TRAINERS

collect_ignore = [f"test_{name}.py" for name in TRAINERS if importlib.util.find_spec(name) is None]
