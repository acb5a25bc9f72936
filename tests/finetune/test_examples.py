"""What counts in each form, against ids put together by hand."""

import numpy as np
import pytest
import tokenizers

from flora_jax.finetune.documents import Document
from flora_jax.finetune.examples import Example, encode, fit
from flora_jax.finetune.tokenizer import Tokenizer
from tests.finetune import folders

TOKENIZER = Tokenizer(
    tokenizers.Tokenizer.from_str(folders.byte_level()),
    bos=0,
    eos=[1, 311],
    template=folders.CHATML,
)
CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat é🙂"},
    {"role": "user", "content": "on"},
    {"role": "assistant", "content": "a mat"},
]


def one(form, value, loss="completions", tokenizer=TOKENIZER):
    return encode([Document(form, value, "here")], tokenizer, loss=loss)[0]


def counted(example):
    return example.tokens[example.counts].tolist()


def test_text():
    ids = TOKENIZER.encode("the cat sat on a mat")
    example = one("text", "the cat sat on a mat")
    assert example.tokens.tolist() == [0, *ids, 1]
    assert counted(example) == [*ids, 1]
    assert example.prompt == (len(ids) + 2) // 2
    assert one("text", "the cat " * 100).prompt == 32


def test_text_without_bos_and_eos():
    bare = Tokenizer(tokenizers.Tokenizer.from_str(folders.byte_level()))
    ids = bare.encode("the cat sat")
    example = one("text", "the cat sat", tokenizer=bare)
    assert example.tokens.tolist() == ids
    assert counted(example) == ids[1:]


def test_a_special_token_in_a_users_text_is_that_token():
    assert one("text", "a<|end|>b").tokens.tolist().count(1) == 2


def test_completion():
    prompt, answer = TOKENIZER.encode("12 + 34 ="), TOKENIZER.encode(" 46")
    example = one("completion", ("12 + 34 =", " 46"))
    assert example.tokens.tolist() == [0, *prompt, *answer, 1]
    assert counted(example) == [*answer, 1]
    assert example.prompt == 1 + len(prompt)
    assert counted(one("completion", ("12 + 34 =", " 46"), "all")) == [*prompt, *answer, 1]


def test_messages():
    example = one("messages", CHAT)
    text = TOKENIZER.decode(example.tokens, specials=True)
    assert text.startswith("<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat")
    assert TOKENIZER.decode(counted(example), specials=True) == (
        "sat é🙂<|im_end|>\na mat<|im_end|>\n"
    )
    assert TOKENIZER.decode(example.tokens[: example.prompt], specials=True).endswith(
        "on<|im_end|>\n<|im_start|>assistant\n"
    )
    assert one("messages", CHAT, "all").counts.sum() == len(example.tokens) - 1


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_messages_by_sentencepiece(tmp_path, kind):
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ '[' + m.content + ']' }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
    }
    folder = folders.write(tmp_path / "model", config, model=folders.pieces(kind))
    tokenizer = Tokenizer.load(folder)
    example = one("messages", CHAT, tokenizer=tokenizer)
    assert example.tokens[0] == tokenizer.bos
    assert (example.tokens[1:] == tokenizer.bos).sum() == 0
    assert (example.tokens == tokenizer.eos[0]).sum() == 2
    said = tokenizer.decode(counted(example), specials=True)
    assert said.replace(" ", "") == "[saté🙂]</s>[amat]</s>"


def test_the_order_is_that_of_the_documents():
    documents = [
        Document("text", "a", "1"),
        Document("messages", CHAT, "2"),
        Document("completion", ("b", "c"), "3"),
        Document("text", "d", "4"),
    ]
    found = encode(documents, TOKENIZER)
    for document, example in zip(documents, found, strict=True):
        assert example.tokens.tolist() == one(*document[:2]).tokens.tolist()


def long(counts):
    return Example(np.arange(len(counts), dtype=np.int32), np.array(counts, bool), prompt=3)


def test_a_long_text_is_cut_into_pieces():
    pieces = fit(long([0] + [1] * 9), "text", 4)
    assert [piece.tokens.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [piece.counts.tolist() for piece in pieces] == [[False] + [True] * 3] * 2 + [
        [False, True]
    ]
    assert [piece.prompt for piece in pieces] == [3, 0, 0]
    assert fit(long([0] + [1] * 9), "text", 4, "drop") == []


def test_a_long_conversation_is_dropped_or_cut():
    example = long([0, 0, 0, 1, 1, 1])
    assert fit(example, "messages", 5) == []
    assert fit(example, "completion", 6) == [example]
    (piece,) = fit(example, "messages", 5, "cut")
    assert piece.tokens.tolist() == [0, 1, 2, 3, 4]
    assert piece.prompt == 3
    assert fit(example, "completion", 3, "cut") == []
