"""GGUF files: what is read is what was written; damaged ones are refused."""

import dataclasses
import json
import struct

import gguf
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from flora_jax.models import decoder
from flora_jax.models.config import config_of
from flora_jax.models.gguf_file import open_gguf
from flora_jax.models.gguf_model import opened
from flora_jax.models.gguf_tokenizer import tokenizer_of
from flora_jax.models.load import load
from flora_jax.models.save import _theirs, save
from tests.models import ggufs
from tests.models.test_load import SMALL, params_of

WIDE = dataclasses.replace(SMALL, vocabulary=len(ggufs.PIECES), width=64, hidden=96, window=None)
MODELS = {
    "llama": WIDE,
    "llama-tied": dataclasses.replace(WIDE, tied=True),
    "qwen2": dataclasses.replace(WIDE, model_type="qwen2", bias=True),
    "qwen3": dataclasses.replace(WIDE, model_type="qwen3", normed_heads=True, head_size=32),
}


def made(file, name, kind="F32", **more):
    """The model and params of a file that is written here."""
    model = decoder.Decoder(MODELS[name])
    params = params_of(model)
    arrays = {x.name: x.read() for x in _theirs(model, params)}
    ggufs.write(file, config_of(model.shape), arrays, kind, **more)
    return model, params, arrays


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_what_is_written_is_read(tmp_path, name, kind):
    model, params, _ = made(tmp_path / "x.gguf", name, kind)
    found, read = load(tmp_path / "x.gguf", np.float32)
    assert found == model
    kind = gguf.GGMLQuantizationType[kind]

    def rounded(array):
        if array.ndim < 2:
            return array
        return gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)

    expected = {x.name: rounded(np.ascontiguousarray(x.read())) for x in _theirs(model, params)}
    arrays = {x.name: x.read() for x in _theirs(found, read)}
    assert arrays.keys() == expected.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, expected[key], err_msg=key)


def test_dtypes_by_default_and_metadata(tmp_path):
    for kind, dtype in (("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")):
        made(tmp_path / kind, "llama", kind, rope__freq_base=300.0)
        model, params = load(tmp_path / kind)
        assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}
        assert model.shape.rotary.theta == 300.0 and model.shape.epsilon == 1e-6


def test_the_frequencies_of_llama_3(tmp_path):
    made(tmp_path / "x", "llama")
    writer_of = gguf.GGUFWriter.write_header_to_file

    def with_factors(writer, *args):
        writer.add_tensor("rope_freqs.weight", np.array([1, 1, 3.5, 8], np.float32))
        writer_of(writer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_factors)
        made(tmp_path / "y", "llama")
    config, _ = opened(tmp_path / "y")
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 8.0
    model, _ = load(tmp_path / "y")
    assert model.shape.rotary.kind == "llama3"


def test_onto_devices_and_into_a_folder(tmp_path):
    model, params, _ = made(tmp_path / "x.gguf", "llama")
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("a",)), jax.P())
    found, read = load(tmp_path / "x.gguf", shardings=everywhere)
    save(tmp_path / "out", found, read, like=tmp_path / "x.gguf")
    again, params_again = load(tmp_path / "out")
    assert again == model and jax.tree.all(jax.tree.map(np.array_equal, params_again, params))
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {"chat_template.jinja", "model.safetensors"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["max_position_embeddings"] == 64
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("banana").tokens == ["<s>", "ban", "ana"]
    about = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (about["bos_token"], about["eos_token"], about["unk_token"]) == ("<s>", "</s>", "<unk>")


def by_scores(text, pieces, scores, types):
    """SentencePiece's BPE as its paper has it: merge the neighbours whose piece has the best score, leftmost first."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    whole = sorted((x for x, kind in zip(pieces, types, strict=True) if kind == 4), key=len)[::-1]
    parts, i = [], 0
    while i < len(text):
        given = next((x for x in whole if text.startswith(x, i)), None)
        parts.append((given or text[i].replace(" ", "\u2581"), given is not None))
        i += len(parts[-1][0])
    while True:
        best = None
        for i in range(len(parts) - 1):
            (left, fixed), (right, also) = parts[i], parts[i + 1]
            number = ids.get(left + right)
            if number is None or fixed or also or types[number] != 1:
                continue
            if best is None or scores[number] > best[0]:
                best = scores[number], i
        if best is None:
            break
        i = best[1]
        parts[i : i + 2] = [(parts[i][0] + parts[i + 1][0], False)]
    tokens = []
    for part, _ in parts:
        tokens += [part] if part in ids else [f"<0x{byte:02X}>" for byte in part.encode()]
    return [ids[token] for token in tokens]


@settings(max_examples=300)
@given(text=st.text(alphabet="abn ü€\n", max_size=20))
def test_tokens_are_sentencepieces(text):
    found = tokenizer_of(METADATA)
    ids = found.tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == by_scores(text, ggufs.PIECES, ggufs.SCORES, ggufs.TYPES)
    assert found.tokenizer.decode(ids, skip_special_tokens=False) == text


METADATA = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ggufs.PIECES,
    "tokenizer.ggml.scores": np.array(ggufs.SCORES, np.float32),
    "tokenizer.ggml.token_type": np.array(ggufs.TYPES),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_eos_token": True,
    "tokenizer.ggml.add_space_prefix": False,
}


def test_texts_begin_and_end_as_the_file_says():
    tokenizer = tokenizer_of(METADATA).tokenizer
    assert tokenizer.encode("ban").tokens == ["<s>", "ban", "</s>"]
    assert tokenizer.encode("ban", "ban").tokens == ["<s>", "ban", "</s>"] * 2
    prefixed = tokenizer_of({**METADATA, "tokenizer.ggml.add_space_prefix": True}).tokenizer
    ids = prefixed.encode("ban a", add_special_tokens=False).ids
    assert [prefixed.id_to_token(i) for i in ids] == ["\u2581ban", "\u2581a"]
    assert prefixed.decode(ids) == "ban a"


@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_tokens_of_bytes(split):
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = [*sorted(ByteLevel.alphabet()), "<|end|>", "11", "ab", "Ġab"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 1, 1, 1],
        "tokenizer.ggml.merges": ["1 1", "a b", "Ġ ab"],
        "tokenizer.ggml.eos_token_id": 256,
    }
    found = tokenizer_of(metadata)
    tokens = found.tokenizer.encode("ab ab1111<|end|>").tokens
    ones = {"qwen2": ["1"] * 4, "smollm": ["1"] * 4, "llama-bpe": ["11", "1", "1"]}
    assert tokens == ["ab", "Ġab", *ones.get(split, ["11", "11"]), "<|end|>"]
    assert found.specials == {"eos_token": "<|end|>"} and found.ids == {"eos_token_id": 256}
    ends = tokenizer_of(metadata | {"tokenizer.ggml.eot_token_id": 3}).ids
    assert ends == {"eos_token_id": [256, 3]}
    for text in ("Grüße, 世界 🎉", "  a\n\n\tb  ", "x = [1]\r\n"):
        ids = found.tokenizer.encode(text).ids
        assert found.tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "bert"}, "tokenizer.ggml.model must be one of llama, gpt2, found 'bert'"),
        ({"model": "gpt2", "pre": "odd"}, "tokenizer.ggml.pre must be one of .*, found 'odd'"),
        ({"tokens": ["a"]}, "tokens, scores and types must be equally many"),
        ({"eos_token_id": 10**6}, "is damaged: list index out of range"),
    ],
)
def test_a_tokenizer_that_is_not_known(change, message):
    changed = METADATA | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        tokenizer_of(changed)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "x.gguf"
    made(file, "llama")
    return file


def refused(tmp_path, data, message):
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(error.value) and "\n" not in str(error.value)


def test_lengths_beyond_the_file(tmp_path, sound):
    data = sound.read_bytes()
    for count in (0, 3, 4, 10, 30, 1000, len(data) - 64):
        refused(tmp_path, data[:count], "is no GGUF file|is damaged or incomplete: it has")
    for place in (8, 16, 24):  # the counts of tensors and entries, the length of the first key
        for value in (2**40, 2**64 - 1):
            changed = data[:place] + struct.pack("<Q", value) + data[place + 8 :]
            refused(tmp_path, changed, "damaged or incomplete: it has a count of")
    refused(tmp_path, data[:4] + struct.pack("<I", 9) + data[8:], "version 2 or 3, found 9")
    refused(tmp_path, b"PK" + data[2:], "is no GGUF file")
    entry = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")
    for place, code, value, message in (
        (0, "I", 9, "'blk.0.attn_q.weight' with 9 axes"),
        (4, "Q", 2**50, "'blk.0.attn_q.weight' up to byte"),
        (20, "I", 77, "'blk.0.attn_q.weight' of unknown type 77"),
        (20, "I", 12, "'blk.0.attn_q.weight' with rows of 64, no multiple of 256"),
        (24, "Q", 2**60, "'blk.0.attn_q.weight' up to byte"),
    ):
        at = entry + place
        changed = data[:at] + struct.pack(f"<{code}", value) + data[at + struct.calcsize(code) :]
        refused(tmp_path, changed, message)


@settings(max_examples=300)
@given(place=st.integers(0, 7000), bits=st.integers(1, 255))
def test_any_byte_may_be_wrong(sound, place, bits):
    data = bytearray(sound.read_bytes())
    data[place] ^= bits
    file = sound.with_name("changed.gguf")
    file.write_bytes(data)
    try:
        model, _ = load(file)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(model, decoder.Decoder)


def test_an_architecture_that_is_not_known(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "bad.gguf", "mamba")
    writer.add_tensor("x", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "bad.gguf").read_bytes()
    refused(tmp_path, data, "general.architecture of .* must be one of llama, .*, found 'mamba'")
    refused(tmp_path, data.replace(b"mamba", b"llama"), "has no 'embedding_length' in its metadata")


def test_metadata_of_all_types(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x", "llama")
    writer.add_bool("a", True)
    writer.add_int8("b", -3)
    writer.add_float64("c", 0.1)
    writer.add_array("d", [1.5, 2.5])
    writer.add_array("e", ["ü", ""])
    writer.add_uint64("f", 2**63)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_gguf(tmp_path / "x").metadata
    assert (found["a"], found["b"], found["c"], found["f"]) == (True, -3, 0.1, 2**63)
    assert found["d"].tolist() == [1.5, 2.5] and found["e"] == ["ü", ""]
