"""The main job as several processes."""

import re
import signal
import subprocess
import time

import pytest

from experiments import soak, train
from flora_jax.finetune import checkpoints as checkpoint
from flora_jax.finetune import layout
from tests.helpers import assert_tree_close
from tests.test_processes import free_port

RUN = {
    **soak.SMALL,
    "optimizer-steps": 4,
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


def restored(out):
    """The newest step and its params."""
    config = train.Config(
        rank=16, optimizer_steps=4, accumulation=2, model=train.decoder.Shape(128 * 2, 128, 1, 2)
    )
    mesh = layout.make_mesh("")
    state = dict(
        zip(("params", "opt_state"), train.initial_state(config, "flora", mesh), strict=True)
    )
    checkpoints = checkpoint.Checkpoints(out, {})
    step, state, _ = checkpoints.restore(state, {})
    checkpoints.close()
    return step, state["params"]


def start_two(out, *more):
    port = free_port()
    return [
        start(
            out, "--distributed", "--coordinator", f"localhost:{port}",
            "--processes", "2", "--process", str(i), *more,
        )
        for i in range(2)
    ]  # fmt: skip


def texts_of(processes):
    try:
        return [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_notice_to_one_process_stops_both_at_the_same_micro_step(tmp_path, number):
    together = start_two(tmp_path, "--optimizer-steps", "100000")
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob("seals/*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    together[1].send_signal(number)
    texts = texts_of(together)
    stopped = [re.findall(r"Stopped at micro-step (\d+), saved", text) for text in texts]
    assert stopped[0] and stopped[0] == stopped[1], texts
    assert restored(tmp_path)[0] == int(stopped[0][0])


@pytest.mark.long
def test_two_processes_end_as_one(tmp_path):
    together = start_two(tmp_path / "two")
    texts = texts_of(together)
    assert [process.returncode for process in together] == [0, 0], texts
    assert "Validation loss" in texts[0] and "Validation loss" not in texts[1]
    alone = start(tmp_path / "one")
    text, _ = alone.communicate(timeout=240)
    assert alone.returncode == 0, text
    (step, left), (other, right) = (restored(tmp_path / name) for name in ("two", "one"))
    assert step == other == 8
    assert_tree_close(left, right, 2e-3)
