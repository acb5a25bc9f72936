"""A byte-level BPE is learnt from the train side, and texts become arrays of one length.

In the shape descriptions `N` is the number of examples, `S` and `T` the lengths of source and target.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<pad>", "</s>", "<sep>"]


class Words(NamedTuple):
    """A tokeniser, and its tokens for padding, for an end, and for what lies between two texts."""

    tokenizer: Tokenizer
    pad: int = 0
    end: int = 1
    separator: int = 2

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Gives the tokens of each text."""
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [one.ids for one in found]

    def decode(self, rows: Any) -> list[str]:
        """Gives the texts of generated tokens, each up to its end."""
        texts = []
        for row in np.asarray(rows).tolist():
            row = row[: row.index(self.end)] if self.end in row else row
            texts.append(self.tokenizer.decode(row).strip())
        return texts


def train(texts: Iterable[str], vocabulary: int) -> Words:
    """Learns a byte-level BPE of so many tokens (with the fewest, 259, it has bytes alone).

    It is deterministic, and can encode any text.

    Raises:
      ValueError: The vocabulary has no room for all bytes and the special tokens.
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
    return Words(tokenizer)


def of_checkpoint(folder: Path) -> Words:
    """Reads the tokeniser that lies beside the weights, `tokenizer.json`.

    Where it has no token to lie between two texts, the end does.

    Raises:
      ValueError: There is no tokeniser.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing; it is the tokeniser of the checkpoint")
    config = json.loads((folder / "config.json").read_text())
    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) else 1 if end is None else end
    pad = config.get("pad_token_id")
    tokenizer = Tokenizer.from_file(str(file))
    separator = tokenizer.token_to_id(SPECIAL[2])
    return Words(tokenizer, pad or 0, end, end if separator is None else separator)


def padded(rows: Sequence[Sequence[int]], length: int, pad: int, left: bool = False):
    """Gives int32 `(N, length)`, truncated and padded after or before, and bools `(N, length)`, False at padding."""
    result = np.full((len(rows), length), pad, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        row = list(row)[:length]
        if row:
            place = slice(-len(row), None) if left else slice(len(row))
            result[i, place], mask[i, place] = row, True
    return result, mask


def for_encoder_decoder(
    words: Words, pairs: Sequence[tuple[str, str]], lengths: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Gives `source`, `mask` `(N, S)`, and `target`, `labels`, `weights` `(N, T)`.

    The labels end with the end token; the target is the labels, shifted behind the first token (0).
    """
    sources, targets = (words.encode(texts) for texts in zip(*pairs, strict=True))
    source, mask = padded(
        [[*row[: lengths[0] - 1], words.end] for row in sources], lengths[0], words.pad
    )
    labels, weights = padded(
        [[*row[: lengths[1] - 1], words.end] for row in targets], lengths[1], words.pad
    )
    target = np.concatenate([np.zeros_like(labels[:, :1]), labels[:, :-1]], 1)
    return {
        "source": source,
        "mask": mask,
        "target": target,
        "labels": labels,
        "weights": weights.astype(np.float32),
    }


def for_decoder(
    words: Words, pairs: Sequence[tuple[str, str]], lengths: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Gives rows of source, separator and target: `tokens`, `targets`, `weights` `(N, S + T - 1)`.

    Only the target's tokens have a weight.
    """
    rows = prompts(words, [source for source, _ in pairs], lengths[0])
    targets = words.encode([target for _, target in pairs])
    joined = [
        [*row, *target[: lengths[1] - 1], words.end]
        for row, target in zip(rows, targets, strict=True)
    ]
    row, mask = padded(joined, sum(lengths), words.pad)
    starts = np.array([len(row) for row in rows])[:, None]
    weights = mask[:, 1:] & (np.arange(1, row.shape[1]) >= starts)
    return {
        "tokens": row[:, :-1],
        "targets": row[:, 1:],
        "weights": weights.astype(np.float32),
    }


def prompts(words: Words, sources: Sequence[str], length: int) -> list[list[int]]:
    """Gives the tokens of sources, each truncated to leave room for the separator at its end."""
    return [[*row[: length - 1], words.separator] for row in words.encode(sources)]


def windows(words: Words, texts: Iterable[str], length: int) -> dict[str, np.ndarray]:
    """Gives all texts in one row, each with its end, divided into `tokens` and `targets` `(N, length)`.

    Raises:
      ValueError: The texts have too few tokens for one window.
    """
    rows = words.encode(list(texts))
    stream = np.array([token for row in rows for token in (*row, words.end)], np.int32)
    count = (len(stream) - 1) // length
    if count < 1:
        raise ValueError(f"text must have more than {length} tokens, found {len(stream)}")
    return {
        "tokens": stream[: count * length].reshape(count, length),
        "targets": stream[1 : count * length + 1].reshape(count, length),
    }
