"""Real processes that train together over gloo."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests import worker
from tests.helpers import assert_close

SECONDS = 240


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def train_together(folder, count, layout):
    """What each of `count` processes, of two devices each, has in the end."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    port = str(free_port())
    files = [folder / f"{layout}-{count}-{i}.npz" for i in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.worker", port, str(count), str(i), layout, str(file)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, file in enumerate(files)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [dict(np.load(file)) for file in files]


@pytest.mark.long
@pytest.mark.parametrize("count, layout", [(2, "data"), (4, "data"), (2, "fsdp"), (4, "fsdp")])
def test_all_processes_hold_the_same_bits_and_one_process_alone_agrees(tmp_path, count, layout):
    first, *others = train_together(tmp_path, count, layout)
    for other in others:
        for name in first:
            assert first[name].tobytes() == other[name].tobytes()
    alone = worker.train(layout)
    start = worker.params_of(0)
    for name in first:
        assert not np.array_equal(first[name], start[name])
        assert_close(first[name], alone[name], 1e-4)
