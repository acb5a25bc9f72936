"""Checkpoints written as the folder that they came from, and all or nothing of them."""

import dataclasses
import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flora_jax.models import decoder, gpt2
from flora_jax.models import save as save_module
from flora_jax.models.checkpoint import INDEX, ONE
from flora_jax.models.load import load
from flora_jax.models.save import save
from tests.models.test_load import MODELS, SMALL, params_of
from tests.test_processes import free_port

TIED = decoder.Decoder(dataclasses.replace(SMALL, tied=True, layers=3))


def contents(folder):
    """All files below a folder, by their names in it."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def arrays_of(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture
def source(tmp_path):
    """A folder as the Hub has them: two files with their index, and much beside them."""
    folder = tmp_path / "source"
    save(folder, TIED, params_of(TIED))
    arrays = load_file(folder / ONE)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.arange(3, dtype=np.float32)
    (folder / ONE).unlink()
    names = sorted(arrays)
    files = {"model-b.safetensors": names[::2], "model-a.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: arrays[name] for name in held}, folder / file, {"format": "pt"})
    where = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {"total_size": 1, "mine": "kept"}, "weight_map": where, "more": 3}
    (folder / INDEX).write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config = {"zeta": [1, {"ü": None}], "torch_dtype": "float32", **config, "transformers": "4.1"}
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("README.md", "tokenizer.json", "chat_template.jinja", "LICENSE", ".gitattributes"):
        (folder / name).write_bytes(f"of {name} ü\r\n".encode())
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model-q4.gguf"):
        (folder / name).write_bytes(b"weights")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    for name in ("onnx/model.onnx", "onnx/config.json", ".git/HEAD", "images/a/plot.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / "blob").write_text("a file of a cache")
    (folder / "vocabulary.txt").symlink_to(tmp_path / "blob")
    return folder


KEPT = {"README.md", "tokenizer.json", "chat_template.jinja", "LICENSE", ".gitattributes"}
KEPT |= {"images/a/plot.png", "vocabulary.txt"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_like_the_folder_that_was_loaded(tmp_path, source, dtype):
    before = contents(source)
    model, params = load(source, dtype)
    params = jax.tree.map(lambda x: (x + 1).astype(x.dtype), params)
    save(tmp_path / "out", model, params, like=source)
    assert contents(source) == before
    after = contents(tmp_path / "out")
    weights = {"model-a.safetensors", "model-b.safetensors"}
    assert after.keys() == KEPT | weights | {INDEX, "config.json"}
    assert {name: after[name] for name in KEPT} == {name: before[name] for name in KEPT}
    old, new = (json.loads(x["config.json"]) for x in (before, after))
    assert list(new) == list(old)
    assert new == {**old, "torch_dtype": dtype}
    for name in weights:
        with safe_open(source / name, "np") as one, safe_open(tmp_path / "out" / name, "np") as two:
            assert set(one.keys()) == set(two.keys())
            assert two.metadata() == {"format": "pt"}
    index = json.loads(after[INDEX])
    assert {**index, "metadata": 0} == {**json.loads(before[INDEX]), "metadata": 0}
    found = arrays_of(tmp_path / "out")
    size = sum(x.nbytes for x in found.values())
    assert index["metadata"] == {"mine": "kept", "total_size": size}
    np.testing.assert_array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["lm_head.weight"], params["embed"]["embedding"])
    frequencies = found["model.layers.0.self_attn.rotary_emb.inv_freq"]
    np.testing.assert_array_equal(frequencies, np.arange(3, dtype=np.float32))
    again, read = load(tmp_path / "out")
    assert again == model and jax.tree.all(jax.tree.map(np.array_equal, read, params))


def test_names_without_a_prefix_stay_so(tmp_path):
    model = gpt2.Gpt2(gpt2.Shape(24, 8, 8, 2, 2))
    save(tmp_path / "source", model, params_of(model))
    file = tmp_path / "source" / ONE
    bare = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 3, 3), np.uint8)
    save_file(bare, file)
    loaded, params = load(tmp_path / "source")
    save(tmp_path / "out", loaded, params, like=tmp_path / "source")
    found = load_file(tmp_path / "out" / ONE)
    assert found.keys() == bare.keys()
    assert all(np.array_equal(found[name], bare[name]) for name in bare)
    assert not (tmp_path / "out" / INDEX).exists()


def test_a_head_that_was_a_copy_gets_a_place_of_its_own(tmp_path):
    """As transformers 5 leaves it out, whether it is one or not."""
    model = MODELS["t5-1.1"]
    save(tmp_path / "source", model, params_of(model))
    arrays = load_file(tmp_path / "source" / ONE)
    del arrays["lm_head.weight"]
    save_file(arrays, tmp_path / "source" / ONE)
    loaded, params = load(tmp_path / "source")
    params["head"]["kernel"] = params["head"]["kernel"] + 1
    save(tmp_path / "out", loaded, params, like=tmp_path / "source")
    _, read = load(tmp_path / "out")
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))


def test_params_on_devices_are_written_as_on_the_host(tmp_path, source):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        return jax.NamedSharding(mesh, jax.P(*(None,) * (len(leaf.shape) - 1), "a"))

    model = MODELS["t5"]
    save(tmp_path / "t5", model, params_of(model))
    for scan, like, shardings in (
        (True, source, jax.NamedSharding(mesh, jax.P())),
        (False, source, None),
        (True, tmp_path / "t5", lambda leaves: jax.tree.map(_fitting(place), leaves)),
    ):
        out = tmp_path / "out" / f"{scan}-{like.name}"
        loaded, params = load(like, shardings=shardings, scan=scan)
        save(out, loaded, params, like)
        assert contents(out).keys() >= {"config.json"}
        new, old = arrays_of(out), arrays_of(like)
        assert new.keys() == old.keys()
        assert all(np.array_equal(new[name], old[name]) for name in old)
        host = [leaf._npy_value for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
        assert all(x is None for x in host), "an array keeps what was gathered of it"


def _fitting(place):
    def fitting(leaf):
        whole = place(leaf)
        return whole if leaf.shape[-1] % 8 == 0 else jax.NamedSharding(whole.mesh, jax.P())

    return fitting


def test_what_is_refused(tmp_path, source):
    model, params = load(source)
    other = decoder.Decoder(dataclasses.replace(model.shape, epsilon=0.5))
    for out, given, like, message in (
        (source, model, None, "source is there already; give another folder"),
        (source / "mine", model, source, "mine lies in .*source, which it is made from"),
        (tmp_path / "out", other, source, "whose epsilon is 1e-06, found 0.5"),
        (tmp_path / "out", model, tmp_path / "none", "none' cannot be read: No such file"),
    ):
        with pytest.raises(ValueError, match=message):
            save(out, given, params, like)
    with pytest.raises(ValueError, match=r"dtype of weights .* must be one of .*, found int8"):
        save(tmp_path / "out", model, jax.tree.map(lambda x: x.astype("int8"), params))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["blob", "source"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_nothing(tmp_path, source, monkeypatch, number):
    model, params = load(source)
    before, written = contents(source), []

    def fsync(stream):
        written.append(stream)
        if len(written) > 1:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    message = f"out cannot be written: {os.strerror(number)}; nothing of it is left"
    if number != errno.EIO:
        message = r"the disk is full: .*out needs 0.00 GB for its weights; nothing of it is left"
    with pytest.raises(OSError, match=message):
        save(tmp_path / "out", model, params, like=source)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["blob", "source"]
    assert contents(source) == before
    monkeypatch.undo()
    save(tmp_path / "out", model, params, like=source)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_disk_that_is_full_in_truth(tmp_path, source, monkeypatch):
    model, params = load(source)
    opened = Path.open

    def full(path, mode="r", *args, **kwargs):
        weights = path.suffix == ".safetensors" and "w" in mode
        return opened(Path("/dev/full") if weights else path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="the disk is full"):
        save(tmp_path / "out", model, params, like=source)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["blob", "source"]


def test_an_interrupt_leaves_nothing(tmp_path, source, monkeypatch):
    model, params = load(source)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(save_module, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out", model, params, like=source)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["blob", "source"]


def start(*words):
    command = [sys.executable, "-m", "tests.models.writer", *map(str, words)]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


@pytest.mark.long
def test_processes_write_what_they_hold_together(tmp_path):
    model = decoder.Decoder(dataclasses.replace(SMALL, layers=2))
    save(tmp_path / "source", model, params_of(model))
    before, port = contents(tmp_path / "source"), free_port()
    words = (tmp_path / "out", tmp_path / "source", port, 2)
    processes = [start(*words, i) for i in range(2)]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors
        assert out.count("refused") == 2, (out, errors)
    assert contents(tmp_path / "out") == before


@pytest.mark.long
def test_a_killed_process_leaves_all_or_nothing(tmp_path):
    """Killed at twenty random moments after the weights are loaded; the source stays as it is."""
    model = decoder.Decoder(dataclasses.replace(SMALL, vocabulary=100_000, width=64, layers=8))
    source, out = tmp_path / "source", tmp_path / "out"
    save(source, model, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params_of(model)))
    (source / "tokenizer.json").write_text("{}")
    before, ends = contents(source), []
    longest = None
    for i in range(21):
        process = start(out, source)
        try:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            began = time.monotonic()
            if longest is None:
                process.wait(120)
                longest = time.monotonic() - began
            time.sleep(random.Random(i).uniform(0, 0.9 * longest))
            process.kill()
        finally:
            process.kill()
            process.communicate()
        ends.append(out.exists())
        if out.exists():
            _, params = load(out)
            assert all((np.asarray(leaf) == 2).all() for leaf in jax.tree.leaves(params))
            assert (out / "tokenizer.json").read_text() == "{}"
            for file in sorted(out.rglob("*"), reverse=True):
                file.unlink()
            out.rmdir()
        assert contents(source) == before
    assert ends[0] and not all(ends)
