"""Tokens: a byte-level BPE learnt from the train side, and texts as arrays of one length.

In the shape descriptions `N` is the number of examples, `S` and `T` the lengths of source and target.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, END, SEPARATOR = 0, 1, 2
SPECIAL = ["<pad>", "</s>", "<sep>"]


def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of so many tokens (257 or more: with the fewest, bytes alone).

    Deterministic; no text is out of its reach.
    """
    if vocabulary < 256 + len(SPECIAL):
        raise ValueError(
            f"vocabulary must be at least {256 + len(SPECIAL)}, all bytes and {len(SPECIAL)} "
            f"special tokens, found {vocabulary}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def padded(rows: Sequence[Sequence[int]], length: int, left: bool = False) -> np.ndarray:
    """int32 `(N, length)`, cut at `length`, with `PAD` after, or before, the tokens."""
    result = np.full((len(rows), length), PAD, np.int32)
    for i, row in enumerate(rows):
        row = list(row)[:length]
        if row:
            result[i, slice(-len(row), None) if left else slice(len(row))] = row
    return result


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [found.ids for found in tokenizer.encode_batch(list(texts))]


def decode(tokenizer: Tokenizer, rows: Any) -> list[str]:
    """Texts of generated tokens, each up to its end."""
    texts = []
    for row in np.asarray(rows).tolist():
        row = row[: row.index(END)] if END in row else row
        texts.append(tokenizer.decode(row).strip())
    return texts


def for_encoder_decoder(
    sources: list[list[int]], targets: list[list[int]], lengths: tuple[int, int]
) -> dict[str, np.ndarray]:
    """`source`, `mask` `(N, S)`; `target`, `labels`, `weights` `(N, T)`; the target shifted by `PAD`."""
    source = padded([[*row[: lengths[0] - 1], END] for row in sources], lengths[0])
    labels = padded([[*row[: lengths[1] - 1], END] for row in targets], lengths[1])
    target = np.concatenate([np.full_like(labels[:, :1], PAD), labels[:, :-1]], 1)
    weights = _before_padding([len(row) + 1 for row in targets], lengths[1])
    mask = _before_padding([len(row) + 1 for row in sources], lengths[0])
    return {
        "source": source,
        "mask": mask.astype(bool),
        "target": target,
        "labels": labels,
        "weights": weights,
    }


def for_decoder(
    sources: list[list[int]], targets: list[list[int]], lengths: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Source, separator, target in one row: `tokens`, `targets`, `weights` `(N, S + T - 1)`.

    The target's tokens alone have a weight.
    """
    rows = [prompt(source, lengths[0]) for source in sources]
    wholes = [
        [*row, *target[: lengths[1] - 1], END] for row, target in zip(rows, targets, strict=True)
    ]
    whole = padded(wholes, sum(lengths))
    starts = np.array([len(row) for row in rows])[:, None]
    ends = np.array([len(row) for row in wholes])[:, None]
    places = np.arange(1, whole.shape[1])
    weights = ((places >= starts) & (places < ends)).astype(np.float32)
    return {"tokens": whole[:, :-1], "targets": whole[:, 1:], "weights": weights}


def prompt(source: list[int], length: int) -> list[int]:
    """A source, cut to leave room for the separator at its end."""
    return [*source[: length - 1], SEPARATOR]


def windows(rows: Iterable[list[int]], length: int) -> dict[str, np.ndarray]:
    """All texts in one row, each with its end, cut into `tokens` and `targets` `(N, length)`."""
    stream = np.array([token for row in rows for token in (*row, END)], np.int32)
    count = (len(stream) - 1) // length
    if count < 1:
        raise ValueError(f"text must have more than {length} tokens, found {len(stream)}")
    return {
        "tokens": stream[: count * length].reshape(count, length),
        "targets": stream[1 : count * length + 1].reshape(count, length),
    }


def _before_padding(counts: list[int], length: int) -> np.ndarray:
    return (np.arange(length) < np.array(counts)[:, None]).astype(np.float32)
