"""Turns documents into examples: token ids, and for each token whether its loss counts.

- `text`: bos if the tokenizer adds one, the text, eos. All count.
- `prompt` and `completion`: bos, the ids of the prompt, the ids of the completion, eos. The two are encoded
  apart and joined, so that a token never spans the boundary: what is learned is how to go on after the
  prompt's own ids. A space between the two must be in the data.
- `messages`: the text of the chat template, which has its own bos and ends of turns; nothing is added.

The first token of an example never counts, since nothing predicts it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from flora_jax.finetune.chat import Chat
from flora_jax.finetune.documents import Document
from flora_jax.finetune.tokenizer import Tokenizer

Loss = Literal["completions", "all"]
TooLong = Literal["cut", "drop"]
OPENING = 32
"""Tokens of a text that are the prompt when its rest is to be sampled."""


class Example(NamedTuple):
    """Is what one document, or a piece of one, has to teach.

    Attributes:
      tokens: int32, `(n,)`.
      counts: bool, `(n,)`: whether the loss of predicting the token counts.
      prompt: How many of the first tokens are the prompt where the rest is sampled; 0 for no such use.
      last_alone: Whether earlier answers of a conversation could not count.
    """

    tokens: np.ndarray
    counts: np.ndarray
    prompt: int = 0
    last_alone: bool = False


@dataclasses.dataclass
class Counts:
    """Says what became of the documents of one side.

    Attributes:
      documents: The number of documents read.
      empty: Those left out since they have nothing to learn.
      cut: Those longer than a row that were cut.
      dropped: Those longer than a row that were left out.
      last_alone: Conversations of which only the last answer counts.
      examples: The number of examples.
      tokens: Their tokens.
      counted: Their tokens whose loss counts.
    """

    documents: int = 0
    empty: int = 0
    cut: int = 0
    dropped: int = 0
    last_alone: int = 0
    examples: int = 0
    tokens: int = 0
    counted: int = 0


def encode(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    chat: Chat | None = None,
    loss: Loss = "completions",
) -> list[Example]:
    """Returns the example of each document, however long.

    Args:
      documents: None of them `empty`.
      tokenizer: The model's.
      chat: The tokenizer's chat template; made here where it is needed and not given.
      loss: `"completions"`: of a prompt or of messages only what the assistant says counts; `"all"`: all
        tokens do.

    Raises:
      ValueError: A chat template is missing or refuses a document, or a token is beyond the vocabulary.
    """
    chats = [d for d in documents if d.form == "messages"]
    found = {}
    if chats:
        found = _conversations(chats, tokenizer, chat or Chat(tokenizer))
    for form, make in (("text", _texts), ("completion", _completions)):
        some = [d for d in documents if d.form == form]
        found |= {id(d): e for d, e in zip(some, make(some, tokenizer), strict=True)}
    examples = [found[id(document)] for document in documents]
    for example in examples:
        if loss == "all":
            example.counts[:] = True
        example.counts[:1] = False
    return examples


def fit(example: Example, form: str, length: int, too_long: TooLong | None = None) -> list[Example]:
    """Returns the examples, of at most `length` tokens, that stand for one that may be longer.

    Args:
      example: Of any length.
      form: The form of its document.
      length: The tokens of a row.
      too_long: `"cut"`: a text is cut into pieces, one after another, of which the first token of each is
        not predicted; of a conversation or completion the first `length` tokens are kept, if any of them
        counts. `"drop"`: it is left out. By default texts are cut and others left out.
    """
    size = len(example.tokens)
    if size <= length:
        return [example]
    if (too_long or ("cut" if form == "text" else "drop")) == "drop":
        return []
    starts = range(0, size, length) if form == "text" else [0]
    pieces = [_piece(example, start, length) for start in starts]
    return [piece for piece in pieces if form == "text" or piece.counts.any()]


def _piece(example: Example, start: int, length: int) -> Example:
    tokens, counts = (x[start : start + length].copy() for x in example[:2])
    counts[0] = False
    prompt = example.prompt if start == 0 and example.prompt < length else 0
    return Example(tokens, counts, prompt, example.last_alone)


def _texts(documents: Sequence[Document], tokenizer: Tokenizer) -> list[Example]:
    bos, eos = _ends(tokenizer)
    made = [bos + ids + eos for ids in tokenizer.encode_many([d.value for d in documents])]
    return [_example(ids, 0, min(OPENING, len(ids) // 2)) for ids in made]


def _completions(documents: Sequence[Document], tokenizer: Tokenizer) -> list[Example]:
    bos, eos = _ends(tokenizer)
    prompts = tokenizer.encode_many([d.value[0] for d in documents])
    answers = tokenizer.encode_many([d.value[1] for d in documents])
    pairs = [(bos + a, b + eos) for a, b in zip(prompts, answers, strict=True)]
    return [_example(a + b, len(a), len(a)) for a, b in pairs]


def _conversations(
    documents: Sequence[Document], tokenizer: Tokenizer, chat: Chat
) -> dict[int, Example]:
    rendered = [chat.answers(d.value, d.where) for d in documents]
    encoded = tokenizer.encode_spans([one.text for one in rendered])
    return {
        id(d): _spoken(ids, spans, one.spans)._replace(last_alone=one.last_alone)
        for d, one, (ids, spans) in zip(documents, rendered, encoded, strict=True)
    }


def _spoken(ids: list[int], spans: Any, answers: list[tuple[int, int]]) -> Example:
    """Marks the tokens that have a character of an answer; the prompt ends where the last one begins."""
    starts = np.array([start for start, _ in spans], np.int64)
    ends = np.maximum([end for _, end in spans], starts + 1)
    counts = np.zeros(len(ids), bool)
    prompt = 0
    for first, last in answers:
        inside = (ends > first) & (starts < last)
        prompt = int(inside.argmax()) if inside.any() else prompt
        counts |= inside
    return Example(np.array(ids, np.int32), counts, prompt)


def _example(ids: list[int], first: int, prompt: int) -> Example:
    return Example(np.array(ids, np.int32), np.arange(len(ids)) >= first, prompt)


def _ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    bos = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    return bos, list(tokenizer.eos[:1])
