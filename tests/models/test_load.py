"""Checkpoints written and read without torch; tests/parity compares with it."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.models import decoder, folder, gpt2, t5, vit
from flora_jax.models.checkpoint import INDEX, pieces
from flora_jax.models.families import outline
from flora_jax.models.load import _buffers, load
from flora_jax.models.rotary import Rotary
from flora_jax.models.save import save
from tests.helpers import normal

SMALL = decoder.Shape(24, 8, 12, 2, 4, 2, jnp.dtype("float32"))
MODELS = {
    "gpt2": gpt2.Gpt2(gpt2.Shape(24, 8, 8, 2, 2)),
    "llama": decoder.Decoder(
        decoder.Shape(24, 8, 12, 2, 4, 2, jnp.dtype("bfloat16"), rotary=Rotary(300.0), epsilon=1e-5)
    ),
    "t5": t5.T5(t5.Shape(24, 8, 12, 2, 2, 6)),
    "t5-1.1": t5.T5(t5.Shape(24, 8, 12, 2, 2, 6, gated=True, tied=False)),
    "vit": vit.Vit(vit.Shape(8, 4, 3, 8, 2, 2, 12, 3)),
    "gpt2-inner": gpt2.Gpt2(gpt2.Shape(24, 8, 8, 2, 2, inner=12)),
    "unrolled": decoder.Decoder(dataclasses.replace(SMALL, scan=False)),
    "mixtral": decoder.Decoder(dataclasses.replace(SMALL, model_type="mixtral", experts=3)),
    "mixtral-unrolled": decoder.Decoder(
        dataclasses.replace(SMALL, model_type="mixtral", experts=3, scan=False)
    ),
    "llama-biases": decoder.Decoder(
        dataclasses.replace(SMALL, bias=True, out_bias=True, feed_forward_bias=True)
    ),
    "mistral": decoder.Decoder(dataclasses.replace(SMALL, model_type="mistral", window=64)),
    "qwen2": decoder.Decoder(dataclasses.replace(SMALL, model_type="qwen2", bias=True, tied=True)),
    "qwen3": decoder.Decoder(
        dataclasses.replace(SMALL, model_type="qwen3", normed_heads=True, head_size=6)
    ),
    "t5-deep": t5.T5(t5.Shape(24, 8, 12, 1, 2, 6, decoder_layers=3)),
    "vit-bias": vit.Vit(vit.Shape(8, 4, 3, 8, 2, 2, 12, 3, bias=False)),
}


def params_of(model):
    shapes = outline(model)
    return jax.tree.map(lambda x: normal(x.size, x.shape).astype(x.dtype), shapes)


def test_what_has_no_place_in_a_checkpoint_is_not_written(tmp_path):
    model = decoder.Decoder(dataclasses.replace(SMALL, gated=False))
    with pytest.raises(ValueError, match="a llama checkpoint must have gated True, found False"):
        save(tmp_path / "out", model, params_of(model))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 700])
def test_what_is_written_is_read(tmp_path, name, shard_bytes):
    model = MODELS[name]
    params = params_of(model)
    save(tmp_path / "out", model, params, shard_bytes=shard_bytes)
    found, read = load(str(tmp_path / "out"), scan=getattr(model.shape, "scan", True))
    assert found == model
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes == 700)


def test_nothing_is_overwritten_or_half_written(tmp_path):
    model = MODELS["gpt2"]
    params = params_of(model)
    save(tmp_path / "out", model, params)
    with pytest.raises(ValueError, match="out is there already; give another folder"):
        save(tmp_path / "out", model, params)
    del params["norm"]["bias"]
    with pytest.raises(ValueError, match="params: 'norm/bias' is missing"):
        save(tmp_path / "other", model, params)
    assert not (tmp_path / "other").exists()


def test_an_index_that_names_what_is_not_there(tmp_path):
    model = MODELS["gpt2"]
    save(tmp_path / "out", model, params_of(model), shard_bytes=700)
    file = tmp_path / "out" / INDEX
    index = json.loads(file.read_text())
    index["weight_map"]["transformer.h.9.ln_1.bias"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'transformer.h.9.ln_1.bias' is named by"):
        load(tmp_path / "out")


def test_an_option_that_the_model_has_not(tmp_path):
    model = MODELS["llama"]
    save(tmp_path / "out", model, params_of(model))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_type"] = "yarn"
    file.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"rope_type of a llama config must be 'default' or .*, found 'yarn'"
    ):
        load(tmp_path / "out")


def test_layers_that_are_always_stacked(tmp_path):
    save(tmp_path / "out", MODELS["gpt2"], params_of(MODELS["gpt2"]))
    with pytest.raises(ValueError, match="the layers of a gpt2 model are always stacked"):
        load(tmp_path / "out", scan=False)


def test_unrolled_layers_are_those_of_the_stack(tmp_path):
    model = MODELS["mixtral"]
    params = params_of(model)
    save(tmp_path / "out", model, params)
    _, read = load(tmp_path / "out", scan=False)
    for i in range(model.shape.layers):
        layer = jax.tree.map(lambda x, i=i: x[i], params["layers"])
        assert jax.tree.all(jax.tree.map(np.array_equal, read[f"layer_{i}"], layer))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_params_on_devices(tmp_path, dtype):
    """Sharded by layers, by columns and over both; each shard is what numpy would hold there."""
    model = decoder.Decoder(dataclasses.replace(SMALL, width=16, hidden=8, layers=4))
    save(tmp_path / "out", model, params_of(model))
    _, expected = load(tmp_path / "out", dtype)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(leaf):
        axes = {1: (None,), 2: (None, "b"), 3: ("a", None, "b")}[len(leaf.shape)]
        axes = ("a", None) if leaf.shape == (4, 16) else axes
        return jax.NamedSharding(mesh, jax.P(*axes))

    alone = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    rule = lambda leaves: jax.tree.map(place, leaves)  # noqa: E731
    for shardings in (rule, rule(outline(model)), alone):
        _, params = load(tmp_path / "out", dtype, shardings)
        tree = shardings if isinstance(shardings, dict) else None
        for path, leaf in jax.tree.leaves_with_path(params):
            name = jax.tree_util.keystr(path)
            wanted = dict(jax.tree.leaves_with_path(expected))[path]
            assert isinstance(leaf, jax.Array) and leaf.dtype == wanted.dtype, name
            np.testing.assert_array_equal(leaf, wanted)
            if tree is not None:
                assert leaf.sharding == dict(jax.tree.leaves_with_path(tree))[path], name
            if shardings is alone:
                assert leaf.devices() == {jax.devices()[3]}


def test_each_tensor_is_read_once_and_only_where_it_is_needed(tmp_path, monkeypatch):
    model = decoder.Decoder(dataclasses.replace(SMALL, layers=4))
    save(tmp_path / "out", model, params_of(model))
    read = []

    def counted(config_and_tensors):
        config, tensors = config_and_tensors

        def count(name, tensor):
            return tensor._replace(read=lambda dtype: read.append(name) or tensor.read(dtype))

        return config, {name: count(name, tensor) for name, tensor in tensors.items()}

    monkeypatch.setattr(folder, "opened", lambda x, opened=folder.opened: counted(opened(x)))
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, jax.P())
    load(tmp_path / "out", shardings=everywhere)
    assert len(read) == len(set(read)) == 9 * 4 + 3

    half = jax.NamedSharding(mesh, jax.P("a"))
    mine = {d: i for d, i in half.addressable_devices_indices_map((4, 8, 8)).items() if d.id < 2}
    parts = [
        (piece, folder.opened(tmp_path / "out")[1][piece.name])
        for piece in pieces(model.shape, {"layers/out/kernel": np.empty((4, 8, 8))})
    ]
    read.clear()
    leaf = jax.ShapeDtypeStruct((4, 8, 8), "float32")
    buffers = _buffers(leaf, parts, mine.values())  # as if the other half were another process's
    assert read == [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)]
    assert len(buffers) == 2


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_host_holds_one_tensor_beside_the_params(tmp_path, dtype):
    """A gigabyte in its files, read by a process of its own onto its CPU devices, and written again."""
    shape = decoder.Shape(32000, 2048, 5632, 8, 16, 16, jnp.dtype("bfloat16"))
    model = decoder.Decoder(shape)
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), outline(model))
    save(tmp_path / "in", model, ones)
    words = [str(tmp_path / "in"), dtype, str(tmp_path / "out")]
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], check=True, capture_output=True, text=True
    )
    size, loading, saving = map(int, told.stdout.split())
    assert size == sum(x.size for x in jax.tree.leaves(ones)) * jnp.dtype(dtype).itemsize
    largest = 32000 * 2048 * jnp.dtype(dtype).itemsize
    assert loading < size + largest, (size, loading)
    assert saving < 2 * largest, (size, saving)


MEASURE = """
import resource, sys
import jax, jax.numpy as jnp
from flora_jax.models.load import load
from flora_jax.models.save import save

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder, dtype, out = sys.argv[1:]
jax.block_until_ready(jnp.ones(3) + 1)
start = peak()
model, params = load(folder, dtype, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
loaded = peak()
save(out, model, params, like=folder)
print(sum(x.nbytes for x in jax.tree.leaves(params)), loaded - start, peak() - loaded)
"""
