"""Folders of strangers: what is damaged, quantized, a pickle or leads elsewhere is refused in a sentence."""

import dataclasses
import json
import re
import resource
import struct

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from flora_jax.models import decoder
from flora_jax.models.checkpoint import INDEX, ONE
from flora_jax.models.load import load
from flora_jax.models.save import save
from tests.models.test_load import SMALL, params_of

MODEL = decoder.Decoder(SMALL)
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "in", MODEL, params_of(MODEL))
    return tmp_path / "in"


@pytest.fixture
def sharded(tmp_path):
    save(tmp_path / "in", MODEL, params_of(MODEL), shard_bytes=2000)
    return tmp_path / "in"


def change(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def with_header(folder, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / ONE).write_bytes(struct.pack("<Q", len(text)) + text + data)


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors",
        "/etc/model.safetensors",
        "a/model.safetensors",
        "..",
        "a\\model.safetensors",
        "pytorch_model.bin",
        "",
    ],
)
def test_an_index_names_files_of_its_folder_only(sharded, name):
    where = json.loads((sharded / INDEX).read_text())["weight_map"]
    change(sharded / INDEX, weight_map={**where, NAME: name})
    message = f"must name *.safetensors in its own folder, found {name!r}"
    refused(sharded, re.escape(message))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, "index.json must be a JSON object with weight_map")


def test_links_as_in_the_hubs_cache(sharded, tmp_path):
    (tmp_path / "blobs").mkdir()
    _, expected = load(sharded)
    for file in list(sharded.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(tmp_path / "blobs" / file.name)
    _, params = load(sharded)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "consolidated.00.pth"])
def test_pickles_are_not_read(folder, name):
    (folder / ONE).rename(folder / name)
    refused(folder, rf"in has its weights as a pickle only, {name}, .* convert it to safetensors")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4"])
def test_a_quantized_checkpoint_is_named_so(folder, method):
    change(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(
        folder,
        rf"in is quantized \(quantization_config is {method}\); flora_jax trains checkpoints in "
        "bfloat16, float16 or float32",
    )
    change(folder / "config.json", quantization_config={"load_in_8bit": True})
    refused(folder, r"quantized \(quantization_config is bitsandbytes\)")


@pytest.mark.parametrize("kind, dtype", [("I8", np.int8), ("U8", np.uint8), ("I32", np.int32)])
def test_integers_in_place_of_weights(folder, kind, dtype):
    arrays = load_file(folder / ONE)
    save_file({**arrays, NAME: arrays[NAME].astype(dtype)}, folder / ONE)
    refused(folder, rf"in is quantized \(weight '{NAME}' is {kind}\)")


def test_floats_of_eight_bits(folder):
    entry = {"dtype": "F8_E4M3", "shape": [24, 8], "data_offsets": [0, 192]}
    with_header(folder, {NAME: entry}, bytes(192))
    refused(folder, rf"in is quantized \(weight '{NAME}' is F8_E4M3\)")


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
DAMAGED = [
    ({"shape": [2, 4]}, "whose shape and bytes do not agree"),
    ({"shape": [-2, -3]}, "whose shape and bytes do not agree"),
    ({"shape": [2.0, 3]}, "whose shape and bytes do not agree"),
    ({"shape": [True, 6]}, "whose shape and bytes do not agree"),
    ({"data_offsets": [24, 0]}, "whose shape and bytes do not agree"),
    ({"data_offsets": [-24, 0]}, "whose shape and bytes do not agree"),
    ({"data_offsets": [8, 32]}, "'x' up to byte .* in a file of"),
    ({"shape": [2**40, 2**40], "data_offsets": [0, 2**82]}, "'x' up to byte .* in a file of"),
    ({"data_offsets": [0]}, "that cannot be read"),
    ({"data_offsets": None}, "that cannot be read"),
    ({"shape": 6}, "that cannot be read"),
]


@pytest.mark.parametrize("entry, message", DAMAGED)
def test_a_header_that_is_wrong(folder, entry, message):
    with_header(folder, {"x": {**ENTRY, **entry}}, bytes(24))
    refused(folder, rf"{ONE} is damaged or incomplete: it has .*{message}")


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"3", b"[" * 10**5, b'{"x": 3}', b"\xff"])
def test_a_header_that_is_none(folder, header):
    with_header(folder, header)
    refused(folder, rf"{ONE} is damaged or incomplete: it has")


@pytest.mark.parametrize("count", [0, 3, 8, 100, -1])
def test_a_file_that_was_cut_off(sharded, count):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:count])
    refused(sharded, rf"{file.name} is damaged or incomplete: it has")


def test_a_length_beyond_the_file_takes_no_memory(folder):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for length in (2**40, 2**63, 2**64 - 1):
        (folder / ONE).write_bytes(struct.pack("<Q", length) + b"{}")
        refused(folder, f"it has a header of {length} bytes in a file of 10")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**5


@settings(max_examples=200)
@given(place=st.integers(0, 2000), bits=st.integers(1, 255))
def test_any_byte_may_be_wrong(sound, place, bits):
    """It is refused in a sentence, or is no byte that anything depends on."""
    data = bytearray(sound)
    data[place] ^= bits
    (sound.folder / ONE).write_bytes(data)
    try:
        load(sound.folder)
    except ValueError as error:
        assert str(sound.folder) in str(error), error


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a file, which know their folder."""
    folder = tmp_path_factory.mktemp("damaged") / "in"
    save(folder, MODEL, params_of(MODEL))
    found = type("Sound", (bytes,), {})((folder / ONE).read_bytes())
    found.folder = folder
    return found


def test_all_that_does_not_fit_is_said_at_once_and_before_memory_is_taken(folder):
    arrays = load_file(folder / ONE)
    missing = "model.layers.0.self_attn.q_proj.weight"
    arrays[NAME] = arrays[NAME].T.copy()
    del arrays[missing]
    save_file({**arrays, "x": arrays[NAME]}, folder / ONE)
    refused(
        folder,
        rf"weight '{missing}' is missing in .*; weight '{NAME}' in .* must have shape "
        r"\(12, 8\), found \(8, 12\); weight 'x' in .*in is not one of LlamaForCausalLM$",
    )
    for entry, name in (("num_hidden_layers", "layers"), ("head_dim", "head_size")):
        kept = (folder / "config.json").read_text()
        change(folder / "config.json", **{entry: 2**31 - 2})
        refused(folder, rf"asks for {name} 2147483646, and its files have no axis longer than 24")
        (folder / "config.json").write_text(kept)
    change(folder / "config.json", num_hidden_layers=20, vocab_size=22)
    refused(folder, r"embed_tokens.weight' in .* must have shape \(22, 8\), .*; and more$")


def test_a_folder_that_is_none(tmp_path):
    refused(str(tmp_path / "none"), "config.json is missing; a checkpoint is a folder with")
    refused(tmp_path, "config.json is missing; a checkpoint is a folder with")
    (tmp_path / ONE).write_bytes(bytes(100))
    refused(tmp_path / ONE, "is no GGUF file; of .*safetensors give the folder they are in")


def test_shapes_of_numbers_that_are_read(folder):
    """float16 and bfloat16 to others, and back."""
    _, expected = load(folder)
    model = dataclasses.replace(MODEL.shape, dtype=np.dtype("float16"))
    half = jax.tree.map(lambda x: x.astype(np.float16), expected)
    save(folder.with_name("half"), decoder.Decoder(model), half)
    for dtype in ("float16", "float32", "bfloat16"):
        _, read = load(folder.with_name("half"), dtype)
        wanted = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), half)
        assert jax.tree.all(jax.tree.map(np.array_equal, read, wanted))
