import io

import numpy as np
import pytest
from rich.console import Console

from experiments import soak


@pytest.mark.long
def test_a_run_that_is_killed_ends_as_one_left_alone(tmp_path):
    console = Console(file=io.StringIO())
    tally = soak.soak(soak.Config(kills=3), tmp_path, console)
    assert tally.kills == 3 and tally.runs >= 1
    assert tally.resumed and tally.differing == 0


def test_a_difference_in_one_bit_or_type_is_seen():
    one = [np.ones(3, np.float32)]
    assert soak.same(one, [np.ones(3, np.float32)])
    assert not soak.same(one, [np.nextafter(one[0], 2)])
    assert not soak.same(one, [np.ones(3)])
    assert not soak.same(one, [])
