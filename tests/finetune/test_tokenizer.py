"""Ids equal those of transformers; specials come from the files that a checkpoint has."""

import json
import re

import pytest
import tokenizers

from flora_jax.finetune.tokenizer import Tokenizer
from tests.finetune import folders

BYTES = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin|>",
    "eos_token": {
        "__type": "AddedToken",
        "content": "<|end|>",
        "special": True,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    },
}
GEMMA = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "add_bos_token": True,
}
LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "legacy": False,
}


def folder_of(kind, path):
    if kind == "bytes":
        return folders.write(path, BYTES, fast=folders.byte_level())
    if kind == "metaspace":
        return folders.write(path, GEMMA, fast=folders.metaspace())
    config = LLAMA if kind == "bpe" else {**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast"}
    return folders.write(path, config, model=folders.pieces(kind), config={"model_type": "llama"})


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "bpe", "unigram"])
def test_ids_are_those_of_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    folder = folder_of(kind, tmp_path / "model")
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    texts = [t for t in folders.TEXTS if kind in ("bytes", "metaspace") or not t.startswith(" ")]
    wanted = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert ours.encode_many(texts) == wanted
    assert [ours.encode(text) for text in texts] == wanted
    assert (ours.bos, ours.eos[0]) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.size == len(theirs)
    for text, ids in zip(texts, wanted, strict=True):
        assert ([ours.bos] if ours.add_bos else []) + ids == theirs.encode(text)
        if kind in ("bytes", "metaspace"):
            assert ours.decode(ids) == theirs.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "bpe", "unigram"])
def test_text_comes_back_and_spans_cover_it(tmp_path, kind):
    tokenizer = Tokenizer.load(folder_of(kind, tmp_path / "model"))
    for text in folders.TEXTS:
        ids, spans = tokenizer.encode_spans([text])[0]
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids, specials=True) == text
        assert {i for a, b in spans for i in range(a, b)} == set(range(len(text)))
        assert spans == sorted(spans)


def test_a_sentencepiece_text_that_begins_with_a_space(tmp_path):
    import sentencepiece

    tokenizer = Tokenizer.load(folder_of("bpe", tmp_path / "model"))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=folders.pieces("bpe"))
    assert tokenizer.encode("  the cat") == pieces.encode("  the cat")


def test_where_specials_come_from(tmp_path):
    fast = folders.byte_level()
    end, turn = 1, 311
    bare = Tokenizer.load(folders.write(tmp_path / "bare", fast=fast))
    assert (bare.bos, bare.eos, bare.pad, bare.add_bos) == (None, (), 0, False)
    mapped = folders.write(
        tmp_path / "mapped", fast=fast, special_tokens_map={"eos_token": {"content": "<|end|>"}}
    )
    assert Tokenizer.load(mapped).eos == (end,)
    several = folders.write(
        tmp_path / "several",
        BYTES,
        fast=fast,
        generation_config={"eos_token_id": [turn, end]},
        config={"eos_token_id": end, "bos_token_id": 5, "text_config": {"eos_token_id": 10**6}},
    )
    tokenizer = Tokenizer.load(several)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (0, (end, turn), True)
    ids_alone = folders.write(
        tmp_path / "ids", fast=fast, config={"eos_token_id": end, "bos_token_id": 0}
    )
    tokenizer = Tokenizer.load(ids_alone)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (0, (end,), True)
    without = folders.write(tmp_path / "without", {**BYTES, "add_bos_token": False}, fast=fast)
    assert not Tokenizer.load(without).add_bos
    no_bos = folders.write(tmp_path / "none", {**BYTES, "bos_token": None}, fast=fast)
    assert Tokenizer.load(no_bos).bos is None and not Tokenizer.load(no_bos).add_bos


def test_tokens_that_the_configuration_adds(tmp_path):
    added = {"312": {"content": "<|tool|>", "special": True, "unknown": 1}}
    folder = folders.write(
        tmp_path / "a", {**BYTES, "added_tokens_decoder": added}, fast=folders.byte_level()
    )
    assert Tokenizer.load(folder).encode("a<|tool|>")[-1] == 312
    added = {"350": {"content": "<|tool|>", "special": True}}
    config = {**LLAMA, "added_tokens_decoder": added}
    folder = folders.write(tmp_path / "b", config, model=folders.pieces("bpe"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("a<|tool|>")[-1] == 350
    assert tokenizer.size == 351
    assert tokenizer.decode(tokenizer.encode("a<|tool|> b"), specials=True) == "a<|tool|> b"
    assert tokenizer.decode(tokenizer.encode("a<|tool|> b")) == "a b"


def test_chat_templates(tmp_path):
    fast = folders.byte_level()
    one = folders.write(tmp_path / "one", {**BYTES, "chat_template": "A"}, fast=fast)
    assert Tokenizer.load(one).template == "A"
    (one / "chat_template.jinja").write_text("B")
    assert Tokenizer.load(one).template == "B"
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    two = folders.write(tmp_path / "two", {**BYTES, "chat_template": several}, fast=fast)
    assert Tokenizer.load(two).template == "D"
    none = folders.write(tmp_path / "none", {**BYTES, "chat_template": several[:1]}, fast=fast)
    assert not Tokenizer.load(none).has_chat
    bad = folders.write(tmp_path / "bad", {**BYTES, "chat_template": 3}, fast=fast)
    with pytest.raises(ValueError, match=r"chat_template of .* must be text, found 3"):
        Tokenizer.load(bad)


def test_from_an_object():
    backend = tokenizers.Tokenizer.from_str(folders.byte_level())
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer(backend, bos=0, eos=[1, 311, 1], template="T")
    assert (tokenizer.eos, tokenizer.pad, tokenizer.add_bos) == ((1, 311), 1, True)
    assert len(tokenizer.encode("the cat sat on a mat")) > 3
    assert Tokenizer(backend, eos=1).eos == (1,)
    assert Tokenizer(backend, eos=1).digest != tokenizer.digest
    with pytest.raises(ValueError, match="eos must be an id below 312, found 312"):
        Tokenizer(backend, eos=312)
    with pytest.raises(
        ValueError, match="add_bos is set and the tokenizer has no bos; give bos or"
    ):
        Tokenizer(backend, add_bos=True)


def test_another_models_vocabulary():
    backend = tokenizers.Tokenizer.from_str(folders.byte_level())
    tokenizer = Tokenizer(backend, bos=0, eos=1)
    tokenizer.check(312)
    tokenizer.check(311)  # <|im_end|> is an added token that no text need have
    with pytest.raises(
        ValueError, match=re.escape("the text has the token '<|im_end|>' with id 311")
    ):
        tokenizer.encode("a<|im_end|>")
    padded = Tokenizer(backend, eos=1, pad=311)
    padded.check(311)
    assert padded.pad == 1
    with pytest.raises(ValueError, match=r"with id 309, but the model's vocabulary has 300; is it"):
        tokenizer.check(300)
    with pytest.raises(ValueError, match=re.escape("has the token '<|im_end|>' with id 311, but")):
        Tokenizer(backend, eos=311).check(311)


def test_a_damaged_folder(tmp_path):
    with pytest.raises(ValueError, match=r"expected tokenizer\.json or tokenizer\.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer: "):
        Tokenizer.load(folders.write(tmp_path / "a", fast="{}"))
    with pytest.raises(ValueError, match=r"tokenizer\.model cannot be read as a tokenizer: "):
        Tokenizer.load(folders.write(tmp_path / "b", model=b"\xffnone"))
    folder = folders.write(tmp_path / "c", {"eos_token": "<gone>"}, fast=folders.byte_level())
    with pytest.raises(ValueError, match=r"names eos_token '<gone>', which the tokenizer has not"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON: "):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"must hold a JSON object, found list"):
        Tokenizer.load(folder)
