"""The main job as several processes."""

import subprocess

import pytest

from experiments import checkpoint, layout, soak, train
from tests.helpers import assert_tree_close
from tests.test_processes import free_port

RUN = {
    **soak.SMALL,
    "boundaries": 4,
    "accumulation": 2,
    "batch": 8,
    "length": 16,
    "evaluate-every": 4,
    "checkpoint-every": 3,
    "mesh": "data=2,fsdp=2",
}


def start(out, *flags):
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 if flags else 4}",
    }
    return soak.start({"out": out, **RUN}, environment, *flags, stdout=subprocess.PIPE, text=True)


def params(out):
    config = train.Config(
        rank=16, boundaries=4, accumulation=2, model=train.decoder.Shape(128 * 2, 128, 1, 2)
    )
    mesh = layout.make_mesh("")
    state = dict(
        zip(("params", "opt_state"), train.initial_state(config, "flora", mesh), strict=True)
    )
    checkpoints = checkpoint.Checkpoints(out, {})
    step, state, _ = checkpoints.restore(state, {})
    checkpoints.close()
    assert step == 8
    return state["params"]


@pytest.mark.slow
def test_two_processes_end_as_one(tmp_path):
    port = free_port()
    together = [
        start(
            tmp_path / "two", "--distributed", "--coordinator", f"localhost:{port}",
            "--processes", "2", "--process", str(i),
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=240)[0] for process in together]
    finally:
        for process in together:
            process.kill()
    assert [process.returncode for process in together] == [0, 0], texts
    assert "Validation loss" in texts[0] and "Validation loss" not in texts[1]
    alone = start(tmp_path / "one")
    text, _ = alone.communicate(timeout=240)
    assert alone.returncode == 0, text
    assert_tree_close(params(tmp_path / "two"), params(tmp_path / "one"), 2e-3)
