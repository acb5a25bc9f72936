"""The command, in processes of its own: told to stop, killed, of several processes, and with wrong arguments."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from flora_jax import cli
from flora_jax.models.load import load
from tests.finetune.checkpoint import PAIRS, make_checkpoint, write

KILLS = 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return make_checkpoint(folder / "model"), write(folder / "pairs.jsonl", PAIRS)


def words(files, out, *more, steps=40):
    model, data = map(str, files)
    own = (
        f"--out {out} --rank 8 --length 64 --batch 2 --micro-batches 2 --steps {steps} --samples 0"
    )
    return ["finetune", model, data, *own.split(), "--save-every", "2", *more]


def start(arguments, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "flora_jax.cli", *arguments]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def weights(folder):
    return jax.tree.leaves(load(folder)[1])


def saved(out):
    return len(list((out.with_name(out.name + ".run") / "seals").glob("*.json")))


@pytest.mark.long
def test_a_run_that_is_told_to_stop_saves_and_goes_on(files, tmp_path):
    out = tmp_path / "mine"
    process = start(words(files, out, "--validate-every", "1000", steps=400))
    deadline = time.monotonic() + 120
    while not saved(out) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == 3, shown
    assert "saved; the same command goes on" in shown and not out.exists()
    steps = int(shown.split("Stopped at step ")[1].split(",")[0])
    assert 0 < steps < 400
    again = start(words(files, out, "--validate-every", "1000", steps=400))
    shown = again.communicate(timeout=180)[0]
    assert again.returncode == 0, shown
    assert f"Going on from step {steps} of 400." in shown
    assert load(out)[0].shape.layers == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--length", "0"], "length must be at least 1, found 0"),
        (["--method", "exact"], "rank must not be given with method exact, which has none"),
        (["--method", "galore"], "invalid choice 'galore' for argument '--method'"),
        (["--mesh", "rows=2"], "flora-jax: mesh must name axes among data, fsdp, model"),
    ],
)
def test_errors_are_a_sentence_and_a_code(files, tmp_path, more, said, capsys):
    try:
        code = cli.main(words(files, tmp_path / "mine", *more))
    except SystemExit as stopped:  # of words that are not understood
        code = stopped.code
    shown = capsys.readouterr()
    text = " ".join((shown.out + shown.err).replace("│", " ").split())
    assert code == 2 and said in text and "Traceback" not in text


def test_help_says_each_setting_in_a_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    shown = capsys.readouterr().out
    for name in ("--method", "--rank", "--length", "--mesh", "--plan-only", "--weight-decay"):
        assert name in shown


@pytest.mark.long
def test_kills_at_random_moments_lose_nothing_that_was_saved(files, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "mine"
    start(words(files, whole)).communicate()
    chance = random.Random(0)
    kills, newest, finished = 0, 0, 0
    while kills < KILLS:
        process = start(words(files, out))
        time.sleep(chance.uniform(1, 18))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
        states = out.with_name("mine.run") / "states"
        found = max((int(x.name) for x in states.glob("[0-9]*") if x.name.isdigit()), default=0)
        assert found >= newest
        newest = saved(out) and found
        if out.exists():
            assert all(np.isfinite(x).all() for x in weights(out))
            for a, b in zip(weights(out), weights(whole), strict=True):
                np.testing.assert_array_equal(a, b)
            finished += 1
            out.rename(tmp_path / f"done-{finished}")
            out.with_name("mine.run").rename(tmp_path / f"done-{finished}.run")
            newest = 0
    process = start(words(files, out))
    shown = process.communicate()[0]
    assert process.returncode == 0, shown
    for a, b in zip(weights(out), weights(whole), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_two_processes_write_the_checkpoint_of_one(files, tmp_path):
    alone = tmp_path / "alone"
    start(words(files, alone, steps=6)).communicate()
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    out = tmp_path / "mine"
    more = [
        "--distributed",
        "--coordinator",
        f"localhost:{port}",
        "--processes",
        "2",
        "--mesh",
        "fsdp=2",
    ]
    both = [start(words(files, out, *more, "--process", str(i), steps=6)) for i in range(2)]
    shown = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(shown)
    for a, b in zip(weights(out), weights(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
